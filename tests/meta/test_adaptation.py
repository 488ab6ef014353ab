"""What adapts, at which rates, under which losses and statistics: each against its formula, or what reaches the network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from paradigms import Model, Objective, context, from_functions, from_nnx, maml, meta, nn, supervised
from paradigms.meta.context import with_context
from paradigms.meta.maml import multi_step
from paradigms.meta.parts import select

KEY = jax.random.key(2)


def quadratic():
    """theta'A theta/2 - b'theta, A and b from the batch's only row; theta is "u", of two numbers, and "v", of one."""

    def losses(params, state, batch, ctx):
        theta = jnp.concatenate([params["model"]["u"], params["model"]["v"]])
        return {"q": theta @ batch["a"][0] @ theta / 2 - batch["b"][0] @ theta}, (state, {})

    return Objective(lambda key, batch: ({"model": {"u": jnp.zeros(2), "v": jnp.zeros(1)}}, {"model": {}}), losses, losses)


def quadratics(rng, tasks):
    root = rng.normal(size=(2, tasks, 1, 3, 3))
    a = root @ root.swapaxes(-1, -2) / 3 + np.eye(3) / 2
    b = rng.normal(size=(2, tasks, 1, 3))
    return {name: {"a": a[i], "b": b[i]} for i, name in enumerate(("support", "query"))}


def per_task(batch):
    return [
        [batch[part][leaf][t, 0] for part in ("support", "query") for leaf in "ab"] for t in range(len(batch["query"]["b"]))
    ]


def split(theta):
    return {"u": jnp.asarray(theta[:2]), "v": jnp.asarray(theta[2:])}


def joined(tree):
    return np.concatenate([tree["u"], tree["v"]])


def gradient(objective, params, state, batch, ctx=None):
    """(value, gradient, new state)."""
    ctx = context(KEY, train=True) if ctx is None else ctx

    def summed(params):
        values, (new, _) = objective.losses(params, state, batch, ctx)
        return sum(values.values()), new

    (value, new), grads = jax.jit(jax.value_and_grad(summed, has_aux=True))(params)
    return value, grads, new


def episodes(rng, tasks=2, support=4, query=3, dtype=np.float64):
    def part(rows):
        return {"x": rng.normal(size=(tasks, rows, 2)).astype(dtype), "y": rng.normal(size=(tasks, rows, 1)).astype(dtype)}

    return {"support": part(support), "query": part(query)}


def differences(function, tree, size=1e-5):
    point, unravel = jax.flatten_util.ravel_pytree(tree)
    moves = size * jnp.eye(len(point))
    values = jax.jit(jax.vmap(lambda p: function(unravel(p))))(jnp.concatenate([point[None] + moves, point[None] - moves]))
    return unravel((values[: len(point)] - values[len(point) :]) / (2 * size))


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


# what adapts

PARAMS = {
    "model": {"encoder": {"layer": {"kernel": jnp.ones(2), "head": jnp.ones(3)}}, "head": {"bias": jnp.ones(4)}},
    "logvar": jnp.ones(5),
    "taps": {"head": jnp.ones(6)},
}


def paths(tree):
    return {"/".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(tree)}


def test_parts_choose_by_names_anywhere_in_the_path_and_never_taps():
    kernel, inner, bias = "model/encoder/layer/kernel", "model/encoder/layer/head", "model/head/bias"
    assert paths(select(PARAMS, meta.everything())) == {kernel, inner, bias, "logvar"}
    assert paths(select(PARAMS, meta.only("head"))) == {inner, bias}
    assert paths(select(PARAMS, meta.only("encoder", "logvar"))) == {kernel, inner, "logvar"}
    assert paths(select(PARAMS, meta.without("head"))) == {kernel, "logvar"}
    assert paths(select(PARAMS, meta.without("head", "model"))) == {"logvar"}
    chosen = select(PARAMS, meta.only("head"))
    assert chosen == {"model": {"encoder": {"layer": {"head": chosen["model"]["encoder"]["layer"]["head"]}}, **chosen["model"]}}
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(chosen))
    fresh = select(PARAMS, meta.reset(meta.only("head")))
    assert paths(fresh) == {inner, bias}
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(fresh))


