"""Memories against sequential algorithms and their laws, and rehearsal with an empty and a full memory."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from paradigms import Trainer, Update, context, from_functions, from_nnx, rehearsal, reservoir, supervised
from paradigms.continual.class_balance import balanced_reservoir, class_balanced
from paradigms.continual.memory import as_uint8, by_label, bytes_of, ring
from paradigms.data import pixels

KEY = jax.random.key(1)


def numbers(start, stop):
    return {"x": jnp.arange(start, stop)}


def stream_into(memory, sizes, key):
    """What is stored after batches of `sizes` numbered examples."""
    state, start = memory.init(numbers(0, 1)), 0
    for i, size in enumerate(sizes):
        state = memory.insert(state, numbers(start, start + size), jax.random.fold_in(key, i))
        start += size
    return state["rows"]["x"]


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [9]], ids=["one by one", "batches", "one batch"])
def test_every_example_is_stored_with_the_same_probability(sizes):
    trials, capacity, n = 6000, 4, 9
    keys = jax.random.split(KEY, trials)
    stored = np.asarray(jax.jit(jax.vmap(lambda key: stream_into(reservoir(capacity), sizes, key)))(keys))
    assert (np.diff(np.sort(stored, 1), axis=1) > 0).all(), "no example twice"
    p = capacity / n
    included = np.bincount(stored.reshape(-1), minlength=n)
    # a sample without replacement: the indicators have variance p(1-p) and covariance -p(1-p)/(n-1)
    statistic = ((included - trials * p) ** 2).sum() / (trials * p * (1 - p) * n / (n - 1))
    assert 0.001 < stats.chi2(n - 1).sf(statistic) < 0.999
    pairs = np.zeros((n, n))
    for row in stored:
        pairs[np.ix_(row, row)] += 1
    both = pairs[np.triu_indices(n, 1)]  # pairs are stored together as often as in a uniform subset
    expected = trials * p * (capacity - 1) / (n - 1)
    assert np.abs(both - expected).max() < 4.5 * np.sqrt(expected)


def test_a_batch_is_inserted_as_its_rows_one_after_the_other(monkeypatch):
    """Algorithm R in NumPy, row by row, on the same draws."""
    rng, capacity, memory = np.random.default_rng(0), 4, reservoir(4)
    drawn = []
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.asarray(drawn[-1]))
    for _ in range(40):
        store, seen = np.zeros(capacity, int), 0
        state = memory.init(numbers(0, 1))
        for size in (3, 7, 5):
            weight = rng.integers(0, 2, size).astype(np.float32)
            counted = seen + np.cumsum(weight) - 1
            drawn.append(np.array([rng.integers(0, max(n, 0) + 1) for n in counted.astype(int)]))
            x = rng.integers(1, 1000, size)
            state = memory.insert(state, {"x": jnp.asarray(x), "weight": jnp.asarray(weight)}, KEY)
            for value, real, j in zip(x, weight, drawn[-1], strict=True):
                if not real:
                    continue
                slot = seen if seen < capacity else j
                if slot < capacity:
                    store[slot] = value
                seen += 1
            np.testing.assert_array_equal(state["rows"]["x"], store)
            assert int(state["seen"]) == seen


def test_draws_run_over_all_that_was_seen():
    """A uniform slot among 0..n, inclusive: the last of n + 1 examples is stored with probability capacity/(n + 1)."""
    memory = reservoir(2)

    def last(key):
        return jnp.any(stream_into(memory, [2, 1], key) == 2)

    kept = int(jax.jit(jax.vmap(last))(jax.random.split(KEY, 6000)).sum())
    assert stats.binomtest(kept, 6000, 2 / 3).pvalue > 0.01


def test_padding_is_neither_stored_nor_counted():
    memory = reservoir(8)
    state = memory.init(numbers(0, 1))
    for i in range(4):
        batch = {"x": jnp.array([1, -1, 2, -1]) + i, "weight": jnp.array([1.0, 0.0, 0.5, 0.0])}
        batch["x"] = jnp.where(batch["weight"] > 0, batch["x"], -1)
        state = memory.insert(state, batch, jax.random.fold_in(KEY, i))
    assert state["seen"] == 8
    np.testing.assert_array_equal(np.sort(state["rows"]["x"]), [1, 2, 2, 3, 3, 4, 4, 5])
    only = memory.insert(memory.init(batch), {"x": jnp.full(4, -1), "weight": jnp.zeros(4)}, KEY)
    assert only["seen"] == 0
    assert not memory.sample(only, KEY, 3)[1].any()
    assert "weight" not in only["rows"]


def test_replay_is_uniform_over_what_is_stored():
    memory = reservoir(6)
    state = memory.insert(memory.init(numbers(0, 1)), numbers(10, 14), KEY)
    batch, valid = jax.jit(memory.sample, static_argnums=2)(state, KEY, 8000)
    assert valid.all()
    count = np.bincount(np.asarray(batch["x"]), minlength=14)[10:]
    assert count.sum() == 8000, "slots that hold nothing are never drawn"
    assert stats.chisquare(count).pvalue > 0.01


@pytest.mark.parametrize("sizes", [[1] * 40, [14, 16, 10]], ids=["one by one", "batches"])
def test_a_ring_keeps_the_last_rows_of_each_group(sizes):
    """Against a deque for each group, with padding, rows of no group, and more rows a batch than there is room."""
    rng, memory = np.random.default_rng(3), ring(2, 3)
    queues = [collections.deque(maxlen=2) for _ in range(3)]
    state, insert = memory.init({"x": jnp.zeros(1, int), "task": jnp.zeros(1, int)}), jax.jit(memory.insert)
    for size in sizes:
        x, task, weight = rng.integers(1, 1000, size), rng.integers(-1, 4, size), rng.integers(0, 2, size)
        state = insert(state, {"x": x, "task": task, "weight": weight.astype(np.float32)}, KEY)
        for value, group, real in zip(x, task, weight, strict=True):
            if real and 0 <= group < 3:
                queues[group].append(value)
        batch, valid = memory.stored(state)
        for group, queue in enumerate(queues):
            mine = slice(2 * group, 2 * group + 2)
            assert sorted(np.asarray(batch["x"][mine])[np.asarray(valid[mine])]) == sorted(queue)
            assert (np.asarray(batch["task"][mine])[np.asarray(valid[mine])] == group).all()
    assert all(len(queue) == 2 for queue in queues)


def test_replay_from_a_ring_is_uniform_over_what_is_stored():
    memory = ring(3, 4, by_label)
    y = jnp.array([1, 3, 3, 1, 3, 3])  # groups 0 and 2 are empty, 1 has 2 rows and 3 has its last 3
    state = memory.insert(memory.init({"x": y, "y": y}), {"x": jnp.arange(6), "y": y}, KEY)
    np.testing.assert_array_equal(memory.stored(state)[1], np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1], bool))
    batch, valid = jax.jit(memory.sample, static_argnums=2)(state, KEY, 5000)
    assert valid.all()
    count = np.bincount(np.asarray(batch["x"]), minlength=6)
    assert count[1] == 0, "of group 3 the first row is gone"
    assert stats.chisquare(np.delete(count, 1)).pvalue > 0.01
    assert not memory.sample(memory.init({"x": y, "y": y}), KEY, 2)[1].any()


EVERY = {
    "reservoir": lambda n: reservoir(n),
    "ring": lambda n: ring(n // 4, 4, by_label),
    "class_balanced": lambda n: class_balanced(n, 4),
    "balanced_reservoir": lambda n: balanced_reservoir(n, 4),
    "as_uint8": lambda n: as_uint8(reservoir(n)),
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


def labelled(key, n, width=2):
    return {"x": jax.random.uniform(key, (n, width), jnp.float32), "y": jax.random.randint(key, (n,), 0, 4)}


@every
def test_structure_and_dtypes_hold_in_a_scan_in_double_precision(x64, make):
    memory = make(8)
    state = memory.init(labelled(KEY, 1))
    after, _ = jax.lax.scan(lambda s, key: (memory.insert(s, labelled(key, 2), key), None), state, jax.random.split(KEY, 5))
    batch, valid = memory.stored(after)
    assert batch["x"].shape == (8, 2)
    assert batch["x"].dtype == jnp.float32
    assert valid.shape == (8,)
    assert 5 < valid.sum() <= 8
    drawn, real = memory.sample(after, KEY, 20)
    assert real.all()
    kept = {tuple(row) for row in np.asarray(batch["x"])[np.asarray(valid)].tolist()}
    assert {tuple(row) for row in np.asarray(drawn["x"]).tolist()} <= kept
    assert not memory.stored(state)[1].any()


def test_pixels_come_back_from_bytes_bit_by_bit():
    original = jnp.arange(256, dtype=jnp.uint8).reshape(64, 4)
    batch = {"x": pixels(original), "y": jnp.zeros(64, jnp.int32)}
    plain, memory = reservoir(64), as_uint8(reservoir(64))
    state = jax.jit(lambda batch: memory.insert(memory.init(batch), batch, KEY))(batch)
    assert state["rows"]["x"].dtype == jnp.uint8
    np.testing.assert_array_equal(state["rows"]["x"], original)
    back, valid = jax.jit(memory.stored)(state)
    assert valid.all()
    assert back["x"].dtype == jnp.float32
    np.testing.assert_array_equal(back["x"], batch["x"])
    same = plain.sample(plain.insert(plain.init(batch), batch, KEY), KEY, 9)[0]
    np.testing.assert_array_equal(jax.jit(memory.sample, static_argnums=2)(state, KEY, 9)[0]["x"], same["x"])
    x = jnp.linspace(-0.1, 1.1, 200).reshape(50, 4)
    back = memory.stored(memory.insert(memory.init(batch), {"x": x, "y": jnp.zeros(50, int)}, KEY))[0]["x"][:50]
    assert np.abs(np.asarray(back) - np.clip(x, 0, 1)).max() <= 1 / 510 + 1e-6


def test_episodes_are_stored_as_bytes():
    part = lambda n: {"x": pixels(jnp.arange(4 * n, dtype=jnp.uint8).reshape(2, n, 2)), "y": jnp.ones((2, n), int)}
    batch, memory = {"support": part(3), "query": part(5)}, as_uint8(reservoir(2))
    state = memory.insert(memory.init(batch), batch, KEY)
    assert {state["rows"][name]["x"].dtype for name in batch} == {jnp.dtype("uint8")}
    jax.tree.map(np.testing.assert_array_equal, memory.stored(state)[0], batch)
    assert bytes_of(state) == 2 * 8 * 2 + 2 * 8 * 4 + 4, "pixels, labels, and the count of rows seen"
    assert bytes_of(jax.eval_shape(memory.init, batch)) == bytes_of(state)


def test_settings_of_memories():
    x = {"x": np.ones((2, 3), np.uint8)}
    for call, words in [
        (lambda: ring(0, 1), "capacity_each=0"),
        (lambda: ring(1, 0), "groups=0"),
        (lambda: ring(1, 1).insert(ring(1, 1).init(x), x, KEY), 'no leaf "task"'),
        (lambda: as_uint8(reservoir(1)).init(x), "x has dtype uint8"),
        (lambda: as_uint8(reservoir(1)).init({"x": np.array([0.5, 1.5])}), r"x is in \[0.5, 1.5\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_settings_and_double_precision_data_of_the_host():
    for call, words in [(lambda: reservoir(0), "capacity=0"), (lambda: rehearsal(CHILD, reservoir(1), -1), "size=-1")]:
        with pytest.raises(ValueError, match=words):
            call()
    batch = {"x": np.ones((2, 4)), "y": np.zeros(2, np.int64)}  # warnings are errors
    Trainer(rehearsal(CHILD, reservoir(3)), optax.sgd(0.1)).init(0, batch)
    with pytest.raises(ValueError, match=r'slot "memory" is already taken.*name="memory2"'):
        rehearsal(rehearsal(CHILD, reservoir(3)), reservoir(3)).init(KEY, batch)


RNG = np.random.default_rng(2)
CHILD = supervised(from_functions(lambda key, x: {"w": jax.random.normal(key, (4, 3))}, lambda p, x: jnp.tanh(x @ p["w"])))


def batch_of(n, start=0):
    return {"x": RNG.normal(size=(n, 4)), "y": RNG.integers(0, 3, n), "index": np.arange(start, start + n)}


def evaluate(objective, params, state, batch, key=KEY):
    def summed(params, state, batch):
        values, rest = objective.losses(params, state, batch, context(key, train=True))
        return sum(values.values()), rest

    (value, (new, aux)), grads = jax.jit(jax.value_and_grad(summed, has_aux=True))(params, state, batch)
    return value, grads, new, aux


def insert(objective, params, state, key=KEY):
    """The memory after the update that followed the losses."""
    _, state = objective.after(params, state, Update(params, params, params), context(key, train=True))
    assert not np.any(state["memory"]["incoming"]["weight"])
    return state


@pytest.mark.parametrize(("size", "padded"), [(None, False), (None, True), (0, True), (3, True)])
def test_an_empty_memory_is_the_child(x64, size, padded):
    batch = batch_of(5)
    if padded:
        batch["weight"] = np.array([1.0, 0, 2, 1, 0])
    objective = rehearsal(CHILD, reservoir(4), size)
    params, state = objective.init(KEY, batch)
    value, grads, new, aux = evaluate(objective, params, state, batch)
    expected, expected_grads, _, expected_aux = evaluate(CHILD, params, {"model": {}}, batch)
    # nothing but the order of the sums differs
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(aux["accuracy"], expected_aux["accuracy"], rtol=1e-14)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-16), grads, expected_grads)
    assert insert(objective, params, new)["memory"]["kept"]["seen"] == (3 if padded else 5)


def test_an_empty_memory_leaves_batch_statistics_as_they_are():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(x))

    child = supervised(from_nnx(lambda rngs: Net(rngs)))
    batch = jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype == float else leaf, batch_of(6))
    objective = rehearsal(child, reservoir(4))
    params, state = objective.init(KEY, batch)
    _, grads, new, _ = evaluate(objective, params, state, batch)
    _, expected_grads, expected, _ = evaluate(child, params, {"model": state["model"]}, batch)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, new["model"], expected["model"])
    jax.tree.map(close, grads, expected_grads)
    assert np.abs(np.asarray(new["model"]["norm"]["mean"])).max() > 1e-3


def test_a_full_memory_joins_stream_and_replay_under_one_mean(x64):
    """The joint loss from the rows that the memory could have given: one mean over stream and replay alike."""
    memory, size = reservoir(3), 2
    objective = rehearsal(CHILD, memory, size)
    first, second = batch_of(3), batch_of(4, start=3)
    params, state = objective.init(KEY, second)
    _, _, state, _ = evaluate(objective, params, state, first)
    state = insert(objective, params, state)
    np.testing.assert_array_equal(state["memory"]["kept"]["rows"]["index"], [0, 1, 2])
    second["weight"] = np.array([1.0, 0.0, 1.0, 3.0])
    value, _, new, _ = evaluate(objective, params, state, second, jax.random.key(7))

    def per_example(batch):
        return np.asarray(evaluate(CHILD, params, {"model": {}}, batch)[3]["per_example"])

    old, now = per_example(first), per_example(second)
    possible = [((second["weight"] * now).sum() + old[i] + old[j]) / (5 + 2) for i in range(3) for j in range(3)]
    assert np.isclose(possible, float(value), rtol=1e-12).any()
    assert insert(objective, params, new)["memory"]["kept"]["seen"] == 6


def test_what_is_stored_are_rows_of_the_stream():
    trainer = Trainer(rehearsal(CHILD, reservoir(5)), optax.sgd(0.1))
    batches = [batch_of(4, 4 * i) for i in range(5)]
    state = trainer.init(0, batches[0])
    for batch in batches:
        state, _ = trainer.step(state, batch)
    rows = jax.tree.map(np.asarray, state.state["memory"]["kept"]["rows"])
    stream = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert len(set(rows["index"].tolist())) == 5
    for name in ("x", "y"):
        np.testing.assert_array_equal(rows[name], stream[name][rows["index"]].astype(rows[name].dtype))
    assert int(state.state["memory"]["kept"]["seen"]) == 20


def copies(compiled, shape):
    return re.findall(rf"= \w+\[{shape}\]\S* copy\(", compiled.as_text())


@every
def test_inserts_in_a_scan_write_in_place(make):
    memory = make(4096)

    def run(state, key):
        return jax.lax.scan(
            lambda s, key: (memory.insert(s, labelled(key, 8, 64), key), None), state, jax.random.split(key, 20)
        )[0]

    state = memory.init(labelled(KEY, 8, 64))
    compiled = jax.jit(run, donate_argnums=0).lower(state, KEY).compile()
    assert not copies(compiled, "4096,64")
    assert not copies(compiled, "4,4096"), "the table of who holds which slot"
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 64 / 4


@pytest.mark.parametrize(
    ("guard", "make"), [(False, EVERY["reservoir"]), (True, EVERY["reservoir"]), (True, EVERY["as_uint8"])]
)
def test_training_with_rehearsal_in_a_scan_copies_no_buffer(guard, make):
    class Source:
        def batch(self, key, step):
            x = jax.random.uniform(jax.random.fold_in(key, step), (8, 64))
            return {"x": x, "y": jnp.zeros(8, jnp.int32)}

    model = from_functions(lambda key, x: {"w": jax.random.normal(key, (64, 3))}, lambda p, x: x @ p["w"])
    trainer = Trainer(rehearsal(supervised(model), make(16384)), optax.sgd(0.1), guard=guard)
    state = trainer.init(0, Source().batch(KEY, 0))
    run = jax.jit(lambda state: trainer.pure.scan(state, Source(), 20), donate_argnums=0)
    compiled = run.lower(state).compile()
    assert not copies(compiled, "16384,64")
    assert compiled.memory_analysis().temp_size_in_bytes < 16384 * 64 / 4  # most of it the batches of some steps


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_parts_of_a_step_are_stored_together(parts):
    trainer = Trainer(rehearsal(CHILD, reservoir(8)), optax.sgd(0.1), microbatches=parts)
    state = trainer.init(0, batch_of(4))
    for i in range(2):
        state, _ = trainer.step(state, batch_of(4, 4 * i))
    kept = state.state["memory"]["kept"]
    assert kept["seen"] == 8
    np.testing.assert_array_equal(kept["rows"]["index"], np.arange(8))


def test_a_skipped_step_stores_nothing():
    trainer = Trainer(rehearsal(CHILD, reservoir(8)), optax.adam(0.1), guard=True)
    state = trainer.init(0, batch_of(4))
    state, metrics = trainer.step(state, batch_of(4))
    before = jax.tree.map(np.asarray, state._replace(key=0))
    bad = batch_of(4, 4)
    bad["x"][2, 1] = np.nan
    state, skipped = trainer.step(state, bad)
    assert (metrics["skipped"], skipped["skipped"]) == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, state._replace(key=0, step=before.step), before)
    assert state.step == before.step + 1
