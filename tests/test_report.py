"""The page: self-contained, escaped, with the numbers and curves that were logged."""

import base64
import html.parser
import io
import re
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from paradigms import data, report
from paradigms.report import figures, tables
from paradigms.report.curves import COLOURS, splits

DIGITS = data.load("digits")


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


def test_every_split_has_a_colour_of_its_own_in_the_order_of_their_numbers():
    keys = [f"{name}/accuracy" for name in ("train", "so far", *(f"task {number}" for number in range(20)))]
    colours = splits(dict.fromkeys(keys))
    assert len(set(colours.values())) == len(colours) == 23  # validation has one too
    tasks = [name for name in colours if name.startswith("task")]
    assert tasks == [f"task {number}" for number in range(20)]
    few = splits(dict.fromkeys(["test/loss", "train/loss"]))
    assert list(few.items()) == list(zip(["train", "validation", "test"], COLOURS, strict=False))


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
    assert page.count("<img") == 5  # three panels of curves, matrix, figure
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
    for image in re.findall(r"base64,([^\"]+)", page):
        xml.etree.ElementTree.fromstring(base64.b64decode(image))


def test_plain_metrics_make_a_page_too(tmp_path):
    found = {
        "accuracy": [0.5, 0.7],
        "loss": 1.25,
        "confusion": np.array([[3, 1], [0, 4]]),
        "per_class/f1": np.zeros((2, 2)),
    }
    page = report.html(tmp_path / "p.html", "t", {}, rows(), found).read_text()
    assert "<td>1.25</td>" in page
    assert re.search(r"accuracy</th><td>0.6 ± 1.3</td><td>2</td>", page)
    assert page.count("<img") == 4


HOSTILE = "<script>alert('x')</script>\" $\\frac$ & @body @title"


