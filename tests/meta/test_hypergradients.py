"""Hypergradients against closed forms on quadratics, dense solves, finite differences; and the memory that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paradigms import Objective, Trainer, context, from_functions, maml, meta, supervised, vectorize
from paradigms.data import Source

KEY = jax.random.key(2)
RATE, STEPS, STRENGTH = 0.3, 5, 2.0


def quadratic(split=3):
    """theta'A theta/2 - b'theta, A and b from the batch's only row; theta is "head", of `split` numbers, and "body"."""

    def losses(params, state, batch, ctx):
        theta = jnp.concatenate([params["model"]["head"], params["model"]["body"]])
        return {"q": theta @ batch["a"][0] @ theta / 2 - batch["b"][0] @ theta}, (state, {})

    def init(key, batch):
        return {"model": {"head": jnp.zeros(split), "body": jnp.zeros(batch["b"].shape[-1] - split)}}, {"model": {}}

    return Objective(init, losses, losses)


def quadratics(rng, tasks, size=3):
    root = rng.normal(size=(2, tasks, 1, size, size))
    a = root @ root.swapaxes(-1, -2) / size + np.eye(size) / 2
    b = rng.normal(size=(2, tasks, 1, size))
    return {name: {"a": a[i], "b": b[i]} for i, name in enumerate(("support", "query"))}


def per_task(batch):
    return [
        [batch[part][leaf][t, 0] for part in ("support", "query") for leaf in "ab"] for t in range(len(batch["query"]["b"]))
    ]


def given(theta, split=3):
    return {"model": {"head": jnp.asarray(theta[:split]), "body": jnp.asarray(theta[split:])}}


def gradient(objective, params, batch, state=None, ctx=None, jit=True):
    ctx = context(KEY, train=True) if ctx is None else ctx
    state = {"model": {}} if state is None else state
    function = jax.value_and_grad(lambda params: sum(objective.losses(params, state, batch, ctx)[0].values()))
    return (jax.jit(function) if jit else function)(params)


def flat(grads):
    return np.concatenate([grads["model"]["head"], grads["model"]["body"]])


def truncated_by_hand(theta, batch, last, steps=STEPS):
    """(M^min(last, K))'(A_Q theta_K - b_Q), mean over tasks."""
    grads = []
    for a_s, b_s, a_q, b_q in per_task(batch):
        fast = theta
        for _ in range(steps):
            fast = fast - RATE * (a_s @ fast - b_s)
        m = np.eye(len(theta)) - RATE * a_s
        grads.append(np.linalg.matrix_power(m, min(last, steps)).T @ (a_q @ fast - b_q))
    return np.mean(grads, 0)


@pytest.mark.parametrize("last", [0, 2, 5, 9])
def test_truncation_keeps_the_jacobians_of_the_last_steps(x64, rng, last):
    batch, theta = quadratics(rng, 2), rng.normal(size=3)
    objective = maml(quadratic(), optax.sgd(RATE), STEPS, hypergradient=meta.truncated(last))
    value, grads = gradient(objective, given(theta), batch)
    np.testing.assert_allclose(flat(grads), truncated_by_hand(theta, batch, last), rtol=1e-11)
    others = [truncated_by_hand(theta, batch, other) for other in (0, 1, 2, 3, 4, 5) if other != min(last, STEPS)]
    assert min(np.abs(flat(grads) - other).max() for other in others) > 1e-3  # another number of steps would not pass
    plain, _ = gradient(maml(quadratic(), optax.sgd(RATE), STEPS), given(theta), batch)
    np.testing.assert_allclose(value, plain, rtol=1e-13)  # what is truncated is the derivative alone


def test_names_of_the_same_derivative_agree_to_the_bit(rng):
    batch = jax.tree.map(np.float32, quadratics(rng, 2))
    theta = rng.normal(size=3).astype(np.float32)

    def of(hypergradient):
        return gradient(maml(quadratic(), optax.sgd(RATE), 3, hypergradient=hypergradient), given(theta), batch)

    for one, other in (
        (meta.first_order(), meta.truncated(0)),
        (meta.unrolled(), None),
        (meta.annealed(0), meta.unrolled()),
        (meta.annealed(1), meta.first_order()),
    ):
        jax.tree.map(np.testing.assert_array_equal, of(one), of(other))
    kept, again = of(meta.unrolled(checkpoint=False)), of(meta.unrolled())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), kept, again)
    with pytest.raises(ValueError, match="last=-1"):
        meta.truncated(-1)
    with pytest.raises(ValueError, match="updates=-1"):
        meta.annealed(-1)


