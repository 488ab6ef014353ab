"""Where batches come from: arrays resident on the device, windows of a text, and batches for evaluation.

A batch is a function of (key, step) alone. A resumed run needs no iterator state, and a run can be one `lax.scan`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paradigms.data.bind import bind
from paradigms.data.checks import check_arrays, check_batch_size
from paradigms.data.order import locate, order
from paradigms.data.transforms import pixels


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["get", "size", "batch_size", "which", "prepare"]
)
@dataclasses.dataclass(frozen=True)
class Source:
    """Batches of a data set, as an argument of a jitted program.

    Attributes:
      arrays: tree of device arrays; the only leaves of the source, so that data is never a captured constant.
      get: `(arrays, key, step) -> batch`, pure and jittable. Sources built alike have equal `get` and share programs.
      size: examples in an epoch.
      batch_size: rows of each batch.
      which: `(key, step) -> (batch_size,)`, the numbers of a batch's examples; None where examples have none.
      prepare: `(arrays, key) -> arrays`, what depends on the run and not on the step, made once a compiled call; or None.
    """

    arrays: Any
    get: Callable
    size: int
    batch_size: int
    which: Callable | None = None
    prepare: Callable | None = None

    def opened(self, key) -> "Source":
        """This source for one run and one compiled call, before its first `batch`; `key` is the same for the whole run."""
        return self if self.prepare is None else dataclasses.replace(self, arrays=_prepare(self, key))

    def batch(self, key, step) -> dict:
        """The batch at a step.

        Args:
          key: the same for the whole run; steps differ.
          step: int32 scalar, may be traced.

        Returns:
          A dict of arrays (batch_size, ...).
        """
        return _get(self, key, step)

    def chunk(self, step: int, n: int) -> "Source":
        """A source that has the batches of steps [step, step + n).

        Args:
          step: the first.
          n: how many.

        Returns:
          This one, since everything is on the device.
        """
        return self

    @property
    def steps_per_epoch(self) -> int:
        """Batches that cover the examples once, rounded up."""
        return -(-self.size // self.batch_size)


# Inside a program these are part of it. Outside they compile once, where a batch by single operations compiles each of them.
_prepare = jax.jit(lambda source, key: source.prepare(source.arrays, key), inline=True)
_get = jax.jit(lambda source, key, step: source.get(source.arrays, key, step), inline=True)


def resident(split: dict, batch_size: int, *, transform: Callable | None = None, shuffle: bool = True) -> Source:
    """A source whose data lies on the device; each batch is gathered there, inside the jitted step.

    Batches run across epoch borders: every example comes exactly once an epoch, in another order each epoch, a
    function of (key, step). The leaf "x" is kept as it is and, where uint8, comes out as float32 in [0, 1]; "tokens"
    come out as int32.

    Args:
      split: dict of arrays with the example axis first, as `load` gives.
      batch_size: 1 to the number of examples.
      transform: `(key, batch) -> batch`, with a key of its own each step; see `augment`, `mixup`, `chain`. A closure
        made anew for each run recompiles.
      shuffle: False takes the examples in order, round and round.

    Returns:
      The source; its size is the number of examples.

    Raises:
      ValueError: where the split cannot be trained on (empty, ragged, not numbers, NaN, negative labels) or
        batch_size is not in [1, examples].
    """
    size = check_arrays(split, batch_size)
    # A copy: on CPUs `asarray` may share memory with an array that the caller goes on to change.
    arrays = jax.tree.map(jnp.array, split)
    which = bind(_which, size, batch_size, shuffle)
    return Source(arrays, bind(_gather, which, transform), size, batch_size, which)


def _which(key, step, size, batch_size, shuffle):
    epochs, rows = locate(step, batch_size, size)
    return order(jax.random.fold_in(key, 0), epochs, rows, size) if shuffle else rows


def _gather(arrays, key, step, which, transform):
    rows = which(key, step)
    # The indices are in range by construction; the default mode would test each and fill.
    batch = jax.tree.map(lambda a: a.at[rows].get(mode="promise_in_bounds"), arrays)
    return finish(batch, key, step, transform)


def finish(batch: dict, key, step, transform: Callable | None) -> dict:
    """What every source does last: images to [0, 1], tokens to int32, then the transform with the step's own key.

    Args:
      batch: dict of arrays, or another tree, to which the transform alone is applied.
      key: the run's key.
      step: int32 scalar, may be traced.
      transform: `(key, batch) -> batch`, or None.

    Returns:
      The batch.
    """
    if isinstance(batch, dict):
        if "x" in batch:
            batch = {**batch, "x": pixels(batch["x"])}
        if "tokens" in batch:
            batch = {**batch, "tokens": batch["tokens"].astype(jnp.int32)}
    if transform is None:
        return batch
    return transform(jax.random.fold_in(jax.random.fold_in(key, 1), step), batch)


def windows(tokens, batch_size: int, length: int) -> Source:
    """Random windows of one long text, for language modelling.

    Each batch is {"x": (B, length) int32, "y": (B, length) int32}, y the tokens that follow those of x; offsets are
    uniform, drawn anew each step. `size` counts windows that do not overlap, so an "epoch" reads about every token.

    Args:
      tokens: (T,) integers, T > length.
      batch_size: >= 1.
      length: tokens in a window, >= 1.

    Returns:
      The source.

    Raises:
      ValueError: where tokens are not a row of integers >= 0, or fewer than length + 1, or batch_size < 1.
    """
    if not hasattr(tokens, "ndim") or tokens.ndim != 1 or np.dtype(tokens.dtype).kind not in "iu":
        shape, dtype = getattr(tokens, "shape", None), getattr(tokens, "dtype", type(tokens).__name__)
        raise ValueError(f'tokens must be a (T,) integer array, got shape {shape} of {dtype}; load gives it as "tokens"')
    if length < 1 or len(tokens) < length + 1:
        raise ValueError(f"length is {length}, must be in [1, {len(tokens) - 1}]: there are {len(tokens)} tokens")
    if tokens.min() < 0:
        raise ValueError(f"tokens go down to {tokens.min()}, must be >= 0: they index an embedding")
    size = (len(tokens) - 1) // length
    check_batch_size(batch_size, max(size, batch_size))  # offsets repeat freely: any number of windows is fine
    get = bind(_windows, len(tokens) - length, batch_size, length)
    return Source({"tokens": jnp.asarray(tokens)}, get, size, batch_size)


def _windows(arrays, key, step, offsets, batch_size, length):
    starts = jax.random.randint(jax.random.fold_in(key, step), (batch_size, 1), 0, offsets)
    rows = arrays["tokens"].at[starts + jnp.arange(length + 1)[None, :]].get(mode="promise_in_bounds").astype(jnp.int32)
    return {"x": rows[:, :-1], "y": rows[:, 1:]}


def batches(split: dict, batch_size: int) -> dict:
    """All examples in order as stacked batches for evaluation, the last one padded.

    Args:
      split: dict of arrays with the example axis first.
      batch_size: >= 1; more than the examples is one padded batch.

    Returns:
      dict of NumPy arrays (n, batch_size, ...): the leaves of `split`, "x" as float32 in [0, 1] where it was uint8, and
      "weight" (n, batch_size) float32, 0 on the rows that pad and otherwise 1, or the split's own weight.

    Raises:
      ValueError: as `resident`, except that batch_size may exceed the number of examples.
    """
    size = check_arrays(split)
    check_batch_size(batch_size, max(size, batch_size))
    n = -(-size // batch_size)
    rows = np.arange(n * batch_size)
    weight = (rows < size).astype(np.float32)
    rows = np.minimum(rows, size - 1)  # padding repeats a real row: its labels and values are valid

    def stack(leaf):
        return np.asarray(leaf)[rows].reshape(n, batch_size, *leaf.shape[1:])

    out = jax.tree.map(stack, dict(split))
    if "x" in out and out["x"].dtype == np.uint8:
        out["x"] = out["x"].astype(np.float32) * np.float32(1 / 255)
    if "tokens" in out:
        out["tokens"] = out["tokens"].astype(np.int32)
    out["weight"] = weight.reshape(n, batch_size) * out.get("weight", np.float32(1))
    return out


def _slice(arrays, key, step, transform):
    at = step - arrays["start"]
    batch = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, at, keepdims=False), arrays["batches"])
    return finish(batch, key, step, transform)


def stacked(steps: dict, start: int, size: int, transform: Callable | None = None) -> Source:
    """A source of batches made before.

    `start` is an array of the source, not a constant of its program: chunk after chunk runs without compiling again.
    Outside the range the nearest batch is given.

    Args:
      steps: dict of arrays (n, B, ...), the batches of steps [start, start + n), n and B >= 1.
      start: the first step.
      size: examples in an epoch.
      transform: as in `resident`.

    Returns:
      The source; its batch size is B.
    """
    batch_size = jax.tree.leaves(steps)[0].shape[1]
    arrays = jax.device_put({"start": np.int32(start), "batches": steps})
    return Source(arrays, bind(_slice, transform), size, batch_size)
