"""Classifiers made at test time on features of a plainly trained child: NumPy means, and a hand-written loop of fitting."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paradigms import Trainer, context, ewc, from_functions, supervised
from paradigms.meta.baselines import few_shot, fine_tuned
from paradigms.meta.heads import prototypes, ridge
from paradigms.meta.parts import everything, only

KEY = jax.random.key(2)
WAYS, WIDTH = 3, 4


def net():
    """6 -> 4 features -> 5 logits."""

    def init(key, x):
        a, b = jax.random.split(key)
        weights = {"encoder": {"w": jax.random.normal(a, (6, WIDTH)), "b": jnp.zeros(WIDTH)}}
        return {**weights, "head": {"w": jax.random.normal(b, (WIDTH, 5))}}

    def apply(p, x):
        features = jnp.tanh(x @ p["encoder"]["w"] + p["encoder"]["b"][None])
        return {"features": features, "logits": features @ p["head"]["w"]}

    return from_functions(init, apply)


CHILD = supervised(net())


def plain(rng, rows=8):
    return {"x": rng.normal(size=(rows, 6)).astype(np.float32), "y": rng.integers(0, 5, rows).astype(np.int32)}


def episodes(rng, tasks=3, shots=6, queries=4):
    def part(rows):
        y = np.tile(np.arange(rows, dtype=np.int32) % WAYS, (tasks, 1))
        return {"x": rng.normal(size=(tasks, rows, 6)).astype(np.float32), "y": y}

    return {"support": {**part(shots), "weight": np.ones((tasks, shots), np.float32)}, "query": part(queries)}


def features(params, x):
    encoder = jax.device_get(params["model"]["encoder"])
    return np.tanh(x @ encoder["w"] + encoder["b"])


def make(kind, child=CHILD):
    return few_shot(child, prototypes(WAYS)) if kind == "few_shot" else fine_tuned(child, optax.sgd(0.5), 5, WAYS)


def test_nearest_centroid(rng):
    batch, objective = episodes(rng), make("few_shot")
    batch["support"]["weight"][1, 4] = 0
    params, state = objective.init(KEY, plain(rng))
    outputs, _ = jax.jit(objective.predict)(params, state, batch, context(KEY))
    nearest = []
    for t in range(3):
        shots, y, keep = features(params, batch["support"]["x"][t]), batch["support"]["y"][t], batch["support"]["weight"][t] > 0
        centres = [shots[(y == k) & keep].mean(0) for k in range(WAYS)]
        for query in features(params, batch["query"]["x"][t]):
            nearest.append(np.argmin([np.linalg.norm(query - c) for c in centres]))
    np.testing.assert_array_equal(np.argmax(outputs["logits"], -1), nearest)


def test_a_head_that_learns_is_used_as_it_starts(rng):
    batch, objective = episodes(rng), few_shot(CHILD, ridge(WAYS, penalty=0.5))
    params, state = objective.init(KEY, plain(rng))
    assert set(params) == {"model"}
    got = objective.predict(params, state, batch, context())[0]["logits"][:4]
    shots, queries = (features(params, batch[part]["x"][0]) for part in ("support", "query"))
    w = np.linalg.solve(shots.T @ shots + 0.5 * np.eye(WIDTH), shots.T @ np.eye(WAYS)[batch["support"]["y"][0]])
    np.testing.assert_allclose(got, queries @ w, rtol=1e-3, atol=1e-4)


def fit_by_hand(params, episode, inner, steps, adapted):
    """Logits of the queries; `adapted` are the names of the network's parts that move."""

    def loss(moving):
        encoder = moving.get("encoder", params["model"]["encoder"])
        found = jnp.tanh(episode["support"]["x"] @ encoder["w"] + encoder["b"][None])
        values = optax.losses.softmax_cross_entropy_with_integer_labels(
            found @ moving["kernel"] + moving["bias"][None], episode["support"]["y"]
        )
        return (values * episode["support"]["weight"]).sum() / episode["support"]["weight"].sum()

    moving = {name: params["model"][name] for name in adapted} | {"kernel": jnp.zeros((WIDTH, WAYS)), "bias": jnp.zeros(WAYS)}
    opt_state = inner.init(moving)
    for _ in range(steps):
        updates, opt_state = inner.update(jax.grad(loss)(moving), opt_state, moving)
        moving = optax.apply_updates(moving, updates)
    moved = {"model": {"encoder": moving.get("encoder", params["model"]["encoder"])}}
    return features(moved, episode["query"]["x"]) @ np.asarray(moving["kernel"]) + np.asarray(moving["bias"])


