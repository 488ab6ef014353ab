"""Writers: what is on disk after a resume and a kill, what a terminal and a pipe show, the extras."""

import io
import json
import sys
import types

import numpy as np
import pytest

from paradigms import logging


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_writes_numbers_and_lists_over_runs(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = logging.jsonl(path)
    writer.write(np.int32(10), {"loss": np.float32(0.5), "accuracy": np.array([0.25, 0.75]), "confusion": np.eye(2)})
    writer.write(20, {"loss": float("nan"), "accuracy": [np.inf, 1.0], "label": "text", "count": 3})
    writer.close()
    assert lines(path) == [
        {"step": 10, "loss": 0.5, "accuracy": [0.25, 0.75]},
        {"step": 20, "loss": None, "accuracy": [None, 1.0], "count": 3},
    ]
    assert next(iter(lines(path)[0])) == "step"


def test_every_row_is_on_disk_before_close(tmp_path):
    writer = logging.jsonl(tmp_path / "m.jsonl")
    writer.write(1, {"loss": 1.0})
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, "loss": 1.0}]
    writer.close()


@pytest.mark.parametrize(("from_step", "kept"), [(None, [10, 20, 30]), (30, [10, 20]), (21, [10, 20]), (0, [])])
def test_a_resumed_run_drops_the_rows_it_writes_again(tmp_path, from_step, kept):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)) + '{"step": 40, "lo')
    writer = logging.jsonl(path, from_step)
    writer.write(50, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in lines(path)] == [*kept, 50]


def test_read_returns_what_was_written(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = logging.jsonl(path)
    writer.write(1, {"loss": np.array([1.0, np.nan]), "accuracy": 0.5, "rate": np.inf})
    writer.close()
    (row,) = logging.read(path)
    np.testing.assert_array_equal(row["loss"], [1.0, np.nan])
    assert row["step"] == 1
    assert row["accuracy"] == 0.5
    assert np.isnan(row["rate"])
    path.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        logging.read(path)


def test_plain_is_idempotent():
    row = {"a": np.array([1.0, np.nan]), "b": np.nan, "c": 2, "d": True, "e": np.zeros((2, 2)), "f": "x"}
    once = logging.plain(row)
    assert once == {"a": [1.0, None], "b": None, "c": 2, "d": True}
    assert logging.plain(once) == once


def test_progress_prints_one_line_a_row_where_there_is_no_terminal():
    file = io.StringIO()
    writer = logging.progress(1000, runs=2, examples=32, from_step=100, file=file)
    writer.write(600, {"train/loss": np.array([1.0, 2.0]), "confusion": np.eye(3)})
    writer.write(1000, {"train/loss": [None, 2.0]})
    writer.close()
    first, last = file.getvalue().splitlines()
    assert first.startswith("600/1000  ")
    for part in ("steps/s", "examples/s", "left", "train/loss 1.5"):
        assert part in first
    assert "confusion" not in first
    assert "train/loss nan" in last
    assert "\x1b" not in file.getvalue()


def test_progress_rate_counts_from_the_step_resumed_from(monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(logging.time, "monotonic", lambda: next(clock))
    file = io.StringIO()
    logging.progress(1000, from_step=900, file=file).write(950, {})
    assert file.getvalue().split("  ") == ["950/1000", "5 steps/s", "0:10 left\n"]


def test_progress_draws_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    writer = logging.progress(10, file=file)
    writer.write(5, {"loss": 0.25})
    writer.write(10, {"accuracy": 0.5})
    writer.close()
    assert "10/10" in file.getvalue()
    assert "0.25" in file.getvalue()


def test_several_writes_to_all_and_closes_all():
    seen = []

    def broken():
        seen.append("close a")
        raise OSError("full")

    a = logging.Writer(lambda step, row: seen.append(("a", step, row)), broken)
    b = logging.Writer(lambda step, row: seen.append(("b", step, row)), lambda: seen.append("close b"))
    both = logging.several(a, b)
    both.write(3, {"loss": 1})
    with pytest.raises(OSError, match="full"):
        both.close()
    assert seen == [("a", 3, {"loss": 1}), ("b", 3, {"loss": 1}), "close a", "close b"]


def test_tensorboard_writes_the_mean_and_every_run(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step, filename_suffix):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder.removeprefix(str(tmp_path)), name, value, step))

        def close(self):
            written.append(("closed", self.folder.removeprefix(str(tmp_path))))

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    writer = logging.tensorboard(tmp_path)
    writer.write(7, {"loss": np.array([1.0, 3.0]), "rate": 0.5})
    writer.close()
    assert written[:4] == [
        ("", "loss", 2.0, 7),
        ("", "rate", 0.5, 7),
        ("/run0", "loss", 1.0, 7),
        ("/run1", "loss", 3.0, 7),
    ]
    assert written[4:] == [("closed", ""), ("closed", "/run0"), ("closed", "/run1")]


def test_wandb_logs_to_a_given_run_and_leaves_it_open(monkeypatch):
    logged, finished = [], []
    run = types.SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: finished.append(1))
    writer = logging.wandb_writer(run)
    writer.write(2, {"loss": [1.0, 3.0]})
    writer.close()
    assert logged == [(2, {"loss": 2.0, "loss/run0": 1.0, "loss/run1": 3.0})]
    assert not finished
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda project: run))
    logging.wandb_writer(project="p").close()
    assert finished


@pytest.mark.parametrize(("extra", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, extra, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "paradigms\[{extra}\]"'):
        logging.tensorboard(tmp_path) if extra == "tensorboard" else logging.wandb_writer()
