"""The command ``report``: pages made from the folders of runs, and one line for each folder that is none."""

import json
import re

import numpy as np
import pytest

from experiments import __main__ as command
from experiments import pages
from paradigms import logging, report

RESULT = {
    "experiment": "toy.bench",
    "protocol": "two numbers",
    "config": {},
    "metrics": {"accuracy": {"mean": 0.9, "interval95": 0.01, "values": [0.9, 0.9]}},
    "published": {"accuracy": {"mean": 0.8, "std": 0.1, "source": "Table 1"}},
    "device": "cpu",
    "versions": {"jax": "1"},
    "seconds": {"compile": 1.0, "run": 2.0},
    "memory": {"host": 2**20 * 1500, "device": None},
}


def run(folder, rate=0.1, result=RESULT, part="."):
    """A folder as the runner leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"experiment": "toy.bench", "settings": {"rate": rate, "text": "<b>"}}))
    writer = logging.jsonl(folder / part / "metrics.jsonl")
    for step in (10, 20):
        writer.write(step, {"train/loss": [1 / step, 2 / step], "validation/loss": np.array([np.nan, 1.0])})
    writer.close()
    np.savez(folder / "arrays.npz", confusion=np.stack([np.eye(2), np.eye(2)]))
    report.save_examples(folder / part, "views", np.zeros((1, 2, 4, 4)), caption="Two views")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def main(*arguments):
    return command.main(["report", *map(str, arguments)])


def test_the_page_of_a_run_is_made_from_its_files_alone(tmp_path, capsys):
    folder = run(tmp_path / "one", part="stage")
    assert main(folder) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    for text in (
        "<h1>toy.bench</h1>",
        "Run one",
        "0.900 ± 0.010",
        "Table 1",
        "host 1,500 MiB",
        "<code>&lt;b&gt;</code>",
        "stage",
        "Two views",
    ):
        assert text in page
    assert page.count("<img") == 3  # loss, matrix, views
    assert "counts of 2 seeds together" in page
    assert main(folder) == 0
    assert (folder / "report.html").read_text() == page


def test_several_runs_make_one_page_here(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [run(tmp_path / name, rate) for name, rate in (("one", 0.1), ("two", 0.5))]
    assert main(*folders) == 0
    assert capsys.readouterr().out == "report.html\n"
    page = (tmp_path / "report.html").read_text()
    assert re.search(r">rate</th><td><code>0.1</code></td><td><code>0.5</code></td>", page)
    assert page.count("<img") == 2 + 2 + 2  # train/loss and validation/loss; a matrix and views each
    assert main(*folders, "--out", "deep/p.html") == 0
    assert (tmp_path / "deep" / "p.html").exists()


def test_a_run_that_has_not_ended_says_so(tmp_path):
    folder, ended = run(tmp_path / "one", result=None), run(tmp_path / "two")
    assert main(folder) == 0
    page = (folder / "report.html").read_text()
    assert "Not ended, there is no result yet: one." in page
    assert "loss" in page
    assert main(ended, folder, "--out", tmp_path / "both.html") == 0
    assert "there is no result yet: one." in (tmp_path / "both.html").read_text()


def test_rows_cut_short_by_a_kill_are_read(tmp_path):
    folder = run(tmp_path / "one", result=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "train/lo')
    assert [row["step"] for row in pages.load(folder).history[""]] == [10, 20]


def edit(**changes):
    return lambda folder: (folder / "result.json").write_text(json.dumps({**RESULT, **changes}))


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"one: no run, it has no config.json; give .* OUT/"),
        (text("config.json", b"{"), "config.json: cannot be read"),
        (text("config.json", b"{}"), "config.json: no run's"),
        (text("result.json", b"[1]"), "result.json: holds a list"),
        (text("result.json", b"\xff"), "result.json: cannot be read"),
        (edit(metrics=[1]), 'result.json: "metrics" is not what a run writes'),
        (edit(metrics={"a": 1}), '"metrics" is not'),
        (edit(metrics={"a": {"mean": "high"}}), '"metrics" is not'),
        (edit(published={"a": {}}), '"published" is not'),
        (edit(metrics={"a": {"mean": 1.0, "interval95": "wide"}}), '"metrics" is not'),
        (edit(metrics={"a": {"mean": 1.0, "values": 3}}), '"metrics" is not'),
        (edit(seconds={"run": "long"}), '"seconds" is not'),
        (edit(versions="new"), '"versions" is not'),
        (text("metrics.jsonl", b"{\n{}\n"), "metrics.jsonl: line 1 is not JSON"),
        (text("metrics.jsonl", b'3\n{"step": 1}\n'), "metrics.jsonl: line 1 is not JSON"),
        (text("metrics.jsonl", b'{"train/loss": 1}\n{"step": 1}\n'), 'with a "step"'),
        (text("metrics.jsonl", b"\xff\n"), "metrics.jsonl: cannot be read"),
        (text("arrays.npz", b"PK"), "arrays.npz: cannot be read"),
        (lambda folder: np.savez(folder / "arrays.npz", a=np.array([{}])), "arrays.npz: cannot be read"),
        (text("examples/views.npz", b""), "views.npz: no examples"),
        (lambda folder: np.savez(folder / "examples" / "x.npz", a=1), "x.npz: no examples"),
        (lambda folder: [(folder / name).unlink() for name in ("result.json", "metrics.jsonl")], "neither a result nor"),
    ],
)
def test_what_is_no_run_s_is_named_in_one_line(tmp_path, damage, message, capsys):
    folder = run(tmp_path / "one")
    damage(folder)
    assert main(folder) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_the_folder_above_and_odd_flags_are_refused(tmp_path, capsys):
    folder = run(tmp_path / "toy.bench" / "one")
    before = (folder / "config.json").read_text()
    for arguments, message in (
        ((folder.parent,), f"such as {folder}"),
        ((tmp_path / "nowhere",), "no run"),
        ((), "no runs; give one"),
        ((folder, "--out", folder / "config.json"), "give a file that ends in .html"),
    ):
        assert main(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (folder / "config.json").read_text() == before
