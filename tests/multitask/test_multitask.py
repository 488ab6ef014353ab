"""One network and many objectives, and PCGrad by hand and against algorithm 1 in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paradigms as pd
from paradigms import Model, Objective, Trainer, byol, context, from_functions, multitask, pcgrad, supervised
from tests.contracts import batch_for, build

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def combine(vectors, key=KEY):
    """pcgrad of flat vectors, each cut into a tree of two leaves of different rank."""
    grads = {f"task{i}": {"a": jnp.asarray(v[:2]), "b": jnp.asarray(v[2:])[:, None]} for i, v in enumerate(vectors)}
    aggregate = pcgrad()
    losses = {name: jnp.zeros(()) for name in grads}
    out, _ = aggregate.combine(grads, losses, aggregate.init({}, tuple(grads)), context(key))
    return jnp.concatenate([out["a"], out["b"][:, 0]])


def algorithm_1(vectors, orders):
    """Yu et al. (2020): each gradient against the others' original ones, in the order given."""
    total = np.zeros(len(vectors[0]))
    for i, order in enumerate(orders):
        g = vectors[i].astype(float)
        for j in order:
            if j != i and g @ vectors[j] < 0:
                g = g - (g @ vectors[j]) / (vectors[j] @ vectors[j]) * vectors[j]
        total += g
    return total


def test_two_conflicting_gradients_by_hand():
    a, b = np.array([1.0, 0, 0, 0], np.float32), np.array([-1.0, 1, 0, 0], np.float32)
    # a - (a.b/b.b) b = (1/2, 1/2, 0, 0) and b - (b.a/a.a) a = (0, 1, 0, 0)
    np.testing.assert_allclose(combine([a, b]), [0.5, 1.5, 0, 0], rtol=1e-6)


def test_heads_keep_their_gradients_and_do_not_count_in_the_projection():
    a, b = {"trunk": jnp.array([1.0, 0]), "left": jnp.array([3.0])}, {"trunk": jnp.array([-1.0, 1]), "right": jnp.array([3.0])}
    whole = {"trunk": jnp.zeros(2), "left": jnp.zeros(1), "right": jnp.zeros(1)}
    out, _ = pcgrad().combine({"a": whole | a, "b": whole | b}, {}, (), context(KEY))
    np.testing.assert_allclose(out["trunk"], [0.5, 1.5], rtol=1e-6)
    np.testing.assert_array_equal([out["left"], out["right"]], [[3.0], [3.0]])


def test_small_gradients_are_projected_as_large_ones():
    a, b = np.array([1e-8, 0, 0, 0], np.float32), np.array([-1e-8, 1e-8, 0, 0], np.float32)
    np.testing.assert_allclose(combine([a, b]), [0.5e-8, 1.5e-8, 0, 0], rtol=1e-5)


def test_gradients_that_do_not_conflict_are_summed():
    a, b, c = np.abs(RNG.normal(size=(3, 4))).astype(np.float32)
    np.testing.assert_allclose(combine([a, b, c]), a + b + c, rtol=1e-6)
    np.testing.assert_allclose(combine([a, np.zeros(4, np.float32)]), a, rtol=1e-6)
    np.testing.assert_array_equal(combine([a]), a)
    np.testing.assert_allclose(combine([a, -a]), np.zeros(4), atol=1e-6)


def test_three_gradients_follow_algorithm_1_in_some_order_and_in_every_order():
    vectors = np.array([[1, 0.2, 0.1, 0], [-1, 1, 0.3, 0], [-0.3, -1, 0.5, 0.2]], np.float32)
    ways = [[k for k in itertools.permutations(range(3)) if k.index(i) == 2] for i in range(3)]  # the others, then i
    possible = np.array([algorithm_1(vectors, orders) for orders in itertools.product(*ways)])
    keys = jax.random.split(KEY, 400)
    got = np.asarray(jax.jit(jax.vmap(lambda key: combine(vectors, key)))(keys))
    distance = np.abs(got[:, None] - possible[None]).max(-1)
    assert distance.min(1).max() < 1e-5, "each result is algorithm 1's in some order"
    distinct = np.unique(possible.round(5), axis=0)
    assert len(distinct) > 2
    hits = (np.abs(got[:, None] - distinct[None]).max(-1) < 1e-4).sum(0)
    assert (hits > 0).all(), "and every order is drawn"
    share = [(np.abs(possible - d[None]).max(-1) < 1e-4).mean() for d in distinct]
    assert np.abs(hits / 400 - share).max() < 5 * np.sqrt(0.25 / 400)


