"""The order of the data as a function of key and step: a keyed permutation evaluated at the asked positions alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paradigms.objective import concrete

# Each round leaves a position where it was with probability 1/2, so 24 rounds leave one in 17 million there. Sixteen
# are enough for chi-squared tests of single positions and of pairs at every size tried.
_ROUNDS = 24
_LOOPS = 4  # more trace faster, and an iteration on an accelerator costs microseconds
_GOLDEN = 0x9E3779B9
_LARGEST = 2**30


def _mix(x):
    """A 32-bit integer hash with low bias ("lowbias32", Wellons 2018), on uint32 arrays of any shape."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def order(key, epoch, positions, n):
    """Where a keyed permutation of `range(n)`, another one each epoch, sends `positions`.

    The "swap-or-not" shuffle (Hoang, Morris & Rogaway, CRYPTO 2012). A round pairs x with K - x (mod n) and swaps the
    two on one hashed bit of the pair. It is a bijection for every n, with no sort and no loop whose length depends on
    the data, so a batch of 128 costs microseconds inside a scan and vmaps like any arithmetic.

    Args:
      key: a JAX key; the same for all positions of a run.
      epoch: int scalar, or an array that broadcasts against `positions`.
      positions: int array of any shape with values in [0, n).
      n: int, 1 to 2**30; may be traced, and is then not checked.

    Returns:
      int32 array of the broadcast shape; over `positions = arange(n)` each index of [0, n) exactly once.

    Raises:
      ValueError: where n is outside [1, 2**30].
    """
    if concrete(n) and not 1 <= int(n) <= _LARGEST:
        raise ValueError(f"n is {n}, must be in [1, 2**30]: split a larger set or stream it")
    positions, epoch = jnp.broadcast_arrays(positions, epoch)
    x, epoch, size = positions.astype(jnp.uint32), epoch.astype(jnp.uint32), jnp.asarray(n, jnp.uint32)
    words = jax.random.bits(key, (2,), jnp.uint32)
    first = _mix(words[0] ^ _mix(epoch + np.uint32(_GOLDEN)))
    second = _mix(words[1] + _mix(epoch ^ np.uint32(0x85EBCA6B)))

    def rounds(i, x):
        for j in range(_ROUNDS // _LOOPS):
            constant = (jnp.asarray(i, jnp.uint32) * np.uint32(_ROUNDS // _LOOPS) + np.uint32(j + 1)) * np.uint32(_GOLDEN)
            partner = _mix(first + constant) % size + (size - x)
            partner = jnp.where(partner >= size, partner - size, partner)
            swap = _mix(jnp.maximum(x, partner) ^ (second + constant)) >> np.uint32(31)
            x = jnp.where(swap == 1, partner, x)
        return x

    # A loop, because XLA:CPU fuses straight-line code into the gather of the rows and would evaluate all rounds
    # again for each pixel (60 ms a batch instead of 0.3); an optimization barrier does not stop it.
    return lax.fori_loop(0, _LOOPS, rounds, x).astype(jnp.int32)


def locate(step, batch_size: int, n, most: int | None = None):
    """The epoch and the position in it of each example of the batch at `step`, when batches run across epoch borders.

    Example i of the batch has position `step * batch_size + i` in the endless stream; the product overflows 32 bits
    in long runs, so it is divided by n digit by digit, as on paper.

    Args:
      step: int32 scalar, 0 to 2**31 - 1, traced or not.
      batch_size: static int, 1 to n.
      n: int, 1 to 2**30; may be traced where `most` is given, and is then not checked.
      most: static bound of a traced n.

    Returns:
      (epochs, positions): two int32 arrays of shape (batch_size,).

    Raises:
      ValueError: where batch_size is outside [1, n] or n is outside [1, 2**30].
    """
    most = n if most is None else most
    if not 1 <= most <= _LARGEST:
        raise ValueError(f"n is {most}, must be in [1, 2**30]: split a larger set or stream it")
    if not 1 <= batch_size <= most:
        raise ValueError(f"batch_size is {batch_size}, must be in [1, {most}], the number of examples")
    width = max(1, 31 - most.bit_length())  # then remainder * 2**width + digit * batch_size < most * 2**(width + 1) <= 2**32
    step, size = jnp.asarray(step).astype(jnp.uint32), jnp.asarray(n, jnp.uint32)
    quotient = remainder = jnp.zeros((), jnp.uint32)
    for shift in reversed(range(0, 31, width)):
        digit = (step >> np.uint32(shift)) & np.uint32(2**width - 1)
        value = (remainder << np.uint32(width)) + digit * np.uint32(batch_size)
        quotient = (quotient << np.uint32(width)) + value // size
        remainder = value % size
    positions = remainder + jnp.arange(batch_size, dtype=jnp.uint32)
    wrapped = positions >= size
    epochs = quotient + wrapped.astype(jnp.uint32)
    return epochs.astype(jnp.int32), jnp.where(wrapped, positions - size, positions).astype(jnp.int32)
