"""BYOL: the loss by NumPy loops, the target as a closed sum of the past, and what must not move it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paradigms import Model, Trainer, byol, context, from_functions

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
A, B = RNG.normal(size=(2, 5, 4)).astype(np.float32)  # two views of five examples
BATCH = {"x": A}


def dense(wide):
    def init(key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], wide))}

    return from_functions(init, lambda p, x: jnp.tanh(x @ p["w"]))


def encoder():
    def init(key, x):
        return {"w": jax.random.normal(key, (4, 3))}

    return from_functions(init, lambda p, x: {"features": jnp.tanh(x @ p["w"]), "logits": x @ p["w"]})


def tracking():
    """An encoder whose state is a running mean of its inputs, rate 1/2, subtracted in evaluation mode."""

    def init(key, x):
        return {"w": jax.random.normal(key, (4, 3))}, {"mean": jnp.zeros(4)}

    def apply(params, state, x, *, train=False, key=None):
        return {"features": x @ params["w"]}, {"mean": (state["mean"] + x.mean(0)) / 2} if train else state

    return Model(init, apply)


def two_views():
    views = itertools.cycle([A, B])
    return lambda key, x: jnp.asarray(next(views))[: len(x)]


def noise(key, x):
    return x + 0.1 * jax.random.normal(key, x.shape)


def make(model=None, views=None, **settings):
    return byol(model or encoder(), views or two_views(), dense(6), dense(6), **settings)


def forward(params, x, predict):
    """The network's unit vectors, one example at a time."""
    found = []
    for row in x.astype(float):
        z = np.tanh(np.tanh(row @ np.asarray(params["model"]["w"])) @ np.asarray(params["projector"]["w"]))
        z = np.tanh(z @ np.asarray(params["predictor"]["w"])) if predict else z
        found.append(z / np.sqrt((z**2).sum()))
    return np.array(found)


def other(params, key=5):
    """A target that is not the online network."""
    keys = iter(jax.random.split(jax.random.key(key), 10))
    return jax.tree.map(lambda p: p + jax.random.normal(next(keys), p.shape), params)


@pytest.mark.parametrize("weight", [None, np.array([1, 0, 2, 0, 0.5], np.float32)])
def test_the_loss_is_4_less_twice_the_cosines(weight):
    objective, batch = make(), BATCH if weight is None else {**BATCH, "weight": weight}
    params, state = objective.init(KEY, batch)
    target = other(state["target"]["params"])
    state["target"]["params"] = target
    values, _ = objective.losses(params, state, batch, context(train=True))
    weight = np.ones(5) if weight is None else weight
    cosines = sum((forward(params, here, True) * forward(target, there, False)).sum(1) for here, there in ((A, B), (B, A)))
    np.testing.assert_allclose(values["byol"], (weight * (4 - 2 * cosines)).sum() / weight.sum(), rtol=1e-5)


