"""The page: self-contained, escaped, with the numbers and curves that were logged."""

import base64
import re
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest

from paradigms import report


def rows(runs=3, steps=10):
    rng = np.random.default_rng(0)
    history = []
    for step in range(1, steps + 1):
        row = {"step": 100 * step, "train/loss": (1 / step + 0.01 * rng.random(runs)).tolist(), "rate": 0.1}
        if step % 2 == 0:
            row["validation/loss"] = (1 / step + 0.05 * (step - 4) ** 2 + 0 * rng.random(runs)).tolist()
            row["validation/accuracy"] = (1 - (step - 6) ** 2 / 100 + 0 * rng.random(runs)).tolist()
        history.append(row)
    return history


def panels(figure):
    return {axis.get_title("left"): axis for axis in figure.axes}


def test_train_and_validation_share_a_panel_and_the_best_is_marked():
    found = panels(report.learning_curves(rows()))
    assert list(found) == ["loss", "accuracy", "rate"]
    lines = {line.get_label(): line for line in found["loss"].lines}
    np.testing.assert_allclose(lines["validation"].get_xdata(), [200, 400, 600, 800, 1000])
    np.testing.assert_allclose(lines["validation"].get_ydata()[0], 0.5 + 0.05 * 4)
    assert found["loss"].get_title("right") == "best 0.25 at 400"
    assert found["accuracy"].get_title("right") == "best 1 at 600"
    dotted = [line for axis in found.values() for line in axis.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [600, 600, 600]


def test_the_band_is_the_95_percent_interval():
    figure = report.learning_curves([{"step": s, "train/loss": [1.0, 2.0, 4.0]} for s in (1, 2)])
    (band,) = figure.axes[0].collections
    low, high = (f(band.get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    half = 4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    np.testing.assert_allclose([low, high], [7 / 3 - half, 7 / 3 + half], rtol=1e-6)


def test_best_can_be_named_and_must_exist():
    found = panels(report.learning_curves(rows(), best="validation/loss"))
    dotted = next(line for line in found["accuracy"].lines if line.get_linestyle() == ":")
    assert dotted.get_xdata()[0] == 400
    with pytest.raises(ValueError, match="best='test/loss': not logged"):
        report.learning_curves(rows(), best="test/loss")
    with pytest.raises(ValueError, match="rows without numbers"):
        report.learning_curves([{"step": 1}])


def test_curves_survive_nan_missing_values_and_single_runs(tmp_path):
    history = [
        {"step": 1, "train/loss": 2.0, "validation/loss": None},
        {"step": 2, "train/loss": float("nan")},
        {"step": 3, "validation/loss": [1.0, None]},
    ]
    report.learning_curves(history, tmp_path / "deep" / "curves.png")
    assert (tmp_path / "deep" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_is_self_contained_and_escaped(tmp_path):
    metrics = {
        "accuracy": {"mean": 0.8821, "interval95": 0.0039, "values": [0.88, 0.884, 0.882]},
        "lone": {"mean": 0.5, "interval95": None, "values": [0.5]},
        "test/confusion": np.stack([np.eye(3), np.eye(3)]),
    }
    result = {
        "experiment": "a.b",
        "protocol": "ten <tasks>",
        "metrics": metrics,
        "published": {"accuracy": {"mean": 0.87, "std": 0.01, "source": "Table 2"}, "other": {"mean": 0.1}},
        "device": "cpu: x",
        "versions": {"jax": "1.2"},
        "seconds": {"compile": 1.0, "run": 2.0},
    }
    figure = report.confusion(np.eye(25), None)
    path = report.html(tmp_path / "r" / "p.html", "<T>", {"a<b": [1, 2]}, {"one": rows(), "none": []}, result, {"F&G": figure})
    page = path.read_text()
    assert page.count("<img") == 3  # curves, matrix, figure
    for text in (
        "&lt;T&gt;",
        "ten &lt;tasks&gt;",
        "a&lt;b",
        "F&amp;G",
        "0.8821 ± 0.0039",
        "0.870 ± 0.010 (std)",
        "Table 2",
    ):
        assert text in page
    assert "<T>" not in page
    assert not re.search(r"""(src|href)=["']?(https?:|//|/)""", page)
    assert "<script" not in page
    for data in re.findall(r"base64,([^\"]+)", page):
        xml.etree.ElementTree.fromstring(base64.b64decode(data))


def test_plain_metrics_make_a_page_too(tmp_path):
    found = {
        "accuracy": [0.5, 0.7],
        "loss": 1.25,
        "confusion": np.array([[3, 1], [0, 4]]),
        "per_class/f1": np.zeros((2, 2)),
    }
    page = report.html(tmp_path / "p.html", "t", {}, rows(), found).read_text()
    assert "<td>1.25</td>" in page
    assert re.search(r"<td>accuracy</td><td>0.6 ± 1.3</td><td>2</td>", page)
    assert page.count("<img") == 2


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [(0.8821, 0.0039, "0.8821 ± 0.0039"), (0.5, None, "0.5"), (0.5, 0.0, "0.5"), (123.4, 5.6, "123.4 ± 5.6"),
     (1234.5, 56.0, "1234 ± 56"), (None, None, "nan"), (float("nan"), 1.0, "nan")],
)  # fmt: skip
def test_numbers_are_rounded_to_their_spread(mean, spread, text):
    assert report.shown(mean, spread) == text


def test_importing_imports_neither_matplotlib_nor_sklearn():
    code = "import sys, paradigms.report, paradigms.logging; print({'matplotlib', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
