"""Sweeps: the same numbers as runs alone, going on after a kill, divergence, bad input, Optuna, the command line."""

import importlib.util
import json
import os
import signal
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.stats import kstest

import paradigms as pd
from experiments import __main__ as command
from paradigms import data, logging
from paradigms.sweep import Sweep, numeric, plot, table
from tests.worker import start

SILENT = logging.several()
DIGITS = data.load("digits")
SOURCE = data.resident(DIGITS.train, 32)
VALIDATION = {leaf: values[:100] for leaf, values in DIGITS.validation.items()}
OPTIONS = {"validation": VALIDATION, "chunk": 10, "log": SILENT, "key": 3}
SETTINGS = pd.grid(width=[4, 6], learning_rate=[1e-3, 0.1])
MADE = []


def make(learning_rate=0.1, width=4):
    MADE.append(width)

    def init(key, x):
        first, second = jax.random.split(key)
        return {"a": jax.random.normal(first, (64, width)) / 8, "b": jax.random.normal(second, (width, 10)) / 2}

    model = pd.from_functions(init, lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params["a"]) @ params["b"])
    return pd.Trainer(pd.supervised(model), optax.adam(learning_rate))


def swept(settings=SETTINGS, steps=30, **options):
    return pd.sweep(make, SOURCE, steps, settings, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing cut short, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return swept(seeds=2, folder=folder), folder


def test_values_are_those_of_runs_alone_chosen_by_validation(whole):
    found, folder = whole
    assert [sorted(path.name for path in folder.iterdir())] == [["000", "001", "plan.json", "sweep.json"]]  # a program a width
    assert len(logging.read(folder / "000" / "metrics.jsonl")[0]["train/loss"]) == 4  # two rates x two seeds
    trainer, row = make(**found.best), found.rows[0]
    for seed in range(2):
        alone = pd.fit(trainer, SOURCE, 30, **{**OPTIONS, "key": jax.random.fold_in(jax.random.key(3), seed)})
        assert row["best_step"][seed] == alone.best_step
        best = max(one["validation/accuracy"] for one in alone.history)
        np.testing.assert_allclose(row["values"][seed], best, atol=1e-6)
    means = [np.mean(row["values"]) for row in found.rows]
    assert means == sorted(means, reverse=True)
    assert found.best == found.rows[0]["settings"]
    half = 12.706204736 * np.std(found.rows[0]["values"], ddof=1) / np.sqrt(2)  # Student's t of one degree of freedom
    np.testing.assert_allclose(found.rows[0]["interval95"], half, rtol=1e-6)
    stored = json.loads((folder / "sweep.json").read_text())
    assert stored["best"] == found.best
    assert stored["rows"] == found.rows


def killed(folder):
    """A sweep whose process is killed at the last evaluation of its second group, after the checkpoints of that."""
    rows = []

    def write(step, row):
        rows.append(step)
        if len(rows) == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    swept(seeds=2, folder=folder, log=logging.Writer(write))


def test_a_killed_sweep_goes_on_and_ends_in_the_same_bits(whole, tmp_path):
    found, folder = whole
    process = start(killed, tmp_path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "000" / "scores.json").exists()
    assert not (tmp_path / "001" / "scores.json").exists()
    assert any((tmp_path / "001" / "checkpoints").iterdir())
    before = (tmp_path / "000" / "metrics.jsonl").stat().st_mtime_ns
    MADE.clear()
    assert swept(seeds=2, folder=tmp_path) == found
    assert set(MADE) == {6}  # the first group had ended: not even made again
    assert (tmp_path / "000" / "metrics.jsonl").stat().st_mtime_ns == before
    for name in ("sweep.json", "plan.json", "000/metrics.jsonl", "001/metrics.jsonl", "001/scores.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    MADE.clear()
    assert swept(seeds=2, folder=tmp_path) == found
    assert MADE == []


def test_a_changed_sweep_is_refused_and_what_changed_is_named(whole):
    _, folder = whole
    for change, message in (
        ({"settings": pd.grid(width=[4], learning_rate=[0.1])}, "settings"),
        ({"steps": 40}, "'steps': 30"),
        ({"key": 4}, "'key': 3"),
        ({"about": {"data": "mnist"}}, "about"),
    ):
        with pytest.raises(ValueError, match=message):
            swept(**{"seeds": 2, "folder": folder, **change})


def test_an_attempt_that_never_began_binds_nothing(tmp_path):
    constant = {"measure": lambda outputs, split: {"accuracy": 0.5, "loss": 1.0}, "steps": 10, "folder": tmp_path}
    with pytest.raises(ValueError, match="top9"):
        swept(pd.grid(learning_rate=[0.1]), select="top9", **constant)
    found = swept(pd.grid(learning_rate=[0.2, 0.1]), **constant)
    assert found.best == {"learning_rate": 0.2}  # of equals the first


def test_each_setting_stops_on_its_own_whatever_trains_beside_it(tmp_path):
    rates = [0.3, 1e-3, 0.05]
    options = {"steps": 80, "patience": 2, "select": "-loss"}
    found = swept(pd.grid(learning_rate=rates), folder=tmp_path, **options)
    last = {row["settings"]["learning_rate"]: row["best_step"][0] for row in found.rows}
    assert last[0.3] < last[0.05] <= 80  # the fast one is over while others go on
    alone = swept(pd.grid(learning_rate=[0.3]), **options).rows[0]
    beside = next(row for row in found.rows if row["number"] == 0)
    assert alone["best_step"] == beside["best_step"]
    np.testing.assert_allclose(alone["value"], beside["value"], rtol=1e-5)
    curve = [row["validation/loss"][0] for row in logging.read(tmp_path / "000" / "metrics.jsonl")]
    stop = last[0.3] // 10 + 2  # patience: what came later does not count
    assert beside["value"] == min(curve[:stop])
    assert [row["value"] for row in found.rows] == sorted(row["value"] for row in found.rows)


def test_a_diverged_setting_is_last_and_said(tmp_path, caplog):
    options = {"steps": 10, "together": 3, "seeds": 2, "folder": tmp_path}  # a program has room for one setting's seeds
    found = swept(pd.grid(learning_rate=[float("inf"), 0.1]), **options)
    assert [len(json.loads((tmp_path / name / "scores.json").read_text())) for name in ("000", "001")] == [1, 1]
    beside = swept(pd.grid(learning_rate=[float("inf"), 0.1]), steps=10, seeds=2)
    np.testing.assert_equal(beside.rows, found.rows)  # alone in its program or beside others
    assert found.best == {"learning_rate": 0.1}
    assert [row["diverged"] for row in found.rows] == [0, 2]
    assert "2 of 2 seeds" in table(found)[1][1]
    again = swept(pd.grid(learning_rate=[float("inf"), 0.1]), **options)
    np.testing.assert_equal(again.rows, found.rows)  # not a number, also from the files
    json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert "every setting diverged" not in caplog.text
    none = swept(pd.grid(learning_rate=[float("inf")]), **{**options, "folder": None})
    assert none.best is None
    assert "every setting diverged" in caplog.text


def test_source_and_steps_may_follow_the_settings():
    seen = []

    def source(batch_size):
        seen.append(batch_size)
        return data.resident(DIGITS.train, batch_size)

    def with_batch(learning_rate, batch_size):
        return make(learning_rate)

    settings = pd.grid(batch_size=[16, 32], learning_rate=[0.1])
    found = pd.sweep(with_batch, source, lambda batch_size: 320 // batch_size, settings, **OPTIONS)
    assert seen == [16, 32]
    assert {row["settings"]["batch_size"]: row["best_step"][0] for row in found.rows}[32] == 10


class Dropping(nnx.Module):
    def __init__(self, rate, rngs):
        self.out, self.drop = nnx.Linear(64, 10, rngs=rngs), nnx.Dropout(rate)

    def __call__(self, x, rngs=None):
        return self.out(self.drop(x.reshape(len(x), -1), rngs=rngs))


def dropping(dropout, learning_rate):
    return pd.Trainer(pd.supervised(pd.from_nnx(lambda rngs: Dropping(dropout, rngs))), optax.sgd(learning_rate))


def test_a_setting_that_cannot_be_traced_is_named_and_may_train_apart(tmp_path):
    settings = pd.grid(dropout=[0.0, 0.5], learning_rate=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"make needs dropout as .*apart=\['dropout'\]"):
        pd.sweep(dropping, SOURCE, 10, settings, folder=tmp_path, **OPTIONS)
    settings = {name: column[:1] for name, column in settings.items()}
    assert pd.sweep(dropping, SOURCE, 10, settings, folder=tmp_path, apart=["dropout"], **OPTIONS).best == {
        "dropout": 0.0,
        "learning_rate": 0.1,
    }


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {}, "lengths {}"),
        ({"learning_rate": []}, {}, "1 or more"),
        ({"learning_rate": [0.1], "width": [4, 5]}, {}, "'width': 2"),
        ({"learning_rate": [0.1]}, {"seeds": 0}, "seeds=0"),
        ({"learning_rate": [0.1]}, {"together": 0}, "together=0"),
        ({"learning_rate": [0.1]}, {"apart": ["rate"]}, r"\['rate'\] are no settings"),
        ({"seeds": [0.1]}, {}, "arguments of vectorize"),
        ({"learning_rate": [0.1]}, {"patience": 0}, "patience=0"),
    ],
)
def test_bad_arguments(settings, options, message):
    with pytest.raises(ValueError, match=message):
        swept(settings, **options)


