"""From rows of a history to curves: mean and interval over runs, where the best is, and what goes into which panel."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paradigms.evaluation import interval

Rows = Sequence[Mapping[str, Any]]
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]  # steps, mean, half-width of the interval (0 where there is none)

LOWER_IS_BETTER = ("loss", "error", "mse", "rmse", "mae", "ece", "nll", "perplexity", "forgetting")
# Okabe and Ito (2008): told apart by colour-blind readers, and in greyscale by their dashes after the first round.
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"
DASHES = "-", "--", ":"


def curves(history: Rows) -> dict[str, Curve]:
    """The curve of every key that has numbers."""
    points: dict[str, dict[int, tuple[float, float]]] = {}
    for row in history:
        for key, value in row.items():
            if key != "step" and value is not None and np.ndim(value) < 2 and np.size(value):
                values = np.asarray(value)
                if values.dtype.kind in "fiub" or (values.dtype.kind == "O" and None in values):
                    mean, half = interval(values.astype(np.float64))
                    points.setdefault(key, {})[row["step"]] = (mean, half or 0.0)
    columns = {key: zip(*((step, *point) for step, point in sorted(at.items())), strict=True) for key, at in points.items()}
    return {key: tuple(map(np.array, three)) for key, three in columns.items()}  # pyright: ignore[reportReturnType]


def panels(found: Mapping[str, Curve]) -> dict[str, list[str]]:
    """Keys by panel: ``train/loss`` and ``validation/loss`` share ``loss``; loss first, then accuracy."""
    grouped: dict[str, list[str]] = {}
    for key in sorted(found, key=_place):
        grouped.setdefault(key.partition("/")[2] or key, []).append(key)
    return grouped


def _place(key: str) -> tuple:
    split, _, name = key.partition("/")
    return {"loss": 0, "accuracy": 1}.get(name or split, 2), name or split, split != "train", key


def split(key: str) -> str:
    """``train`` of ``train/loss``."""
    return key.partition("/")[0]


def splits(found: Mapping[str, Curve]) -> dict[str, str]:
    """The colour of each split, the same in every panel: train, validation, then the others by name, "task 2" before
    "task 10". Where they are more than the colours, those with numbers go from dark to light in their order."""
    others = sorted({split(key) for key in found if "/" in key} - {"train", "validation"}, key=_natural)
    names = ["train", "validation", *others]
    if len(names) <= len(COLOURS):
        return dict(zip(names, COLOURS, strict=False))
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    numbered = [name for name in names if re.search(r"\d", name)]
    shades = map(to_hex, colormaps["viridis"](np.linspace(0, 0.92, len(numbered))))
    named = [name for name in names if name not in numbered]
    return dict(zip(named, itertools.cycle(COLOURS), strict=False)) | dict(zip(numbered, shades, strict=True))


def _natural(name: str) -> list:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def selecting(found: Mapping[str, Curve], best: str | None) -> str | None:
    """The key whose best step is marked in every panel: `best`, or what validation has."""
    candidates = ("validation/accuracy", "validation/loss", *sorted(found))
    return best or next((key for key in candidates if marked(key, found)), None)


def marked(key: str, found: Mapping[str, Curve]) -> bool:
    """Whether `key` is of validation and has a best step."""
    return key.startswith("validation/") and key in found and bool(np.isfinite(found[key][1]).any())


def optimum(key: str, curve: Curve) -> tuple[float, float]:
    """The step where the mean was best, and its value there."""
    steps, mean, _ = curve
    lower = key.rpartition("/")[2].endswith(LOWER_IS_BETTER) or "loss" in key
    at = np.nanargmin(mean) if lower else np.nanargmax(mean)
    return steps[at], mean[at]