def hostile():
    history = [{"step": 1, "train/" + HOSTILE: 1.0}, {"step": 2, "train/" + HOSTILE: 2.0}]
    number = {"mean": 1.0, "interval95": None, "values": [1.0]}
    result = {"experiment": HOSTILE, "protocol": HOSTILE, "metrics": {HOSTILE: number, HOSTILE + "confusion": np.eye(2)}}
    result |= {"published": {HOSTILE: {"mean": 1.0, "source": HOSTILE}}, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    images = report.Examples(np.zeros((1, 1, 4, 4, 1), np.uint8), (HOSTILE,), (HOSTILE,), HOSTILE)
    return report.Record(HOSTILE, {HOSTILE: HOSTILE, "list": [HOSTILE]}, {HOSTILE: history}, result, [images])


def test_markup_in_any_text_stays_text(tmp_path):
    one = hostile()
    page = report.html(tmp_path / "1.html", HOSTILE, one.config, one.history, one.result, {}, one.examples, HOSTILE).read_text()
    other = one._replace(config={"list": 1})
    both = report.compare(tmp_path / "2.html", HOSTILE, [one, other], HOSTILE).read_text()
    for text in (page, both):
        assert "<script" not in text
        assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot; $\\frac$ &amp; @body @title") > 8
        assert text.count("<body>") == 1
        parser = html.parser.HTMLParser()
        tags = []
        parser.handle_starttag = lambda tag, attributes: tags.append(tag)
        parser.feed(text)
        assert {"h1", "td", "img"} < set(tags)
        assert not set(tags) & {"script", "a", "iframe", "link"}


def cells(page, row):
    """The cells of the table's row that `row` heads, tags and filling spaces removed."""
    (found,) = re.findall(rf'<th scope="row">{re.escape(row)}</th>(.*?)</tr>', page)
    return [re.sub("<[^>]*>", "", cell).replace("\u2007", "").strip() for cell in re.findall(r"<td>(.*?)</td>", found)]


def record(name, mean, rate, **config):
    metrics = {"accuracy": {"mean": mean, "interval95": 0.01, "values": [mean] * 3}, "confusion": np.diag([5.0, 3.0])}
    published = {"accuracy": {"mean": 0.87, "std": 0.02, "source": "Table 2"}}
    result = {"experiment": "a.b", "metrics": metrics, "published": published}
    return report.Record(name, {"rate": rate, "seeds": 3, **config}, {"": rows()}, result)


def test_several_runs_side_by_side(tmp_path):
    runs = [record("first", 0.9, 0.1), record("second", 0.85, 0.2, extra="x"), record("third", 0.8, 0.1)]
    runs[2] = runs[2]._replace(history={}, result={})  # has not ended
    page = report.compare(tmp_path / "p.html", "T", runs).read_text()
    assert cells(page, "run") == ["first", "second", "third"]
    assert cells(page, "rate") == ["0.1", "0.2", "0.1"]
    assert cells(page, "extra") == ["—", "x", "—"]
    assert cells(page, "seeds") == ["3"]  # among those in common
    assert cells(page, "accuracy") == ["0.900 ± 0.010", "0.850 ± 0.010", "—", "0.870 ± 0.020 (std) Table 2"]
    assert page.count("<img") == 4 + 2  # train/loss, validation/loss, validation/accuracy, rate; two matrices
    drawn = {panel.title: panel.figure.axes[0] for panel in figures.overlaid([run.history.get("", ()) for run in runs])}
    assert list(drawn) == ["train/loss", "validation/loss", "validation/accuracy", "rate"]
    assert [line.get_color() for line in drawn["validation/loss"].lines] == [figures.style(0)[0], figures.style(1)[0]]
    styles = [figures.style(number) for number in range(20)]
    assert len(set(styles)) == 20
    assert all(style[0] in page for style in styles[:3])


def test_decimal_points_of_a_column_are_in_line():
    numbers = [tables.Number(0.9895, 0.0003), None, tables.Number(12.5), tables.Number(-104.0, 3.0), tables.Number(None)]
    found = tables.aligned(numbers)
    assert [text.strip("\u2007") for text in found] == ["0.98950 ± 0.00030", "—", "12.5", "-104.0 ± 3.0", "nan"]
    points = [text.index(".") for text in found if "." in text]
    assert len(set(points)) == 1


def test_many_numbers_are_a_grid_by_the_parts_of_their_names():
    parts = [f"part {number}" for number in range(20)]
    metrics = {f"{part}/{kind}": np.full(3, kind == "b") for part in parts for kind in ("a", "b", "c<")}
    del metrics["part 3/a"]
    found = tables.results({"loss": 0.5, **metrics}, {"published": {"part 0/b": {"mean": 0.75, "std": 0.1}}})
    assert "runs: 1" in found
    assert "runs: 3" in found
    assert "c&lt;" in found
    assert len(re.findall(r'<th scope="row">', found)) == 1 + 1 + 20  # the published, the loss, the parts
    listed, alone, grid, end = found.split("</table>")
    assert "<td>0.5</td>" in alone
    assert "<td" not in end
    assert ">part 0/b</th>" in listed
    assert "0.75 ± 0.10" in listed
    assert re.findall(r"<td>(.*?)</td>", grid.partition(">part 3<")[2].partition("</tr>")[0]) == ["—", "0", "1"]
    few = tables.results({name: metrics[name] for name in list(metrics)[:40]}, {})
    assert len(re.findall(r'<th scope="row">', few)) == 40


def embedded(figure):
    """The image that the SVG of a figure holds, as pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    (data,) = re.findall(rb'data:image/png;base64,([^"]*)', file.getvalue().replace(b"\n", b""))
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_a_grid_holds_every_pixel_of_every_image():
    images = DIGITS.test["x"][:6].reshape(2, 3, 8, 8, 1)
    labels = [f"digit {label}" for label in DIGITS.test["y"][:3]]
    for given in (images, images[..., 0], images / np.float32(255)):
        figure = report.image_grid(given, ("a", "b"), labels)
        assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == labels
        canvas = embedded(figure)
        scale, gap = 12, 8
        assert canvas.shape == (2 * 8 * scale + gap, 3 * 8 * scale + 2 * gap, 3)
        for row, column in np.ndindex(2, 3):
            top, left = row * (8 * scale + gap), column * (8 * scale + gap)
            cell = canvas[top : top + 8 * scale, left : left + 8 * scale]
            np.testing.assert_array_equal(cell[scale // 2 :: scale, scale // 2 :: scale], images[row, column].repeat(3, -1))
            assert (cell == cell[::scale, ::scale].repeat(scale, 0).repeat(scale, 1)).all()


def test_examples_come_back_as_they_were(tmp_path):
    images = DIGITS.test["x"][:4].reshape(2, 2, 8, 8, 1)
    path = report.save_examples(tmp_path / "part", "attack", images / 255, ("clean", "é<b>"), caption="Digits")
    assert path == tmp_path / "part" / "examples" / "attack.npz"
    report.save_examples(tmp_path, "views", images.repeat(3, -1), columns=("1", "2"))
    views, attack = report.read_examples(tmp_path)
    np.testing.assert_array_equal(attack.images, images)
    assert attack[1:] == (("clean", "é<b>"), (), "Digits")
    assert views.images.shape == (2, 2, 8, 8, 3)
    assert views[1:] == ((), ("1", "2"), "views")
    assert report.read_examples(tmp_path / "empty") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 3, 4))}, r"shape \(2, 3, 4\); give \(rows"),
        ({"images": np.zeros((1, 1, 4, 4, 2))}, "1 or 3 channels"),
        ({"images": np.zeros((0, 1, 4, 4, 1))}, "images: shape"),
        ({"images": np.full((1, 1, 4, 4), 1.5)}, r"1.5 to 1.5; give uint8, or floats in \[0, 1\]"),
        ({"images": np.full((1, 1, 4, 4), np.nan)}, "floats in"),
        ({"images": np.zeros((1, 1, 4, 4), np.int32)}, "images: int32"),
        ({"images": np.full((1, 1, 4, 4), "a")}, "no numbers"),
        ({"rows": ("a", "b")}, "rows: 2 labels for 1 rows"),
        ({"columns": ("a", "b")}, "columns: 2 labels"),
        ({"name": "../escape"}, "name='../escape': is a file's"),
    ],
)
def test_examples_that_cannot_be_drawn_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        report.save_examples(tmp_path, **{"name": "x", "images": np.zeros((1, 1, 4, 4)), **change})
    assert not list(tmp_path.iterdir())


def test_the_matrix_of_a_real_classifier_shows_its_counts():
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import confusion_matrix

    train, test = ((split["x"].reshape(len(split["x"]), -1), split["y"]) for split in (DIGITS.train, DIGITS.test))
    matrix = confusion_matrix(test[1], RidgeClassifier().fit(*train).predict(test[0]))
    axis = report.confusion(matrix).axes[0]
    counts = {(round(text.get_position()[1]), round(text.get_position()[0])): int(text.get_text()) for text in axis.texts}
    assert counts == {place: count for place, count in np.ndenumerate(matrix) if count}
    np.testing.assert_allclose(axis.images[0].get_array().sum(1), 1)


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [(0.8821, 0.0039, "0.8821 ± 0.0039"), (0.5, None, "0.5"), (0.5, 0.0, "0.5"), (0.5, 1e-9, "0.5"),
     (123.4, 5.6, "123.4 ± 5.6"), (1234.5, 56.0, "1234 ± 56"), (None, None, "nan"), (float("nan"), 1.0, "nan")],
)  # fmt: skip
def test_numbers_are_rounded_to_their_spread(mean, spread, text):
    assert report.shown(mean, spread) == text


def test_importing_imports_neither_matplotlib_nor_sklearn():
    code = "import sys, paradigms.report, paradigms.logging; print({'matplotlib', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