def test_every_hypergradient_without_steps_is_the_gradient_on_the_query_set(x64, rng):
    batch, theta = quadratics(rng, 2), rng.normal(size=3)
    expected = np.mean([a_q @ theta - b_q for _, _, a_q, b_q in per_task(batch)], 0)
    kinds = meta.first_order(), meta.truncated(2), meta.annealed(1), meta.unrolled(False), meta.implicit(STRENGTH)
    for hypergradient in kinds:
        _, grads = gradient(maml(quadratic(), optax.sgd(RATE), 0, hypergradient=hypergradient), given(theta), batch)
        np.testing.assert_allclose(flat(grads), expected, rtol=1e-13)


def test_annealing_turns_second_order_at_its_update_within_one_program(x64, rng):
    batch, over, rate = quadratics(rng, 2), 3, 0.2
    objective = maml(quadratic(), optax.sgd(RATE), 2, hypergradient=meta.annealed(over))
    theta = rng.normal(size=3)
    told = jax.jit(lambda step: gradient(objective, given(theta), batch, ctx=context(KEY, step, train=True), jit=False)[1])
    for step in (0, over - 1, over, 100):
        expected = truncated_by_hand(theta, batch, 2 if step >= over else 0, steps=2)
        np.testing.assert_allclose(flat(told(jnp.int32(step))), expected, rtol=1e-11)
    assert told._cache_size() == 1
    trainer = Trainer(objective, optax.sgd(rate))
    state = trainer.init(0, batch)
    state, _ = trainer.scan(state, Source(jax.tree.map(jnp.asarray, batch), lambda arrays, key, step: arrays, 2, 2), 6)
    theta, early = np.zeros(3), np.zeros(3)
    for step in range(6):
        theta = theta - rate * truncated_by_hand(theta, batch, 2 if step >= over else 0, steps=2)
        early = early - rate * truncated_by_hand(early, batch, 0, steps=2)
    np.testing.assert_allclose(state.params["model"]["head"], theta, rtol=1e-10)
    assert np.abs(theta - early).max() > 1e-2
    assert trainer._scan._cache_size() == 1


def test_annealing_between_others_and_with_losses_of_all_steps(x64, rng):
    batch, theta = quadratics(rng, 2), rng.normal(size=3)
    hypergradient = meta.annealed(1, first=meta.truncated(1), then=meta.truncated(2))
    objective = maml(quadratic(), optax.sgd(RATE), 3, hypergradient=hypergradient, step_losses=lambda step: jnp.ones(3))
    for step in (0, 1):
        _, grads = gradient(objective, given(theta), batch, ctx=context(KEY, step, train=True))
        expected = np.zeros(3)  # the loss after i steps has the Jacobians of those of its steps that are among the last
        for made in (1, 2, 3):
            last = max(made - (3 - (step + 1)), 0)
            expected = expected + truncated_by_hand(theta, batch, last, steps=made)
        np.testing.assert_allclose(flat(grads), expected, rtol=1e-11)


def proximal(theta, batch, steps=None):
    """For each task (I + A_S/lambda, g_Q) at the proximal minimiser, or where gradient descent is after `steps`."""
    found = []
    for a_s, b_s, a_q, b_q in per_task(batch):
        phi = np.linalg.solve(a_s + STRENGTH * np.eye(3), b_s + STRENGTH * theta) if steps is None else theta
        for _ in range(steps or 0):
            phi = phi - 0.2 * (a_s @ phi - b_s + STRENGTH * (phi - theta))
        found.append((np.eye(3) + a_s / STRENGTH, a_q @ phi - b_q))
    return found


