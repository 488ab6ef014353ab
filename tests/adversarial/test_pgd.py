"""Attacks: exact projections and starts, the optimum of a linear model, and what adversarial training lets through."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from paradigms import (
    Model,
    Trainer,
    Update,
    adversarial,
    context,
    fgsm,
    from_functions,
    l2,
    linf,
    maml,
    pgd,
    rehearsal,
    reservoir,
    supervised,
)

RNG = np.random.default_rng(0)
X = RNG.uniform(0.3, 0.7, (6, 4)).astype(np.float32)
Y = np.array([0, 1, 2, 2, 1, 0])
W = np.array([0.5, -2.0, 1.0, 0.25], np.float32)
KEY = jax.random.key(3)


def norms(delta):
    return np.sqrt((np.asarray(delta, float).reshape(len(delta), -1) ** 2).sum(1))


def test_projections_are_the_nearest_points():
    delta = RNG.normal(size=(50, 2, 3, 1)).astype(np.float32)
    np.testing.assert_array_equal(linf(0.5).project(delta), np.minimum(np.maximum(delta, -0.5), 0.5))
    size = norms(delta).reshape(-1, 1, 1, 1)
    expected = np.where(size > 2.4, 2.4 * delta / size, delta)
    assert 5 < (size > 2.4).sum() < 45
    got = np.asarray(l2(2.4).project(delta))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    inside = (size <= 2.4)[:, 0, 0, 0]
    np.testing.assert_array_equal(got[inside], delta[inside])
    for threat in (linf(0.5), l2(2.4)):
        np.testing.assert_array_equal(threat.project(jnp.zeros((2, 3))), np.zeros((2, 3)))
        np.testing.assert_allclose(threat.project(threat.project(delta)), threat.project(delta), rtol=1e-6)


def test_directions_are_the_steepest_of_unit_size():
    grad = RNG.normal(size=(5, 2, 3)).astype(np.float32)
    grad[0] = 0
    np.testing.assert_array_equal(linf(1.0).direction(grad), np.sign(grad))
    got = np.asarray(l2(1.0).direction(grad))
    np.testing.assert_allclose(got[1:], grad[1:] / norms(grad[1:]).reshape(-1, 1, 1), rtol=1e-6)
    np.testing.assert_array_equal(got[0], 0)


def test_the_start_under_linf_is_uniform_in_the_cube():
    start = np.asarray(jax.jit(linf(0.2).start)(KEY, jnp.zeros((20_000, 3))))
    assert np.abs(start).max() <= 0.2
    for column in start.T:
        assert stats.kstest(column, stats.uniform(-0.2, 0.4).cdf).pvalue > 0.01
    np.testing.assert_allclose(start.mean(0), 0, atol=5 * 0.2 / np.sqrt(3 * 20_000))
    np.testing.assert_allclose(np.cov(start.T), 0.04 / 3 * np.eye(3), atol=5 * 0.04 / 3 * np.sqrt(2 / 20_000))


def test_the_start_under_l2_is_uniform_in_the_ball():
    start = np.asarray(jax.jit(l2(2.0).start)(KEY, jnp.zeros((20_000, 1, 3))))[:, 0]
    radius = norms(start)
    assert radius.max() <= 2 * (1 + 1e-6)
    assert stats.kstest((radius / 2) ** 3, "uniform").pvalue > 0.01  # volumes are uniform
    for column in (start / radius[:, None]).T:  # Archimedes: each coordinate on the sphere is uniform
        assert stats.kstest(column, stats.uniform(-1, 2).cdf).pvalue > 0.01
    np.testing.assert_allclose(start.mean(0), 0, atol=5 * 2 / np.sqrt(5 * 20_000))


def slope(x):
    return jnp.sum(x @ W)


@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_reaches_the_optimum_of_a_linear_model(random_start):
    corner = pgd(linf(0.1), 7, random_start=random_start)(slope, X, KEY)
    np.testing.assert_allclose(corner, X + 0.1 * np.sign(W), atol=1e-6)
    # a step of 10 radii keeps at most 1/9 of what is across the gradient
    far = pgd(l2(0.2), 12, step_size=2.0, random_start=random_start)(slope, X, KEY)
    np.testing.assert_allclose(far, X + 0.2 * W / np.linalg.norm(W), atol=1e-6)


def test_each_example_has_a_ball_of_its_own():
    scale = np.array([1e-3, 1, 10, -1, -5, 0], np.float32)
    got = pgd(l2(0.1), 3, random_start=False)(lambda x: jnp.sum(scale * (x @ W)), X, KEY)
    expected = X + 0.1 * np.sign(scale)[:, None] * W / np.linalg.norm(W)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_each_example_of_an_episode_has_a_ball_of_its_own():
    seen = {}

    def watch(loss, x, key):
        attacked = pgd(l2(0.3), 3, bounds=(-9, 9))(loss, x, key)
        seen.update(jax.tree.map(lambda after, before: np.asarray(after - before), attacked, x))
        return attacked

    model = from_functions(lambda key, x: {"w": jnp.asarray(W)[:, None] * jnp.ones((1, 3))}, lambda p, x: jnp.sin(x) @ p["w"])
    part = {"x": X.reshape(2, 3, 4), "y": Y.reshape(2, 3)}
    episodes = {"support": part, "query": part}
    child = maml(supervised(model), optax.sgd(0.1))
    params, state = child.init(KEY, episodes)
    adversarial(child, watch).losses(params, state, episodes, context(KEY, train=True))
    for part in ("support", "query"):
        assert seen[part]["x"].shape == (6, 4)
        assert norms(seen[part]["x"]).max() <= 0.3 + 1e-6
    assert norms(seen["query"]["x"]).min() > 0.05


def test_tiny_gradients_still_have_a_direction_of_unit_size():
    grads = jnp.asarray(np.array([[3e-30, 4e-30], [0, 0]], np.float32))
    np.testing.assert_allclose(l2(1.0).direction(grads), [[0.6, 0.8], [0, 0]], rtol=1e-5)


@pytest.mark.parametrize("make", [lambda: pgd(linf(0.1), 2, step_size=-1.0), lambda: pgd(linf(0.1), 2, bounds=(1, 0))])
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match=r"step_size=-1|bounds="):
        make()
    with pytest.raises(ValueError, match="radius=nan"):
        linf(float("nan"))


def test_bounds_hold_and_are_exact_under_linf():
    x = RNG.uniform(0, 1, (6, 4)).astype(np.float32)
    got = pgd(linf(0.4), 10)(slope, x, KEY)
    np.testing.assert_allclose(got, np.clip(x + 0.4 * np.sign(W), 0, 1), atol=1e-6)
    for threat, size in ((linf(0.4), None), (l2(0.7), 2.0)):
        for low, high in ((0.0, 1.0), (-0.1, 0.9)):
            inside = np.clip(x, low, high)
            for steps in (0, 3):
                got = np.asarray(pgd(threat, steps, size, bounds=(low, high))(slope, inside, KEY))
                assert got.min() >= low
                assert got.max() <= high
                delta = got - inside
                assert np.abs(delta).max() > 0.01
                assert (norms(delta) if size else np.abs(delta)).max() <= threat.radius * (1 + 1e-5)


def test_fgsm_is_one_step_of_the_radius():
    def loss(x):
        return jnp.sum(jnp.sin(7 * x) @ W)

    grad = 7 * np.cos(7 * X) * W
    np.testing.assert_allclose(fgsm(linf(0.05))(loss, X, KEY), X + 0.05 * np.sign(grad), atol=1e-6)
    expected = X + 0.05 * grad / norms(grad)[:, None]
    np.testing.assert_allclose(fgsm(l2(0.05))(loss, X, KEY), expected, atol=1e-6)


def test_two_steps_by_hand():
    def loss(x):
        return jnp.sum(jnp.sin(7 * x) @ W)

    x = X.astype(float)
    for _ in range(2):
        x = X + np.clip(x + 0.08 * np.sign(7 * np.cos(7 * x) * W) - X, -0.1, 0.1)
    np.testing.assert_allclose(pgd(linf(0.1), 2, 0.08, random_start=False)(loss, X, KEY), x, atol=1e-6)


def test_a_tree_of_inputs_and_what_cannot_be_attacked():
    got = pgd(linf(0.1), 5)(lambda x: slope(x["a"]) - slope(x["b"]), {"a": X, "b": X}, KEY)
    np.testing.assert_allclose(got["a"] - X, 0.1 * np.sign(W)[None].repeat(6, 0), atol=1e-6)
    np.testing.assert_allclose(got["b"] - X, -0.1 * np.sign(W)[None].repeat(6, 0), atol=1e-6)
    for call, words in [
        (lambda: pgd(linf(0.1), 1)(slope, np.ones((2, 4), np.uint8), KEY), "uint8.*needs floats"),
        (lambda: pgd(linf(0.1), -1), "steps=-1"),
        (lambda: linf(-0.1), "radius=-0.1"),
        (lambda: l2(-0.1), "radius=-0.1"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def net():
    """A small tanh network whose state counts its training passes and keeps the mean of what it last saw."""

    def init(key, x):
        a, b = jax.random.split(key)
        params = {"a": 3 * jax.random.normal(a, (4, 5)), "b": jax.random.normal(b, (5, 3))}
        return params, {"count": jnp.zeros((), jnp.int32), "mean": jnp.zeros(4)}

    def apply(params, state, x, *, train=False, key=None):
        state = {"count": state["count"] + 1, "mean": x.mean(0)} if train else state
        return {"logits": jnp.tanh(x @ params["a"]) @ params["b"]}, state

    return Model(init, apply)


CHILD = supervised(net())
BATCH = {"x": X, "y": Y}


def evaluate(objective, params, state, batch=BATCH, key=KEY):
    def summed(params, state, batch):
        values, rest = objective.losses(params, state, batch, context(key, train=True))
        return sum(values.values()), rest

    (value, (new, aux)), grads = jax.jit(jax.value_and_grad(summed, has_aux=True))(params, state, batch)
    return value, grads, new, aux


@pytest.mark.parametrize("threat", [linf(0.1), l2(0.15)], ids=["linf", "l2"])
def test_pgd_harms_every_example(threat):
    params, state = CHILD.init(KEY, BATCH)
    clean = evaluate(CHILD, params, state)[3]["per_example"]
    for random_start in (True, False):
        hard = adversarial(CHILD, pgd(threat, 20, random_start=random_start))
        attacked = evaluate(hard, params, state)[3]["per_example"]
        assert (np.asarray(attacked) > np.asarray(clean) + 1e-3).all()


@pytest.mark.parametrize(
    "attack",
    [pgd(linf(0.0), 3), pgd(l2(0.0), 3), fgsm(linf(0.0)), pgd(linf(0.1), 0, random_start=False)],
    ids=["linf", "l2", "fgsm", "no steps"],
)
def test_radius_0_is_the_child(attack):
    params, state = CHILD.init(KEY, BATCH)
    got, expected = (evaluate(objective, params, state) for objective in (adversarial(CHILD, attack), CHILD))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_probes_leave_the_state_and_no_gradient_passes_the_attack():
    params, state = CHILD.init(KEY, BATCH)
    _, _, new, _ = evaluate(adversarial(CHILD, pgd(l2(0.15), 3)), params, state)
    assert new["model"]["count"] == 1
    attack = fgsm(l2(0.15))  # it draws nothing, so the test can repeat it
    value, grads, new, _ = evaluate(adversarial(CHILD, attack), params, state)

    def attacked(params):
        def harm(x):
            return CHILD.losses(params, state, {**BATCH, "x": x}, context(train=True))[0]["supervised"]

        return attack(harm, X, KEY)

    x = jax.jit(attacked)(params)
    np.testing.assert_allclose(new["model"]["mean"], np.asarray(x).mean(0), rtol=1e-6)
    expected, expected_grads, _, _ = evaluate(CHILD, params, state, {**BATCH, "x": x})
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected_grads)

    def through(params):
        return CHILD.losses(params, state, {**BATCH, "x": attacked(params)}, context())[0]["supervised"]

    passed = jax.jit(jax.grad(through))(params)  # the test has teeth: this gradient is another one
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(passed), jax.tree.leaves(grads), strict=True)) > 1e-2


def test_predictions_are_on_the_inputs_as_they_are():
    params, state = CHILD.init(KEY, BATCH)
    hard = adversarial(CHILD, pgd(linf(0.1), 3))
    got, expected = (objective.predict(params, state, BATCH, context())[0] for objective in (hard, CHILD))
    np.testing.assert_array_equal(got["logits"], expected["logits"])


def recording(seen):
    """A linear regression whose attack under linf is known; concrete inputs of the network are written down."""

    def apply(params, x):
        if not isinstance(x, jax.core.Tracer):
            seen.append(np.asarray(x))
        return x @ params["w"]

    return from_functions(lambda key, x: {"w": jnp.asarray(W)}, apply)


def rows_of(table):
    return sorted(map(tuple, np.asarray(table).round(4).tolist()))


@pytest.mark.parametrize("outer", ["rehearsal", "adversarial"])
def test_order_of_rehearsal_and_attack(outer):
    """rehearsal(adversarial(x)) stores clean rows and attacks replayed ones; adversarial(rehearsal(x)) the reverse."""
    seen = []
    child = supervised(recording(seen), lambda output, y: output)  # the loss is w'x: the attack adds 0.1 sign(w)
    attack, memory, move = fgsm(linf(0.1)), reservoir(6), 0.1 * np.sign(W)
    if outer == "rehearsal":
        objective = rehearsal(adversarial(child, attack), memory)
    else:
        objective = adversarial(rehearsal(child, memory), attack)
    first, second = ({"x": part, "y": np.zeros(3, np.float32)} for part in (X[:3], X[3:]))
    params, state = objective.init(KEY, first)

    def step(state, batch, key):
        ctx = context(key, train=True)
        _, (state, _) = objective.losses(params, state, batch, ctx)
        return objective.after(params, state, Update(params, params, params), ctx)[1]

    state = step(state, first, KEY)
    stored = np.asarray(state["memory"]["kept"]["rows"]["x"])[:3]
    np.testing.assert_allclose(stored, X[:3] if outer == "rehearsal" else X[:3] + move, atol=1e-6)
    seen.clear()
    state = step(state, second, jax.random.key(4))
    (joint,) = seen
    np.testing.assert_allclose(joint[:3], X[3:] + move, atol=1e-6)
    assert set(rows_of(joint[3:])) <= set(rows_of(X[:3] + move)), "replayed rows are attacked, now or when they were stored"
    np.testing.assert_allclose(state["memory"]["kept"]["rows"]["x"], X if outer == "rehearsal" else X + move, atol=1e-6)


def test_replayed_rows_are_left_alone_by_an_attack_outside():
    """With a memory of clean rows the two orders differ in what the network sees of them."""
    for outer in ("rehearsal", "adversarial"):
        seen = []
        child = supervised(recording(seen), lambda output, y: output)
        attack, memory, move = fgsm(linf(0.1)), reservoir(3), 0.1 * np.sign(W)
        objective = (
            rehearsal(adversarial(child, attack), memory)
            if outer == "rehearsal"
            else adversarial(rehearsal(child, memory), attack)
        )
        batch = {"x": X[3:], "y": np.zeros(3, np.float32)}
        params, state = objective.init(KEY, batch)
        clean = memory.insert(memory.init(batch), {**batch, "x": X[:3]}, KEY)
        seen.clear()
        full = {**state, "memory": {**state["memory"], "kept": clean}}
        objective.losses(params, full, batch, context(KEY, train=True))
        (joint,) = seen
        expected = X[:3] + move if outer == "rehearsal" else X[:3]
        assert set(rows_of(joint[3:])) <= set(rows_of(expected))


def test_a_trained_network_under_attack_keeps_one_update_of_its_state_a_step():
    trainer = Trainer(adversarial(CHILD, pgd(linf(0.05), 2)), optax.sgd(0.1))
    state = trainer.init(0, BATCH)
    for _ in range(3):
        state, metrics = trainer.step(state, BATCH)
    assert state.state["model"]["count"] == 3
    assert np.isfinite(metrics["loss"])