def test_a_folder_of_something_else_is_refused(tmp_path):
    pd.fit(make(), SOURCE, 10, chunk=10, folder=tmp_path / "run", log=SILENT)
    with pytest.raises(ValueError, match=r"no plan\.json"):
        swept(folder=tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json: is damaged"):
        swept(folder=tmp_path)


def test_what_trains_together():
    settings = {
        "rate": [0.1, 1],
        "zero": [0.0, 0.0],
        "width": [4, 8],
        "flag": [True, False],
        "name": ["a", "b"],
        "odd": [0.1, "a"],
    }
    assert numeric(settings) == ["rate", "zero"]
    assert numeric(settings, ["zero"]) == ["rate"]


def test_random_search_draws_what_it_says():
    draws = {"rate": pd.log_uniform(1e-4, 1e-1), "drop": pd.uniform(0.1, 0.5), "width": pd.choice([64, 128, "x"])}
    found = pd.random_search(2000, 1, **draws)
    assert kstest((np.log10(found["rate"]) + 4) / 3, "uniform").pvalue > 1e-3
    assert kstest((np.asarray(found["drop"]) - 0.1) / 0.4, "uniform").pvalue > 1e-3
    assert all(600 < found["width"].count(value) < 733 for value in (64, 128, "x"))
    assert abs(np.corrcoef(found["rate"], found["drop"])[0, 1]) < 0.08
    assert pd.random_search(5, 1, **draws) == {name: column[:5] for name, column in found.items()}
    assert pd.random_search(5, 1, rate=draws["rate"])["rate"] == found["rate"][:5]
    assert pd.random_search(5, 2, rate=draws["rate"])["rate"] != found["rate"][:5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pd.random_search(0, x=pd.uniform(0, 1)), "n=0"),
        (lambda: pd.uniform(1, 0), "low=1, high=0"),
        (lambda: pd.log_uniform(0, 1), "low=0, high=1: must be positive"),
        (lambda: pd.choice([]), "empty"),
    ],
)
def test_bad_distributions(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def made_up(settings, value, select="accuracy"):
    """A sweep of which the outcome is known; values of None diverged."""
    rows = [dict(zip(settings, values, strict=True)) for values in zip(*settings.values(), strict=True)]
    rows = [{"number": i, "settings": row, "value": value(**row)} for i, row in enumerate(rows)]
    more = [{"values": [row["value"]] * 2, "interval95": 0.01, "best_step": [10, 20], "diverged": 0} for row in rows]
    rows = [{**row, **rest} for row, rest in zip(rows, more, strict=True)]
    rows = [{**row, "diverged": 2, "value": float("nan")} if row["value"] is None else row for row in rows]
    rows.sort(key=lambda row: -row["value"] if row["value"] == row["value"] else np.inf)
    return Sweep(rows, rows[0]["settings"], select)


def test_two_crossed_settings_are_a_heat_map(tmp_path):
    found = made_up(pd.grid(rate=[0.1, 0.01], decay=[0.0, 0.5]), lambda rate, decay: None if decay and rate == 0.1 else rate)
    axis = plot(found, tmp_path / "new" / "response.png").axes[0]
    assert (tmp_path / "new" / "response.png").stat().st_size > 1000
    cells = np.ma.filled(axis.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(cells, [[0.01, 0.1], [0.01, np.nan]])  # decay down, rate across, each in order
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0.01", "0.1"]
    assert "diverged" in [text.get_text() for text in axis.texts]


def test_other_sweeps_have_a_panel_a_setting_on_its_own_scale():
    draws = {"rate": pd.log_uniform(1e-4, 1e-1), "drop": pd.uniform(0, 0.5), "decay": pd.choice([0.0, 1e-3, 1e-2, 0.1])}
    settings = pd.random_search(30, 0, **draws, depth=pd.choice([1, 2, 3]), name=pd.choice(["relu", "tanh"]))
    settings["constant"] = [1] * 30
    axes = plot(made_up(settings, lambda rate, **rest: rate if rate < 0.05 else None)).axes
    scales = {axis.get_xlabel(): axis.get_xscale() for axis in axes}
    assert scales == {"rate": "log", "drop": "linear", "decay": "symlog", "depth": "linear", "name": "linear"}
    assert [tick.get_text() for tick in axes[-1].get_xticklabels()] == ["relu", "tanh"]


def test_the_table_has_the_best_first():
    head, rows = table(made_up({"rate": [0.1, 0.2, 0.3]}, lambda rate: None if rate == 0.3 else rate))
    assert head == ["rate", "validation accuracy ± 95%", "best step", "diverged"]
    assert rows == [
        ["0.2", "0.200 ± 0.010", "10-20", ""],
        ["0.1", "0.100 ± 0.010", "10-20", ""],
        ["0.3", "nan", "10-20", "2 of 2 seeds"],
    ]


OPTUNA = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs optuna")


def suggest(trial):
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1.0, log=True)}