@pytest.mark.parametrize("part", [meta.only("hea"), meta.without("model", "logvar"), meta.only("taps")])
def test_a_part_that_chooses_nothing_raises(part):
    with pytest.raises(ValueError, match=r"adapts: chooses none.*model/encoder"):
        select(PARAMS, part)


def net(seen=None):
    """x -> tanh(x A) B; `seen` collects (sum of body, sum of head) of every pass."""

    def init(key, x):
        a, b = jax.random.split(key)
        return {"body": {"a": jax.random.normal(a, (2, 3))}, "head": {"b": jax.random.normal(b, (3, 1))}}

    def apply(p, x):
        if seen is not None:
            jax.debug.callback(lambda a, b: seen.append((a, b)), p["body"]["a"], p["head"]["b"])
        return jnp.tanh(x @ p["body"]["a"]) @ p["head"]["b"]

    return supervised(from_functions(init, apply), optax.losses.squared_error)


@pytest.mark.parametrize("part", [meta.only("head"), meta.without("head"), meta.everything()], ids=["ANIL", "BOIL", "MAML"])
def test_the_network_receives_fast_weights_where_they_adapt_and_slow_ones_elsewhere(rng, part):
    seen, batch = [], episodes(rng, tasks=2, dtype=np.float32)
    objective = maml(net(seen), optax.sgd(0.3), 2, adapts=part)
    params, state = objective.init(KEY, batch)
    jax.effects_barrier()
    for call in (objective.losses, objective.predict):
        seen.clear()
        call(params, state, batch, context(KEY, train=call is objective.losses))
        jax.effects_barrier()
        assert len(seen) == 2 * (2 + 1)
        for place, slow in enumerate((params["model"]["body"]["a"], params["model"]["head"]["b"])):
            same = [np.array_equal(passed[place], slow) for passed in seen]
            adapts = part.chosen(("model", ("body", "head")[place]))
            assert sum(same) == (2 if adapts else 6)  # where it adapts, the first pass of each task alone


def test_anil_keeps_the_path_through_the_support_features(x64, rng):
    batch, rate = episodes(rng), 0.4
    objective = maml(net(), optax.sgd(rate), 3, adapts=meta.only("head"))
    params, state = objective.init(KEY, batch)

    def by_hand(params, stop=lambda features: features):
        values = []
        for t in range(2):
            (xs, ys), (xq, yq) = ((batch[p]["x"][t], batch[p]["y"][t]) for p in ("support", "query"))
            features, head = stop(jnp.tanh(xs @ params["model"]["body"]["a"])), params["model"]["head"]["b"]
            for _ in range(3):
                head = head - rate * 2 * features.T @ (features @ head - ys) / len(xs)
            values.append(jnp.mean((jnp.tanh(xq @ params["model"]["body"]["a"]) @ head - yq) ** 2))
        return sum(values) / 2

    value, grads, _ = gradient(objective, params, state, batch)
    np.testing.assert_allclose(value, by_hand(params), rtol=1e-12)
    assert_close(grads, differences(by_hand, params), rtol=1e-6, atol=1e-8)
    stopped = jax.grad(lambda params: by_hand(params, jax.lax.stop_gradient))(params)  # another algorithm
    assert np.abs(stopped["model"]["body"]["a"] - grads["model"]["body"]["a"]).max() > 0.01


def test_boil_by_finite_differences(x64, rng):
    batch = episodes(rng)
    objective = maml(net(), optax.sgd(0.2), 2, adapts=meta.without("head"))
    params, state = objective.init(KEY, batch)

    def loss(params):
        return objective.losses(params, state, batch, context(KEY, train=True))[0]["supervised"]

    _, grads, _ = gradient(objective, params, state, batch)
    assert_close(grads, differences(loss, params), rtol=1e-6, atol=1e-8)


# rates