def conjugate(matrix, b, iterations):
    x, r = np.zeros_like(b), b
    p = r
    for _ in range(iterations):
        step = r @ r / (p @ matrix @ p)
        x, new = x + step * p, r - step * matrix @ p
        p = new + new @ new / (r @ r) * p
        r = new
    return x


def implicit(solve=None, steps=100):
    return maml(quadratic(), optax.sgd(0.2), steps, hypergradient=meta.implicit(STRENGTH, solve))


@pytest.mark.parametrize("steps", [100, 2])
def test_the_implicit_gradient_is_a_dense_solve_where_the_steps_ended(x64, rng, steps):
    batch, theta = quadratics(rng, 3), rng.normal(size=3)
    _, grads = gradient(implicit(meta.conjugate_gradients(3), steps), given(theta), batch)
    exact = proximal(theta, batch, None if steps == 100 else steps)
    np.testing.assert_allclose(flat(grads), np.mean([np.linalg.solve(m, g) for m, g in exact], 0), rtol=1e-9)
    first = np.mean([g for _, g in exact], 0)
    assert np.abs(flat(grads) - first).max() > 0.05  # a first-order method would not pass


@pytest.mark.parametrize("iterations", [1, 2])
def test_few_conjugate_gradients_are_the_textbook_ones_from_zero(x64, rng, iterations):
    batch, theta = quadratics(rng, 2), rng.normal(size=3)
    _, grads = gradient(implicit(meta.conjugate_gradients(iterations), 2), given(theta), batch)
    expected = [conjugate(m, g, iterations) for m, g in proximal(theta, batch, 2)]
    np.testing.assert_allclose(flat(grads), np.mean(expected, 0), rtol=1e-10)
    exact = [np.linalg.solve(m, g) for m, g in proximal(theta, batch, 2)]
    assert np.abs(np.mean(expected, 0) - np.mean(exact, 0)).max() > 1e-4
    with pytest.raises(ValueError, match="iterations=0"):
        meta.conjugate_gradients(0)


@pytest.mark.parametrize("terms", [1, 4])
def test_neumann_is_its_truncated_series(x64, rng, terms):
    batch, theta, rate = quadratics(rng, 2), rng.normal(size=3), 0.15
    _, grads = gradient(implicit(meta.neumann(terms, rate), 2), given(theta), batch)
    expected = []
    for m, g in proximal(theta, batch, 2):
        hessian = STRENGTH * m  # of the support loss and its pull
        series = sum(np.linalg.matrix_power(np.eye(3) - rate * hessian, k) for k in range(terms))
        expected.append(STRENGTH * rate * series @ g)
    np.testing.assert_allclose(flat(grads), np.mean(expected, 0), rtol=1e-11)
    with pytest.raises(ValueError, match="terms=0"):
        meta.neumann(0, rate)


def test_the_default_solver_is_five_conjugate_gradients(x64, rng):
    batch, theta = quadratics(rng, 1, 8), rng.normal(size=8)  # eight dimensions, which five do not solve
    objective = maml(quadratic(8), optax.sgd(0.0), 1, hypergradient=meta.implicit(0.1))  # a step that goes nowhere
    _, grads = gradient(objective, given(theta, 8), batch)
    ((a_s, _, a_q, b_q),) = per_task(batch)
    expected = conjugate(np.eye(8) + a_s / 0.1, a_q @ theta - b_q, 5)
    np.testing.assert_allclose(flat(grads), expected, rtol=1e-9)
    assert np.abs(conjugate(np.eye(8) + a_s / 0.1, a_q @ theta - b_q, 8) - expected).max() > 1e-7