def opened(path, seed=0):
    import optuna

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    options = {"storage": storage, "study_name": "shared", "load_if_exists": True}
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed), **options)


def shared(path, seed, log=SILENT):
    """Has part in the search of two trials in the file `path`."""
    pd.optuna_search(opened(path, seed), suggest, 2, make, SOURCE, 10, batch=1, **{**OPTIONS, "log": log})


@OPTUNA
def test_two_processes_share_a_study(tmp_path):
    path = tmp_path / "journal.log"
    other = start(shared, path, 1)

    def wait(step, row):  # until the other has asked as well: both train at once
        while len(opened(path).trials) < 2 and other.is_alive():
            time.sleep(0.1)

    shared(path, 2, logging.Writer(wait))
    other.join()
    assert other.exitcode == 0
    trials = opened(path).trials
    assert 2 <= len(trials) <= 3  # at most the batch that the other had in flight
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    for trial in trials[:2]:
        again = swept({"learning_rate": [trial.params["learning_rate"]]}, steps=10).rows[0]
        np.testing.assert_allclose(again["value"], trial.value, atol=1e-6)
        assert again["best_step"] == trial.user_attrs["best_step"]
    shared(path, 3, logging.Writer(lambda step, row: pytest.fail("there are enough")))


@OPTUNA
def test_optuna_hears_of_divergence_and_of_interruption():
    import optuna

    study = optuna.create_study(direction="minimize")
    rates = iter([0.1, float("inf"), 0.1, 0.1])
    search = {**OPTIONS, "batch": 2, "select": "-loss"}
    pd.optuna_search(study, lambda trial: {"learning_rate": next(rates)}, 2, make, SOURCE, 10, **search)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]

    def stop(step, row):
        raise KeyboardInterrupt

    interrupted = {**search, "log": logging.Writer(stop)}
    with pytest.raises(KeyboardInterrupt):
        pd.optuna_search(study, lambda trial: {"learning_rate": next(rates)}, 4, make, SOURCE, 10, **interrupted)
    assert [trial.state.name for trial in study.trials][2:] == ["FAIL", "FAIL"]