def test_meta_sgd_on_quadratics(x64, rng):
    """d L_Q / d alpha = -(gradient of L_Q at the adapted params) * (gradient of L_S), number by number."""
    batch, theta, alpha = quadratics(rng, 3), rng.normal(size=3), rng.uniform(-0.2, 0.5, 3)
    objective = maml(quadratic(), optax.sgd(1.0), 1, rates=meta.per_parameter())
    params, state = objective.init(KEY, batch)
    assert state == {"model": {}}
    assert paths(params["maml"]) == {"rates/model/u", "rates/model/v"}
    params = {"model": split(theta), "maml": {"rates": {"model": split(alpha)}}}
    value, grads, _ = gradient(objective, params, state, batch)
    losses, of_alpha, of_theta = [], [], []
    for a_s, b_s, a_q, b_q in per_task(batch):
        g = a_s @ theta - b_s
        fast = theta - alpha * g
        q = a_q @ fast - b_q
        losses.append(fast @ a_q @ fast / 2 - b_q @ fast)
        of_alpha.append(-q * g)
        of_theta.append((np.eye(3) - np.diag(alpha) @ a_s).T @ q)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-12)
    np.testing.assert_allclose(joined(grads["maml"]["rates"]["model"]), np.mean(of_alpha, 0), rtol=1e-11)
    np.testing.assert_allclose(joined(grads["model"]), np.mean(of_theta, 0), rtol=1e-11)


def test_rates_start_where_the_method_says_for_what_adapts_alone(rng):
    wide = from_functions(lambda key, x: {"a": jnp.zeros((2, 300)), "b": jnp.zeros((300, 1))}, lambda p, x: x @ p["a"] @ p["b"])
    batch, child = episodes(rng, dtype=np.float32), supervised(wide, optax.losses.squared_error)
    params, _ = maml(child, optax.sgd(1.0), rates=meta.per_parameter(), adapts=meta.only("a")).init(KEY, batch)
    assert paths(params["maml"]) == {"rates/model/a"}
    drawn = np.sort(params["maml"]["rates"]["model"]["a"].ravel())
    assert 0.005 <= drawn[0] < 0.008 < 0.098 < drawn[-1] <= 0.1
    assert np.abs(drawn - np.linspace(0.005, 0.1, 600)).max() < 0.1 * 0.08  # uniform: the 5e-4 bound of Kolmogorov's test
    params, _ = maml(child, optax.sgd(1.0), 4, rates=meta.per_tensor_and_step(0.3, 4)).init(KEY, batch)
    assert jax.tree.map(jnp.shape, params["maml"]["rates"]) == {"model": {"a": (5,), "b": (5,)}}
    assert all((leaf == np.float32(0.3)).all() for leaf in jax.tree.leaves(params["maml"]["rates"]))
    with pytest.raises(ValueError, match="low=2"):
        meta.per_parameter(2, 1)
    with pytest.raises(ValueError, match="steps=0"):
        meta.per_tensor_and_step(0.1, 0)


@pytest.mark.parametrize("steps", [2, 4])
def test_every_step_and_tensor_has_its_rate_and_further_steps_the_last(x64, rng, steps):
    """Trained with two steps, so with three rates; four steps take rates 0, 1, 2, 2."""
    batch, theta = quadratics(rng, 2), rng.normal(size=3)
    rates = {"u": rng.uniform(0.1, 0.5, 3), "v": rng.uniform(0.1, 0.5, 3)}
    objective = maml(quadratic(), optax.sgd(1.0), steps, rates=meta.per_tensor_and_step(0.1, 2))
    params = {"model": split(theta), "maml": {"rates": {"model": jax.tree.map(jnp.asarray, rates)}}}

    def by_hand(params):
        values = []
        for a_s, b_s, a_q, b_q in per_task(batch):
            fast = jnp.concatenate([params["model"]["u"], params["model"]["v"]])
            for i in range(steps):
                u, v = (params["maml"]["rates"]["model"][name][(0, 1, 2, 2)[i]] for name in "uv")
                fast = fast - jnp.stack([u, u, v]) * (a_s @ fast - b_s)
            values.append(fast @ a_q @ fast / 2 - b_q @ fast)
        return sum(values) / len(values)

    value, grads, _ = gradient(objective, params, {"model": {}}, batch)
    np.testing.assert_allclose(value, by_hand(params), rtol=1e-12)
    assert_close(grads, differences(by_hand, params), rtol=1e-6, atol=1e-8)
    used = [np.asarray(leaf) != 0 for leaf in jax.tree.leaves(grads["maml"])]
    assert all((leaf == [True, True, steps > 2]).all() for leaf in used)