def test_padding_equals_dropping_the_rows():
    padded, short = make(), make()
    params, state = padded.init(KEY, BATCH)
    weight = np.array([1, 1, 1, 0, 0], np.float32)
    grads = []
    for objective, batch in ((padded, {**BATCH, "weight": weight}), (short, {"x": A[:3]})):
        loss = lambda p: objective.losses(p, state, batch, context(train=True))[0]["byol"]
        grads.append(jax.jit(jax.grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *grads)


def test_no_gradient_reaches_the_target():
    """At init the target equals the online network, so only frozen copies tell the two roles apart."""
    objective = make()
    params, state = objective.init(KEY, BATCH)
    state = jax.tree.map(jnp.copy, state)

    def loss(online, target):
        def unit(params, x, predict):
            z = jnp.tanh(jnp.tanh(x @ params["model"]["w"]) @ params["projector"]["w"])
            z = jnp.tanh(z @ online["predictor"]["w"]) if predict else z
            return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

        return sum(
            4 / 2 - 2 * jnp.mean(jnp.sum(unit(online, u, True) * unit(target, v, False), -1)) for u, v in ((A, B), (B, A))
        )

    grads = jax.jit(jax.grad(lambda p: objective.losses(p, state, BATCH, context(train=True))[0]["byol"]))(params)
    frozen = jax.jit(jax.grad(loss))(params, jax.tree.map(jnp.copy, params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, frozen)
    leaking = jax.jit(jax.grad(lambda p: loss(p, p)))(params)
    assert np.abs(np.asarray(leaking["model"]["w"]) - np.asarray(grads["model"]["w"])).max() > 1e-2
    into = jax.jit(jax.grad(lambda s: objective.losses(params, s, BATCH, context(train=True))[0]["byol"]))(state)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(into["target"]["params"]))


@pytest.mark.parametrize("momentum", [0.7, 0.0, 1.0, "schedule"])
def test_the_target_is_a_moving_average_of_the_params_after_each_update(momentum):
    rate = (lambda step: step / (step + 1)) if momentum == "schedule" else momentum  # a plain mean of what came after
    trainer = Trainer(make(views=noise, momentum=rate), optax.sgd(0.5))
    state = trainer.init(0, BATCH)
    path = [np.array(state.params["model"]["w"])]
    heads = [np.array(state.params["projector"]["w"])]
    np.testing.assert_array_equal(state.state["target"]["params"]["model"]["w"], path[0])
    for _ in range(4):
        state, _ = trainer.step(state, BATCH)
        path.append(np.array(state.params["model"]["w"]))
        heads.append(np.array(state.params["projector"]["w"]))
    assert np.abs(path[4] - path[0]).max() > 1e-2
    for slot, w in (("model", path), ("projector", heads)):
        expected = {
            0.7: 0.7**4 * w[0] + 0.3 * sum(0.7 ** (4 - k) * w[k] for k in range(1, 5)),
            0.0: w[4],
            1.0: w[0],
            "schedule": sum(w[1:]) / 4,
        }[momentum]
        exact = momentum in (0.0, 1.0)
        np.testing.assert_allclose(state.state["target"]["params"][slot]["w"], expected, rtol=0 if exact else 1e-5)
    assert "predictor" not in state.state["target"]["params"]


def test_the_statistics_of_the_target_are_its_own():
    objective = byol(tracking(), two_views(), dense(6), dense(6), momentum=0.5)
    params, state = objective.init(KEY, BATCH)
    online, slow = RNG.normal(size=(2, 4)).astype(np.float32)
    state["model"]["mean"], state["target"]["state"]["model"]["mean"] = jnp.asarray(online), jnp.asarray(slow)
    _, (new, _) = objective.losses(params, state, BATCH, context(train=True))
    a, b = A.mean(0), B.mean(0)
    np.testing.assert_allclose(new["model"]["mean"], ((online + a) / 2 + b) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["target"]["state"]["model"]["mean"], ((slow + b) / 2 + a) / 2, rtol=1e-5, atol=1e-6)
    _, after = objective.after(params, new, None, context())
    jax.tree.map(np.testing.assert_array_equal, after["target"]["state"], new["target"]["state"])
    _, (still, _) = objective.losses(params, state, BATCH, context(train=False))
    jax.tree.map(np.testing.assert_array_equal, still, state)


def test_predictions_are_the_encoder_s():
    trainer = Trainer(make(views=noise), optax.sgd(0.1))
    state = trainer.init(0, BATCH)
    outputs = trainer.predict(state, BATCH)
    w = np.asarray(state.params["model"]["w"])
    np.testing.assert_allclose(outputs["features"], np.tanh(A @ w), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["logits"], A @ w, rtol=1e-5, atol=1e-6)


def test_a_model_without_features_and_settings_out_of_range():
    trainer = Trainer(make(dense(3), noise), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r'model: byol needs an output "features" and got \[\'logits\'\]'):
        trainer.init(0, BATCH)
    assert trainer._init._cache_size() == 0
    for momentum in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"momentum={momentum}"):
            make(momentum=momentum)
    with pytest.raises(ValueError, match='slot "projector" is already taken'):
        make(name="projector").init(KEY, BATCH)


def test_every_network_and_view_has_a_key_of_its_own():
    """Else two networks of one width would drop the same units."""
    keys = []

    def recording(model):
        def apply(params, state, x, *, train=False, key=None):
            keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
            return model.apply(params, state, x, train=train, key=key)

        return Model(model.init, apply)

    objective = byol(recording(encoder()), noise, recording(dense(6)), recording(dense(6)))
    params, state = jax.eval_shape(lambda: make().init(KEY, BATCH))
    params, state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), (params, state))
    objective.losses(params, state, BATCH, context(KEY, train=True))
    assert len(keys) == 10  # two views: encoder, projector and predictor, and the target's two
    assert len(set(keys)) == len(keys)


def test_the_spread_is_that_of_the_rows_with_weight():
    objective = make(views=noise)
    params, state = objective.init(KEY, BATCH)
    still = make(views=lambda key, x: x)
    whole = still.losses(params, state, {"x": A[:3]}, context(KEY, train=True))[1][1]["feature_std"]
    padded = {"x": A, "weight": np.array([1, 1, 1, 0, 0], np.float32)}
    np.testing.assert_allclose(
        still.losses(params, state, padded, context(KEY, train=True))[1][1]["feature_std"], whole, rtol=1e-5
    )
    z = np.stack(forward({"model": params["model"], "projector": params["projector"]}, A[:3], False))
    np.testing.assert_allclose(whole, z.std(0).mean(), rtol=1e-4)
