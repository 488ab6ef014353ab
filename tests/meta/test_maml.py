"""MAML: the meta-gradient of quadratics in closed form, finite differences, and whose weights and state survive."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paradigms import Model, Objective, Trainer, context, ewc, from_functions, maml, meta, rehearsal, reservoir, supervised

RNG = np.random.default_rng(0)
KEY = jax.random.key(2)


def quadratic():
    """theta'A theta/2 - b'theta, A and b from the batch's only row."""

    def losses(params, state, batch, ctx):
        theta = params["model"]["theta"]
        return {"q": theta @ batch["a"][0] @ theta / 2 - batch["b"][0] @ theta}, (state, {})

    return Objective(lambda key, batch: ({"model": {"theta": jnp.zeros(3)}}, {"model": {}}), losses, losses)


def quadratics(tasks):
    root = RNG.normal(size=(2, tasks, 1, 3, 3))
    a = root @ root.swapaxes(-1, -2) / 3 + np.eye(3) / 2
    b = RNG.normal(size=(2, tasks, 1, 3))
    return {name: {"a": a[i], "b": b[i]} for i, name in enumerate(("support", "query"))}


def by_hand(theta, batch, rate, steps, fisher=None, anchor=None, weights=None):
    """Loss and meta-gradient (M^K)'(A_Q theta_K - b_Q), mean over tasks; a penalty f(theta - anchor)^2/2 in both."""
    tasks = len(batch["query"]["b"])
    weights = np.ones(tasks) if weights is None else weights
    loss, grad, first_order = 0.0, np.zeros(3), np.zeros(3)
    for t, share in enumerate(weights / weights.sum()):
        (a_s, a_q), (b_s, b_q) = ([batch[part][leaf][t, 0] for part in ("support", "query")] for leaf in ("a", "b"))
        if fisher is not None:
            a_s, a_q = a_s + np.diag(fisher), a_q + np.diag(fisher)
            b_s, b_q = b_s + fisher * anchor, b_q + fisher * anchor
        m, fast = np.eye(3) - rate * a_s, theta
        for _ in range(steps):
            fast = fast - rate * (a_s @ fast - b_s)
        constant = 0.0 if fisher is None else anchor @ (fisher * anchor) / 2
        loss += share * (fast @ a_q @ fast / 2 - b_q @ fast + constant)
        grad += share * np.linalg.matrix_power(m, steps).T @ (a_q @ fast - b_q)
        first_order += share * (a_q @ fast - b_q)
    return loss, grad, first_order


def evaluate(objective, params, state, batch, ctx=None):
    ctx = context(KEY, train=True) if ctx is None else ctx

    def summed(params, state, batch):
        values, rest = objective.losses(params, state, batch, ctx)
        return sum(values.values()), rest

    (value, (new, aux)), grads = jax.jit(jax.value_and_grad(summed, has_aux=True))(params, state, batch)
    return value, grads, new, aux


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("weights", [None, np.array([1.0, 0.0, 3.0])], ids=["mean", "weighted"])
def test_the_meta_gradient_of_quadratics(x64, steps, weights):
    batch, theta = quadratics(3), RNG.normal(size=3)
    params = {"model": {"theta": jnp.asarray(theta)}}
    told = batch if weights is None else {**batch, "weight": weights}
    value, grads, _, _ = evaluate(maml(quadratic(), optax.sgd(0.3), steps), params, {"model": {}}, told)
    loss, expected, first_order = by_hand(theta, batch, 0.3, steps, weights=weights)
    assert grads["model"]["theta"].dtype == jnp.float64
    np.testing.assert_allclose(value, loss, rtol=1e-12)
    np.testing.assert_allclose(grads["model"]["theta"], expected, rtol=1e-11)
    assert np.abs(expected - first_order).max() > 0.05  # a first-order method would not pass


def test_order_of_ewc_and_maml(x64):
    """maml(ewc(x)) penalises the adapted weights, in both loops; ewc(maml(x)) the meta weights alone."""
    batch, theta, rate, weight = quadratics(2), RNG.normal(size=3), 0.2, 3.0
    fisher, anchor = RNG.uniform(0.1, 1, 3), RNG.normal(size=3)
    params = {"model": {"theta": jnp.asarray(theta)}}
    held = {"fisher": {"model": {"theta": jnp.asarray(fisher)}}, "anchor": {"model": {"theta": jnp.asarray(anchor)}}}
    state = {"model": {}, "ewc": held}
    value, grads, new, _ = evaluate(maml(ewc(quadratic(), weight), optax.sgd(rate), 2), params, state, batch)
    loss, expected, _ = by_hand(theta, batch, rate, 2, weight * fisher, anchor)
    np.testing.assert_allclose(value, loss, rtol=1e-12)
    np.testing.assert_allclose(grads["model"]["theta"], expected, rtol=1e-11)
    jax.tree.map(np.testing.assert_array_equal, new, state)
    value, grads, _, _ = evaluate(ewc(maml(quadratic(), optax.sgd(rate), 2), weight), params, state, batch)
    loss, expected, _ = by_hand(theta, batch, rate, 2)
    np.testing.assert_allclose(value, loss + weight / 2 * fisher @ (theta - anchor) ** 2, rtol=1e-12)
    np.testing.assert_allclose(grads["model"]["theta"], expected + weight * fisher * (theta - anchor), rtol=1e-11)


