"""Splits by class: classes to meta-learn from, and others to be tested on."""

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from paradigms.data.load import Data, moments

_PARTS = ("train", "validation", "test")


def by_class(data: Data, classes: Mapping[str, Sequence[str]], name: str | None = None) -> Data:
    """A set split anew for few-shot learning: each split has classes of its own and all of their rows.

    The rows of all three splits of `data` are pooled, in that order. The labels of a split count from 0 in the order
    its classes are named; classes that are not named are left out.

    Args:
      data: a labelled set, as `load` gives.
      classes: {"train": names, "validation": names, "test": names}, each name of `data.class_names` at most once in all.
      name: of the result; None keeps `data.name`.

    Returns:
      The set. `classes` and `class_names` are those of train: label i of validation or test is `classes[part][i]`,
      another class than label i of train. `mean` and `std` are those of train's inputs.

    Raises:
      ValueError: the set has no labels or no class names, or some name two classes; a split is missing, unknown or
        names no class; a name is unknown (with close ones), comes twice, or has no rows.
    """
    numbers = _numbers(data)
    _check_classes(classes, numbers)
    pooled = {leaf: np.concatenate([getattr(data, part)[leaf] for part in _PARTS]) for leaf in data.train}
    labels = pooled.pop("y")
    splits = {}
    for part in _PARTS:
        renumbered = np.full(len(numbers), -1, np.int32)
        renumbered[[numbers[one] for one in classes[part]]] = np.arange(len(classes[part]))
        y = renumbered[labels]
        rows = np.flatnonzero(y >= 0)
        if without := [one for i, one in enumerate(classes[part]) if not (y[rows] == i).any()]:
            raise ValueError(f"classes[{part!r}] names {without[:4]}, of which {data.name} has no rows: leave them out")
        splits[part] = {leaf: values[rows] for leaf, values in pooled.items()} | {"y": y[rows]}
        for leaf in splits[part].values():
            leaf.setflags(write=False)  # as those of `load`
    mean, std = moments(splits["train"].get("x"))
    names = tuple(classes["train"])
    return Data(name or data.name, **splits, classes=len(names), class_names=names, mean=mean, std=std)


def _numbers(data) -> dict[str, int]:
    """{name: label} of a set's classes."""
    numbers = {one: label for label, one in enumerate(data.class_names)}
    labels = data.train.get("y")
    if labels is None or not numbers or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"data is {data.name}, which has no named classes: by_class needs labels and class_names")
    if len(numbers) < len(data.class_names):
        twice = sorted(one for one in numbers if data.class_names.count(one) > 1)
        raise ValueError(f"data is {data.name}, where {twice[:4]} name two classes each: rename them in class_names")
    return numbers


def _check_classes(classes, known) -> None:
    if not isinstance(classes, Mapping) or set(classes) != set(_PARTS):
        found = sorted(classes) if isinstance(classes, Mapping) else type(classes).__name__
        raise ValueError(f'classes has {found}, must be {{"train": names, "validation": names, "test": names}}')
    place = {}
    for part in _PARTS:
        if isinstance(classes[part], str) or len(classes[part]) == 0:
            raise ValueError(f"classes[{part!r}] is {classes[part]!r}, must be a sequence of one class name or more")
        for one in classes[part]:
            if one not in known:
                close = difflib.get_close_matches(str(one), known, n=4)
                hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {list(known)[:4]} ..."
                raise ValueError(f"classes[{part!r}] names {one!r}, which is no class of the set: {hint}")
            if one in place:
                raise ValueError(f"{one!r} is named in classes[{place[one]!r}] and again in classes[{part!r}]: keep it once")
            place[one] = part
