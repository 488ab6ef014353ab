"""The runner on a package of its own: the list, the flags, what a run writes, and one line for each error."""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import __main__ as command
from experiments import catalog, runner, tables
from paradigms import watch

EXPERIMENT = '''
    """Toy benchmark, in one line.

    More about it.
    """

    import dataclasses
    import json

    import numpy as np

    PROTOCOL = "two numbers"
    PUBLISHED = {"accuracy": {"mean": 0.6, "std": 0.01, "source": "Table 1"}}


    @dataclasses.dataclass(frozen=True)
    class Config:
        seeds: int = 3
        """Number of seeds."""
        rate: float = 0.1
        """Learning rate."""
        fail: str = ""
        """Which error to raise."""


    def run(config, folder):
        assert json.loads((folder / "config.json").read_text())["settings"]["rate"] == config.rate
        if config.fail == "value":
            raise ValueError("rate=0.1: too\\n  large")
        if config.fail == "file":
            raise FileNotFoundError("no data")
        if config.fail == "stop":
            from paradigms import Stopped

            raise Stopped(15, "stopped at step 20 of 40")
        if config.fail == "bug":
            raise KeyError("bug")
        (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": [1.0, 2.0]}\\n')
        few = {"mean": 0.9, "interval95": 0.01, "tasks": 600}
        return {"accuracy": np.arange(config.seeds) / 2, "loss": float("nan"), "few": few, "confusion": np.eye(2)}
'''


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A fresh package a test: modules are cached by name."""
    package = tmp_path / f"fake{abs(hash(str(tmp_path)))}"
    files = {
        "__init__": '"""Experiments."""',
        "toy/bench": EXPERIMENT,
        "toy/_helper": "def run(): pass",
        "toy/parts": "x = 1",
        "speed/fast": EXPERIMENT,
        "tour": '"""A tour."""\nraise RuntimeError("imported for the list")\ndef run(config, folder): pass',
        "runner": EXPERIMENT,
    }
    for name, text in files.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return package


def run(root, *flags):
    return command.main(["toy.bench", *flags], root)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only(folder):
    (found,) = folder.iterdir()
    return found


def test_the_list_reads_sources_without_importing(root, capsys):
    assert list(catalog.find(root)) == ["tour", "toy.bench"]
    assert catalog.find(root)["toy.bench"].published["accuracy"]["mean"] == 0.6
    assert command.main([], root) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("toy.bench"))
    assert line.split(maxsplit=1)[1].startswith("Toy benchmark, in one line.  ")
    assert line.rstrip().endswith("—")
    assert "0.600 ± 0.010" in line


def test_published_that_is_no_literal_is_left_out_of_the_list(root):
    (root / "toy" / "odd.py").write_text('"""Odd."""\nPUBLISHED: dict = dict(a=1)\ndef run(config, folder): pass')
    assert catalog.find(root)["toy.odd"] == catalog.Entry("toy.odd", "Odd.", {}, {})


def test_a_run_writes_its_configuration_result_and_report(root, tmp_path, capsys):
    assert run(root, "--out", "elsewhere", "--rate", "0.5") == 0
    folder = only(tmp_path / "elsewhere" / "toy.bench")
    record = {"experiment": "toy.bench", "settings": {"seeds": 3, "rate": 0.5, "fail": ""}, "deterministic": False}
    assert json.loads((folder / "config.json").read_text()) == record
    result = json.loads((folder / "result.json").read_text())
    keys = "experiment protocol config metrics published device versions seconds memory deterministic"
    assert list(result) == keys.split()
    assert result["experiment"] == "toy.bench"
    assert result["protocol"] == "two numbers"
    accuracy = result["metrics"]["accuracy"]
    assert accuracy["mean"] == 0.5
    assert accuracy["values"] == [0.0, 0.5, 1.0]
    assert accuracy["interval95"] == pytest.approx(4.302653 * 0.5 / np.sqrt(3), rel=1e-6)
    assert result["metrics"]["loss"] == {"mean": None, "interval95": None, "values": [None]}
    assert result["metrics"]["few"] == {"mean": 0.9, "interval95": 0.01, "tasks": 600, "values": [0.9]}
    assert sorted(result["metrics"]) == ["accuracy", "few", "loss"]
    assert result["published"]["accuracy"]["source"] == "Table 1"
    assert result["device"].startswith(jax.default_backend())
    assert result["versions"]["jax"] == jax.__version__
    assert set(result["seconds"]) == {"compile", "run"}
    np.testing.assert_array_equal(np.load(folder / "arrays.npz")["confusion"], np.eye(2))
    assert (folder / "report.html").read_text().count("<img") == 2
    printed = capsys.readouterr().out
    assert "Table 1" in printed
    assert printed.splitlines()[-1] == str(pathlib.Path("elsewhere") / "toy.bench" / folder.name)
    assert not list(folder.glob("*.part"))


def test_two_runs_of_one_second_have_two_folders(tmp_path):
    options = runner.Options(out=tmp_path)
    folders = {runner.open_folder({"experiment": "a.b", "settings": {"x": 1}}, options) for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.parent == tmp_path / "a.b" for folder in folders)


def test_a_run_goes_on_in_its_folder_with_the_same_flags_alone(root, tmp_path, capsys):
    assert run(root, "--rate", "0.5", "--fail", "value") == 2
    folder = only(tmp_path / "runs" / "toy.bench")
    assert run(root, "--rate", "0.7", "--fail", "value", "--resume", str(folder)) == 2
    assert "{'rate': 0.5}" in capsys.readouterr().err
    assert run(root, "--rate", "0.5", "--resume", str(folder), "--override") == 0
    assert "{'fail': 'value'}" in capsys.readouterr().err
    assert runner.read_config(folder)["settings"]["fail"] == ""
    assert only(tmp_path / "runs" / "toy.bench") == folder
    assert (folder / "result.json").exists()
    assert run(root, "--resume", "nowhere") == 2


def test_a_run_that_ended_is_not_run_again(root, tmp_path, capsys):
    assert run(root) == 0
    folder = only(tmp_path / "runs/toy.bench")
    before = (folder / "result.json").read_text()
    (folder / "metrics.jsonl").unlink()
    assert run(root, "--resume", str(folder), "--save-result") == 0
    assert (folder / "result.json").read_text() == before
    assert not (folder / "metrics.jsonl").exists()
    assert json.loads((root / "results/toy.bench.json").read_text())["metrics"]["accuracy"]["mean"] == 0.5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json: holds a list"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
        (lambda folder: edit(folder, experiment="toy.other"), "run of toy.other"),
        (lambda folder: edit(folder, settings=None), "no run's"),
    ],
)
def test_a_folder_that_is_no_run_s_is_named(root, tmp_path, damage, message, capsys):
    assert run(root, "--fail", "value") == 2
    folder = only(tmp_path / "runs/toy.bench")
    damage(folder)
    capsys.readouterr()
    assert run(root, "--fail", "value", "--resume", str(folder)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_only_the_protocol_s_numbers_are_saved(root, capsys):
    assert run(root, "--rate", "0.5", "--save-result") == 2
    assert "'rate': 0.5" in capsys.readouterr().err
    assert not (root / "results").exists()
    assert run(root, "--seeds", "2", "--save-result") == 0


def test_a_damaged_result_is_named_in_one_line(root, capsys):
    (root / "results").mkdir()
    (root / "results/toy.bench.json").write_text("{")
    for arguments in ([], ["table"]):
        assert command.main(arguments, root) == 2
        assert "toy.bench.json: cannot be read" in capsys.readouterr().err
    assert command.main(["--help"], root) == 2


def test_settings_below_their_limit():
    config = types.SimpleNamespace(batch_size=0, seeds=float("nan"))
    for name, shown in (("batch_size", "--batch-size 0: must be 1"), ("seeds", "--seeds nan")):
        with pytest.raises(ValueError, match=shown):
            runner.require(config, **{name: 1})


def test_only_a_run_that_is_told_to_writes_a_result_and_the_table_shows_it(root, tmp_path, capsys):
    assert run(root) == 0
    assert not (root / "results").exists()
    assert run(root, "--save-result") == 0
    capsys.readouterr()
    saved = json.loads((root / "results" / "toy.bench.json").read_text())
    assert saved["metrics"]["accuracy"]["seconds"] == saved["seconds"]["run"]
    other = {"mean": 1, "values": [1], "device": "another", "seconds": 7}  # of another choice, by another run
    saved["metrics"]["other"] = other
    (root / "results" / "toy.bench.json").write_text(json.dumps(saved))
    assert run(root, "--save-result") == 0
    assert json.loads((root / "results" / "toy.bench.json").read_text())["metrics"]["other"] == other
    capsys.readouterr()
    assert command.main(["table"], root) == 0
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| toy.bench | accuracy | 0.600 ± 0.010 | 0.5 ± 1.2 | 3 | ")
    command.main([], root)
    assert "0.5 ± 1.2" in capsys.readouterr().out

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    assert command.main(["table", str(readme)], root) == 0
    once = readme.read_text()
    assert once == f"before\n<!-- results -->\n{head}\n{rule}\n{row}\n<!-- /results -->\nafter\n"
    tables.update_readme(readme, root)
    assert readme.read_text() == once
    readme.write_text("no markers")
    assert command.main(["table", str(readme)], root) == 2
    assert "<!-- results -->" in capsys.readouterr().err


def test_a_grid_has_a_row_a_method_and_stars_what_is_far_from_the_published(root, capsys):
    source = root / "toy" / "bench.py"
    source.write_text(
        source.read_text()
        + 'GRIDS = {"by size": r"(?P<row>[a-z]+)(/(?P<column>[0-9]+))?/accuracy", "none": r"(?P<row>x)(?P<column>y)"}\n'
    )
    assert catalog.find(root)["toy.bench"].grids["none"]
    number = lambda mean: {"mean": mean, "interval95": 0.02, "values": [mean] * 3, "device": "cpu: A, 2 cores", "seconds": 7}
    published = {"er/20/accuracy": {"mean": 0.8, "std": 0.01}, "er/5/accuracy": {"mean": 0.7, "std": 0.3}}
    metrics = {"sgd/accuracy": 0.2, "er/5/accuracy": 0.6, "er/20/accuracy": 0.77, "er/20/accuracy/forgetting": 0.1}
    result = {"experiment": "toy.bench", "published": published, "metrics": {k: number(v) for k, v in metrics.items()}}
    (root / "results").mkdir()
    (root / "results" / "toy.bench.json").write_text(json.dumps(result))
    assert command.main(["table"], root) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "",
        "**`toy.bench`, by size**: 3 runs, cpu: A, 7 to 7 s a command",
        "",
        "| | 20 | 5 |  |",
        "|---|---|---|---|",
        "| er | 0.770 ± 0.020* (0.800 ± 0.010) | 0.600 ± 0.020 (0.70 ± 0.30) |  |",
        "| sgd |  |  | 0.200 ± 0.020 |",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", "no regular expression"), (".*", "lacks a group"), ("(?P<row>.)(?P<column>).*", "one cell")]
)
def test_a_grid_that_is_none_is_named(pattern, message):
    number = {"mean": 1.0, "values": [1.0], "device": "cpu", "seconds": 1}
    with pytest.raises(ValueError, match=f"GRIDS: mine has .*{message}"):
        tables.grid("mine", {"published": {}, "metrics": {"ab": number, "ac": number}}, pattern)


def test_errors_are_one_line_unless_asked_for(root, capsys, monkeypatch):
    assert run(root, "--fail", "value") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: rate=0.1: too large (--debug shows the traceback)"
    assert run(root, "--fail", "file") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run(root, "--fail", "value", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("PARADIGMS_DEBUG", "1")
    assert run(root, "--fail", "value") == 2
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(KeyError):  # a bug keeps its traceback
        run(root, "--fail", "bug")


def test_a_stopped_run_says_the_command_that_goes_on(root, tmp_path, capsys):
    assert run(root, "--rate", "0.5", "--fail", "stop") == 128 + 15
    folder = only(tmp_path / "runs" / "toy.bench").relative_to(tmp_path)
    said = capsys.readouterr().err.splitlines()[-1]
    command_line = f"python -m {root.name} toy.bench --rate 0.5 --fail stop --resume {folder}"
    assert said == f"stopped at step 20 of 40: {command_line}"
    run(root, "--fail", "value")  # a newer run is not the one to go on with
    assert run(root, "--rate", "0.5", "--fail", "stop", "--resume", str(folder)) == 128 + 15
    assert capsys.readouterr().err.splitlines()[-1].endswith(command_line)
    assert run(root, "--out=other", "--fail", "stop") == 128 + 15
    assert capsys.readouterr().err.splitlines()[-1].endswith(str(only(tmp_path / "other" / "toy.bench").relative_to(tmp_path)))


def test_an_unknown_name_gets_close_ones(root, capsys):
    assert command.main(["toy.bnch"], root) == 2
    assert capsys.readouterr().err == "error: no experiment 'toy.bnch'; did you mean toy.bench?\n"
    assert command.main(["bench"], root) == 2
    assert "did you mean toy.bench?" in capsys.readouterr().err
    for name in ("../../etc", "speed.fast", "runner", "zzzzzzzz"):
        assert command.main([name], root) == 2
    assert command.main(["toy/bench.py", "--fail", "value"], root) == 2
    assert "too large" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--rates", "1"], ["--rate", "fast"]])
def test_bad_flags_leave_by_code_2_and_make_no_folder(root, tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(root, *flags)
    assert stopped.value.code == 2
    assert "rate" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_help_shows_typed_and_documented_flags(root, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(root, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for part in ("--rate FLOAT", "Learning rate.", "--out PATH", "--save-result", "--debug", "Toy benchmark"):
        assert part in text


def test_compile_seconds_counts_nested_traces_once():
    inner = jax.jit(lambda x: jnp.sin(x) * 2.5)
    with watch.compile_seconds() as seconds:
        start = time.monotonic()
        jax.jit(lambda x: inner(inner(x) + 1.5) + 3)(jnp.ones(3))
        taken = seconds()
        assert 0 < taken <= time.monotonic() - start
        assert seconds() == taken
    jax.jit(lambda x: x * 7.25)(jnp.ones(3))
    assert seconds() == taken


def test_the_cache_respects_the_environment(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/nowhere")
        jax.config.update("jax_compilation_cache_dir", None)
        command._cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_listing_from_a_shell_imports_no_jax():
    code = "import sys, experiments.__main__ as m; m.main([]); sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=catalog.HERE.parent, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("experiment")
