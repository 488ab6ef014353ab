"""The adapters: what a network's randomness, state and outputs become."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import paradigms as pd

X = np.random.default_rng(0).random((8, 6), np.float32)
Y = np.arange(8) % 3
KEY = jax.random.key(0)


class Normed(linen.Module):
    """Batch statistics and dropout, told of training by ``train``."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(5)(x))
        self.sow("intermediates", "hidden", x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return {"features": x, "logits": linen.Dense(3)(x)}


class Dropped(linen.Module):
    """Told of training by ``deterministic``."""

    @linen.compact
    def __call__(self, x, deterministic=True):
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=deterministic)(x))


class Nnx(nnx.Module):
    """As `Normed`."""

    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(6, 5, rngs=rngs), nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.5), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        x = self.dropout(self.norm(self.first(x)), rngs=rngs)
        return {"features": x, "logits": self.head(x)}


MODELS = {
    "linen": pd.from_linen(Normed()),
    "nnx": pd.from_nnx(lambda rngs: Nnx(rngs)),
    "linen, deterministic": pd.from_linen(Dropped()),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_dropout_follows_the_key_and_evaluation_has_none(model):
    params, state = model.init(KEY, X)
    kinds = {"train": True, "key": jax.random.key(1)}, {"train": True, "key": jax.random.key(2)}, {"key": jax.random.key(1)}
    (a, _), (again, _), (b, _), (still, same), (quiet, _) = (
        model.apply(params, state, X, **kind) for kind in (kinds[0], kinds[0], kinds[1], kinds[2], {})
    )
    assert np.array_equal(a["logits"], again["logits"])
    assert not np.allclose(a["logits"], b["logits"])
    assert not np.allclose(a["logits"], still["logits"])
    assert np.array_equal(still["logits"], quiet["logits"])
    jax.tree.map(np.testing.assert_array_equal, state, same)


@pytest.mark.parametrize("model", [MODELS["linen"], MODELS["nnx"]], ids=["linen", "nnx"])
def test_state_is_the_batch_statistics_and_moves_in_training_alone(model):
    params, state = model.init(KEY, X)
    _, moved = model.apply(params, state, X, train=True, key=KEY)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    assert len(jax.tree.leaves(state)) == 2  # mean and variance: no keys, no sown values
    first = next(p for p in params.values() if np.shape(p.get("kernel")) == (6, 5))
    batch = X @ np.asarray(first["kernel"]) + np.asarray(first["bias"])
    expected = {"mean": 0.1 * batch.mean(0), "var": 0.9 + 0.1 * batch.var(0)}
    for path, leaf in jax.tree.leaves_with_path(moved):
        name = next(name for name in expected if name in jax.tree_util.keystr(path))
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-6)


def test_modules_of_flax_as_they_are():
    layers = [linen.Dense(5), linen.relu, linen.Dense(3)]
    for model in (pd.from_linen(linen.Sequential(layers)), pd.from_nnx(lambda rngs: nnx.Linear(6, 3, rngs=rngs))):
        trainer = pd.Trainer(pd.supervised(model), optax.adam(1e-2))
        batch = {"x": X, "y": Y}
        state = trainer.init(0, batch)
        state, first = trainer.step(state, batch)
        for _ in range(20):
            state, last = trainer.step(state, batch)
        assert last["loss"] < first["loss"]
        assert list(trainer.predict(state, batch)) == ["logits"]


def test_a_random_stream_in_the_state_is_refused():
    with pytest.raises(ValueError, match="without rngs"):
        pd.from_nnx(lambda rngs: nnx.Dropout(0.5, rngs=rngs))


def test_functions_of_params_and_inputs():
    model = pd.from_functions(lambda key, x: {"w": jnp.ones((x.shape[-1], 2))}, lambda params, x: x @ params["w"])
    params, state = model.init(KEY, X)
    outputs, after = model.apply(params, state, X, train=True, key=KEY)
    assert state == after == {}
    np.testing.assert_allclose(outputs["logits"], X.sum(1, keepdims=True) * np.ones((1, 2)), rtol=1e-6)
