"""Herding against the algorithm as it is printed; iCaRL's losses, exemplars and answers against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paradigms import Trainer, context, from_functions, vectorize
from paradigms.continual.herding import herded, herding
from paradigms.continual.icarl import icarl
from paradigms.data import Source
from paradigms.supervised import CLOSED

KEY = jax.random.key(0)
TABLE = np.repeat(np.eye(2, dtype=bool), 2, 1)  # two tasks of two classes


def network(width=3):
    def init(key, x):
        a, b = jax.random.split(key)
        return {"a": jax.random.normal(a, (x.shape[-1], width), x.dtype), "b": jax.random.normal(b, (width, 4), x.dtype)}

    def apply(p, x):
        features = jnp.tanh(x @ p["a"])
        return {"features": features, "logits": features @ p["b"]}

    return from_functions(init, apply)


MODEL = network()


def rows(task, *shape, seed=0):
    """Rows on the grid of uint8, so that storing them loses nothing."""
    rng = np.random.default_rng(seed)
    return {"x": rng.integers(0, 256, (*shape, 5)) / 255, "y": rng.integers(2 * task, 2 * task + 2, shape).astype(np.int32)}


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def features(params, x):
    return unit(np.tanh(x @ np.asarray(params["a"])))


def greedy(phi, n):
    """Algorithm 4 of Rebuffi et al. (2017), by loops."""
    phi, order = unit(phi), []
    mean = unit(phi.mean(0))
    for k in range(1, min(n, len(phi)) + 1):
        gaps = [np.linalg.norm(mean - (p + phi[order].sum(0)) / k) if i not in order else np.inf for i, p in enumerate(phi)]
        order.append(int(np.argmin(gaps)))
    return order


def test_herding_is_the_greedy_algorithm(x64):
    rng = np.random.default_rng(1)
    for n in (1, 7, 20):
        phi, real = rng.normal(size=(20, 4)), rng.random(20) < 0.7
        numbers = np.flatnonzero(real)
        expected = list(numbers[greedy(phi[real], n)]) + [-1] * max(n - real.sum(), 0)
        np.testing.assert_array_equal(herding(phi, real, n), expected)


def test_a_herded_memory_chooses_the_classes_of_a_batch_and_cuts_the_others(x64):
    """Against the algorithm by loops, for classes that come in any order, with padding and a class that is not there."""
    rng, memory = np.random.default_rng(2), herded(12, 4, most=6, new=2)
    first = {"x": np.zeros((1, 3)), "y": np.zeros(1, int), "features": np.zeros((1, 3))}
    state, sets, expected = memory.init(first), {}, []
    assert set(state["rows"]) == {"x", "y"}
    for number, classes in enumerate(([3, 1], [0], [1, 7])):
        n = 20
        batch = {"x": rng.normal(size=(n, 3)), "y": rng.choice(classes, n), "weight": (rng.random(n) < 0.8).astype(float)}
        batch["features"] = batch["x"] * (number + 1) + rng.normal(size=(n, 3))
        state = jax.jit(memory.insert)(state, batch, KEY)
        for label in set(classes) & set(range(4)):
            mine = np.flatnonzero((batch["y"] == label) & (batch["weight"] > 0))
            sets[label] = batch["x"][mine[greedy(batch["features"][mine], 6)]]
        sets = {label: rows[: 12 // len(sets)] for label, rows in sets.items()}
        stored, valid = memory.stored(state)
        expected = [row for label in sorted(sets) for row in sets[label]]
        np.testing.assert_array_equal(np.asarray(stored["x"])[np.asarray(valid)], expected)
        labels = np.repeat(sorted(sets), [len(sets[label]) for label in sorted(sets)])
        np.testing.assert_array_equal(np.asarray(stored["y"])[np.asarray(valid)], labels)
    drawn, _ = memory.sample(state, KEY, 4000)
    assert {tuple(row) for row in np.asarray(drawn["x"])} == {tuple(row) for row in expected}
    for make, message in (
        (lambda: herded(3, 4), "capacity=3: must be at least 4"),
        (lambda: herded(8, 4, most=0), "most=0: must be 1 or more"),
        (lambda: memory.insert(state, {"x": np.zeros((1, 3)), "y": np.zeros(1, int)}, KEY), 'no leaf "features"'),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
def test_a_herded_memory_holds_many_rows_of_labels_of_few_bits(dtype):
    x = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    batch = {"x": x, "y": np.repeat(np.arange(4), 100).astype(dtype), "features": x}
    memory = herded(400, 4)
    stored, valid = memory.stored(memory.insert(memory.init(batch), batch, KEY))
    assert valid.all()
    np.testing.assert_array_equal(np.sort(np.asarray(stored["x"]), 0), np.sort(x, 0))
    np.testing.assert_array_equal(stored["y"], batch["y"])
    only = herded(400, 4, new=2)
    np.testing.assert_array_equal(only.insert(only.init(batch), batch, KEY)["count"], [100, 100, 0, 0])  # the lowest numbers


def after_task(objective, params, state, task, data):
    return objective.boundary(params, state, data, context(KEY, task=task), "end")


def chosen(params, data, label, n):
    """The exemplars of one class, by hand."""
    keep = data["y"].ravel() == label
    if "weight" in data:
        keep &= data["weight"].ravel() > 0
    x = data["x"].reshape(-1, 5)[keep]
    return x[greedy(features(params, x), n)]


@functools.cache
def trained(capacity=12, **options):
    """Params, the objective and the states after each of two tasks, under different params."""
    objective = icarl(MODEL, TABLE, capacity, **options)
    tasks = [rows(0, 3, 8), {**rows(1, 3, 8, seed=1), "weight": np.random.default_rng(2).integers(0, 2, (3, 8)) * 1.0}]
    first, state = objective.init(KEY, jax.tree.map(lambda leaf: leaf[0], tasks[0]))
    second = jax.tree.map(lambda p: p + 0.3, first)
    _, one = jax.jit(lambda p, s: after_task(objective, p, s, 0, tasks[0]))(first, state)
    _, two = jax.jit(lambda p, s: after_task(objective, p, s, 1, tasks[1]))(second, one)
    return objective, tasks, (first, second), (state, one, two)


def test_exemplars_are_herded_and_old_sets_keep_their_first(x64):
    _, tasks, (first, second), (_, one, two) = trained()
    one, two = ({"x": held["rows"]["x"].reshape(4, 6, 5), "count": held["count"]} for held in (kept(one), kept(two)))
    assert one["x"].dtype == jnp.uint8  # in six slots a class: 12 exemplars for the two classes of the first task
    np.testing.assert_array_equal(one["count"], [6, 6, 0, 0])
    available = [(tasks[1]["weight"] > 0)[tasks[1]["y"] == c].sum() for c in (2, 3)]
    np.testing.assert_array_equal(two["count"], [3, 3, *np.minimum(available, 3)])
    for label in range(4):
        task = label // 2
        params, data = ((first, tasks[0]), (second, tasks[1]))[task]
        best = chosen(params["model"], data, label, 6)
        if task == 0:
            np.testing.assert_array_equal(one["x"][label], np.round(best * 255))
        n = int(two["count"][label])
        np.testing.assert_array_equal(two["x"][label][:n], np.round(best[:n] * 255))


def test_it_answers_with_the_nearest_mean_of_exemplars(x64):
    objective, _, (_, second), (start, one, two) = trained()
    x = rows(0, 6, seed=5)["x"]
    phi = features(second["model"], x)
    means = [unit(features(second["model"], chosen_x).mean(0)) for chosen_x in exemplars(two)]
    expected = np.stack([-((phi - mean) ** 2).sum(-1) for mean in means], -1)
    found = objective.predict(second, two, {"x": x}, context())[0]
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-10)
    np.testing.assert_allclose(unit(np.asarray(found["features"])), phi, rtol=1e-10)
    early = np.asarray(objective.predict(second, one, {"x": x}, context())[0]["logits"])
    assert (early[:, 2:] == CLOSED).all()
    assert (early[:, :2] <= 0).all()
    assert (early[:, :2] >= -4).all()
    assert (np.asarray(objective.predict(second, start, {"x": x}, context())[0]["logits"]) == CLOSED).all()


def kept(state):
    return state["icarl"]["kept"]


def test_rows_of_classes_before_choose_no_exemplars(x64):
    """A blurry boundary: those of the task are chosen as without them, those before only cut."""
    objective, tasks, (_, second), (_, one, two) = trained()
    mixed = {name: np.concatenate([leaf, tasks[0][name]]) for name, leaf in tasks[1].items() if name != "weight"}
    mixed["weight"] = np.concatenate([tasks[1]["weight"], np.ones((3, 8))])
    _, found = after_task(objective, second, one, 1, mixed)
    for expected, got in zip(exemplars(two), exemplars(found), strict=True):
        np.testing.assert_array_equal(got, expected)


def exemplars(state):
    x = np.asarray(kept(state)["rows"]["x"])
    return [x[:n] / 255 for x, n in zip(x.reshape(4, -1, *x.shape[1:]), kept(state)["count"], strict=True)]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def cross(z, target):
    return -(target * np.log(sigmoid(z)) + (1 - target) * np.log(1 - sigmoid(z)))


def by_hand(params, teacher, x, y, old, new, temperature=1.0):
    """The sums over old and new outputs, one value a row."""
    z = np.tanh(x @ np.asarray(params["a"])) @ np.asarray(params["b"])
    target = sigmoid(np.tanh(x @ np.asarray(teacher["a"])) @ np.asarray(teacher["b"]) / temperature)
    return cross(z, np.eye(4)[y])[:, new].sum(-1), cross(z, target)[:, old].sum(-1)


def test_the_first_task_is_sigmoid_classification_of_its_outputs(x64):
    objective, _, (first, _), (start, *_) = trained()
    batch = {**rows(0, 6), "weight": np.array([1.0, 2, 0, 1, 1, 1])}
    losses, _ = objective.losses(first, start, batch, context(KEY, train=True))
    each, _ = by_hand(first["model"], first["model"], batch["x"], batch["y"], [], [0, 1])
    np.testing.assert_allclose(losses["classification"], np.average(each, weights=batch["weight"]), rtol=1e-10)
    assert losses["distillation"] == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_old_outputs_learn_from_the_teacher(x64, temperature):
    objective, _, (first, _), (_, one, _) = trained(size=0, temperature=temperature)
    moved = jax.tree.map(lambda p: p - 0.2, first)
    batch = rows(1, 6, seed=7)
    losses, (state, _) = objective.losses(moved, one, batch, context(KEY, task=1, train=True))
    new, old = by_hand(moved["model"], first["model"], batch["x"], batch["y"], [0, 1], [2, 3], temperature)
    np.testing.assert_allclose(losses["classification"], new.mean(), rtol=1e-10)
    np.testing.assert_allclose(losses["distillation"], old.mean(), rtol=1e-10)
    jax.tree.map(np.testing.assert_array_equal, state["icarl"], one["icarl"])


def test_exemplars_count_as_in_the_union_with_the_task(x64):
    """The mean of sum(stream) + w sum(replayed) over many draws is that over the task and all exemplars, each once."""
    size, task_size = 4, 30
    objective, _, (first, _), (_, one, _) = trained(size=size, task_size=task_size)
    batch = rows(1, 6, seed=7)
    moved = jax.tree.map(lambda p: p - 0.2, first)

    def one_draw(key):
        return objective.losses(moved, one, batch, context(key, task=1, train=True))[0]["classification"]

    found = np.asarray(jax.jit(jax.vmap(one_draw))(jax.random.split(KEY, 3000)))
    sets = exemplars(one)
    x, y = np.concatenate(sets), np.repeat(np.arange(4), [len(s) for s in sets])
    replayed, _ = by_hand(moved["model"], first["model"], x, y, [0, 1], [2, 3])
    stream, _ = by_hand(moved["model"], first["model"], batch["x"], batch["y"], [0, 1], [2, 3])
    union = (task_size * stream.mean() + replayed.sum()) / (task_size + len(x))
    assert abs(found.mean() - union) < 4 * found.std() / np.sqrt(len(found))
    assert found.std() > 0


def narrow(batch):
    return {**batch, "x": batch["x"].astype(np.float32)}


def repeat(arrays, key, step):
    del key, step
    return arrays


def test_a_run_of_two_tasks_with_seeds_side_by_side():
    """The teacher is the network of the last boundary, however long the task; nothing compiles anew."""
    data = [narrow(rows(task, 2, 8)) for task in (0, 1)]
    trainer = vectorize(lambda: Trainer(icarl(MODEL, TABLE, 8), optax.adam(0.05)), seeds=2)
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), data[0])
    state = trainer.init(KEY, first)
    for stacked in data:
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), stacked)
        before = jax.tree.map(np.array, state.state["icarl"])
        state, metrics = trainer.scan(state, Source(batch, repeat, 8, 8), 30)
        jax.tree.map(np.testing.assert_array_equal, state.state["icarl"], before)
        assert (np.asarray(metrics["loss"][:, -1]) < np.asarray(metrics["loss"][:, 0])).all()
        state = trainer.boundary(state, stacked)
        jax.tree.map(np.testing.assert_array_equal, state.state["icarl"]["teacher"]["params"], state.params["model"])
    assert trainer._scan._cache_size() == 1
    assert trainer.predict(state, first)["logits"].shape == (2, 8, 4)
    np.testing.assert_array_equal(np.asarray(kept(state.state)["count"]).sum(1) <= 8, True)


def test_bad_settings_are_named():
    shared = np.ones((2, 4), bool)
    batch = narrow(rows(0, 4))
    for make, message in (
        (lambda: icarl(MODEL, shared, 8), "table: must be"),
        (lambda: icarl(MODEL, TABLE, 3), "capacity=3: must be at least 4, one exemplar a class"),
        (lambda: icarl(MODEL, TABLE, 8, size=-1), "size=-1"),
        (lambda: icarl(MODEL, TABLE, 8, task_size=0), "task_size=0"),
        (lambda: icarl(MODEL, TABLE, 8, temperature=0.0), "temperature=0.0"),
        (lambda: icarl(MODEL, TABLE, 8).init(KEY, {**batch, "x": batch["x"] * 2}), r"x is in \[.*scale x to \[0, 1\]"),
        (lambda: icarl(MODEL, TABLE[:, :3], 8).init(KEY, {**batch, "y": batch["y"] % 2}), "3 logits, as table has"),
        (
            lambda: icarl(from_functions(lambda key, x: {"w": jnp.ones((5, 4))}, lambda p, x: x @ p["w"]), TABLE, 8).init(
                KEY, batch
            ),
            'model: needs "features"',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    objective = icarl(MODEL, TABLE, 8)
    with pytest.raises(ValueError, match="batches=None: icarl chooses exemplars"):
        objective.boundary(*objective.init(KEY, batch), None, context(), "end")
