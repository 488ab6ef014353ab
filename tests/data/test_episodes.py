"""Episodes: what a task holds, how tasks are drawn, and what is refused."""

import jax
import numpy as np
import pytest

from paradigms import data

WAYS, SHOTS, QUERIES, TASKS = 3, 2, 4, 64
# x says the class and the row, so that an episode can be read back: 5 classes of 9 rows, one with a row more
LABELS = np.array([*np.repeat(np.arange(5), 9), 4], np.int32)
SPLIT = {"x": np.stack([LABELS * 10, np.arange(46)], -1).astype(np.float32), "y": LABELS}


@pytest.fixture(scope="module")
def drawn():
    source = data.episodes(SPLIT, ways=WAYS, shots=SHOTS, queries=QUERIES, tasks=TASKS)
    batch = jax.jit(lambda source, step: source.batch(jax.random.key(0), step))
    return [jax.tree.map(np.asarray, batch(source, step)) for step in range(8)]


def test_shapes_and_labels(drawn):
    for part, each in (("support", SHOTS), ("query", QUERIES)):
        assert drawn[0][part]["x"].shape == (TASKS, WAYS * each, 2)
        assert (drawn[0][part]["y"] == np.repeat(np.arange(WAYS), each)).all()


def test_support_and_query_are_disjoint_rows_of_the_same_classes(drawn):
    for episode in drawn:
        rows = np.concatenate([episode["support"]["x"][..., 1], episode["query"]["x"][..., 1]], 1)
        assert all(len(set(task)) == WAYS * (SHOTS + QUERIES) for task in rows)
        classes = [episode[part]["x"][..., 0].reshape(TASKS, WAYS, -1) for part in ("support", "query")]
        assert (np.concatenate(classes, -1) == classes[0][..., :1]).all()
        assert all(len(set(task)) == WAYS for task in classes[0][..., 0])


def test_classes_labels_and_rows_are_uniform(drawn):
    classes = np.concatenate([episode["support"]["x"][:, ::SHOTS, 0] for episode in drawn])  # (512, ways)
    counts = np.stack([(classes == 10 * label).sum(0) for label in range(5)])
    expected = len(classes) / 5
    assert ((counts - expected) ** 2 / expected).sum() < 36  # chi-squared of 12 degrees of freedom, p = 3e-4
    rows = np.concatenate([episode["query"]["x"][..., 1].ravel() for episode in drawn]).astype(int)
    counts = np.bincount(rows, minlength=46)
    assert counts[45] == 0  # the larger class is cut to the size of the smallest
    expected = len(rows) / 45
    assert ((counts[:45] - expected) ** 2 / expected).sum() < 90  # 44 degrees of freedom, p = 5e-5


def test_steps_and_tasks_differ_and_repeat(drawn):
    assert not np.array_equal(drawn[0]["query"]["x"], drawn[1]["query"]["x"])
    assert len({task.tobytes() for task in drawn[0]["query"]["x"]}) == TASKS
    source = data.episodes(SPLIT, ways=WAYS, shots=SHOTS, queries=QUERIES, tasks=TASKS)
    again = source.batch(jax.random.key(0), 1)
    assert np.array_equal(again["query"]["x"], drawn[1]["query"]["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ways": 6}, "ways=6"), ({"ways": 0}, "ways=0"), ({"queries": 9}, "shots \\+ queries <= 9"), ({"tasks": 0}, "tasks=0")],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        data.episodes(SPLIT, **{"ways": 2, "shots": 1, "queries": 1, "tasks": 1, **change})


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"x": SPLIT["x"]}, 'no labels "y"'),
        ({"y": LABELS}, 'no inputs "x"'),
        ({**SPLIT, "y": SPLIT["x"]}, "must be integer labels"),
    ],
)
def test_splits_without_inputs_or_labels_are_refused(split, message):
    with pytest.raises(ValueError, match=message):
        data.episodes(split, ways=2, shots=1, queries=1, tasks=1)
