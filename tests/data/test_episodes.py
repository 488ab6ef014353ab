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
    return [jax.tree.map(np.asarray, source.batch(jax.random.key(0), step)) for step in range(8)]


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
    [
        ({"ways": 6}, "ways=6"),
        ({"ways": 0}, "ways=0"),
        ({"queries": 9}, "queries=9: .* at most 9 together"),
        ({"tasks": 0}, "tasks=0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        data.episodes(SPLIT, **{"ways": 2, "shots": 1, "queries": 1, "tasks": 1, **change})


# an image says its class in one corner and its row in the next, so that its turn can be read off: 3 classes of 4 rows
CORNERS = np.zeros((12, 5, 5, 1), np.uint8)
CORNERS[:, 0, 0, 0], CORNERS[:, 0, 4, 0] = np.repeat([50, 100, 150], 4), np.arange(200, 212)
IMAGES = {"x": CORNERS, "y": np.repeat(np.arange(3, dtype=np.int32), 4)}


def _read(classes, ways, steps=4):
    """(classes, turns, rows) of many tasks: (tasks, ways) twice and (tasks, ways, rows)."""
    source = data.episodes(IMAGES, ways=ways, shots=1, queries=2, tasks=256, classes=classes)
    draw = jax.jit(lambda source, step: source.batch(jax.random.key(0), step))
    found = []
    for step in range(steps):
        episode = draw(source, step)
        parts = [np.asarray(episode[part]["x"]).reshape(256, ways, -1, 5, 5) for part in ("support", "query")]
        images = np.round(np.concatenate(parts, 2) * 255).astype(np.uint8)
        matches = np.zeros((*images.shape[:3], 12, 4), bool)
        for row in range(12):
            for k in range(4):
                matches[..., row, k] = (images == np.rot90(CORNERS[row, ..., 0], k)).all((-1, -2))
        assert (matches.sum((-1, -2)) == 1).all()  # each image is one row by one turn, unchanged
        *_, row, turn = np.nonzero(matches)
        row, turn = row.reshape(images.shape[:3]), turn.reshape(images.shape[:3])
        assert (row // 4 == row[..., :1] // 4).all()  # support and query share the class and the turn
        assert (turn == turn[..., :1]).all()
        assert all(len(set(one)) == 3 for one in row.reshape(-1, 3))
        found.append((row[..., 0] // 4, turn[..., 0], row))
    return [np.concatenate(one) for one in zip(*found, strict=True)]


def test_a_turned_class_never_meets_its_original():
    classes, turns, _ = _read(data.turned(), ways=3)
    assert (np.sort(classes, axis=1) == np.arange(3)).all()
    joint = np.zeros((3, 3, 4))  # label, class, turn
    np.add.at(joint, (np.arange(3), classes, turns), 1)
    expected = len(classes) / 12
    assert ((joint - expected) ** 2 / expected).sum() < 70  # chi-squared of about 33 degrees of freedom, p = 2e-4
    pairs = np.bincount(turns[:, 0] * 4 + turns[:, 1], minlength=16)  # the classes of a task turn independently
    assert ((pairs - len(turns) / 16) ** 2 / (len(turns) / 16)).sum() < 42  # 15 degrees of freedom, p = 2e-4


def test_classes_turned_apart_are_classes_of_their_own():
    classes, turns, _ = _read(data.turned_apart(), ways=4)  # of three: some class meets itself turned otherwise
    versions = classes * 4 + turns
    assert all(len(set(task)) == 4 for task in versions)
    counts = np.stack([np.bincount(column, minlength=12) for column in versions.T])
    expected = len(classes) / 12
    assert ((counts - expected) ** 2 / expected).sum() < 82  # 44 degrees of freedom, p = 4e-4
    classes, turns, _ = _read(data.turned_apart(), ways=12, steps=1)
    assert (np.sort(classes * 4 + turns, axis=1) == np.arange(12)).all()


def test_unturned_is_the_default_and_sources_built_alike_are_equal():
    shape = {"ways": 2, "shots": 1, "queries": 1, "tasks": 4}
    default, unturned = data.episodes(IMAGES, **shape), data.episodes(IMAGES, **shape, classes=data.unturned())
    assert default.get == unturned.get
    for draw in (data.turned, data.turned_apart):
        gets = [data.episodes(IMAGES, **shape, classes=draw()).get for _ in range(2)]
        assert gets[0] == gets[1] != default.get
    flat = {**IMAGES, "x": CORNERS[..., 0]}  # (N, S, S), without channels
    source = data.episodes(flat, **shape, classes=data.turned())
    assert jax.eval_shape(source.batch, jax.random.key(0), 0)["query"]["x"].shape == (4, 2, 5, 5)


def test_turns_of_what_is_not_square_and_draws_that_are_none_are_refused():
    shape = {"ways": 2, "shots": 1, "queries": 1, "tasks": 1}
    for x in (CORNERS[:, :4], CORNERS.reshape(12, -1)):
        with pytest.raises(ValueError, match="must be square images"):
            data.episodes({**IMAGES, "x": x}, **shape, classes=data.turned())
    with pytest.raises(ValueError, match=r"ways=13: must be in \[1, 12\], the classes of the split, each in 4 versions"):
        data.episodes(IMAGES, **{**shape, "ways": 13}, classes=data.turned_apart())
    for name in shape:
        with pytest.raises(ValueError, match=rf"{name}=0\.5: must be an integer, 1 or more"):
            data.episodes(IMAGES, **{**shape, name: 0.5})
    with pytest.raises(ValueError, match=r"ways=4: must be in \[1, 3\]"):
        data.episodes(IMAGES, **{**shape, "ways": 4}, classes=data.turned())
    for bad in (data.turned, "turned", None):
        with pytest.raises(TypeError, match="must be a ClassDraw"):
            data.episodes(IMAGES, **shape, classes=bad)


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