def test_first_order_trains_the_rates_too(x64, rng):
    """The rates multiply gradients that count as constants."""
    batch, theta = quadratics(rng, 2), rng.normal(size=3)
    objective = maml(quadratic(), optax.sgd(1.0), 1, rates=meta.per_parameter(), hypergradient=meta.first_order())
    params = {"model": split(theta), "maml": {"rates": {"model": split(np.full(3, 0.2))}}}
    _, grads, _ = gradient(objective, params, {"model": {}}, batch)
    queries = [(a_q @ (theta - 0.2 * (a_s @ theta - b_s)) - b_q, a_s @ theta - b_s) for a_s, b_s, a_q, b_q in per_task(batch)]
    np.testing.assert_allclose(joined(grads["model"]), np.mean([q for q, _ in queries], 0), rtol=1e-11)
    expected = np.mean([-q * g for q, g in queries], 0)
    np.testing.assert_allclose(joined(grads["maml"]["rates"]["model"]), expected, rtol=1e-11)


def test_a_slot_that_is_taken_raises(rng):
    batch = quadratics(rng, 2)
    batch = jax.tree.map(np.float32, batch)
    once = maml(quadratic(), optax.sgd(1.0), rates=meta.per_parameter())
    nested = {"support": {"support": batch["support"], "query": batch["query"]}}
    nested = jax.tree.map(lambda leaf: leaf[None], {"support": nested["support"], "query": nested["support"]})
    with pytest.raises(ValueError, match=r'slot "maml" is already taken.*name="maml2"'):
        maml(once, optax.sgd(1.0), rates=meta.per_parameter()).init(KEY, nested)
    params, _ = maml(once, optax.sgd(1.0), rates=meta.per_parameter(), name="outer").init(KEY, nested)
    assert paths(params["outer"]) == {"rates/maml/rates/model/u", "rates/maml/rates/model/v", "rates/model/u", "rates/model/v"}


# losses of all steps


def test_multi_step_weights_are_the_published_ones():
    weights = jax.jit(multi_step(steps=5, over=10, every=100))
    # w_i = max(1/5 - e/50, 0.03/5) for i < 5, w_5 = min(1/5 + 4e/50, 1 - 4 * 0.03/5)
    for epoch, early, last in ((0, 0.2, 0.2), (1, 0.18, 0.28), (5, 0.1, 0.6), (9, 0.02, 0.92), (10, 0.0, 1.0), (50, 0.0, 1.0)):
        for update in (100 * epoch, 100 * epoch + 99):
            np.testing.assert_allclose(weights(jnp.int32(update)), [early] * 4 + [last], rtol=1e-5, atol=1e-7)
    # at epoch 99 of 100 both bounds hold: 1/5 - 99/500 = 0.002 < 0.006, 1/5 + 4 * 99/500 = 0.992 > 0.976
    found = multi_step(steps=5, over=100)(jnp.int32(99))
    np.testing.assert_allclose(found, [0.006] * 4 + [0.976], rtol=1e-5)
    for epoch in range(0, 110, 7):
        assert abs(float(multi_step(3, 100)(jnp.int32(epoch)).sum()) - 1) < 1e-6
    np.testing.assert_array_equal(multi_step(1, 3)(jnp.int32(1)), [1.0])
    with pytest.raises(ValueError, match="over=0"):
        multi_step(5, 0)


