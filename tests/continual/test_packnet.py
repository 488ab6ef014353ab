"""Who owns which weight after each task, what never moves again, and that old answers stay the same to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paradigms as pd
from paradigms.continual.packnet import packnet
from paradigms.continual.specific import task_specific
from paradigms.objective import copy
from tests.continual.streams import batch, forward, gradient, jittered, learner, network, stacked, train

KEY = jax.random.key(2)
KERNELS = ("encoder/linear1/kernel", "encoder/linear2/kernel")


def kernels(state):
    return {
        f"encoder/{name}/kernel": np.asarray(state.params["model"]["encoder"][name]["kernel"])
        for name in ("linear1", "linear2")
    }


def owners(state):
    return jax.tree.map(np.asarray, state.state["packnet"])


def moves(share, **options):
    """A trainer whose optimizer moves all that is not put back: momentum, and decay."""
    objective = packnet(task_specific(learner(), 2), 2, share, **options)
    return pd.Trainer(objective, optax.adamw(1e-2, weight_decay=0.1))


@pytest.fixture(scope="module")
def two_tasks():
    """The states of a run: pruned in the middle of the first task, its end, in the second task, and its end."""
    trainer = moves(0.4)
    state = trainer.init(0, batch(0))
    state, _ = train(trainer, state, 0)
    found = {"trained": copy(state)}
    found["pruned"] = trainer.boundary(state, None, "prune")
    state, _ = train(trainer, copy(found["pruned"]), 0)
    found["first"] = trainer.boundary(state, None, "end")
    state, _ = train(trainer, copy(found["first"]), 1)
    found["second"] = copy(state)
    found["end"] = trainer.boundary(state, None, "end")
    return trainer, found


def test_the_largest_weights_are_kept_and_the_others_freed(two_tasks):
    _, found = two_tasks
    trained, pruned = kernels(found["trained"]), kernels(found["pruned"])
    for path, owner in owners(found["pruned"]).items():
        w = trained[path]
        count = round(0.4 * w.size)
        expected = np.abs(w) >= np.sort(np.abs(w).ravel())[-count]
        np.testing.assert_array_equal(owner, np.where(expected, 0, -1))
        assert owner.dtype == np.int8
        np.testing.assert_array_equal(pruned[path], np.where(expected, w, 0))


def test_one_weight_of_a_layer_is_kept_at_least():
    trainer = moves(1e-6)
    pruned = trainer.boundary(trainer.init(0, batch(0)), None, "prune")
    for owner in owners(pruned).values():
        assert (owner == 0).sum() == 1


def test_what_was_kept_trains_on_and_what_was_freed_waits(two_tasks):
    _, found = two_tasks
    pruned, first = kernels(found["pruned"]), kernels(found["first"])
    for path, owner in owners(found["pruned"]).items():
        assert (first[path] != pruned[path])[owner == 0].all()
        assert not first[path][owner == -1].any()
        # the end prunes no second time
        np.testing.assert_array_equal(owners(found["first"])[path], np.where(owner == 0, 0, 1))


def test_the_second_task_moves_the_free_weights_alone(two_tasks):
    _, found = two_tasks
    first, second, end = (kernels(found[moment]) for moment in ("first", "second", "end"))
    for path, owner in owners(found["first"]).items():
        np.testing.assert_array_equal(second[path][owner == 0], first[path][owner == 0])
        assert second[path][owner == 1].any()
        last = owners(found["end"])[path]
        assert (last == 1).sum() == round(0.4 * (owner == 1).sum())
        np.testing.assert_array_equal(last == 0, owner == 0)
        np.testing.assert_array_equal(end[path], np.where(last == 2, 0, second[path]))
    for layer in ("linear1", "linear2"):
        biases = [found[m].params["model"]["encoder"][layer]["bias"] for m in ("trained", "first", "end")]
        assert (biases[0] != biases[1]).any()
        np.testing.assert_array_equal(biases[1], biases[2])


def test_old_answers_stay_to_the_last_bit(two_tasks):
    trainer, found = two_tasks
    answers = [np.asarray(trainer.predict(found[m], batch(0))["logits"]) for m in ("first", "second", "end")]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])
    weights = kernels(found["end"])
    mine = {path: np.where(owner == 0, weights[path], 0) for path, owner in owners(found["end"]).items()}
    model, head = found["end"].params["model"], found["end"].params["task_specific"]
    encoder = {name: {**model["encoder"][name], "kernel": mine[f"encoder/{name}/kernel"]} for name in ("linear1", "linear2")}
    read = {"encoder": encoder, "head": {part: head[f"head/{part}"][0] for part in ("kernel", "bias")}}
    expected = forward(read, batch(0)["x"])
    np.testing.assert_allclose(answers[0][:, :2], expected[:, :2], rtol=2e-5, atol=2e-6)


def test_before_a_boundary_it_is_the_child(x64):
    child = pd.supervised(network())
    objective = packnet(child, 2, 0.5)
    params, state = objective.init(KEY, batch(0))
    params = jittered(params)
    value, grads = gradient(objective, params, state, batch(0), pd.context(train=True))
    expected, expected_grads = gradient(child, params, {"model": state["model"]}, batch(0), pd.context(train=True))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), grads, expected_grads)


def test_retraining_moves_what_the_task_keeps():
    """One step of gradient descent at the end, from the pruned network."""
    plain, retrained = packnet(learner(), 2, 0.5), packnet(learner(), 2, 0.5, retrain=(optax.sgd(0.5), 1))
    params, state = plain.init(KEY, batch(0))
    end = lambda objective: jax.jit(objective.boundary, static_argnums=4)(params, state, stacked(batch(0)), pd.context(), "end")
    (before, at), (after, _) = end(plain), end(retrained)
    _, grads = gradient(plain, before, at, batch(0), pd.context(train=True))
    for layer in ("linear1", "linear2"):
        w, new = (np.asarray(p["model"]["encoder"][layer]["kernel"]) for p in (before, after))
        kept = np.asarray(at["packnet"][f"encoder/{layer}/kernel"]) == 0
        step = 0.5 * np.asarray(grads["model"]["encoder"][layer]["kernel"])
        np.testing.assert_allclose(new, np.where(kept, w - step, 0), rtol=1e-5, atol=1e-7)
        assert step[kept].any()
    with pytest.raises(ValueError, match='batches=None: packnet retrains at "end"'):
        retrained.boundary(params, state, None, pd.context(), "end")


def test_shares_of_each_task_over_seeds():
    """1 / (tasks left) divides the weights evenly, here of two tasks."""
    make = lambda: moves(lambda task: 1 / (2 - task))
    trainer = pd.vectorize(make, seeds=2)
    state = trainer.init(0, batch(0))
    for task in range(2):
        state, metrics = trainer.step(state, batch(task))
        state = trainer.boundary(state, None, "end")
    assert np.isfinite(metrics["loss"]).all()
    for path in KERNELS:
        owner = np.asarray(state.state["packnet"][path])
        assert (owner[0] != owner[1]).any()
        for of_seed in owner:
            assert (of_seed == 0).sum() == (of_seed == 1).sum() == of_seed.size // 2


def test_settings_and_mixed_batches():
    child = pd.supervised(network())
    for call, words in [
        (lambda: packnet(child, 2, 0.0), "share=0.0"),
        (lambda: packnet(child, 2, 1.5), "share=1.5"),
        (lambda: packnet(child, 127, 0.5), "tasks=127"),
        (lambda: packnet(child, 2, 0.5, retrain=(optax.sgd(1.0), -1)), "retrain: -1 steps"),
        (lambda: packnet(child, 2, 0.5, shared=lambda path: False).init(KEY, batch(0)), "shared: holds of no array"),
        (lambda: packnet(child, 2, 0.5).init(KEY, {"x": batch(0)["x"], "y": batch(0)["y"]}), 'no leaf "task".*packnet asks'),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    objective = packnet(child, 2, 0.5)
    params, state = objective.init(KEY, batch(0))
    mixed = {**batch(0), "task": jnp.arange(8) % 2}
    assert np.isnan(objective.predict(params, state, mixed, pd.context())[0]["logits"]).all()