def net():
    def init(key, x):
        a, b = jax.random.split(key)
        return {"a": jax.random.normal(a, (2, 3)), "b": jax.random.normal(b, (3, 1)), "c": jnp.zeros(3)}

    return from_functions(init, lambda p, x: jnp.tanh(x @ p["a"] + p["c"][None]) @ p["b"])


REGRESSION = supervised(net(), optax.losses.squared_error)


def episodes(tasks=3, support=4, query=3):
    def part(rows):
        return {"x": RNG.normal(size=(tasks, rows, 2)), "y": RNG.normal(size=(tasks, rows, 1))}

    return {"support": part(support), "query": part(query)}


@pytest.mark.parametrize("inner", [optax.sgd(0.3), optax.sgd(0.2, momentum=0.9)], ids=["sgd", "momentum"])
def test_the_meta_gradient_by_finite_differences(x64, inner):
    batch, objective = episodes(2), maml(REGRESSION, inner, 3)
    params, state = objective.init(KEY, batch)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    flat = flat + 0.1

    def loss(flat):
        return sum(objective.losses(unravel(flat), state, batch, context(KEY, train=True))[0].values())

    grad = jax.jit(jax.grad(loss))(flat)
    steps = 1e-5 * jnp.eye(len(flat))
    sides = jax.jit(jax.vmap(loss))(jnp.concatenate([flat[None] + steps, flat[None] - steps]))
    np.testing.assert_allclose(grad, (sides[: len(flat)] - sides[len(flat) :]) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("inner", "steps"), [(optax.sgd(0.3), 0), (optax.sgd(0.0), 3)], ids=["no steps", "rate 0"])
def test_no_steps_or_no_rate_is_the_child_on_the_query_set(inner, steps):
    batch = jax.tree.map(lambda leaf: leaf.astype(np.float32), episodes(1))
    objective = maml(REGRESSION, inner, steps)
    params, state = objective.init(KEY, batch)
    query = jax.tree.map(lambda leaf: leaf[0], batch["query"])
    value, grads, new, _ = evaluate(objective, params, state, batch)
    expected, expected_grads, expected_state, _ = evaluate(REGRESSION, params, state, query)
    same = np.testing.assert_array_equal if steps == 0 else lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6)
    same(value, expected)
    jax.tree.map(same, grads, expected_grads)
    jax.tree.map(same, new, expected_state)
    many = jax.tree.map(lambda leaf: leaf.astype(np.float32), episodes(3))
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), many["query"])
    value, grads, _, _ = evaluate(objective, params, state, many)
    expected, expected_grads, _, _ = evaluate(REGRESSION, params, state, flat)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, expected_grads)
    got, expected = (o.predict(params, state, b, context())[0] for o, b in ((objective, many), (REGRESSION, flat)))
    np.testing.assert_allclose(got["logits"], expected["logits"], rtol=1e-6)


def test_predict_adapts_each_task_and_keeps_the_rows_in_order():
    slopes = np.array([-2.0, 0.5, 3.0], np.float32)
    x = RNG.normal(size=(3, 6, 1)).astype(np.float32)
    y = slopes[:, None, None] * x
    batch = {"support": {"x": x[:, :4], "y": y[:, :4]}, "query": {"x": x[:, 4:], "y": y[:, 4:]}}
    line = from_functions(lambda key, x: {"w": jnp.ones((1, 1))}, lambda p, x: x @ p["w"])
    objective = maml(supervised(line, optax.losses.squared_error), optax.sgd(0.1), 2)
    params, state = objective.init(KEY, batch)
    outputs, after = jax.jit(objective.predict)(params, state, batch, context(KEY))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    expected = []
    for t in range(3):
        w = 1.0
        for _ in range(2):
            w -= 0.1 * 2 * np.mean(x[t, :4] * (w * x[t, :4] - y[t, :4]))
        expected.append(w * x[t, 4:])
    np.testing.assert_allclose(outputs["logits"], np.concatenate(expected), rtol=1e-5)
    wrong = np.abs(x[:, 4:] - y[:, 4:]).reshape(-1)
    assert (np.abs(np.asarray(outputs["logits"]) - y[:, 4:].reshape(-1, 1))[:, 0] < wrong).all()