@pytest.mark.parametrize("steps", [1, 3])  # one step stands outside of a loop
def test_losses_of_all_steps_are_their_weighted_sum(x64, rng, steps):
    batch, theta, rate = quadratics(rng, 2), rng.normal(size=3), 0.3
    weigh = lambda update: jnp.array([0.5, 0.2, 1.0][:steps]) * (1 + update)
    objective = maml(quadratic(), optax.sgd(rate), steps, step_losses=weigh)
    value, grads, _ = gradient(objective, {"model": split(theta)}, {"model": {}}, batch, context(KEY, 2, train=True))
    losses, expected = [], []
    for a_s, b_s, a_q, b_q in per_task(batch):
        fast, m = theta, np.eye(3) - rate * a_s
        for i, weight in enumerate((1.5, 0.6, 3.0)[:steps], 1):
            fast = fast - rate * (a_s @ fast - b_s)
            losses.append(weight * (fast @ a_q @ fast / 2 - b_q @ fast))
            expected.append(weight * np.linalg.matrix_power(m, i).T @ (a_q @ fast - b_q))
    np.testing.assert_allclose(value, np.sum(losses) / 2, rtol=1e-12)
    np.testing.assert_allclose(joined(grads["model"]), np.sum(expected, 0) / 2, rtol=1e-11)
    alone = maml(quadratic(), optax.sgd(rate), 3, step_losses=lambda update: jnp.array([0.0, 0.0, 1.0]))
    args = {"model": split(theta)}, {"model": {}}, batch
    assert_close(gradient(alone, *args), gradient(maml(quadratic(), optax.sgd(rate), 3), *args), rtol=1e-13)
    with pytest.raises(ValueError, match="steps=0"):
        maml(quadratic(), optax.sgd(rate), 0, step_losses=weigh)


# CAVIA


def cavia(seen=None):
    def init(key, x):
        return {"a": jax.random.normal(key, (2 + 3, 4)), "b": jnp.ones((4, 1))}

    def apply(p, x):
        if seen is not None:
            jax.debug.callback(lambda x: seen.append(np.asarray(x[:, 2:])), x)
        return jnp.tanh(x @ p["a"]) @ p["b"]

    return supervised(with_context(from_functions(init, apply), 3), optax.losses.squared_error)


def test_cavia_starts_every_task_at_a_context_of_zero_and_steps_from_there(rng):
    seen, rate, batch = [], 0.5, episodes(rng, tasks=2, dtype=np.float32)
    objective = maml(cavia(seen), optax.sgd(rate), 1, adapts=meta.reset(meta.only("context")))
    params, state = objective.init(KEY, batch)
    assert jax.tree.map(jnp.shape, params) == {"model": {"network": {"a": (5, 4), "b": (4, 1)}, "context": (3,)}}
    params["model"]["context"] = jnp.array([5.0, -3.0, 2.0])  # wherever it lies, the tasks do not start there
    jax.effects_barrier()
    seen.clear()
    objective.losses(params, state, batch, context(KEY, train=True))
    jax.effects_barrier()
    a, b = (np.asarray(params["model"]["network"][name], np.float64) for name in "ab")
    expected = []
    for x, y in zip(batch["support"]["x"], batch["support"]["y"], strict=True):
        hidden = np.tanh(x @ a[:2])
        slope = 2 * (hidden @ b - y) / len(x)  # of the mean squared error
        expected.append(-rate * ((slope @ b.T * (1 - hidden**2)) @ a[2:].T).sum(0))
    assert len(seen) == 4
    contexts = sorted((tuple(rows[0]) for rows in seen), key=lambda c: any(c))
    assert all((rows == rows[0]).all() for rows in seen)  # the same for all examples
    assert not np.any(contexts[:2])
    np.testing.assert_allclose(sorted(contexts[2:]), sorted(map(tuple, expected)), rtol=1e-4, atol=1e-6)


def test_the_meta_gradient_of_the_context_is_exactly_zero_and_of_the_network_exact(x64, rng):
    batch = episodes(rng)
    objective = maml(cavia(), optax.sgd(0.5), 2, adapts=meta.reset(meta.only("context")))
    params, state = objective.init(KEY, batch)
    params["model"]["context"] = jnp.array([5.0, -3.0, 2.0])

    def loss(params):
        return objective.losses(params, state, batch, context(KEY, train=True))[0]["supervised"]

    _, grads, _ = gradient(objective, params, state, batch)
    assert (grads["model"]["context"] == 0).all()
    assert_close(grads["model"]["network"], differences(loss, params)["model"]["network"], rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="size=0"):
        with_context(from_functions(lambda key, x: {}, lambda p, x: x), 0)