def test_pcgrad_repeats_algorithm_1_on_its_own_permutations(monkeypatch):
    vectors = RNG.normal(size=(3, 4)).astype(np.float32)
    vectors[2] = -vectors[0] - 0.5 * vectors[1]
    for order in itertools.permutations(range(3)):
        monkeypatch.setattr(jax.random, "permutation", lambda key, n, order=order: jnp.array(order))
        np.testing.assert_allclose(combine(vectors), algorithm_1(vectors, [order] * 3), rtol=1e-4, atol=1e-6)


def head(name):
    """A regression on one output of a shared model of two heads."""
    return supervised(shared(), optax.losses.squared_error, output=name)


def shared(wide=3):
    def init(key, x):
        keys = jax.random.split(key, 3)
        shapes = {"trunk": (4, wide), "left": (wide, 2), "right": (wide, 2)}
        return {name: jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=True)}

    def apply(p, x):
        z = jnp.tanh(x @ p["trunk"])
        return {"features": z, "logits": z, "left": z @ p["left"], "right": z @ p["right"]}

    return from_functions(init, apply)


def batch_of(n):
    return {"x": RNG.normal(size=(n, 4)).astype(np.float32), "y": RNG.normal(size=(n, 2)).astype(np.float32)}


BATCHES = {"left": batch_of(5), "right": batch_of(3)}


def test_losses_of_each_task_on_its_own_batch_under_its_name():
    objective = multitask({"left": head("left"), "right": head("right")})
    params, state = objective.init(KEY, BATCHES)
    values, (_, aux) = objective.losses(params, state, BATCHES, context(train=True))
    assert list(values) == ["left/supervised", "right/supervised"]
    assert not any("per_example" in name for name in aux)
    outputs, _ = objective.predict(params, state, BATCHES, context())
    w = {name: np.asarray(leaf) for name, leaf in params["model"].items()}
    for task, batch in BATCHES.items():
        expected = np.tanh(batch["x"] @ w["trunk"]) @ w[task]
        np.testing.assert_allclose(values[f"{task}/supervised"], ((expected - batch["y"]) ** 2).mean(), rtol=1e-5)
        np.testing.assert_allclose(outputs[task]["logits"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(outputs["logits"], outputs["left"]["logits"])
    both = multitask({"left": head("left"), "right": head("right")})
    values, _ = both.losses(params, state, BATCHES["left"], context(train=True))
    for task in ("left", "right"):
        alone, _ = head(task).losses(params, state, BATCHES["left"], context(train=True))
        np.testing.assert_allclose(values[f"{task}/supervised"], alone["supervised"], rtol=1e-6)


@pytest.mark.parametrize("aggregate", [None, pcgrad()])
def test_one_task_is_that_objective(aggregate):
    batch, runs = batch_of(4), []
    for objective, combined in ((head("left"), None), (multitask({"left": head("left")}), aggregate)):
        trainer = Trainer(objective, optax.adam(0.1), combined)
        state = trainer.init(0, batch)
        for _ in range(3):
            state, metrics = trainer.step(state, batch)
        runs.append((state.params["model"], metrics["loss"]))
    close = np.testing.assert_array_equal if aggregate is None else lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(close, *runs)


def test_training_with_pcgrad_is_algorithm_1_on_the_tasks_gradients():
    """Two tasks, where the order does not matter: the update is by hand from each task's own gradient."""
    batches = {"left": {**batch_of(4), "y": np.full((4, 2), 10, np.float32)}}
    batches["right"] = {"x": batches["left"]["x"], "y": -batches["left"]["y"]}  # where the other does not want to go
    both = {"left": head("left"), "right": supervised(shared(), optax.losses.squared_error, output="left")}
    trainer = Trainer(multitask(both), optax.sgd(0.1), pcgrad())
    state = trainer.init(0, batches)
    before = jax.tree.map(np.array, state.params["model"])
    grads = []
    for task, child in both.items():
        loss = lambda p: child.losses({"model": p}, {"model": {}}, batches[task], context(train=True))[0]["supervised"]
        grads.append(np.asarray(jax.flatten_util.ravel_pytree(jax.jit(jax.grad(loss))(before))[0]))
    assert grads[0] @ grads[1] < 0
    state, _ = trainer.step(state, batches)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    moved = (flat(before) - flat(state.params["model"])) / 0.1
    expected = algorithm_1(np.array(grads), [(0, 1), (0, 1)])
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-4)


def tracking():
    def init(key, x):
        return {"w": jax.random.normal(key, (4, 2))}, {"mean": jnp.zeros(4)}

    def apply(params, state, x, *, train=False, key=None):
        return {"logits": x @ params["w"]}, {"mean": (state["mean"] + x.mean(0)) / 2} if train else state

    return Model(init, apply)


@pytest.mark.parametrize("aggregate", [None, pcgrad()])
def test_the_state_of_the_network_threads_through_the_tasks_in_order(aggregate):
    child = supervised(tracking(), optax.losses.squared_error)
    trainer = Trainer(multitask({"left": child, "right": child}), optax.sgd(0.1), aggregate)
    state, _ = trainer.step(trainer.init(0, BATCHES), BATCHES)
    expected = (BATCHES["left"]["x"].mean(0) / 2 + BATCHES["right"]["x"].mean(0)) / 2
    np.testing.assert_allclose(state.state["model"]["mean"], expected, rtol=1e-5, atol=1e-7)


def test_two_byol_children_keep_their_slots_apart():
    def dense(key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], 3))}

    linear = lambda p, x: x @ p["w"]
    noise = lambda key, x: x + 0.1 * jax.random.normal(key, x.shape)

    def ssl(momentum):
        return byol(shared(), noise, from_functions(dense, linear), from_functions(dense, linear), momentum)

    trainer = Trainer(multitask({"left": ssl(0.0), "right": ssl(1.0)}), optax.sgd(0.1))
    state = trainer.init(0, BATCHES)
    held = jax.tree.map(np.array, state.state["right"]["target"]["params"])
    state, metrics = trainer.step(state, BATCHES)
    assert {"left/byol", "right/byol", "left/feature_std"} <= set(metrics)
    assert set(state.params) == {"model", "left", "right"}
    assert set(state.params["left"]) == {"projector", "predictor"}
    targets = {task: state.state[task]["target"]["params"] for task in ("left", "right")}
    jax.tree.map(np.testing.assert_array_equal, targets["left"]["model"], state.params["model"])  # momentum 0 copies
    jax.tree.map(np.testing.assert_array_equal, targets["left"]["projector"], state.params["left"]["projector"])
    jax.tree.map(np.testing.assert_array_equal, targets["right"], held)  # momentum 1 holds
    heads = [np.asarray(state.params[task]["projector"]["w"]) for task in ("left", "right")]
    assert np.abs(heads[0] - heads[1]).max() > 1e-3
    assert trainer.predict(state, BATCHES)["right"]["features"].shape == (3, 3)


