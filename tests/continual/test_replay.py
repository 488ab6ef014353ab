"""Replay in two forwards against the losses by hand, the asymmetric cross-entropy, and what an augmented child keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from paradigms import Trainer, Update, context, ewc, from_functions, from_nnx, supervised, vectorize
from paradigms.continual.memory import reservoir
from paradigms.continual.rehearsal import rehearsal
from paradigms.continual.replay import earlier, er_ace, replay
from paradigms.supervised import augmented
from tests.contracts import source

KEY = jax.random.key(1)
RNG = np.random.default_rng(3)
MODEL = from_functions(lambda key, x: {"w": jax.random.normal(key, (4, 3))}, lambda p, x: x @ p["w"])
CHILD = supervised(MODEL)


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws the same numbers, whichever were run before it."""
    RNG.bit_generator.state = np.random.default_rng(3).bit_generator.state


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


NORMED = supervised(from_nnx(lambda rngs: Normed(rngs)))


def batch_of(n, start=0, classes=3):
    x = RNG.normal(size=(n, 4)).astype(np.float32)
    return {"x": x, "y": RNG.integers(0, classes, n).astype(np.int32), "index": np.arange(start, start + n, dtype=np.int32)}


def evaluate(objective, params, state, batch, key=KEY, task=0):
    def summed(params, state, batch):
        values, rest = objective.losses(params, state, batch, context(key, task=task, train=True))
        return sum(values.values()), (values, rest)

    (_, (values, (new, aux))), grads = jax.jit(jax.value_and_grad(summed, has_aux=True))(params, state, batch)
    return values, grads, new, aux


def fill(objective, params, state, batch):
    """The state once `batch` was trained on and stored."""
    _, _, state, _ = evaluate(objective, params, state, batch)
    return objective.after(params, state, Update(params, params, params), context(KEY, train=True))[1]


def cross_entropy(w, batch, closed=None):
    """In NumPy, one value a row; `closed` (classes,) do not compete."""
    z = np.asarray(batch["x"], float) @ np.asarray(w, float)
    z = z if closed is None else np.where(closed, -np.inf, z)
    return np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), np.asarray(batch["y"])]


@pytest.mark.parametrize("child", [CHILD, NORMED], ids=["plain", "batch statistics"])
@pytest.mark.parametrize("size", [None, 3, 0])
def test_an_empty_memory_is_the_child(child, size):
    batch = batch_of(5) | {"weight": np.array([1, 0, 2, 1, 1], np.float32)}
    objective = replay(child, reservoir(4), size)
    params, state = objective.init(KEY, batch)
    values, grads, new, aux = evaluate(objective, params, state, batch)
    expected, expected_grads, moved, expected_aux = evaluate(child, params, {"model": state["model"]}, batch)
    assert values.keys() == {"supervised"} | ({"memory/supervised"} if size != 0 else set())
    assert values.get("memory/supervised", 0) == 0
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    close(values["supervised"], expected["supervised"])
    close(aux["accuracy"], expected_aux["accuracy"])
    jax.tree.map(close, (grads, new["model"]), (expected_grads, moved["model"]))
    assert fill(objective, params, state, batch)["memory"]["kept"]["seen"] == 4, "padding is not stored"


def test_a_penalty_that_no_weight_silences_is_not_counted_while_the_memory_is_empty():
    batch = batch_of(4)
    objective = replay(ewc(CHILD, 1.0), reservoir(4))
    params, state = objective.init(KEY, batch)
    ones = jax.tree.map(jnp.ones_like, params)
    state = {**state, "ewc": {"fisher": ones, "anchor": ones}}
    values, _, _, _ = evaluate(objective, params, state, batch)
    assert values["ewc"] > 0
    assert values["memory/ewc"] == 0
    values, _, _, _ = evaluate(objective, params, fill(objective, params, state, batch), batch)
    assert values["memory/ewc"] == values["ewc"], "inside, a penalty counts in both losses"


def test_stream_and_replay_have_means_of_their_own_by_hand():
    first, second = batch_of(5), batch_of(3, 5)
    objective = replay(CHILD, reservoir(8), size=6, weight=0.5)
    params, state = objective.init(KEY, batch_of(5))
    state = fill(objective, params, state, first)
    values, _, new, aux = evaluate(objective, params, state, second)
    picked = reservoir(8).sample(state["memory"]["kept"], context(KEY).fold("memory").key, 6)[0]
    assert len(set(picked["index"].tolist())) > 1
    w = params["model"]["w"]
    np.testing.assert_allclose(values["supervised"], cross_entropy(w, second).mean(), rtol=1e-5)
    np.testing.assert_allclose(values["memory/supervised"], 0.5 * cross_entropy(w, picked).mean(), rtol=1e-5)
    right = np.argmax(picked["x"] @ w, -1) == picked["y"]
    np.testing.assert_allclose(aux["memory/accuracy"], right.mean(), rtol=1e-6)
    waiting = new["memory"]["incoming"]
    np.testing.assert_array_equal(waiting["rows"]["index"][:3], second["index"])


