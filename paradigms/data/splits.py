"""Splits by a fixed seed."""

import operator

import numpy as np


def check_seed(seed: int) -> None:
    """Checks a seed.

    Args:
      seed: >= 0.

    Raises:
      ValueError: where it is no such integer.
    """
    try:
        sound = operator.index(seed) >= 0
    except TypeError:
        sound = False
    if not sound:
        raise ValueError(f"seed is {seed!r}, must be an integer >= 0")


def permutation(n: int, seed: int):
    """A random order of `range(n)`.

    By sorting the raw words of a bit generator: NumPy promises these to stay the same in every version, which it does
    not for `Generator.permutation`, and a validation split must not move with an upgrade.

    Args:
      n: >= 0.
      seed: >= 0.

    Returns:
      (n,) int64.

    Raises:
      ValueError: where seed is not an integer >= 0.
    """
    check_seed(seed)
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable") if n else np.zeros(0, np.int64)


def holdout(n: int, count: int, seed: int, labels=None):
    """Divides rows by a fixed seed.

    Args:
      n: how many rows there are, >= 0.
      count: how many to hold out, 0 to n.
      seed: >= 0.
      labels: None, or integers (n,), to stratify: each class gives its share, to within one example.

    Returns:
      (kept, held out): row numbers (n - count,) and (count,), both ascending.

    Raises:
      ValueError: where count is not an integer in [0, n], seed not an integer >= 0, or labels not (n,).
    """
    try:
        sound = 0 <= operator.index(count) <= n
    except TypeError:
        sound = False
    if not sound:
        raise ValueError(f"count is {count!r}, must be an integer in [0, {n}], the number of rows")
    if labels is not None and np.shape(labels) != (n,):
        raise ValueError(f"labels has shape {np.shape(labels)}, must be ({n},), one a row")
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
    """How many of n examples a validation share means.

    Args:
      share: a fraction in [0, 1), or a count in [0, n).
      n: examples to hold out from.

    Returns:
      The count, below n unless both are 0.

    Raises:
      ValueError: where share is neither, or leaves no example.
    """
    if isinstance(share, bool) or not isinstance(share, int | float | np.integer | np.floating):
        raise ValueError(f"validation is {share!r}, must be a fraction in [0, 1) or a number of examples")
    whole = isinstance(share, int | np.integer)
    if not 0 <= share < (max(n, 1) if whole else 1):
        raise ValueError(f"validation is {share}, must be a fraction in [0, 1) or a count in [0, {n}), train's size")
    count = int(share) if whole else round(float(share) * n)
    if count >= max(n, 1):
        raise ValueError(f"validation is {share}, all {n} examples of train: must be at most {(n - 1) / n}, to leave one")
    return count