def test_boundaries_reach_each_task_with_its_own_data():
    seen = {}

    def watching(task):
        def boundary(params, state, batches, ctx, event):
            seen[task] = event, None if batches is None else batches["x"].shape
            return params, state

        return head(task)._replace(boundary=boundary)

    objective = multitask({"left": watching("left"), "right": watching("right")})
    params, state = objective.init(KEY, BATCHES)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), BATCHES)
    objective.boundary(params, state, stacked, context(), "end")
    assert seen == {"left": ("end", (2, 5, 4)), "right": ("end", (2, 3, 4))}
    objective.boundary(params, state, None, context(), "start")
    assert seen == {"left": ("start", None), "right": ("start", None)}


def test_networks_that_differ_and_names_that_clash():
    other = supervised(shared(wide=5), optax.losses.squared_error, output="right")
    trainer = Trainer(multitask({"left": head("left"), "right": other}), optax.sgd(0.1))
    with pytest.raises(ValueError, match='the network of "right" differs from that of "left"'):
        trainer.init(0, BATCHES)
    assert trainer._init._cache_size() == 0
    with pytest.raises(ValueError, match="objectives: is empty"):
        multitask({})
    for name in ("model", "taps", "a/b"):
        with pytest.raises(ValueError, match=f'"{name}" cannot name a task'):
            multitask({name: head("left")})
    assert isinstance(multitask({"a": head("left")}), Objective)


def test_snapshots_of_later_children_are_of_the_shared_network():
    objective = pd.multitask({"a": build(("supervised",)), "b": build(("averaged", "byol"))})
    params, state = objective.init(jax.random.key(0), batch_for(("supervised",)))
    for snapshot in (state["b"]["average"]["model"], state["b"]["target"]["params"]["model"]):
        jax.tree.map(np.testing.assert_array_equal, snapshot, params["model"])