def test_earlier_tasks_alone_may_count():
    told = lambda batch, task: {**batch, "task": np.full(len(batch["y"]), task, np.int32)}
    first, second, third = (told(batch_of(4, 4 * task), task) for task in range(3))
    objective = replay(CHILD, reservoir(12), size=8, counts=earlier)
    params, state = objective.init(KEY, first)
    for batch in (first, second):
        state = fill(objective, params, state, batch)
    picked = reservoir(12).sample(state["memory"]["kept"], context(KEY).fold("memory").key, 8)[0]
    losses = cross_entropy(params["model"]["w"], picked)
    assert set(picked["task"].tolist()) == {0, 1}
    for task, counted in ((0, picked["task"] < 0), (1, picked["task"] < 1), (2, picked["task"] < 2)):
        values = evaluate(objective, params, state, third, task=task)[0]
        expected = losses[counted].mean() if counted.any() else 0.0
        np.testing.assert_allclose(values["memory/supervised"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match='batch: has no leaf "task"'):
        earlier({"x": picked["x"], "y": picked["y"]}, context())
    alone = evaluate(CHILD, params, {"model": state["model"]}, third)[1]
    jax.tree.map(np.testing.assert_array_equal, evaluate(objective, params, state, third, task=0)[1], alone)


def test_batch_statistics_see_the_stream_and_then_the_replay():
    first, second = batch_of(4), batch_of(4, 4)
    objective = replay(NORMED, reservoir(4))
    params, state = objective.init(KEY, first)
    state = fill(objective, params, state, first)
    _, _, new, _ = evaluate(objective, params, state, second)
    picked = reservoir(4).sample(state["memory"]["kept"], context(KEY).fold("memory").key, 4)[0]
    mean = np.asarray(state["model"]["norm"]["mean"])
    for batch in (second, picked):
        mean = 0.99 * mean + 0.01 * np.asarray(batch["x"]).mean(0)  # flax's momentum
    np.testing.assert_allclose(new["model"]["norm"]["mean"], mean, rtol=1e-4, atol=1e-7)


def test_other_slots_of_the_child_see_the_stream_alone():
    batch = batch_of(4)
    objective = replay(rehearsal(CHILD, reservoir(64), name="inner"), reservoir(8))
    params, state = objective.init(KEY, batch)
    for _ in range(3):
        state = fill(objective, params, state, batch)
    assert state["inner"]["kept"]["seen"] == 12


def test_asymmetric_cross_entropy_by_hand():
    table = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], bool)
    model = from_functions(lambda key, x: {"w": jax.random.normal(key, (4, 6))}, lambda p, x: x @ p["w"])
    objective = er_ace(model, reservoir(8), table, size=5)
    first, second = batch_of(4), {**batch_of(4, 4), "y": np.array([2, 2, 3, 2], np.int32)}
    first["y"] = first["y"] % 2
    params, state = objective.init(KEY, first)
    state = fill(objective, params, state, first)
    values, _, _, _ = evaluate(objective, params, state, second, task=1)
    picked = reservoir(8).sample(state["memory"]["kept"], context(KEY).fold("memory").key, 5)[0]
    w, classes = params["model"]["w"], np.arange(6)
    stream = cross_entropy(w, second, ~np.isin(classes, [2, 3]))  # the classes of the batch
    np.testing.assert_allclose(values["supervised"], stream.mean(), rtol=1e-5)
    replayed = cross_entropy(w, picked, classes >= 4)  # those of all tasks so far
    np.testing.assert_allclose(values["memory/supervised"], replayed.mean(), rtol=1e-5)
    logits = np.asarray(objective.predict(params, state, second, context(task=1))[0]["logits"])
    assert ((logits > -1e3) == (classes < 4)).all(), "the answer is among the classes seen"


def noise(key, batch):
    return {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape, batch["x"].dtype)}


def test_an_augmented_child_keeps_plain_rows_and_sees_one_view_a_step():
    batch, child = batch_of(6), augmented(CHILD, noise)
    objective = replay(child, reservoir(6))
    params, state = objective.init(KEY, batch)
    state = fill(objective, params, state, batch)
    np.testing.assert_array_equal(state["memory"]["kept"]["rows"]["x"], batch["x"])
    values, _, _, _ = evaluate(child, params, {"model": {}}, batch)
    seen = child.predict(params, {"model": {}}, batch, context(KEY, train=True))[0]["logits"]
    own = optax.softmax_cross_entropy_with_integer_labels(seen, batch["y"]).mean()
    np.testing.assert_allclose(values["supervised"], own, rtol=1e-6)
    plain = child.predict(params, {"model": {}}, batch, context(KEY))[0]["logits"]
    np.testing.assert_allclose(plain, batch["x"] @ params["model"]["w"], rtol=1e-5, atol=1e-6)
    assert np.abs(seen - plain).max() > 0.1
    again = child.predict(params, {"model": {}}, batch, context(jax.random.key(2), train=True))[0]["logits"]
    assert np.abs(seen - again).max() > 0.1, "another step, another view"


def test_weights_are_settings_of_runs_side_by_side(x64):
    batch = jax.tree.map(lambda leaf: leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf, batch_of(4))
    make = lambda weight: Trainer(replay(CHILD, reservoir(8), weight=weight), optax.sgd(0.1))
    many = vectorize(make, seeds=1, weight=[0.0, 2.0])
    state, metrics = many.scan(many.init(KEY, batch), source(batch), 3)
    assert (np.asarray(metrics["memory/supervised"])[0] == 0).all()
    for run, child in enumerate((Trainer(CHILD, optax.sgd(0.1)), make(2.0))):
        alone, _ = child.scan(child.init(jax.random.fold_in(KEY, 0), batch), source(batch), 3)
        np.testing.assert_allclose(state.params["model"]["w"][run], alone.params["model"]["w"], rtol=1e-12)
    assert (np.asarray(state.state["memory"]["kept"]["seen"]) == 12).all()


def test_settings():
    for call, words in [
        (lambda: replay(CHILD, reservoir(1), -1), "size=-1"),
        (lambda: replay(CHILD, reservoir(1), weight=-1.0), "weight=-1.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match=r'slot "memory" is already taken.*name="memory2"'):
        replay(replay(CHILD, reservoir(3)), reservoir(3)).init(KEY, batch_of(2))
