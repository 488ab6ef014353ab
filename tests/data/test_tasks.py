"""Task streams: every example of a task once an epoch, each run its own stream, padding, and mixtures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from paradigms import data

KEY, OTHER = jax.random.key(0), jax.random.key(1)
SIDE = 4


def numbered(counts=(5, 7, 6, 9), side=SIDE):
    """A set whose image i has i in every pixel, of classes of the given sizes, in a mixed order."""
    rng = np.random.default_rng(0)

    def split(times):
        y = rng.permutation(np.repeat(np.arange(len(counts)), times * np.asarray(counts))).astype(np.int32)
        x = np.broadcast_to(np.arange(len(y), dtype=np.uint8)[:, None, None, None], (len(y), side, side, 1))
        return {"x": np.array(x), "y": y}

    return data.Data("numbered", split(2), split(1), split(1), len(counts), (), (), ())


def images(n=12):
    """A set of random images, of two classes."""
    rng = np.random.default_rng(1)
    split = lambda: {"x": rng.integers(1, 256, (n, SIDE, SIDE, 1), np.uint8), "y": np.arange(n, dtype=np.int32) % 2}
    return data.Data("images", split(), split(), split(), 2, (), (), ())


def batches(source, steps, key=KEY):
    run = jax.jit(lambda source: jax.lax.map(lambda i: source.opened(key).batch(key, i), jnp.arange(steps)))
    return jax.tree.map(np.asarray, run(source))


def ids(batch):
    return np.round(batch["x"][..., 0, 0, 0] * 255).astype(int)


def test_a_task_gives_each_of_its_examples_once_an_epoch():
    numbers = numbered()
    tasks = data.split_classes(numbers, per_task=2)
    assert len(tasks) == 2
    for task, count in enumerate((24, 30)):
        found = batches(tasks.train(task, 6, start=0), 2 * count // 6)
        order = ids(found).reshape(2, count)
        expected = np.flatnonzero(numbers.train["y"] // 2 == task)
        assert all(sorted(epoch) == sorted(expected) for epoch in order)
        assert not np.array_equal(*order)
        np.testing.assert_array_equal(found["y"].ravel(), numbers.train["y"][order.ravel()])
        assert (found["task"] == task).all()
        assert found["x"].dtype == np.float32


def test_a_task_that_begins_later_begins_its_epoch_there():
    tasks = data.split_classes(numbered(), per_task=2)
    source = tasks.train(0, 6, start=3)
    run = jax.jit(lambda i: source.opened(KEY).batch(KEY, i)["x"])
    late = np.stack([run(i) for i in range(3, 7)])
    np.testing.assert_array_equal(late, batches(tasks.train(0, 6), 4)["x"])


@pytest.mark.parametrize("size", [5, 8, 64])
def test_a_whole_task_comes_in_order_with_padding_of_weight_0(size):
    numbers = numbered()
    source = data.split_classes(numbers, per_task=2).whole("test", 1, size)
    found = batches(source, source.steps_per_epoch)
    real = found["weight"].ravel() > 0
    np.testing.assert_array_equal(np.sort(ids(found).ravel()[real]), np.flatnonzero(numbers.test["y"] >= 2))
    assert set(found["y"].ravel()) == {2, 3}


def test_a_part_of_a_task_is_a_random_part():
    tasks = data.split_classes(numbered(), per_task=2)
    source = tasks.whole("train", 1, 4, most=10)
    assert source.steps_per_epoch == 3
    one, other = (batches(source, 3, key) for key in (KEY, OTHER))
    assert one["weight"].sum() == 10
    assert len(set(ids(one).ravel()[one["weight"].ravel() > 0])) == 10
    assert set(ids(one).ravel()) != set(ids(other).ravel())


def test_shuffled_classes_are_another_order_for_each_run_and_outputs_follow_it():
    numbers = numbered()
    tasks = data.split_classes(numbers, per_task=2, shuffled=True)
    seen = set()
    for seed in range(8):
        key, pairs = jax.random.key(seed), []
        for task in range(2):
            found = batches(tasks.whole("test", task, 16), 1, key)
            labels = numbers.test["y"][ids(found)].ravel()
            outputs = found["y"].ravel()
            assert set(outputs) == {2 * task, 2 * task + 1}
            pairs.append(tuple(labels[outputs == output][0] for output in (2 * task, 2 * task + 1)))
            assert all(len(set(labels[outputs == output])) == 1 for output in set(outputs))
        assert sorted(sum(pairs, ())) == [0, 1, 2, 3]
        seen.add(tuple(pairs))
    assert len(seen) > 4


def test_shared_outputs_are_the_place_within_the_task():
    tasks = data.split_classes(numbered(), per_task=2, shared=True)
    assert tasks.table.shape == (2, 2)
    assert tasks.table.all()
    numbers = numbered()
    found = batches(tasks.whole("test", 1, 16), 1)
    np.testing.assert_array_equal(found["y"].ravel(), numbers.test["y"][ids(found)].ravel() - 2)


def test_permutations_permute_and_differ_by_task_and_run_alone():
    pictures = images()
    tasks = data.permuted(pictures, 3)
    flat = pictures.test["x"].reshape(12, -1)
    found = {
        (task, seed): np.round(255 * batches(tasks.whole("test", task, 12), 1, jax.random.key(seed))["x"][0]).reshape(12, -1)
        for task in range(3)
        for seed in range(2)
    }
    order = np.argsort(pictures.test["y"] * 0, kind="stable")
    for seen in found.values():
        np.testing.assert_array_equal(np.sort(seen, 1), np.sort(flat[order], 1))
        where = [np.flatnonzero((flat[order] == column[:, None]).all(0)) for column in seen.T]  # one permutation for all
        assert sorted(np.concatenate(where)) == list(range(SIDE * SIDE))
    values = list(found.values())
    assert all(not np.array_equal(a, b) for i, a in enumerate(values) for b in values[:i])
    train = np.round(255 * batches(tasks.train(1, 12), 1)["x"][0]).reshape(12, -1)  # the same permutation in training
    flat_train = pictures.train["x"].reshape(12, -1)
    permutation = [np.flatnonzero((flat == column[:, None]).all(0))[0] for column in found[1, 0].T]
    assert {tuple(row) for row in train} == {tuple(row) for row in flat_train[:, permutation]}


def test_the_first_permutation_may_be_none_and_padding_comes_before_it():
    pictures = images()
    plain = batches(data.permuted(pictures, 2, plain_first=True).whole("test", 0, 12), 1)
    np.testing.assert_array_equal(np.round(255 * plain["x"][0]), pictures.test["x"])
    padded = batches(data.permuted(pictures, 2, pad=2).whole("test", 1, 12), 1)["x"][0]
    assert padded.shape == (12, SIDE + 4, SIDE + 4, 1)
    np.testing.assert_array_equal((padded > 0).sum((1, 2, 3)), SIDE * SIDE)


def test_a_rotation_is_that_of_pillow():
    rng = np.random.default_rng(3)
    pictures = images()
    x = rng.integers(1, 256, (12, 9, 9, 1), np.uint8)
    pictures = dataclasses.replace(pictures, **{part: {"x": x, "y": np.zeros(12, np.int32)} for part in data.tasks.PARTS})
    for angle in (0, 90, 37):
        tasks = data.rotated(pictures, 1, angle, angle)
        found = np.round(255 * batches(tasks.whole("test", 0, 12), 1)["x"][0, ..., 0])
        expected = np.stack([np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.NEAREST)) for image in x[..., 0]])
        assert (found == expected).mean() > 0.97  # ties between two nearest pixels may fall either way
        if angle == 90:
            np.testing.assert_array_equal(found, np.rot90(x[..., 0], 1, (1, 2)))


def test_cumulative_and_joint_training_draw_from_all_tasks_so_far():
    numbers = numbered()
    tasks = data.split_classes(numbers, per_task=1)
    found = batches(tasks.train(2, 6, since=0), 6)
    np.testing.assert_array_equal(np.sort(ids(found).ravel()), np.flatnonzero(numbers.train["y"] <= 2))
    np.testing.assert_array_equal(found["task"], found["y"])
    mixed = data.permuted(images(), 3)
    seen = batches(mixed.train(2, 12, since=0), 3)
    assert sorted(np.unique(seen["task"], return_counts=True)[1]) == [12, 12, 12]


def test_a_drifting_stream_mixes_where_it_should():
    tasks = data.split_classes(numbered((20, 20, 20)), per_task=1)
    sharp = batches(tasks.drifting(32, 10), 30)["task"]
    np.testing.assert_array_equal(sharp, np.repeat(np.arange(3), 10)[:, None] * np.ones((1, 32), int))
    fuzzy = batches(tasks.drifting(512, 10, width=6), 30)["task"]
    shares = (fuzzy == 1).mean(1)
    expected = np.interp(np.arange(30) + 0.5, [7, 13, 17, 23], [0, 1, 1, 0])
    np.testing.assert_allclose(shares, expected, atol=0.08)
    blurry = batches(tasks.drifting(512, 10, foreign=0.3), 30)
    own = blurry["task"] == np.repeat(np.arange(3), 10)[:, None]
    np.testing.assert_allclose(own.mean(), 0.7, atol=0.02)
    np.testing.assert_array_equal(blurry["y"], blurry["task"])
    one = data.split_classes(numbered((20,)), per_task=1)
    assert not batches(one.drifting(32, 10, width=6, foreign=0.3), 10)["task"].any(), "a stream of one task has no change"


def test_a_stream_of_ones_own():
    one, other = numbered((4, 4)), numbered((6, 3))
    other = dataclasses.replace(
        other,
        **{part: {**getattr(other, part), "y": getattr(other, part)["y"] + 1} for part in ("train", "validation", "test")},
    )
    tasks = data.tasks_of([one, other])
    np.testing.assert_array_equal(tasks.table, [[1, 1, 0], [0, 1, 1]])
    found = batches(tasks.whole("train", 1, 18), 1)
    np.testing.assert_array_equal(ids(found)[0], np.arange(18))
    np.testing.assert_array_equal(found["y"][0], other.train["y"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.split_classes(numbered(), per_task=3), "per_task=3: must divide the 4 classes"),
        (lambda: data.permuted(images(), 0), "tasks=0"),
        (lambda: data.rotated(images(), 2, 90, 0), "low=90"),
        (lambda: data.tasks_of([]), "tasks: is empty"),
        (lambda: data.tasks_of([numbered(), numbered(side=5)]), "number 1 differ"),
        (lambda: data.tasks_of([numbered()], np.ones((2, 4))), "table: has shape"),
        (lambda: data.permuted(images(), 2).train(2, 4), "task=2"),
        (lambda: data.permuted(images(), 2).train(1, 40), "batch_size is 40"),
        (lambda: data.permuted(images(), 2).whole("tests", 0), 'part="tests"'),
        (lambda: data.permuted(images(), 2).whole("test", 0, most=0), "most=0"),
        (lambda: data.permuted(images(), 2).drifting(4, 10, width=11), "width=11"),
    ],
)
def test_bad_streams_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