def test_the_context_of_images_is_constant_channels(rng):
    seen = {}

    def apply(p, x):
        seen["x"] = x
        return x.reshape(len(x), -1) @ jnp.ones((4 * 4 * 5, 1))

    model = with_context(from_functions(lambda key, x: {"shape": jnp.zeros(x.shape)}, apply), 2)
    x = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
    params, state = model.init(KEY, x)
    assert params["network"]["shape"].shape == (2, 4, 4, 5)
    model.apply({**params, "context": jnp.array([1.0, -2.0])}, state, x)
    np.testing.assert_array_equal(seen["x"][..., :3], x)
    np.testing.assert_array_equal(seen["x"][..., 3:], np.broadcast_to([1.0, -2.0], (2, 4, 4, 2)))


# normalisation


class Normalised(nnx.Module):
    """Linear, batch normalisation, tanh, linear."""

    def __init__(self, norm, rngs):
        self.linear, self.head = nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)
        self.norm = norm(3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.linear(x))))


def running(momentum):
    return lambda features, rngs: nn.batch_norm(features, momentum=momentum, rngs=rngs)


def normalised(norm):
    return supervised(from_nnx(lambda rngs: Normalised(norm, rngs)), optax.losses.squared_error)


def forward(params, x, statistics=None):
    """The network by hand; normalised by `statistics`, or by those of the batch. Returns them too, before the layer's scale."""
    layer, norm = params["linear"], params["norm"]
    hidden = x @ layer["kernel"] + layer["bias"][None]
    mean, var = statistics = (hidden.mean(0), hidden.var(0)) if statistics is None else statistics
    hidden = (hidden - mean[None]) / jnp.sqrt(var + 1e-5)[None] * norm["scale"][None] + norm["bias"][None]
    return jnp.tanh(hidden) @ params["head"]["kernel"] + params["head"]["bias"][None], statistics


def adapted(params, x, y, rate, steps):
    slope = jax.grad(lambda params: jnp.mean((forward(params, x)[0] - y) ** 2))
    for _ in range(steps):
        params = jax.tree.map(lambda p, g: p - rate * g, params, slope(params))
    return params


def float64(tree):
    wide = lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    return jax.tree.map(wide, tree)


def start(objective, batch):
    """Params and state in float64, every parameter moved off its start, which for scales and biases is special."""
    params, state = float64(objective.init(KEY, batch))
    point, unravel = jax.flatten_util.ravel_pytree(params)
    return unravel(point + 0.2 * jax.random.normal(jax.random.key(7), point.shape)), state


