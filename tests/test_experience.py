"""A whole stream: what reaches the objective in which order, the matrix, runs side by side, and going on after a stop."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paradigms as pd
from paradigms import continual, data, nn
from paradigms.continual import metrics
from paradigms.objective import Objective

DIGITS = data.load("digits")
TASKS = data.split_classes(DIGITS, per_task=5)


def linear():
    init = lambda key, x: {"w": jnp.zeros((64, 10)), "b": 0.01 * jax.random.normal(key, (10,))}
    return pd.from_functions(init, lambda p, x: x.reshape(len(x), -1) @ p["w"] + p["b"][None])


def trainer(objective=None):
    return pd.Trainer(pd.supervised(linear()) if objective is None else objective, optax.sgd(0.1))


def example(source):
    return source.opened(jax.random.key(0)).batch(jax.random.key(0), 0)


def right(state, task):
    """The accuracy on a task by NumPy."""
    rows = DIGITS.test["y"] // 5 == task
    x, y = DIGITS.test["x"][rows].reshape(rows.sum(), -1) / 255, DIGITS.test["y"][rows]
    w, b = (np.asarray(state.params["model"][name], np.float64) for name in "wb")
    return np.mean(np.argmax(x @ w + b, -1) == y)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6), a, b)


def test_advance_is_scan_in_one_program_for_every_length():
    ours, source = trainer(), TASKS.train(0, 16)
    batch = example(source)
    for n in (0, 1, 5):
        one, values = ours.advance(ours.init(0, batch), source, n)
        if n:
            other, stacked = ours.scan(ours.init(0, batch), source, n)
            close(one.params, other.params)
            close(values, jax.tree.map(lambda leaf: leaf.mean(0), stacked))
        assert int(one.step) == n
    assert ours._advance._cache_size() == 1


def test_a_tally_is_the_sum_over_the_whole_split():
    ours = trainer()
    state, _ = ours.advance(ours.init(0, example(TASKS.train(0, 16))), TASKS.train(0, 16), 20)
    for task in range(2):
        sums = ours.tally(state, TASKS.whole("test", task, 50), pd.hits(TASKS.table))
        assert int(sums["weight"]) == np.sum(DIGITS.test["y"] // 5 == task)
        np.testing.assert_allclose(sums["accuracy"] / sums["weight"], right(state, task), atol=1e-6)
        assert sums["task accuracy"] >= sums["accuracy"]


def test_a_boundary_takes_a_source():
    seen = {}

    def boundary(params, state, batches, ctx, event):
        del ctx, event
        seen["shapes"] = jax.tree.map(jnp.shape, batches)
        return params, {**state, "sum": jnp.sum(batches["x"] * batches["weight"][..., None, None, None])}

    child = pd.supervised(linear())
    init = lambda key, batch: (child.init(key, batch)[0], {**child.init(key, batch)[1], "sum": jnp.zeros(())})
    ours = trainer(Objective(init, child.losses, child.predict, boundary=boundary))
    state = ours.boundary(ours.init(0, example(TASKS.train(0, 16))), TASKS.whole("train", 1, 100), "start")
    assert seen["shapes"]["x"] == (7, 100, 8, 8, 1)
    expected = DIGITS.train["x"][DIGITS.train["y"] >= 5].astype(np.float64).sum() / 255
    np.testing.assert_allclose(state.state["sum"], expected, rtol=1e-5)


def test_an_experience_is_its_parts_one_after_the_other():
    ours, tests = trainer(), [TASKS.whole("test", task) for task in range(2)]
    found = pd.experience(ours, TASKS, batch_size=16, steps=15)
    state = ours.init(0, example(TASKS.train(0, 16)))
    np.testing.assert_allclose(found.start["accuracy"], [right(state, task) for task in range(2)], atol=1e-6)
    for task in range(2):
        state, _ = ours.scan(state, TASKS.train(task, 16, start=15 * task), 15)
        state = ours.boundary(state, None, "end")
        np.testing.assert_allclose(found.matrix["accuracy"][task], [right(state, other) for other in range(2)], atol=1e-6)
    close(found.state.params, state.params)
    assert (int(found.state.step), int(found.state.task)) == (30, 2)
    assert len(tests) == 2


def test_curves_are_evaluated_between():
    found = pd.experience(trainer(), TASKS, batch_size=16, steps=15, evaluate_every=6)
    np.testing.assert_array_equal(found.curve_steps, [6, 12, 15, 21, 27, 30])
    np.testing.assert_array_equal(found.curve_tasks, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(found.curve["accuracy"][[2, 5]], found.matrix["accuracy"])
    whole = pd.experience(trainer(), TASKS, batch_size=16, steps=15)
    np.testing.assert_allclose(found.matrix["accuracy"], whole.matrix["accuracy"], atol=1e-6)
    assert metrics.stability_gap(found.curve["accuracy"], found.curve_tasks) > 0


def test_runs_are_those_of_each_seed_alone():
    tasks = data.split_classes(DIGITS, per_task=5, shuffled=True)
    both = pd.experience(pd.vectorize(trainer, seeds=2), tasks, batch_size=16, steps=10)
    assert both.matrix["accuracy"].shape == (2, 2, 2)
    assert not np.array_equal(*both.matrix["accuracy"])
    for seed in range(2):
        alone = pd.experience(trainer(), tasks, batch_size=16, steps=10, key=jax.random.fold_in(jax.random.key(0), seed))
        np.testing.assert_allclose(both.matrix["accuracy"][seed], alone.matrix["accuracy"], atol=1e-6)


def test_a_stopped_stream_goes_on_after_its_last_whole_task(tmp_path):
    objective = pd.rehearsal(pd.supervised(linear()), pd.reservoir(50))
    options = {"batch_size": 16, "steps": 10}
    pd.experience(trainer(objective), TASKS, **options, folder=tmp_path, only=range(1))
    found = pd.experience(trainer(objective), TASKS, **options, folder=tmp_path)
    whole = pd.experience(trainer(objective), TASKS, **options)
    np.testing.assert_array_equal(found.matrix["accuracy"], whole.matrix["accuracy"])
    np.testing.assert_array_equal(found.state.params["model"]["w"], whole.state.params["model"]["w"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20]
    np.testing.assert_allclose(rows[1]["so far/accuracy"], found.matrix["accuracy"][1].mean())
    assert "task 1/accuracy" in rows[1]
    assert "task 1/accuracy" not in rows[0]


def test_joint_training_sees_all_tasks():
    last = range(1, 2)
    found = pd.experience(trainer(), TASKS, batch_size=16, steps=60, span=lambda task: 0, only=last)
    assert found.matrix["accuracy"].shape == (1, 2)
    assert found.matrix["accuracy"].min() > 0.5
    apart = pd.experience(trainer(), TASKS, batch_size=16, steps=60)
    assert apart.matrix["accuracy"][-1, 0] < 0.2


def test_cumulative_training_draws_from_all_tasks_so_far():
    """An epoch is as long as what it is drawn from, and nothing is forgotten."""
    found = pd.experience(trainer(), TASKS, batch_size=16, epochs=2, span=lambda task: 0, evaluate_every=1000)
    one = round(np.asarray(TASKS.parts["train"]["count"]).sum() / 16)
    np.testing.assert_array_equal(found.curve_steps, [one, 3 * one])
    state = trainer().init(0, example(TASKS.train(0, 16)))
    for task, first, steps in ((0, 0, one), (1, one, 2 * one)):
        state, _ = trainer().scan(state, TASKS.train(task, 16, start=first, since=0), steps)
        state = trainer().boundary(state, None, "end")
    close(found.state.params, state.params)
    assert found.matrix["accuracy"][1].min() > 0.6


def test_rehearsal_remembers_what_fine_tuning_forgets():
    tasks = data.split_classes(DIGITS, per_task=2)
    model = pd.from_nnx(lambda rngs: nn.MLP(64, (64,), 10, mean=DIGITS.mean, std=DIGITS.std, rngs=rngs))
    plain = pd.supervised(model, active=continual.class_incremental(tasks.table))
    options = {"batch_size": 16, "epochs": 5, "score": pd.hits(tasks.table)}
    last = lambda objective: pd.experience(trainer(objective), tasks, **options).matrix
    forgets, remembers = last(plain), last(pd.rehearsal(plain, pd.reservoir(200)))
    assert metrics.average_accuracy(forgets["accuracy"]) < 0.35
    assert metrics.average_accuracy(remembers["accuracy"]) > 0.8
    assert metrics.average_accuracy(remembers["task accuracy"]) > 0.95
    assert metrics.forgetting(forgets["accuracy"]) > 0.6


def test_a_stream_that_drifts_without_boundaries_is_remembered():
    """Task-free: nothing tells which task it is, or that one has ended."""
    tasks = data.split_classes(DIGITS, per_task=2)
    scenario = continual.task_free(tasks.table)
    model = pd.from_nnx(lambda rngs: nn.MLP(64, (64,), 10, mean=DIGITS.mean, std=DIGITS.std, rngs=rngs))
    plain = pd.supervised(model, active=scenario)
    source = tasks.drifting(16, 80, width=40)

    def accuracy(objective):
        learner = trainer(continual.told(objective, scenario))
        opened = source.opened(jax.random.key(0)).batch(jax.random.key(0), 0)
        state, _ = learner.scan(learner.init(0, opened), source, 400)
        sums = [learner.tally(state, tasks.whole("test", task), pd.hits()) for task in range(5)]
        return np.mean([one["accuracy"] / one["weight"] for one in sums])

    assert accuracy(plain) < 0.5
    assert accuracy(pd.rehearsal(plain, pd.reservoir(200))) > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "epochs=None, steps=None: give one of the two"),
        ({"steps": 3, "epochs": 1}, "give one of the two"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 3, "evaluate_every": 0}, "evaluate_every=0"),
        ({"steps": 3, "batch_size": 10_000}, "batch_size is 10000"),
        ({"steps": 3, "span": lambda task: 2 * task}, "span: gives 2 for task 1; must be"),
        ({"epochs": 1, "span": lambda task: -1}, "span: gives -1 for task 0; must be"),
        ({"steps": 3, "only": range(0)}, r"only=range\(0, 0\): must be some of"),
        ({"steps": 3, "only": range(9)}, r"only=range\(0, 9\): must be some of"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pd.experience(trainer(), TASKS, **{"batch_size": 16, **options})


def test_a_stream_on_a_mesh_is_the_stream_on_one_device():
    objective, options = pd.ewc(pd.supervised(linear()), 1.0), {"batch_size": 16, "steps": 10, "boundary_rows": 80}
    alone = pd.experience(trainer(objective), TASKS, **options)
    spread = pd.Trainer(objective, optax.sgd(0.1), mesh=pd.mesh.make_mesh(data=8))
    found = pd.experience(spread, TASKS, **options)
    assert len(found.state.params["model"]["w"].sharding.device_set) == 8
    np.testing.assert_allclose(found.state.params["model"]["w"], alone.state.params["model"]["w"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.matrix["accuracy"], alone.matrix["accuracy"], atol=0.01)
