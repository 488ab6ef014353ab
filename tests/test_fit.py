"""The run: resume, selection by validation, early stopping, bad input, and real data end to end."""

import json

import jax
import numpy as np
import optax
import pytest

import paradigms as pd
from paradigms import data, logging, nn
from paradigms.evaluation import evaluate
from paradigms.metrics import classification
from tests.contracts import NET

SILENT = logging.several()


LINEAR = pd.from_functions(lambda key, x: {"w": np.zeros((x.shape[-1], 3), np.float32)}, lambda params, x: x @ params["w"])


def split(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, 6), np.float32)
    return {"x": x, "y": np.argmax((x - 0.5) @ np.random.default_rng(9).normal(size=(6, 3)), -1).astype(np.int32)}


TRAIN, VALIDATION = split(200), split(70, 1)
SOURCE = data.resident(TRAIN, 20)
SINGLE = pd.Trainer(pd.supervised(NET), optax.adam(1e-2))
MANY = pd.vectorize(lambda: pd.Trainer(pd.supervised(NET), optax.adam(1e-2)), seeds=2)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("trainer", [SINGLE, MANY], ids=["one run", "two runs"])
def test_resumed_run_equals_one_that_was_not_stopped(trainer, tmp_path):
    options = {"chunk": 10, "validation": VALIDATION, "checkpoint_every": 20, "log": SILENT, "key": 3}
    whole = pd.fit(trainer, SOURCE, 60, folder=tmp_path / "whole", **options)
    pd.fit(trainer, SOURCE, 30, folder=tmp_path / "parts", **options)
    resumed = pd.fit(trainer, SOURCE, 60, folder=tmp_path / "parts", resume=True, **options)
    assert equal(whole.state.params, resumed.state.params)
    assert equal(whole.state.opt_state, resumed.state.opt_state)
    assert equal(whole.best.params, resumed.best.params)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == [10, 20, 30, 40, 50, 60]


def test_a_used_folder_is_refused_and_an_ended_run_is_not_shortened(tmp_path):
    pd.fit(SINGLE, SOURCE, 20, chunk=10, folder=tmp_path, log=SILENT)
    with pytest.raises(ValueError, match="resume=True"):
        pd.fit(SINGLE, SOURCE, 10, chunk=10, folder=tmp_path, log=SILENT)
    with pytest.raises(ValueError, match=r"steps=10.*20"):
        pd.fit(SINGLE, SOURCE, 10, chunk=10, folder=tmp_path, resume=True, log=SILENT)


def test_a_run_that_goes_on_from_between_chunks_meets_its_evaluations(tmp_path):
    options = {"chunk": 10, "validation": VALIDATION, "folder": tmp_path, "log": SILENT}
    pd.fit(SINGLE, SOURCE, 25, **options)
    longer = pd.fit(SINGLE, SOURCE, 45, resume=True, **options)
    assert [row["step"] for row in longer.history if "validation/loss" in row] == [10, 20, 25, 30, 40, 45]


def test_a_diverged_run_is_never_the_best(caplog):
    many = pd.vectorize(lambda rate: pd.Trainer(pd.supervised(LINEAR), optax.sgd(rate)), rate=[float("nan"), 0.1])
    zeros = {**VALIDATION, "y": np.zeros_like(VALIDATION["y"])}  # what NaN would be right about as class 0
    run = pd.fit(many, SOURCE, 30, chunk=10, validation=zeros, log=SILENT)
    assert np.isfinite(run.history[-1]["validation/loss"]).tolist() == [False, True]
    assert np.isfinite(run.best.params["model"]["w"]).all()
    assert "run 0 has failed" in caplog.text
    assert "initial" in caplog.text


def test_best_is_the_best_of_validation():
    run = pd.fit(MANY, SOURCE, 60, chunk=10, validation=VALIDATION, log=SILENT)
    curve = np.stack([row["validation/accuracy"] for row in run.history])
    assert run.best_step.tolist() == [10 * (1 + int(i)) for i in curve.argmax(0)]
    again = evaluate(MANY, run.best, VALIDATION, classification())["accuracy"]
    np.testing.assert_array_equal(again, curve.max(0))


def test_smaller_is_better_with_a_minus():
    run = pd.fit(SINGLE, SOURCE, 40, chunk=10, validation=VALIDATION, select="-loss", log=SILENT)
    losses = [row["validation/loss"] for row in run.history]
    assert run.best_step == 10 * (1 + int(np.argmin(losses)))


