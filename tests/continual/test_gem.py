"""A-GEM by hand, GEM against a solver of least squares with bounds, and the gradients of every past task in a trainer."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import nnls

from paradigms import Trainer, context, from_functions, supervised
from paradigms.continual.gem import agem, episodic_memory, gem
from paradigms.continual.memory import as_uint8, reservoir, ring
from paradigms.continual.replay import replay
from tests.continual.test_replay import CHILD, KEY, RNG, batch_of, cross_entropy, fill, same_numbers  # noqa: F401
from tests.contracts import source


def combine(aggregate, stream, past):
    """Of flat vectors, each cut into a tree of two leaves of different rank."""
    cut = lambda v: {"a": v[:2], "b": v[2:, None]}
    grads = {f"s{i}": cut(v) for i, v in enumerate(stream)} | {f"memory/{i}": cut(v) for i, v in enumerate(past)}
    out, _ = aggregate.combine(grads, {}, aggregate.init({}, tuple(grads)), context())
    return jnp.concatenate([out["a"], out["b"][:, 0]])


def test_agem_by_hand_and_where_it_changes_nothing():
    vectors = lambda *rows: [jnp.array(row, jnp.float32) for row in rows]
    a, b = vectors([1, 0, 0, 0], [-1, 1, 0, 0])
    np.testing.assert_allclose(combine(agem(), [a], [b]), [0.5, 0.5, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(combine(agem(), [a / 2, a / 2], [b / 4, 3 * b / 4]), [0.5, 0.5, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(combine(agem(), [1e-8 * a], [1e-8 * b]), [0.5e-8, 0.5e-8, 0, 0], rtol=1e-6)
    for other in vectors([2, 1, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]):
        np.testing.assert_array_equal(combine(agem(), [a], [other]), a)
    np.testing.assert_allclose(combine(agem(), [a], [-3 * a]), [0, 0, 0, 0], atol=1e-7)


def test_agem_never_points_against_what_is_remembered():
    g, r = RNG.normal(size=(2, 500, 1, 6)).astype(np.float32)
    out = np.asarray(jax.jit(jax.vmap(lambda g, r: combine(agem(), g, r)))(g, r))
    g, r = g[:, 0], r[:, 0]
    assert ((out * r).sum(1) >= -1e-5).all()
    agrees = (g * r).sum(1) >= 0
    assert 0 < agrees.mean() < 1
    np.testing.assert_array_equal(out[agrees], g[agrees])
    np.testing.assert_allclose((out * r).sum(1)[~agrees], 0, atol=1e-5)
    # the nearest such vector: what was taken away is along r
    away, r = (g - out)[~agrees], r[~agrees]
    lengths = np.linalg.norm(away, axis=1) * np.linalg.norm(r, axis=1)
    np.testing.assert_allclose(np.abs((away * r).sum(1)), lengths, rtol=1e-4)


def project(gradient, past, margin, ridge):
    """The program of the paper as non-negative least squares of stacked columns, by scipy in float64, with its dual."""
    past = past[(past**2).sum(1) > 0]
    if not (past @ gradient < 0).any():
        return gradient, np.zeros(len(past)), past
    columns = np.concatenate([past.T, np.sqrt(ridge) * np.eye(len(past))])
    start = np.concatenate([gradient, np.zeros(len(past))]) + columns @ np.full(len(past), margin)
    v = nnls(columns, -start, maxiter=10_000)[0] + margin
    return gradient + past.T @ v, v, past


KINDS = {
    "plain": lambda past: past,
    "badly scaled": lambda past: past * 10.0 ** RNG.uniform(-3, 3, (len(past), 1)),
    "parallel": lambda past: np.where(np.arange(len(past))[:, None] % 2, 4 * np.roll(past, 1, 0), past),
    "opposed": lambda past: np.where(np.arange(len(past))[:, None] % 2, -2 * np.roll(past, 1, 0), past),
    "to come": lambda past: np.where(np.arange(len(past))[:, None] % 3 == 1, 0, past),
}


def errors(dtype):
    """{case: the difference from scipy's solution, relative to the terms of the sum g + G'v}."""
    found = {}
    solve = jax.jit(lambda g, past, margin, ridge: combine(gem(margin, ridge=ridge), [g], past))
    for tasks in (1, 5, 19):
        for name, kind in KINDS.items():
            for margin, ridge in ((0.5, 1e-3), (0.0, 1e-3), (0.5, 0.0), (0.0, 0.0)):
                if name == "opposed" and ridge == 0:
                    continue  # scipy's own multipliers go to infinity there
                gradient = RNG.normal(size=30)
                past = kind(RNG.normal(size=(tasks, 30)) - 0.3 * gradient).astype(dtype)
                gradient = gradient.astype(dtype)
                expected, v, rows = project(gradient.astype(float), past.astype(float), margin, ridge)
                scale = np.linalg.norm(gradient) + v @ np.linalg.norm(rows, axis=1)
                got = np.asarray(solve(gradient, past, margin, ridge))
                assert got.dtype == dtype
                found[name, tasks, margin, ridge] = np.linalg.norm(got - expected) / scale
    return found


def test_gem_is_the_quadratic_program():
    assert {case: error for case, error in errors(np.float32).items() if error >= 1e-5} == {}


def test_gem_is_the_quadratic_program_in_double_precision(x64):
    assert {case: error for case, error in errors(np.float64).items() if error >= 1e-10} == {}


def test_gem_with_opposed_gradients_leaves_what_is_orthogonal_to_both(x64):
    g, r = RNG.normal(size=(2, 8))
    expected = g - (g @ r) / (r @ r) * r
    np.testing.assert_allclose(combine(gem(0.0, ridge=0.0), [g], [r, -2 * r]), expected, rtol=1e-9, atol=1e-12)


def test_gem_points_against_no_task_and_changes_nothing_where_none_is_hurt():
    g, past = RNG.normal(size=(200, 1, 12)).astype(np.float32), RNG.normal(size=(200, 5, 12)).astype(np.float32)
    out = np.asarray(jax.jit(jax.vmap(lambda g, past: combine(gem(0.0, ridge=0.0), g, past)))(g, past))
    assert (np.einsum("np,ntp->nt", out, past) >= -1e-4).all()
    kind = g * np.sign(np.einsum("nsp,ntp->nt", g, past)[:, :1, None])
    agree = jnp.stack([kind[0, 0], 2 * kind[0, 0]])
    np.testing.assert_array_equal(combine(gem(), kind[0], agree), kind[0, 0])
    np.testing.assert_array_equal(combine(gem(), g[0], jnp.zeros((3, 12))), g[0, 0])


def test_gem_with_one_memory_and_no_margin_is_agem():
    g, r = RNG.normal(size=(2, 100, 1, 6)).astype(np.float32)
    a, b = (jax.jit(jax.vmap(lambda g, r, how=how: combine(how, g, r)))(g, r) for how in (agem(), gem(0.0, ridge=0.0)))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def of_task(task, n=4):
    return {**batch_of(n, 100 * task), "task": np.full(n, task, np.int32)}


def gradient(w, batch):
    """Of the mean cross-entropy of a linear model, in NumPy."""
    z = batch["x"] @ w
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    p[np.arange(len(z)), batch["y"]] -= 1
    return batch["x"].T @ p / len(z)


def test_every_past_task_has_its_loss_and_gradient_and_no_other_has():
    """Tasks 0 and 1 are past, task 2 is under way, task 3 is to come; those of task 1 have filled half of their ring."""
    objective = episodic_memory(CHILD, ring(4, 4), 4)
    tasks = [of_task(0), of_task(1, 2), of_task(2)]
    params, state = objective.init(KEY, tasks[0])
    for batch in tasks:
        state = fill(objective, params, state, batch)
    w = np.asarray(params["model"]["w"])
    stream = of_task(2)

    def losses(params):
        values, _ = objective.losses(params, state, stream, context(KEY, task=2, train=True))
        return values

    values, jacobian = jax.jit(lambda params: (losses(params), jax.jacrev(losses)(params)))(params)
    assert values.keys() == {"supervised", "memory/0", "memory/1", "memory/2", "memory/3"}
    np.testing.assert_allclose(values["supervised"], cross_entropy(w, stream).mean(), rtol=1e-5)
    np.testing.assert_allclose(jacobian["supervised"]["model"]["w"], gradient(w, stream), rtol=1e-4, atol=1e-6)
    for task in range(4):
        value, slope = values[f"memory/{task}"], jacobian[f"memory/{task}"]["model"]["w"]
        if task < 2:
            np.testing.assert_allclose(value, cross_entropy(w, tasks[task]).mean(), rtol=1e-5)
            np.testing.assert_allclose(slope, gradient(w, tasks[task]), rtol=1e-4, atol=1e-6)
        else:
            assert value == 0
            assert not np.any(slope)


def test_in_the_first_task_they_are_the_child():
    batch = of_task(0)
    child = Trainer(CHILD, optax.sgd(0.1))
    plain, _ = child.scan(child.init(0, batch), source(batch), 4)
    objective = episodic_memory(CHILD, as_uint8(ring(4, 3)), 3)
    batch = {**batch, "x": np.clip(batch["x"], 0, 1)}
    for made, aggregate in ((objective, gem()), (objective, None)):
        trainer = Trainer(made, optax.sgd(0.1), aggregate)
        state, _ = trainer.scan(trainer.init(0, batch), source(batch), 4)
        plain, _ = child.scan(child.init(0, batch), source(batch), 4)
        np.testing.assert_allclose(state.params["model"]["w"], plain.params["model"]["w"], rtol=1e-5, atol=1e-6)
    assert state.state["memory"]["kept"]["seen"].tolist() == [16, 0, 0]
    with pytest.raises(ValueError, match="memory: has 12 slots for 5 tasks"):
        episodic_memory(CHILD, ring(4, 3), 5).init(KEY, batch)


def test_a_step_of_the_trainer_follows_the_projected_gradient():
    past, now = of_task(0), of_task(1)
    past["x"] = now["x"] = 2 * np.eye(4, dtype=np.float32)  # orthogonal: each row meets itself alone
    now["y"] = (past["y"] + 1) % 3  # what is asked for contradicts what was learned
    for aggregate, objective in ((agem(), replay(CHILD, reservoir(4))), (gem(0.2), episodic_memory(CHILD, ring(4, 2), 2))):
        trainer = Trainer(objective, optax.sgd(0.1), aggregate)
        state = trainer.init(0, past)
        for _ in range(20):
            state, _ = trainer.step(state, past)
        state = state._replace(task=state.task + 1)
        before, rows = np.asarray(state.params["model"]["w"], float), past
        if "memory/0" not in jax.eval_shape(trainer.pure.step, state, now)[1]:  # one draw of the memory
            key = context(jax.random.fold_in(state.key, state.step)).fold("memory").key
            rows = jax.tree.map(np.asarray, reservoir(4).sample(state.state["memory"]["kept"], key, 4)[0])
        g, r = gradient(before, now), gradient(before, rows)
        assert (g * r).sum() < 0
        if rows is past:
            expected, _, _ = project(g.ravel(), r.ravel()[None], 0.2, 1e-3)
        else:
            expected = g - (g * r).sum() / (r * r).sum() * r
        state, _ = trainer.step(state, now)
        np.testing.assert_allclose(before - 0.1 * expected.reshape(4, 3), state.params["model"]["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["agem", "gem"])
def test_with_an_aggregator_the_memory_is_still_written_in_place(how):
    model = from_functions(lambda key, x: {"w": jax.random.normal(key, (64, 3))}, lambda p, x: x @ p["w"])
    batch, memory = {**of_task(0, 8), "x": RNG.normal(size=(8, 64)).astype(np.float32)}, ring(1024, 4)
    wrapped = replay(supervised(model), memory) if how == "agem" else episodic_memory(supervised(model), memory, 4)
    trainer = Trainer(wrapped, optax.sgd(0.1), agem() if how == "agem" else gem())
    state = trainer.init(0, batch)
    compiled = jax.jit(lambda state: trainer.pure.scan(state, source(batch), 5), donate_argnums=0).lower(state).compile()
    assert not re.findall(r"= f32\[4096,64\]\S* copy\(", str(compiled.as_text()))


def test_names_and_settings():
    with pytest.raises(ValueError, match=r'none is named "memory/\.\.\."'):
        Trainer(CHILD, optax.sgd(0.1), agem()).init(0, batch_of(2))
    with pytest.raises(ValueError, match=r'none is named "past/\.\.\."'):
        Trainer(replay(CHILD, reservoir(2)), optax.sgd(0.1), gem(name="past")).init(0, batch_of(2))
    for call, words in [
        (lambda: gem(-0.5), "margin=-0.5"),
        (lambda: gem(ridge=-1.0), "ridge=-1.0"),
        (lambda: episodic_memory(CHILD, ring(2, 1), 0), "tasks=0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