def test_the_implicit_gradient_reaches_params_that_do_not_adapt(x64, rng):
    batch, theta, split = quadratics(rng, 2, 5), rng.normal(size=5), 2
    hypergradient = meta.implicit(STRENGTH, meta.conjugate_gradients(2))
    objective = maml(quadratic(split), optax.sgd(0.2), 150, hypergradient=hypergradient, adapts=meta.only("head"))
    _, grads = gradient(objective, given(theta, split), batch)
    expected, direct = [], []
    h, w = slice(0, split), slice(split, None)
    for a_s, b_s, a_q, b_q in per_task(batch):
        pulled = a_s[h, h] + STRENGTH * np.eye(split)
        head = np.linalg.solve(pulled, b_s[h] - a_s[h, w] @ theta[w] + STRENGTH * theta[h])
        g = a_q @ np.concatenate([head, theta[w]]) - b_q
        back = np.linalg.solve(pulled, g[h])
        expected.append(np.concatenate([STRENGTH * back, g[w] - a_s[h, w].T @ back]))
        direct.append(g)
    np.testing.assert_allclose(flat(grads), np.mean(expected, 0), rtol=1e-9)
    assert np.abs(np.mean(expected, 0) - np.mean(direct, 0))[w].max() > 0.05  # what the support set says counts


def test_the_implicit_gradient_of_a_network_by_finite_differences(x64, rng):
    """Of the converged problem itself, with a layer that does not adapt and enters it nonlinearly."""

    def init(key, x):
        return {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=(3, 1)), "c": rng.normal(size=3)}

    net = supervised(
        from_functions(init, lambda p, x: jnp.tanh(x @ p["a"] + p["c"][None]) @ p["b"]), optax.losses.squared_error
    )
    batch = {p: {"x": rng.normal(size=(2, 4, 2)), "y": rng.normal(size=(2, 4, 1))} for p in ("support", "query")}
    hypergradient = meta.implicit(1.0, meta.conjugate_gradients(50))
    objective = maml(net, optax.sgd(0.2), 300, hypergradient=hypergradient, adapts=meta.without("a"))
    params, state = objective.init(KEY, batch)
    point, unravel = jax.flatten_util.ravel_pytree(params)

    def loss(point):
        return objective.losses(unravel(point), state, batch, context(KEY, train=True))[0]["supervised"]

    grad = jax.jit(jax.grad(loss))(point)
    moves = 1e-5 * jnp.eye(len(point))
    sides = jax.jit(jax.vmap(loss))(jnp.concatenate([point[None] + moves, point[None] - moves]))
    expected = (sides[: len(point)] - sides[len(point) :]) / 2e-5
    # conjugate gradients stop at a residual of 1e-5 of the right-hand side
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_the_implicit_gradient_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="strength=0"):
        meta.implicit(0)
    with pytest.raises(ValueError, match="step_losses: an implicit gradient"):
        maml(quadratic(), optax.sgd(0.1), 2, hypergradient=meta.implicit(1.0), step_losses=lambda step: jnp.ones(2) / 2)


def dead():
    """A network half of whose hidden units are dead: no gradient reaches their weights."""

    def init(key, x):
        a, b = jax.random.split(key)
        bias = jnp.array([0.0, 0.0, -100.0, -100.0])
        return {"a": jax.random.normal(a, (2, 4)), "b": jax.random.normal(b, (4, 1)), "c": bias}

    def apply(p, x):
        return jax.nn.relu(x @ p["a"] + p["c"][None]) @ p["b"]

    return supervised(from_functions(init, apply), optax.losses.squared_error)


def regression(rng):
    def part():
        return {"x": rng.normal(size=(2, 4, 2)).astype(np.float32), "y": rng.normal(size=(2, 4, 1)).astype(np.float32)}

    return {"support": part(), "query": part()}


@pytest.mark.parametrize(
    "inner",
    [optax.adam(1e-2), optax.adamw(1e-2), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))],
    ids=["adam", "adamw", "clipping"],
)
def test_an_inner_optimizer_without_a_second_derivative_at_zero_raises_before_compilation(rng, inner):
    batch = regression(rng)
    for hypergradient in (None, meta.truncated(1), meta.annealed(5)):
        trainer = Trainer(maml(dead(), inner, 2, hypergradient=hypergradient), optax.sgd(0.1))
        with pytest.raises(ValueError, match=r"inner: .*\n?.*eps_root"):
            trainer.init(0, batch)
        assert trainer._init._cache_size() == 0
    maml(dead(), inner, 0).init(KEY, batch)  # no steps, nothing to differentiate


