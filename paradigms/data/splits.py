"""Splits by a fixed seed."""

import numpy as np


def permutation(n: int, seed: int):
    """(n,) int64: a random order of `range(n)`.

    By sorting the raw words of a bit generator: NumPy promises these to stay the same in every version, which it does
    not for `Generator.permutation`, and a validation split must not move with an upgrade.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable") if n else np.zeros(0, np.int64)


def holdout(n: int, count: int, seed: int, labels=None):
    """Rows (n - count,) that stay and rows (count,) held out, both ascending.

    With integer labels (n,) the held-out rows are stratified: each class gives its share, to within one example.
    """
    shuffled = permutation(n, seed)
    if labels is not None and n:
        classes = np.asarray(labels)[shuffled]
        by_class = np.argsort(classes, kind="stable")
        _, starts, counts = np.unique(classes[by_class], return_index=True, return_counts=True)
        quantile = np.empty(n)
        quantile[by_class] = (np.arange(n) - np.repeat(starts, counts) + 0.5) / np.repeat(counts, counts)
        shuffled = shuffled[np.argsort(quantile, kind="stable")]
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def count_of(share, n: int) -> int:
    """How many of n examples `share` means: a fraction in [0, 1) of them, or a count in [0, n).

    Raises:
      ValueError: where it is neither.
    """
    if isinstance(share, bool) or not isinstance(share, int | float | np.integer | np.floating):
        raise ValueError(f"validation is {share!r}, must be a fraction in [0, 1) or a number of examples")
    count = int(share) if isinstance(share, int | np.integer) else round(share * n)
    if share < 0 or count >= max(n, 1) or (isinstance(share, float | np.floating) and share >= 1):
        raise ValueError(f"validation is {share}, must be a fraction in [0, 1) or a count in [0, {n}), train's size")
    return count
