"""The scenarios: which outputs compete in the loss and in the answer, and that nothing reaches the others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paradigms import Trainer, context, continual, data, experience, from_functions, hits, supervised
from paradigms.objective import Objective

TABLE = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
BATCH = {
    "x": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
    "y": np.array([2, 3, 2], np.int32),
    "task": np.array([1, 1, 1], np.int32),
}


def linear():
    init = lambda key, x: {"w": jax.random.normal(key, (5, 4))}
    return from_functions(init, lambda p, x: x @ p["w"])


def open_outputs(active, task, train):
    return np.broadcast_to(active(BATCH, context(task=task, train=train)), (3, 4))


@pytest.mark.parametrize(
    ("active", "task", "train", "expected"),
    [
        (continual.task_incremental(TABLE), 0, True, [0, 0, 1, 1]),
        (continual.task_incremental(TABLE), 0, False, [0, 0, 1, 1]),
        (continual.domain_incremental(TABLE), 0, False, [1, 1, 1, 1]),
        (continual.class_incremental(TABLE), 0, True, [1, 1, 0, 0]),
        (continual.class_incremental(TABLE), 1, True, [1, 1, 1, 1]),
        (continual.class_incremental(TABLE), 7, False, [1, 1, 1, 1]),
        (continual.class_incremental(TABLE, continual.every(TABLE)), 0, True, [1, 1, 1, 1]),
        (continual.class_incremental(TABLE, continual.every(TABLE)), 0, False, [1, 1, 0, 0]),
        (continual.class_incremental(TABLE, continual.present(TABLE)), 1, True, [0, 0, 1, 1]),
        (continual.class_incremental(TABLE, continual.present(TABLE)), 0, False, [1, 1, 0, 0]),
        (continual.past(TABLE), 0, True, [0, 0, 0, 0]),
        (continual.past(TABLE), 1, True, [1, 1, 0, 0]),
        (continual.past(TABLE), 9, True, [1, 1, 1, 1]),
    ],
)
def test_which_outputs_compete(active, task, train, expected):
    np.testing.assert_array_equal(open_outputs(active, task, train), np.broadcast_to(np.array(expected, bool), (3, 4)))


def test_present_classes_leave_out_padding():
    batch = {**BATCH, "weight": np.array([1.0, 0.0, 1.0], np.float32)}
    found = continual.present(TABLE)(batch, context(train=True))
    np.testing.assert_array_equal(found, [[False, False, True, False]])


def test_the_loss_is_the_cross_entropy_over_the_open_outputs_and_the_others_get_no_gradient():
    objective = supervised(linear(), active=continual.task_incremental(TABLE))
    params, state = objective.init(jax.random.key(0), BATCH)
    value, grad = jax.value_and_grad(lambda p: objective.losses(p, state, BATCH, context(train=True))[0]["supervised"])(params)
    logits = BATCH["x"] @ np.asarray(params["model"]["w"])
    own = logits[:, 2:]
    expected = -np.mean(own[np.arange(3), BATCH["y"] - 2] - np.log(np.exp(own).sum(1)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not np.asarray(grad["model"]["w"][:, :2]).any()
    assert np.asarray(grad["model"]["w"][:, 2:]).all()


def test_the_answer_is_among_the_open_outputs():
    objective = supervised(linear(), active=continual.class_incremental(TABLE))
    trainer = Trainer(objective, optax.sgd(0.1))
    state = trainer.init(0, {**BATCH, "y": BATCH["y"] - 2})
    assert (np.argmax(trainer.predict(state, BATCH)["logits"], -1) < 2).all()
    later = trainer.boundary(state, None, "end")
    np.testing.assert_allclose(
        trainer.predict(later, BATCH)["logits"], BATCH["x"] @ np.asarray(state.params["model"]["w"]), rtol=1e-5
    )


def test_a_batch_without_tasks_is_named():
    objective = supervised(linear(), active=continual.task_incremental(TABLE))
    with pytest.raises(ValueError, match='no leaf "task"'):
        Trainer(objective, optax.sgd(0.1)).init(0, {"x": BATCH["x"], "y": BATCH["y"]})


def test_tasks_beyond_the_table_are_named():
    trainer = Trainer(supervised(linear(), active=continual.task_incremental(TABLE)), optax.sgd(0.1))
    for task in (2, -1):
        with pytest.raises(ValueError, match=f"tasks go from .*{task}.*, and the table has 2"):
            trainer.init(0, {**BATCH, "task": np.array([1, task, 1], np.int32)})


def test_a_table_of_other_axes_is_named():
    for made in (continual.task_incremental, continual.domain_incremental, continual.class_incremental):
        for table in (np.ones(4, bool), np.ones((2, 3, 4), bool), []):
            with pytest.raises(ValueError, match=r"table: has shape .*; give \(tasks, outputs\)"):
                made(table)


SCENARIOS = {made(TABLE).name: made(TABLE) for made in (
    continual.task_incremental, continual.domain_incremental, continual.class_incremental, continual.task_free
)}  # fmt: skip


def test_scenarios_say_what_is_known():
    known = {name: scenario.known for name, scenario in SCENARIOS.items()}
    assert {name: one.test for name, one in known.items()} == {"task": True, "domain": False, "class": False, "free": False}
    assert {name for name, one in known.items() if not one.train} == {"free"}
    assert {name for name, one in known.items() if not one.boundaries} == {"free"}
    assert jnp.ndim(SCENARIOS["domain"](BATCH, context())) == 2
    assert np.all(SCENARIOS["free"](BATCH, context(train=True)))


UNLABELLED = continual.task_free(TABLE)._replace(name="unlabelled", known=continual.Known(False, False, boundaries=True))


@pytest.mark.parametrize("scenario", [*SCENARIOS.values(), UNLABELLED], ids=lambda scenario: scenario.name)
def test_a_learner_is_told_what_is_known_and_no_more(scenario):
    heard = {}

    def hear(call):
        def function(params, state, batch, ctx, *event):
            assert ("task" in batch) == ("task" in batch.get("part", batch))
            heard[call] = ("task" in batch, int(ctx.task))
            return ({"loss": jnp.zeros(())}, (state, {})) if call == "losses" else (params if event else {}, state)

        return function

    def init(key, batch):
        heard["init"] = ("task" in batch, 0)
        return {}, {}

    def after(params, state, update, ctx):
        heard["after"] = (False, int(ctx.task))
        return params, state

    child = Objective(init, hear("losses"), hear("predict"), after, hear("boundary"))
    objective, known = continual.told(child, scenario), scenario.known
    objective.init(jax.random.key(0), BATCH)
    objective.losses({}, {}, BATCH, context(task=3, train=True))
    objective.predict({}, {}, BATCH, context(task=3))
    objective.after({}, {}, None, context(task=3))
    objective.boundary({}, {}, {**BATCH, "part": {"task": BATCH["task"]}}, context(task=3), "end")
    task = 3 if known.boundaries else 0
    expected = {"init": (known.train, 0), "losses": (known.train, task), "predict": (known.test, task), "after": (False, task)}
    assert heard == expected | ({"boundary": (known.train, 3)} if known.boundaries else {})


def test_a_method_that_looks_at_a_hidden_task_is_named():
    objective = continual.told(supervised(linear(), active=continual.task_incremental(TABLE)), SCENARIOS["class"])
    params, state = objective.init(jax.random.key(0), BATCH)
    with pytest.raises(ValueError, match='no leaf "task"'):
        objective.predict(params, state, BATCH, context())
    inside = {"support": BATCH, "task": BATCH}  # a part of this name is a batch of its own
    told = continual.told(Objective(lambda key, batch: (batch, {}), None, None), SCENARIOS["free"])
    without = {"x", "y"}
    assert {name: set(part) for name, part in told.init(None, inside)[0].items()} == {"support": without, "task": without}


def test_the_scores_of_a_stream_see_the_tasks_that_its_learner_does_not():
    digits = data.load("digits")
    tasks = data.split_classes(digits, per_task=5)
    model = from_functions(lambda key, x: {"w": jnp.zeros((64, 10))}, lambda p, x: x.reshape(len(x), -1) @ p["w"])
    plain = supervised(model, active=continual.class_incremental(tasks.table))
    run = lambda objective: experience(
        Trainer(objective, optax.sgd(0.1)), tasks, batch_size=16, steps=15, score=hits(tasks.table)
    )
    open_, told = run(plain), run(continual.told(plain, continual.class_incremental(tasks.table)))
    assert set(told.matrix) == {"accuracy", "task accuracy"}
    for name, matrix in told.matrix.items():
        np.testing.assert_allclose(matrix, open_.matrix[name], atol=1e-6)
    free = run(continual.told(supervised(model), continual.task_free(tasks.table)))
    assert (free.matrix["task accuracy"][-1] > free.matrix["accuracy"][-1]).any()