@pytest.mark.parametrize("mode", ["support statistics", "threaded"])
def test_whose_statistics_normalise_the_queries(x64, rng, mode):
    """In training: the support set's under the adapted weights, derivatives included; threaded: the queries' own."""
    batch, rate, of_support = episodes(rng, support=6), 0.3, mode == "support statistics"
    how = meta.support_statistics() if of_support else meta.threaded()
    objective = maml(normalised(nn.last_batch_norm), optax.sgd(rate), 2, normalisation=how)
    params, state = start(objective, batch)

    def by_hand(params, of_support=of_support):
        values = []
        for t in range(2):
            (xs, ys), (xq, yq) = ((batch[p]["x"][t], batch[p]["y"][t]) for p in ("support", "query"))
            fast = adapted(params["model"], xs, ys, rate, 2)
            values.append(jnp.mean((forward(fast, xq, forward(fast, xs)[1] if of_support else None)[0] - yq) ** 2))
        return sum(values) / 2

    value, grads, new = gradient(objective, params, state, batch)
    np.testing.assert_allclose(value, by_hand(params), rtol=1e-10)
    assert_close(grads, jax.jit(jax.grad(by_hand))(params), rtol=1e-8, atol=1e-10)
    assert abs(by_hand(params) - by_hand(params, not of_support)) > 1e-3
    last = "support" if of_support else "query"  # the last pass in training mode
    found = []
    for t in range(2):
        fast = adapted(params["model"], batch["support"]["x"][t], batch["support"]["y"][t], rate, 2)
        found.append(forward(fast, batch[last]["x"][t])[1])
    mean, var = np.mean([m for m, _ in found], 0), np.mean([v for _, v in found], 0)
    np.testing.assert_allclose(new["model"]["norm"]["mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(new["model"]["norm"]["var"], var, rtol=1e-9)


@pytest.mark.parametrize("norm", [nn.last_batch_norm, running(0.0)], ids=["last", "momentum 0"])
def test_predictions_under_support_statistics_do_not_depend_on_the_stored_ones(x64, rng, norm):
    batch, rate = episodes(rng, support=6), 0.3
    objective = maml(normalised(norm), optax.sgd(rate), 2, normalisation=meta.support_statistics())
    params, state = start(objective, batch)
    state = jax.tree.map(lambda leaf: leaf * 3 + 1, state)
    outputs, after = jax.jit(objective.predict)(params, state, batch, context(KEY))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    expected = []
    for t in range(2):
        xs = batch["support"]["x"][t]
        fast = adapted(params["model"], xs, batch["support"]["y"][t], rate, 2)
        expected.append(forward(fast, batch["query"]["x"][t], forward(fast, xs)[1])[0])
    np.testing.assert_allclose(outputs["logits"], np.concatenate(expected), rtol=1e-9)


def test_every_step_has_scales_biases_and_statistics_of_its_own(x64, rng):
    """In training passes the batch at hand normalises; the running averages of step i see step i's batches alone."""
    batch, rate, momentum, steps = episodes(rng, support=6), 0.3, 0.75, 2
    objective = maml(normalised(running(momentum)), optax.sgd(rate), steps, normalisation=meta.per_step(steps))
    params, state = objective.init(KEY, batch)
    assert paths(params["maml"]) == {f"normalisation/model/norm/{name}" for name in ("scale", "bias")}
    assert jax.tree.map(jnp.shape, state["maml"]) == {"norm": {"mean": (3, 3), "var": (3, 3)}}
    assert {leaf.shape for leaf in jax.tree.leaves(params["maml"])} == {(3, 3)}
    params, state = start(objective, batch)
    state["maml"] = jax.tree.map(lambda leaf: leaf + jnp.arange(3.0)[:, None] / 7, state["maml"])

    def at(params, fast, i):
        own = params["maml"]["normalisation"]["model"]["norm"]
        return {**fast, "norm": {name: own[name][i] for name in ("scale", "bias")}}

    def by_hand(params):
        values, seen = [], []
        for t in range(2):
            (xs, ys), (xq, yq) = ((batch[p]["x"][t], batch[p]["y"][t]) for p in ("support", "query"))
            fast, passed = params["model"], []
            for i in range(steps):
                slope = lambda fast: jnp.mean((forward(at(params, fast, i), xs)[0] - ys) ** 2)
                passed.append(forward(at(params, fast, i), xs)[1])
                fast = jax.tree.map(lambda p, g: p - rate * g, fast, jax.grad(slope)(fast))
            logits, statistics = forward(at(params, fast, steps), xq)
            values.append(jnp.mean((logits - yq) ** 2))
            seen.append([*passed, statistics])
        return sum(values) / 2, seen

    value, grads, new = gradient(objective, params, state, batch)
    (expected, seen), slopes = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert_close(grads, slopes, rtol=1e-8, atol=1e-10)
    assert all((np.abs(leaf).max(1) > 1e-6).all() for leaf in jax.tree.leaves(grads["maml"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["model"]["norm"]))  # these are not used
    old, kept = (s["maml"]["norm"] for s in (state, new))
    for i in range(steps + 1):
        for place, name in enumerate(("mean", "var")):
            fresh = np.mean([seen[t][i][place] for t in range(2)], 0)
            np.testing.assert_allclose(kept[name][i], momentum * old[name][i] + (1 - momentum) * fresh, rtol=1e-9)


@pytest.mark.parametrize("steps", [2, 4])
def test_evaluation_with_more_steps_uses_the_last_set(x64, rng, steps):
    """Trained for two steps: queries have set 2, and so have steps 2 and 3."""
    batch, rate, momentum = episodes(rng, support=6), 0.3, 0.75
    objective = maml(normalised(running(momentum)), optax.sgd(rate), steps, normalisation=meta.per_step(2))
    params, state = start(objective, batch)
    state["maml"] = jax.tree.map(lambda leaf: leaf + jnp.arange(3.0)[:, None] / 7, state["maml"])
    outputs, after = jax.jit(objective.predict)(params, state, batch, context(KEY))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    own, kept = params["maml"]["normalisation"]["model"]["norm"], state["maml"]["norm"]
    expected = []
    for t in range(2):
        xs, ys, fast = batch["support"]["x"][t], batch["support"]["y"][t], params["model"]
        mean, var = kept["mean"][2], kept["var"][2]

        def at(fast, i):
            return {**fast, "norm": {name: own[name][min(i, 2)] for name in ("scale", "bias")}}

        for i in range(steps):
            if i >= 2:  # the last set's averages move in the task
                m, v = forward(at(fast, i), xs)[1]
                mean, var = momentum * mean + (1 - momentum) * m, momentum * var + (1 - momentum) * v
            slope = jax.grad(lambda fast: jnp.mean((forward(at(fast, i), xs)[0] - ys) ** 2))(fast)
            fast = jax.tree.map(lambda p, g: p - rate * g, fast, slope)
        expected.append(forward(at(fast, 2), batch["query"]["x"][t], (mean, var))[0])
    np.testing.assert_allclose(outputs["logits"], np.concatenate(expected), rtol=1e-9)


def test_sets_of_each_step_need_a_network_that_keeps_statistics(rng):
    batch = episodes(rng, dtype=np.float32)
    with pytest.raises(ValueError, match="keeps no statistics"):
        maml(net(), optax.sgd(0.1), 1, normalisation=meta.per_step(1)).init(KEY, batch)
    with pytest.raises(ValueError, match="steps=-1"):
        meta.per_step(-1)


def test_integers_of_the_state_are_not_kept_for_each_step(rng):
    """A counter beside the averages threads through a task and stays over tasks."""

    def apply(params, state, x, *, train=False, key=None):
        centred = (x - (x.mean(0) if train else state["norm"]["mean"])[None]) * params["norm"]["scale"][None]
        moved = {"norm": {"mean": (state["norm"]["mean"] + x.mean(0)) / 2}, "count": state["count"] + 1}
        return {"logits": centred @ params["w"]}, moved if train else state

    def init(key, x):
        params = {"norm": {"scale": jnp.ones(2)}, "w": jnp.ones((2, 1))}
        return params, {"norm": {"mean": jnp.zeros(2)}, "count": jnp.zeros((), jnp.int32)}

    child = supervised(Model(init, apply), optax.losses.squared_error)
    batch = episodes(rng, dtype=np.float32)
    objective = maml(child, optax.sgd(0.1), 2, normalisation=meta.per_step(2))
    params, state = objective.init(KEY, batch)
    assert paths(params["maml"]) == {"normalisation/model/norm/scale"}
    assert paths(state["maml"]) == {"norm/mean"}
    _, _, new = gradient(objective, params, state, batch)
    means = [batch[part]["x"].mean((0, 1)) / 2 for part in ("support", "support", "query")]
    np.testing.assert_allclose(new["maml"]["norm"]["mean"], means, rtol=1e-5, atol=1e-7)
    assert new["model"]["count"] == 0


def test_an_implicit_gradient_refuses_learned_rates():
    with pytest.raises(ValueError, match="rates: an implicit gradient"):
        maml(normalised(nn.batch_norm), optax.sgd(1.0), hypergradient=meta.implicit(1.0), rates=meta.per_parameter())