@pytest.mark.parametrize(("adapts", "adapted"), [(None, []), (everything(), ["encoder"])], ids=["frozen", "all"])
def test_fine_tuning_is_a_loop_over_each_tasks_support(rng, adapts, adapted):
    batch, inner = episodes(rng), optax.sgd(0.5, momentum=0.9)
    batch["support"]["weight"][2, :2] = 0
    params, state = fine_tuned(CHILD, inner, 4, WAYS, adapts).init(KEY, plain(rng))

    @jax.jit
    def predict(batch, steps):
        return fine_tuned(CHILD, inner, steps, WAYS, adapts).predict(params, state, batch, context(KEY))[0]

    logits = predict(batch, 4)["logits"]
    for t in range(3):
        expected = fit_by_hand(params, jax.tree.map(lambda leaf: leaf[t], batch), inner, 4, adapted)
        np.testing.assert_allclose(logits[4 * t : 4 * t + 4], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(predict(batch, 0)["logits"], np.zeros((12, WAYS)))
    static = fine_tuned(CHILD, inner, 4, WAYS, adapts)
    alone, _ = static.predict(params, state, jax.tree.map(lambda leaf: leaf[1:2], batch), context(jax.random.key(9)))
    np.testing.assert_allclose(alone["logits"], logits[4:8], rtol=1e-5, atol=1e-6)


def test_only_what_is_chosen_adapts(rng):
    batch = episodes(rng)
    params, state = CHILD.init(KEY, plain(rng))
    frozen, useless, moved = (
        fine_tuned(CHILD, optax.sgd(0.5), 3, WAYS, adapts).predict(params, state, batch, context())[0]
        for adapts in (None, only("head"), only("b"))
    )
    np.testing.assert_allclose(useless["logits"], frozen["logits"], rtol=1e-5)  # the old head has no gradient
    np.testing.assert_array_equal(useless["features"], frozen["features"])
    assert np.abs(moved["features"] - frozen["features"]).max() > 1e-2


@pytest.mark.parametrize("kind", ["few_shot", "fine_tuned"])
def test_training_and_plain_answers_are_the_childs(rng, kind):
    child, batch = ewc(CHILD, 10.0), plain(rng)
    objective, ctx = make(kind, child), context(KEY, train=True)
    params, state = objective.init(KEY, batch)
    jax.tree.map(np.testing.assert_array_equal, (params, state), child.init(KEY, batch))
    same = [o.losses(params, state, batch, ctx) for o in (objective, child)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    same = [o.predict(params, state, batch, context())[0] for o in (objective, child)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    assert (objective.after, objective.boundary) == (child.after, child.boundary)
    answers, after = objective.predict(params, state, episodes(rng), context())
    assert answers["logits"].shape == (12, WAYS)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("kind", ["few_shot", "fine_tuned"])
def test_a_child_without_features_raises(rng, kind):
    bare = supervised(from_functions(lambda key, x: {"w": jnp.ones((6, 5))}, lambda p, x: x @ p["w"]))
    trainer = Trainer(make(kind, bare), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"child: gives \['logits'\] and no \"features\""):
        trainer.init(0, plain(rng))
    assert trainer._init._cache_size() == 0


def test_settings_out_of_range_raise():
    with pytest.raises(ValueError, match="steps=-1: must be an integer, 0 or more"):
        fine_tuned(CHILD, optax.sgd(0.1), -1, WAYS)
    with pytest.raises(ValueError, match="ways=0: must be an integer, 1 or more"):
        fine_tuned(CHILD, optax.sgd(0.1), 1, 0)