def test_every_task_and_every_step_has_a_key_of_its_own():
    seen = []

    def apply(params, state, x, *, train=False, key=None):
        if key is not None:
            jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return {"logits": x @ params["w"]}, state

    model = Model(lambda key, x: ({"w": jnp.ones((2, 1))}, {}), apply)
    objective = maml(supervised(model, optax.losses.squared_error), optax.sgd(0.1), 2)
    batch = episodes(3)
    params, state = objective.init(KEY, batch)
    seen.clear()
    objective.losses(params, state, batch, context(KEY, train=True))
    jax.effects_barrier()
    assert len(set(seen)) == 3 * (2 + 1)
    seen.clear()
    objective.losses(params, state, batch, context(jax.random.key(9), train=True))
    jax.effects_barrier()
    assert len(set(seen)) == 9


def statistics():
    """A model with a running mean (rate 1/2) and an integer count, both moved by every training pass."""

    def apply(params, state, x, *, train=False, key=None):
        moved = {"mean": (state["mean"] + x.mean(0)) / 2, "count": state["count"] + 1}
        return {"logits": (x - state["mean"][None]) @ params["w"]}, moved if train else state

    def init(key, x):
        return {"w": jnp.ones((2, 1))}, {"mean": jnp.zeros(2), "count": jnp.zeros((), jnp.int32)}

    return Model(init, apply)


def test_statistics_thread_through_a_task_and_are_averaged_over_tasks():
    batch = episodes(3)
    child = rehearsal(supervised(statistics(), optax.losses.squared_error), reservoir(5), size=0)
    objective = maml(child, optax.sgd(0.1), 2)
    params, state = objective.init(KEY, batch)
    _, _, new, _ = evaluate(objective, params, state, batch)
    means = []
    for t in range(3):
        mean = np.zeros(2)
        for part in ("support", "support", "query"):
            mean = (mean + batch[part]["x"][t].mean(0)) / 2
        means.append(mean)
    np.testing.assert_allclose(new["model"]["mean"], np.mean(means, 0), rtol=1e-5, atol=1e-7)
    assert new["model"]["count"] == state["model"]["count"]
    jax.tree.map(np.testing.assert_array_equal, new["memory"], state["memory"])


def test_what_is_not_an_episode_raises():
    trainer = Trainer(maml(REGRESSION, optax.sgd(0.1)), optax.sgd(0.1))
    for batch in ({"x": np.ones((3, 2)), "y": np.ones((3, 1))}, {"support": episodes()["support"]}):
        with pytest.raises(ValueError, match=r'maml needs {"support": ..., "query": ...}'):
            trainer.init(0, batch)
    assert trainer._init._cache_size() == 0
    with pytest.raises(ValueError, match="steps=-1"):
        maml(REGRESSION, optax.sgd(0.1), -1)


@pytest.mark.parametrize("learner", [maml, meta.reptile])
def test_settings_of_another_kind_are_named(learner):
    for steps in (1.5, "1", True):
        with pytest.raises(ValueError, match=f"steps={steps!r}: must be an integer, 0 or more"):
            learner(REGRESSION, optax.sgd(0.1), steps)
    with pytest.raises(ValueError, match=r"batch_size=2\.5: must be an integer"):
        learner(REGRESSION, optax.sgd(0.1), 1, batch_size=2.5)
    with pytest.raises(TypeError, match="adapts='head': must be a Part"):
        learner(REGRESSION, optax.sgd(0.1), 1, adapts="head")
    with pytest.raises(TypeError, match=r"inner=.*: must be a GradientTransformation; call it"):
        learner(REGRESSION, optax.sgd, 1)


def test_a_hypergradient_that_was_not_called_is_named():
    with pytest.raises(TypeError, match=r"hypergradient=.*: must be a Hypergradient; call it"):
        maml(REGRESSION, optax.sgd(0.1), hypergradient=meta.first_order)
    with pytest.raises(TypeError, match=r"rates=0\.1: must be a Rates"):
        maml(REGRESSION, optax.sgd(0.1), rates=0.1)


def test_an_inner_optimizer_without_a_derivative_is_refused_before_anything_is_compiled():
    batch = jax.tree.map(lambda leaf: leaf.astype(np.float32), episodes(3))
    for hypergradient in (None, meta.first_order()):
        trainer = Trainer(maml(REGRESSION, optax.lbfgs(), 2, hypergradient=hypergradient), optax.sgd(0.1))
        with pytest.raises(ValueError, match="inner: its update searches in a loop"):
            trainer.init(0, batch)
        assert trainer._init._cache_size() == 0


def test_training_lowers_the_loss_after_adaptation():
    batch = jax.tree.map(lambda leaf: leaf.astype(np.float32), episodes(3))
    trainer = Trainer(maml(REGRESSION, optax.sgd(0.1), 1), optax.adam(0.05))
    state = trainer.init(0, batch)
    losses = []
    for _ in range(20):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["supervised"]))
    assert losses[-1] < 0.7 * losses[0]
