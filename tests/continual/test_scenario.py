"""The scenarios: which outputs compete in the loss and in the answer, and that nothing reaches the others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paradigms import Trainer, context, continual, from_functions, supervised

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


def test_a_table_of_other_axes_is_named():
    for made in (continual.task_incremental, continual.domain_incremental, continual.class_incremental):
        for table in (np.ones(4, bool), np.ones((2, 3, 4), bool), []):
            with pytest.raises(ValueError, match=r"table: has shape .*; give \(tasks, outputs\)"):
                made(table)


def test_scenarios_say_what_is_known():
    kinds = continual.task_incremental, continual.domain_incremental, continual.class_incremental
    known = {made(TABLE).name: made(TABLE).labels for made in kinds}
    assert {name: labels["test"] for name, labels in known.items()} == {"task": True, "domain": False, "class": False}
    assert all(labels["train"] for labels in known.values())
    assert jnp.ndim(continual.domain_incremental(TABLE)(BATCH, context())) == 2
