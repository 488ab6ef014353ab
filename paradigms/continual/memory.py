"""Replay memories: pure functions over a dict of arrays of fixed size.

A memory is ``{"rows": the buffer, ...}``, where the other entries are the book of its policy. A policy decides from its book
alone which slot each row goes to, so the buffer is written once a batch, in place.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.batch import inputs, on_inputs, rows, unweighted
from paradigms.data.transforms import pixels
from paradigms.objective import Batch, Tree, concrete

Groups = Callable[[Batch], jax.Array]


class Memory(NamedTuple):
    """A policy of what to keep and what to replay.

    Attributes:
      init: ``batch -> memory``, empty.
      insert: ``(memory, batch, key) -> memory``.
      sample: ``(memory, key, n) -> (batch, valid)``, ``n`` rows drawn with replacement and whether each is a stored one.
      stored: ``memory -> (batch, valid)``, all slots and whether each is filled.
    """

    init: Callable[[Batch], Tree]
    insert: Callable[[Tree, Batch, jax.Array], Tree]
    sample: Callable[[Tree, jax.Array, int], tuple[Batch, jax.Array]]
    stored: Callable[[Tree], tuple[Batch, jax.Array]]


def of_rows(batch: Batch) -> jax.Array:
    """Whether each row of a batch is a real one, not padding of weight 0."""
    return batch["weight"] > 0 if "weight" in batch else jnp.ones(rows(batch), bool)


def by_label(batch: Batch) -> jax.Array:
    """Groups are the classes: the leaf "y"."""
    return _group(batch, "y")


def by_task(batch: Batch) -> jax.Array:
    """Groups are the tasks: the leaf "task"."""
    return _group(batch, "task")


def _group(batch, leaf):
    if leaf not in batch:
        raise ValueError(f'batch: has no leaf "{leaf}" (leaves: {sorted(batch)}) to group by; give another function of a batch')
    return batch[leaf]


def slotted(
    start: Callable[[], dict],
    place: Callable[[dict, Batch, jax.Array, jax.Array], tuple[jax.Array, dict]],
    filled: Callable[[dict], jax.Array],
    width: int,
    blocks: int = 1,
) -> Memory:
    """A memory of blocks x width slots, which replays uniformly over all that is stored.

    Of two rows of a batch for one slot the later stays, as if they came one after the other. What is stored are the leaves
    of the batch of ``init``, without weights; further leaves of later batches are for `place` alone.

    Args:
      start: the policy's book while the memory is empty.
      place: ``(book, batch, real, key) -> (slots (rows,) int, book)``, where each row goes; blocks x width is nowhere.
        ``real`` (rows,) bool: not padding, which goes nowhere whatever its slot and must not count in the book.
      filled: ``book -> (blocks,)``, the filled slots of each block. A block is filled from its first slot on.
      width: slots of a block. blocks: number of blocks, which lie one behind the other.
    """
    capacity = blocks * width

    def init(batch):
        store = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, shape=(capacity, *leaf.shape[1:])), unweighted(batch))
        return {"rows": store, **start()}

    def insert(memory, batch, key):
        store, book = memory["rows"], {name: leaf for name, leaf in memory.items() if name != "rows"}
        real, order = of_rows(batch), jnp.arange(rows(batch))
        slot, book = place(book, batch, real, key)
        slot = jnp.where(real & (slot < capacity), slot, capacity)
        last = jnp.full(capacity + 1, -1).at[slot].max(order)
        slot = jnp.where(last[slot] == order, slot, capacity)  # out of bounds: dropped, so the buffer is written in place
        put = lambda kept, leaf: kept.at[slot].set(leaf.astype(kept.dtype), mode="drop")
        return {"rows": jax.tree.map(put, store, {name: batch[name] for name in store}), **book}

    def sample(memory, key, n):
        counts = filled(memory)
        ends = jnp.cumsum(counts)
        number = jax.random.randint(key, (n,), 0, jnp.maximum(ends[-1], 1))
        block = jnp.minimum(jnp.sum(number[:, None] >= ends[None], -1), blocks - 1)
        slot = jnp.clip(block * width + number - (ends - counts)[block], 0, capacity - 1)
        return jax.tree.map(lambda leaf: leaf[slot], memory["rows"]), jnp.broadcast_to(ends[-1] > 0, (n,))

    def stored(memory):
        return memory["rows"], (jnp.arange(width)[None] < filled(memory)[:, None]).reshape(-1)

    return Memory(init, insert, sample, stored)


def reservoir(capacity: int) -> Memory:
    """Keeps a uniform sample of all that was seen (Vitter, 1985, algorithm R), replays uniformly.

    The example with 0-based number n goes to slot n while there is room, else to slot j ~ U{0..n} if j < capacity. A batch
    is inserted as its rows would be one after the other. Rows of weight 0 are padding and are not counted.

    Args:
      capacity: number of rows (examples; tasks, for episodes), 1 or more.
    """
    at_least_one(capacity=capacity)

    def place(book, batch, real, key):
        number = book["seen"] + jnp.cumsum(real) - 1
        drawn = jax.random.randint(key, real.shape, 0, number + 1)
        return jnp.where(number < capacity, number, drawn), {"seen": book["seen"] + jnp.sum(real, dtype=jnp.int32)}

    start = lambda: {"seen": jnp.zeros((), jnp.int32)}
    return slotted(start, place, lambda book: jnp.minimum(book["seen"], capacity)[None], capacity)


def ring(capacity_each: int, groups: int, of: Groups = by_task) -> Memory:
    """Keeps the last rows of each group, first in first out (GEM; "ring buffer", Chaudhry et al., 2019b, algorithm 3).

    Of a group, the row with 0-based number n goes to slot n mod capacity_each of that group. Slots of group g are
    ``g * capacity_each`` and those behind it. Replay is uniform over all that is stored.

    Args:
      capacity_each: rows of each group, 1 or more.
      groups: number of groups, 1 or more. Rows of other groups are not stored.
      of: ``batch -> (rows,) int``, the group of each row: `by_task`, `by_label`, or a function of your own.
    """
    at_least_one(capacity_each=capacity_each, groups=groups)

    def place(book, batch, real, key):
        del key
        group = of(batch)
        mine = jax.nn.one_hot(jnp.where(real, group, -1), groups, dtype=jnp.int32)
        number = book["seen"][None] + jnp.cumsum(mine, 0, dtype=jnp.int32) - 1
        within = jnp.take_along_axis(number, jnp.clip(group, 0, groups - 1)[:, None], 1)[:, 0] % capacity_each
        slot = jnp.where((group >= 0) & (group < groups), group * capacity_each + within, groups * capacity_each)
        return slot, {"seen": book["seen"] + jnp.sum(mine, 0, dtype=jnp.int32)}

    start = lambda: {"seen": jnp.zeros(groups, jnp.int32)}
    return slotted(start, place, lambda book: jnp.minimum(book["seen"], capacity_each), capacity_each, groups)


def as_uint8(memory: Memory) -> Memory:
    """`memory` that holds images in a quarter of the bytes: every leaf "x", floats in [0, 1], as round(255 x).

    They come back as float32, x times 1/255, as `paradigms.data.pixels` makes them: what was uint8 once comes back bit by
    bit. Other values are rounded by at most 1/510, and values outside [0, 1] are clipped.

    Raises:
      ValueError: (at init) leaves "x" that are not floats, or, on concrete data, not in [0, 1].
    """

    def decoded(batch, valid):
        return on_inputs(pixels, batch), valid

    def init(batch):
        for x in jax.tree.leaves(inputs(batch)):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"batch: x has dtype {x.dtype}; as_uint8 is for floats in [0, 1], leave it out")
            check_unit(x)
        return memory.init(on_inputs(to_uint8, batch))

    return Memory(
        init,
        lambda kept, batch, key: memory.insert(kept, on_inputs(to_uint8, batch), key),
        lambda kept, key, n: decoded(*memory.sample(kept, key, n)),
        lambda kept: decoded(*memory.stored(kept)),
    )


def to_uint8(x: jax.Array) -> jax.Array:
    """Floats in [0, 1] as round(255 x), what is outside clipped; other dtypes as they are. `pixels` is the inverse."""
    return jnp.round(jnp.clip(x, 0, 1) * 255).astype(jnp.uint8) if jnp.issubdtype(x.dtype, jnp.floating) else x


def check_unit(x: jax.Array) -> None:
    """Raises for concrete floats outside [0, 1], which `to_uint8` would clip."""
    if concrete(x) and np.size(x) and jnp.issubdtype(x.dtype, jnp.floating):
        low, high = np.min(np.asarray(x)), np.max(np.asarray(x))
        if not 0 <= low <= high <= 1:
            raise ValueError(f"batch: x is in [{low}, {high}]; it is stored as uint8, scale x to [0, 1]")


def bytes_of(tree: Tree) -> int:
    """The bytes that the arrays of a tree hold, such as ``state["memory"]["kept"]``; shapes and dtypes are enough."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def at_least_one(**numbers: int) -> None:
    """Raises for a number below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number}: must be 1 or more")
