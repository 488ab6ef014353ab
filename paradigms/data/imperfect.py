"""Data sets made harder: wrong labels, rare classes, few labels. NumPy on the host, new splits out."""

import numpy as np

from paradigms.data.checks import check_labels
from paradigms.data.splits import permutation


def label_noise(split: dict, rate: float, classes: int, *, seed: int = 0) -> dict:
    """Symmetric noise: `round(rate * N)` random examples get one of the other classes, uniformly.

    Some papers draw from all classes, the true one too; their rate r is r * (classes - 1) / classes here.

    Args:
      split: dict with integer "y" (N,).
      rate: in [0, 1]; 0 changes nothing.
      classes: number of classes, >= 2.
      seed: of the choice, >= 0.

    Returns:
      The split with new labels; the other leaves are shared.

    Raises:
      ValueError: where rate or classes is out of range, or a label is not below classes.
    """
    y = _labels(split, rate)
    if classes < 2 or y.max() >= classes:
        raise ValueError(f"classes is {classes}, must be at least 2 and above the largest label, {y.max()}")
    chosen = permutation(len(y), seed)[: round(rate * len(y))]
    offset = 1 + np.random.default_rng(seed).integers(0, classes - 1, len(chosen))
    noisy = y.copy()
    noisy[chosen] = (y[chosen] + offset) % classes
    return {**split, "y": noisy}


def label_flips(split: dict, rate: float, mapping: dict[int, int], *, seed: int = 0) -> dict:
    """Asymmetric noise: a share `rate` of each class in `mapping` gets the class it maps to (Patrini et al. 2017).

    On CIFAR-10 they use {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}: truck to automobile, bird to aeroplane, deer to horse, cat and
    dog exchanged.

    Args:
      split: dict with integer "y" (N,).
      rate: in [0, 1]; 0 changes nothing. `round(rate * n)` of each class's n examples change.
      mapping: from a class to the class it is mistaken for, one that the split's labels reach: 0 to their largest.
      seed: of the choice, >= 0.

    Returns:
      The split with new labels; the other leaves are shared.

    Raises:
      ValueError: where rate is out of range or a class of the mapping has no example, or its target is no class.
    """
    y = _labels(split, rate)
    shuffled = permutation(len(y), seed)
    noisy = y.copy()
    for source, target in mapping.items():
        rows = shuffled[y[shuffled] == source]
        if len(rows) == 0:
            raise ValueError(f"mapping has class {source}, of which split has no example: labels are {np.unique(y)}")
        if target not in range(int(y.max()) + 1):
            raise ValueError(f"mapping sends class {source} to {target}, must be a class of the split, in [0, {y.max()}]")
        noisy[rows[: round(rate * len(rows))]] = target
    return {**split, "y": noisy}


def imbalance(split: dict, ratio: float, *, seed: int = 0) -> dict:
    """A long-tailed subset: class i of C keeps `floor(n * ratio ** (-i / (C - 1)))` examples (Cui et al. 2019).

    n is the size of the smallest class, so that the tail is exactly the paper's on balanced sets; class 0 is the most
    frequent, the last the rarest.

    Args:
      split: dict with integer "y" (N,).
      ratio: largest class over smallest, >= 1; 1 balances the classes.
      seed: of the choice, >= 0.

    Returns:
      The chosen rows of every leaf, in their order.

    Raises:
      ValueError: where ratio < 1, or so large that the rarest class would be empty.
    """
    y = _labels(split)
    if not ratio >= 1:
        raise ValueError(f"ratio is {ratio}, must be >= 1: the largest class over the smallest")
    names, counts = np.unique(y, return_counts=True)
    if counts.min() < ratio:
        raise ValueError(f"ratio is {ratio}, must be at most {counts.min()}, or the rarest class would be empty")
    exponents = np.arange(len(names)) / max(1, len(names) - 1)
    # The addend keeps floor exact where the power is whole but for rounding.
    keep = np.floor(counts.min() * ratio**-exponents + 1e-9).astype(int)
    return _choose(split, y, dict(zip(names.tolist(), keep.tolist(), strict=True)), seed)


def few_labels(split: dict, per_class: int, *, seed: int = 0) -> dict:
    """The labelled subset of few-label benchmarks: `per_class` random examples of each class, in their order.

    Args:
      split: dict with integer "y" (N,).
      per_class: >= 1.
      seed: of the choice, >= 0.

    Returns:
      The chosen rows of every leaf.

    Raises:
      ValueError: where per_class < 1 or a class has fewer examples.
    """
    y = _labels(split)
    names, counts = np.unique(y, return_counts=True)
    if not 1 <= per_class <= counts.min():
        raise ValueError(f"per_class is {per_class}, must be in [1, {counts.min()}], the size of the smallest class")
    return _choose(split, y, dict.fromkeys(names.tolist(), per_class), seed)


def _labels(split, rate=0.0):
    y = check_labels(split)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}, must be a share of the examples in [0, 1]")
    return y


def _choose(split, y, keep, seed):
    shuffled = permutation(len(y), seed)
    rows = np.concatenate([shuffled[y[shuffled] == name][:count] for name, count in keep.items()])
    rows.sort()
    return {name: np.asarray(leaf)[rows] for name, leaf in split.items()}