def test_each_run_stops_on_its_own():
    make = lambda rate: pd.Trainer(pd.supervised(LINEAR), optax.sgd(rate))
    many = pd.vectorize(make, rate=[0.0, 0.3])
    run = pd.fit(many, SOURCE, 100, chunk=10, validation=VALIDATION, select="-loss", patience=3, log=SILENT)
    assert run.best_step.tolist() == [10, 100]
    assert run.history[-1]["step"] == 100


def test_stops_when_all_have_stopped():
    frozen = pd.Trainer(pd.supervised(LINEAR), optax.sgd(0.0))
    run = pd.fit(frozen, SOURCE, 1000, chunk=10, validation=VALIDATION, patience=2, log=SILENT)
    assert run.history[-1]["step"] == 30


BAD = {
    "steps": ({"steps": 0}, "steps=0"),
    "chunk": ({"chunk": 0}, "chunk=0"),
    "evaluate_every": ({"evaluate_every": 15}, "multiple of chunk"),
    "resume": ({"resume": True}, "folder"),
    "patience": ({"patience": 0, "validation": VALIDATION}, "patience=0"),
    "patience of nothing": ({"patience": 2}, "pass validation"),
    "checkpoints nowhere": ({"checkpoint_every": 10}, "folder"),
    "evaluate_every below 0": ({"evaluate_every": -10}, "multiple of chunk"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        pd.fit(SINGLE, SOURCE, **{"steps": 10, "chunk": 10, "log": SILENT, **options})


def test_unknown_metric_names_those_there_are():
    with pytest.raises(ValueError, match="accuracy"):
        pd.fit(SINGLE, SOURCE, 10, chunk=10, validation=VALIDATION, select="acuracy", log=SILENT)


def wrong(**leaves):
    return {**TRAIN, **leaves}


DATA = {
    "label beyond the classes, in one row of all": (lambda: wrong(y=np.where(np.arange(200) == 199, 3, TRAIN["y"])), "0 to 2"),
    "negative label": (lambda: wrong(y=TRAIN["y"] - 1), "-1"),
    "NaN": (lambda: wrong(x=np.where(np.arange(200)[:, None] == 7, np.nan, TRAIN["x"]).astype(np.float32)), "row"),
    "empty": (lambda: {k: v[:0] for k, v in TRAIN.items()}, "empty|no examples"),
    "batch larger than the data": (lambda: {k: v[:5] for k, v in TRAIN.items()}, "batch_size"),
    "ragged": (lambda: wrong(y=TRAIN["y"][:100]), "100"),
    "real targets for a classifier": (lambda: wrong(y=TRAIN["y"].astype(np.float32)), "do not fit"),
}


@pytest.mark.parametrize(("make", "message"), DATA.values(), ids=DATA)
def test_bad_data_is_refused_before_anything_is_compiled(make, message):
    trainer = pd.Trainer(pd.supervised(NET), optax.adam(1e-2))
    with pytest.raises(ValueError, match=message):
        pd.fit(trainer, data.resident(make(), 20), 10, chunk=10, log=SILENT)
    assert trainer._init._cache_size() == trainer._scan._cache_size() == 0


def test_digits_end_to_end(tmp_path):
    digits = data.load("digits")
    model = pd.from_nnx(lambda rngs: nn.MLP(64, (64,), 10, mean=digits.mean, std=digits.std, rngs=rngs))
    trainer = pd.vectorize(lambda: pd.Trainer(pd.supervised(model), optax.adam(3e-3)), seeds=2)
    run = pd.fit(
        trainer, data.resident(digits.train, 64), 600, chunk=100, validation=digits.validation, folder=tmp_path, log=SILENT
    )
    assert (evaluate(trainer, run.best, digits.test, classification())["accuracy"] > 0.95).all()


def test_fashion_mnist_end_to_end():
    try:
        fashion = data.load("fashion_mnist")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    inputs = {"mean": fashion.mean, "std": fashion.std}
    model = pd.from_nnx(lambda rngs: nn.MLP(784, (128,), 10, **inputs, rngs=rngs))
    trainer = pd.Trainer(pd.supervised(model), optax.adam(1e-3))
    run = pd.fit(trainer, data.resident(fashion.train, 128), 800, chunk=400, log=SILENT)
    assert evaluate(trainer, run.state, fashion.test, classification())["accuracy"] > 0.84