def test_plain_adam_gives_what_the_error_says(rng):
    batch = regression(rng)
    params, state = dead().init(KEY, jax.tree.map(lambda leaf: leaf[0], batch["query"]))
    _, grads = gradient(maml(dead(), optax.adam(1e-2), 2), params, batch, state)
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("inner", "hypergradient"),
    [
        (optax.adam(1e-2, eps_root=1e-8), None),
        (optax.adam(1e-2), meta.first_order()),
        (optax.adam(1e-2), meta.implicit(1.0)),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), meta.first_order()),
        (optax.sgd(0.1, momentum=0.9, nesterov=True), None),
    ],
    ids=["eps_root", "first order", "implicit", "clipping, first order", "momentum"],
)
def test_an_inner_optimizer_that_can_be_differentiated_is_accepted(rng, inner, hypergradient):
    batch = regression(rng)
    trainer = Trainer(maml(dead(), inner, 2, hypergradient=hypergradient), optax.sgd(0.1))
    state = trainer.init(0, batch)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = trainer.step(state, batch)
    moved = jax.tree.map(lambda a, b: np.asarray(b) - a, before, state.params)
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    assert np.abs(moved["model"]["b"][:2]).max() > 0


def test_rates_and_strengths_are_columns_of_one_program(rng):
    batch = jax.tree.map(np.float32, quadratics(rng, 2))
    rates = [0.1, 0.3]

    def make(rate):
        return Trainer(maml(quadratic(), optax.sgd(rate), 2), optax.sgd(1.0))

    def pulled(strength):
        return Trainer(maml(quadratic(), optax.sgd(0.0), 1, hypergradient=meta.implicit(strength)), optax.sgd(1.0))

    def adam(rate):
        return Trainer(maml(quadratic(), optax.adam(rate, eps_root=1e-8), 2), optax.sgd(1.0))

    state, metrics = (trainer := vectorize(make, rate=rates)).step(trainer.init(0, batch), batch)
    for run, rate in enumerate(rates):
        grads = []
        for a_s, b_s, a_q, b_q in per_task(batch):
            m = np.eye(3) - rate * a_s
            grads.append(m.T @ m.T @ (a_q @ (m @ (rate * b_s) + rate * b_s) - b_q))
        np.testing.assert_allclose(state.params["model"]["head"][run], -np.mean(grads, 0), rtol=1e-5)
    state, _ = (trainer := vectorize(pulled, strength=[1.0, 4.0])).step(trainer.init(0, batch), batch)
    for run, strength in enumerate([1.0, 4.0]):
        grads = [np.linalg.solve(np.eye(3) + a_s / strength, -b_q) for a_s, _, _, b_q in per_task(batch)]
        np.testing.assert_allclose(state.params["model"]["head"][run], -np.mean(grads, 0), rtol=1e-4)
    _, metrics = (trainer := vectorize(adam, rate=rates)).step(trainer.init(0, batch), batch)
    assert np.isfinite(metrics["loss"]).all()
    with pytest.raises(ValueError, match="eps_root"):
        vectorize(lambda rate: Trainer(maml(quadratic(), optax.adam(rate)), optax.sgd(1.0)), rate=rates).init(0, batch)


def test_memory_hardly_grows_with_the_steps(rng):
    """Temporaries of the gradient of a network whose activations are far larger than its params."""

    def init(key, x):
        return {"a": jnp.ones((4, 16)), "b": jnp.ones((16, 16)), "c": jnp.ones((16, 1))}

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    net = supervised(from_functions(init, apply), optax.losses.squared_error)
    batch = {p: {"x": np.ones((1, 2048, 4), np.float32), "y": np.ones((1, 2048, 1), np.float32)} for p in ("support", "query")}

    def temporaries(steps, hypergradient):
        objective = maml(net, optax.sgd(0.1), steps, hypergradient=hypergradient)
        params, state = objective.init(KEY, batch)

        def loss(params, batch):
            return objective.losses(params, state, batch, context(KEY, train=True))[0]["supervised"]

        return jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    for hypergradient in (meta.unrolled(), meta.implicit(1.0)):
        assert temporaries(20, hypergradient) <= 2 * temporaries(1, hypergradient)
    assert temporaries(20, meta.unrolled(checkpoint=False)) > 4 * temporaries(20, meta.unrolled())