@OPTUNA
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "-loss"}, 'direction="minimize"'),
        ({"folder": "x"}, "folder"),
        ({"trials": 0}, "trials=0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_bad_searches(options, message):
    import optuna

    study = optuna.create_study(direction="maximize")
    with pytest.raises(ValueError, match=message):
        pd.optuna_search(study, suggest, make=make, source=SOURCE, steps=10, **{"trials": 2, **OPTIONS, **options})
    assert not study.trials


EXPERIMENT = '''
    """Toy benchmark."""

    import dataclasses
    from typing import Literal

    from experiments.runner import require
    from paradigms import data, logging
    from tests import test_sweep


    @dataclasses.dataclass(frozen=True)
    class Config:
        seeds: int = 2
        learning_rate: float = 0.1
        width: int = 4
        hidden: tuple[int, ...] = (4,)
        batch_size: int = 32
        kind: Literal["a", "b"] = "a"

        def __post_init__(self):
            require(self, learning_rate=0, width=1)


    def run(config, folder):
        return {}


    def training(config):
        source = data.resident(test_sweep.DIGITS.train, config.batch_size)

        def make(config):
            return test_sweep.make(config.learning_rate, config.width * len(config.hidden))

        return {**test_sweep.OPTIONS, "make": make, "source": source, "steps": 640 // config.batch_size}
'''


@pytest.fixture
def root(tmp_path, monkeypatch):
    root = tmp_path / f"sweeps{tmp_path.name}".replace("-", "_")
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "bench.py").write_text(textwrap.dedent(EXPERIMENT))
    (root / "toy" / "plain.py").write_text('"""No training."""\ndef run(config, folder):\n    return {}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


def test_the_command_sweeps_an_experiment_and_goes_on(root, tmp_path, capsys):
    flags = [
        "sweep",
        "toy.bench",
        "--out",
        str(tmp_path / "runs"),
        "--set",
        "learning_rate=1e-4,0.1",
        "--set",
        "batch-size=64,32",
    ]
    flags += ["--set", "seeds=1", "--set=hidden=1 1"]
    assert command.main(flags, root) == 0
    printed = capsys.readouterr().out
    (folder,) = (tmp_path / "runs" / "sweeps" / "toy.bench").iterdir()
    found = json.loads((folder / "sweep.json").read_text())
    assert found["config"]["hidden"] == [1, 1]
    assert {row["settings"]["batch_size"] for row in found["rows"]} == {32, 64}
    assert found["best"]["learning_rate"] == 0.1
    assert len(found["rows"][0]["values"]) == 1
    assert {name: len(logging.read(folder / name / "metrics.jsonl")) for name in ("000", "001")} == {"000": 1, "001": 2}
    assert (folder / "response.png").exists()
    assert str(folder) in printed
    assert printed.index("0.1 ") < printed.index("0.0001")  # the best first
    MADE.clear()
    assert command.main(flags, root) == 0
    assert MADE == []  # all groups had ended
    (again,) = (tmp_path / "runs" / "sweeps" / "toy.bench").iterdir()
    assert again == folder


def test_the_command_draws(root):
    from experiments.commands import sweep

    module = sweep.load("toy.bench", root)
    given = ("learning_rate=log_uniform(1e-3, 1e-1)", "hidden=4 4,8", "kind=a,b", "width=8")
    base, columns = sweep.settings(module, sweep.Flags("toy.bench", given, random=7, key=1))
    assert base.width == 8
    assert {name: len(column) for name, column in columns.items()} == {"learning_rate": 7, "hidden": 7, "kind": 7}
    assert set(columns["hidden"]) == {(4, 4), (8,)}
    assert all(1e-3 <= rate <= 1e-1 for rate in columns["learning_rate"])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("toy.bensh", ["learning_rate=1,2"], "did you mean toy.bench"),
        ("toy.plain", ["learning_rate=1,2"], "no function training(config)"),
        ("toy.bench", ["rate=1,2"], "a NAME of batch_size, hidden"),
        ("toy.bench", ["learning_rate"], "write NAME=VALUE"),
        ("toy.bench", ["learning_rate=1,x"], "'x' is no float"),
        ("toy.bench", ["learning_rate=-1,1"], "--learning-rate -1.0: must be 0 or more"),
        ("toy.bench", ["kind=a,c"], "'c' is no"),
        ("toy.bench", ["learning_rate=0.1"], "nothing varies"),
        ("toy.bench", ["seeds=1,2"], "--set seeds"),
        ("toy.bench", ["width=4,8", "width=16,32"], "twice"),
        ("toy.bench", ["learning_rate=uniform(0,1)"], "--random 20"),
        ("toy.bench", ["width=uniform(1,8)"], "no float"),
    ],
)
def test_bad_flags_are_one_line_and_make_no_folder(root, tmp_path, name, given, message, capsys):
    flags = [flag for text in given for flag in ("--set", text)]
    assert command.main(["sweep", name, "--out", str(tmp_path / "runs"), *flags], root) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
