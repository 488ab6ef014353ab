"""Importances against one example and one class at a time, and what makes them cheap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paradigms import context, from_functions, from_nnx, supervised
from paradigms.continual.importance import (
    batched_fisher,
    empirical_fisher,
    exact_fisher,
    labelled_fisher,
    output_sensitivity,
    sampled_fisher,
)
from paradigms.nn import MLP

KEY = jax.random.key(0)


class Conv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (2, 2), rngs=rngs)
        self.head = nnx.Linear(18, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).reshape(len(x), -1))


def tied(params, x):
    """One kernel read twice, and a scale an output."""
    h = jnp.tanh(x @ params["w"])
    return jnp.tanh(h @ params["w"]) * params["scale"][None]


NETWORKS = {
    "dense": (from_nnx(lambda rngs: MLP(9, (4, 4), 3, rngs=rngs)), (9,)),
    "convolutional": (from_nnx(lambda rngs: Conv(rngs)), (3, 3, 1)),
    "tied": (
        from_functions(
            lambda key, x: {"w": jax.random.normal(key, (3, 3)), "scale": jnp.arange(1.0, 4.0)},
            tied,
        ),
        (3,),
    ),
}


def data_of(shape, n=2, rows=3, seed=0):
    rng = np.random.default_rng(seed)
    weight = np.array([[1.0, 2.0, 0.0], [1.0, 1.0, 0.5]])[:n, :rows]
    return {"x": rng.normal(size=(n, rows, *shape)), "y": rng.integers(0, 3, (n, rows)).astype(np.int32), "weight": weight}


def setting(name, active=None):
    model, shape = NETWORKS[name]
    child, data = supervised(model, active=active), data_of(shape)
    params, state = child.init(KEY, {"x": data["x"][0].astype(np.float32), "y": data["y"][0]})
    return child, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), state, data


def logits_of(child, state, x):
    return lambda params: child.predict(params, state, {"x": x[None]}, context())[0]["logits"][0]


def examples(data):
    for x, y, weight in zip(*(data[k].reshape(-1, *data[k].shape[2:]) for k in ("x", "y", "weight")), strict=True):
        yield x, y, weight / data["weight"].sum()


def check(found, expected, name="dense"):
    rtol = 1e-5 if name == "dense" else 1e-10  # that network answers in float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), found, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_importances_are_those_of_one_example_at_a_time(name, x64):
    child, params, state, data = setting(name)

    @jax.jit
    def dense(params, x, y):
        """The exact, the empirical and the labelled Fisher and the sensitivity on one example, from its Jacobians."""
        logits = logits_of(child, state, x)
        scores = jax.jacrev(lambda p: jax.nn.log_softmax(logits(p)))(params)
        p = jax.nn.softmax(logits(params))
        exact = jax.tree.map(lambda j: jnp.tensordot(p, j**2, 1), scores)
        norm = jax.grad(lambda p: jnp.sum(logits(p) ** 2))(params)
        empirical = jax.tree.map(lambda j: j[y] ** 2, scores)
        return exact, empirical, jax.tree.map(lambda f: p[y] * f, empirical), jax.tree.map(jnp.abs, norm)

    parts = [jax.tree.map(lambda leaf, w=w: w * leaf, dense(params, x, y)) for x, y, w in examples(data)]
    expected = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    estimators = (exact_fisher, empirical_fisher, labelled_fisher, output_sensitivity)
    found = jax.jit(lambda p: tuple(estimate(child, p, state, data, context()) for estimate in estimators))(params)
    check(found, expected, name)
    assert min(float(leaf.max()) for leaf in jax.tree.leaves(found)) > 0


def test_sampled_labels_give_the_exact_fisher_in_the_mean(x64):
    child, params, state, data = setting("dense")
    exact = exact_fisher(child, params, state, data, context())["model"]["head"]["kernel"]
    draw = lambda key: sampled_fisher(child, params, state, data, context(key))["model"]["head"]["kernel"]
    draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 2000)))
    assert (np.abs(draws.mean(0) - exact) < 5 * draws.std(0) / np.sqrt(2000) + 1e-12).all()
    assert draws.std(0).max() > 0


def test_the_batched_fisher_is_the_square_of_the_mean_gradient(x64):
    child, params, state, data = setting("tied")
    score = jax.jit(jax.grad(lambda p, x, y: -jax.nn.log_softmax(logits_of(child, state, x)(p))[y]))
    found = jax.jit(lambda p: batched_fisher(child, p, state, data, context()))(params)
    expected = 0
    for i in range(2):
        batch = {name: leaf[i] for name, leaf in data.items()}
        mean = 0.0
        for x, y, w in zip(batch["x"], batch["y"], batch["weight"] / batch["weight"].sum(), strict=True):
            grad = score(params, x, y)["model"]["w"]
            mean = mean + w * grad
        expected += np.asarray(mean) ** 2 * batch["weight"].sum() / data["weight"].sum()
    np.testing.assert_allclose(found["model"]["w"], expected, rtol=1e-10)


def test_closed_outputs_contribute_nothing(x64):
    """With output 2 closed, the importances are those of a network that never had it."""
    child, params, state, data = setting("dense", active=lambda batch, ctx: jnp.array([[True, True, False]]))
    data["y"] = data["y"] % 2
    head = params["model"]["head"]
    cut = {"model": {**params["model"], "head": {"kernel": head["kernel"][:, :2], "bias": head["bias"][:2]}}}
    smaller = supervised(from_nnx(lambda rngs: MLP(9, (4, 4), 2, rngs=rngs)))
    estimators = (exact_fisher, sampled_fisher, empirical_fisher, output_sensitivity)
    every = lambda child: jax.jit(lambda p: [estimate(child, p, state, data, context()) for estimate in estimators])
    for found, expected in zip(every(child)(params), every(smaller)(cut), strict=True):
        found, expected = found["model"], expected["model"]
        assert not found["head"]["kernel"][:, 2].any()
        assert found["head"]["bias"][2] == 0
        found["head"] = {"kernel": found["head"]["kernel"][:, :2], "bias": found["head"]["bias"][:2]}
        check(found, expected)


def test_dense_layers_hold_no_gradient_an_example():
    """No array of examples x kernel appears, at any depth of the program."""
    model = from_nnx(lambda rngs: MLP(11, (13,), 3, rngs=rngs))
    child, x = supervised(model), np.zeros((2, 7, 11), np.float32)
    data = {"x": x, "y": np.zeros((2, 7), np.int32)}
    params, state = child.init(KEY, {"x": x[0], "y": data["y"][0]})
    for estimate in (exact_fisher, sampled_fisher, empirical_fisher, output_sensitivity):
        program = str(jax.make_jaxpr(lambda p: estimate(child, p, state, data, context()))(params))
        assert "7,11,13]" not in program
        assert "7,13,3]" not in program
        assert "f32[11,13]" in program
