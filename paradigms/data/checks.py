"""What a data set must satisfy before anything is compiled."""

import operator

import jax
import numpy as np


def check_arrays(arrays, batch_size: int | None = None, what: str = "split") -> int:
    """The number of examples in a dict (or tree) of arrays, after checking that it can be trained on.

    Args:
      arrays: tree whose leaves have the example axis first.
      batch_size: checked against the number of examples where given.
      what: the argument's name, for the messages.

    Returns:
      The number of examples.

    Raises:
      ValueError: a whole `Data`, not one of its splits; no leaves; no examples; leaves of different lengths; a leaf
        without an example axis, of objects or strings, or of integers beyond 32 bits; NaN or infinity; a negative
        label; a batch size outside [1, examples].
    """
    if hasattr(arrays, "train"):
        raise ValueError(f"{what} is a {type(arrays).__name__}, must be a dict of arrays, one of its splits: pass its .train")
    leaves = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)]
    if not leaves:
        raise ValueError(f'{what} has no arrays: give a dict such as {{"x": images, "y": labels}}')
    for name, leaf in leaves:
        _check_leaf(f"{what}[{name}]" if name else what, leaf, is_label=name == repr("y"))
    lengths = {name: len(leaf) for name, leaf in leaves}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the arrays of {what} have different lengths {lengths}: row i of each must be example i")
    size = len(leaves[0][1])
    if size == 0:
        raise ValueError(f"{what} is empty (0 examples): was everything held out, or filtered away?")
    if batch_size is not None:
        check_batch_size(batch_size, size)
    return size


def check_count(least: int = 1, **counts) -> None:
    """Checks numbers of things.

    Args:
      least: the smallest that is allowed.
      **counts: each by the name of its argument.

    Raises:
      ValueError: where one is no integer, or smaller.
    """
    for name, count in counts.items():
        try:
            whole = not isinstance(count, bool) and operator.index(count) >= least
        except TypeError:
            whole = False
        if not whole:
            raise ValueError(f"{name}={count!r}: must be an integer, {least} or more")


def check_batch_size(batch_size: int, size: int) -> None:
    """Checks a batch size.

    Args:
      batch_size: 1 to `size`.
      size: the number of examples.

    Raises:
      ValueError: where it is no such integer.
    """
    try:
        operator.index(batch_size)
    except TypeError:
        raise ValueError(f"batch_size is {batch_size!r}, must be an integer") from None
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size is {batch_size}, must be in [1, {size}], the number of examples")


def check_labels(split: dict) -> np.ndarray:
    """The labels of a split, after `check_arrays`.

    Args:
      split: dict of arrays, examples first, with integer "y" (N,).

    Returns:
      "y" as a NumPy array.

    Raises:
      ValueError: where there are none, or they are not (N,) integers, or as `check_arrays`.
    """
    check_arrays(split)
    if "y" not in split:
        raise ValueError(f'split has no labels "y", only {sorted(split)}')
    y = np.asarray(split["y"])
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise ValueError(f'split["y"] is {y.dtype}{y.shape}, must be integer labels (N,)')
    return y


def _name(path) -> str:
    return "/".join(repr(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _check_leaf(name: str, leaf, is_label: bool) -> None:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise ValueError(f"{name} is a {type(leaf).__name__}, must be an array: use np.asarray")
    if len(leaf.shape) == 0:
        raise ValueError(f"{name} has no example axis (shape ()): give one value an example")
    kind = np.dtype(leaf.dtype).kind if leaf.dtype != jax.numpy.bfloat16 else "f"
    if kind in "OSUMm":
        raise ValueError(f"{name} has dtype {leaf.dtype}, must be numbers: encode it, or leave it out of the split")
    if leaf.size == 0:
        return
    if kind == "f":
        _check_finite(name, leaf)
    if kind in "iu":
        low, high = leaf.min(), leaf.max()
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} holds integers from {low} to {high}, beyond 32 bits: renumber them")
        if is_label and low < 0:
            rows = np.flatnonzero((np.asarray(leaf) < 0).reshape(len(leaf), -1).any(axis=1))
            raise ValueError(
                f"{name} has {len(rows)} negative labels (lowest {low}, first row {rows[0]}): classes count "
                "from 0; drop unlabelled rows"
            )


def _check_finite(name: str, leaf) -> None:
    rows = np.asarray(leaf).reshape(len(leaf), -1)
    step = max(1, 2**22 // max(1, rows.shape[1]))  # in pieces: the mask of a large set would be large too
    bad, first = 0, None
    for start in range(0, len(rows), step):
        wrong = ~np.isfinite(rows[start : start + step].astype(np.float32, copy=False))
        if wrong.any():
            bad += int(wrong.sum())
            first = start + int(np.flatnonzero(wrong.any(axis=1))[0]) if first is None else first
    if bad:
        raise ValueError(f"{name} has {bad} NaN or infinite values, the first in row {first}: drop those rows or fill them in")
