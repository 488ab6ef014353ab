import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paradigms.data import locate, order


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 1000, 60000])
def test_order_is_a_permutation_and_changes_with_epoch_and_key(n):
    run = jax.jit(lambda key, epoch: order(key, epoch, jnp.arange(n), n))
    first = np.asarray(run(jax.random.key(0), 0))
    np.testing.assert_array_equal(np.sort(first), np.arange(n))
    np.testing.assert_array_equal(order(jax.random.key(0), 0, jnp.arange(n), n), first)
    if n >= 97:
        for other in (run(jax.random.key(0), 1), run(jax.random.key(1), 0), np.arange(n)):
            assert (np.asarray(other) == first).mean() < 0.1


def _orders(n, keys):
    run = jax.jit(jax.vmap(lambda key: order(key, 3, jnp.arange(n), n)))
    return np.asarray(run(jax.random.split(jax.random.key(7), keys)))


def _deviation(counts):
    """Chi-squared against equal counts, in standard deviations from what is expected."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    return ((((counts - expected) ** 2) / expected).sum() - degrees) / np.sqrt(2 * degrees)


def test_every_order_of_four_is_equally_likely():
    orders = _orders(4, 24_000)
    counts = np.array([(orders == p).all(axis=1).sum() for p in itertools.permutations(range(4))])
    assert abs(_deviation(counts)) < 4


@pytest.mark.parametrize("n", [10, 97])
def test_places_and_pairs_of_places_are_uniform(n):
    orders = _orders(n, 20_000)
    assert max(abs(_deviation(np.bincount(orders[:, i], minlength=n))) for i in range(n)) < 5
    for i, j in [(0, 1), (3, 4), (0, n - 1), (0, n // 2)]:
        pairs = np.bincount(orders[:, i] * n + orders[:, j], minlength=n * n).reshape(n, n)
        assert abs(_deviation(pairs[~np.eye(n, dtype=bool)])) < 5


def test_epochs_are_independent():
    n = 50
    run = jax.jit(jax.vmap(lambda e: order(jax.random.key(0), e, jnp.arange(n), n)))
    orders = np.asarray(run(jnp.arange(10_000)))
    assert abs(_deviation(np.bincount(orders[:, 0], minlength=n))) < 5
    step = (orders[1:, 0] - orders[:-1, 0]) % n
    assert abs(_deviation(np.bincount(step, minlength=n))) < 5


@pytest.mark.parametrize(("batch_size", "n"), [(1, 1), (3, 10), (128, 60000), (10, 10), (8192, 1_000_003), (9, 2**30)])
def test_locate_is_long_division_of_the_stream(batch_size, n):
    run = jax.jit(locate, static_argnums=(1, 2))
    for step in (0, 1, 7, 12345, 2**31 - 1):
        epochs, positions = run(jnp.int32(step), batch_size, n)
        at = [divmod(step * batch_size + i, n) for i in range(batch_size)]
        np.testing.assert_array_equal(epochs, [epoch for epoch, _ in at])
        np.testing.assert_array_equal(positions, [position for _, position in at])


def test_sizes_out_of_range_raise():
    with pytest.raises(ValueError, match=r"n is 0, must be in \[1, 2\*\*30\]"):
        order(jax.random.key(0), 0, jnp.arange(1), 0)
    with pytest.raises(ValueError, match=r"batch_size is 11, must be in \[1, 10\]"):
        locate(0, 11, 10)
