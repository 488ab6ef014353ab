"""The response of validation to the settings: a table, and a plot."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from paradigms.report import shown
from paradigms.sweep.run import Sweep

INK, QUIET, BEST = "#222222", "#8a8d91", "#b5382a"


def table(found: Sweep) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of text, the best setting first."""
    names = list(found.rows[0]["settings"])
    seeds = len(found.rows[0]["values"])
    rows = []
    for row in found.rows:
        steps = "-".join(str(step) for step in sorted({min(row["best_step"]), max(row["best_step"])}))
        value = shown(row["value"], row["interval95"])
        said = f"{row['diverged']} of {seeds} seeds" if row["diverged"] else ""
        rows.append([*(_label(row["settings"][name]) for name in names), value, steps, said])
    return [*names, f"validation {found.select.removeprefix('-')} ± 95%", "best step", "diverged"], rows


def plot(found: Sweep, path: "str | os.PathLike | None" = None):
    """One panel a setting that varies, or a heat map where two settings were crossed completely.

    A panel shows every setting with its 95% interval over seeds and, where the values are few, a line through the best of
    each. An axis is logarithmic where the values are spaced so. Settings that diverged are crosses at the foot, or empty cells.

    Args:
      found: what `sweep` returned.
      path: where to save the figure; the ending says the format (png, svg, pdf). None saves nothing.

    Returns:
      a `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure

    values = {name: _distinct([row["settings"][name] for row in found.rows]) for name in found.rows[0]["settings"]}
    varied = [name for name in values if len(values[name]) > 1] or list(values)[:1]
    crossed = len(varied) == 2 and len(found.rows) == len(values[varied[0]]) * len(values[varied[1]])
    columns = 1 if crossed else min(3, len(varied))
    lines = 1 if crossed else -(-len(varied) // columns)
    figure = Figure(figsize=((5.4 if crossed else 4.2) * columns, 3.6 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    if crossed:
        _heat_map(figure, axes[0], found, varied, values)
    else:
        for axis, name in zip(axes, varied, strict=False):
            _panel(axis, found, name, values[name])
        for axis in axes[len(varied) :]:
            axis.remove()
    if path is not None:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
    return figure


def _panel(axis: Any, found: Sweep, name: str, values: list) -> None:
    places = values if _numbers(values) else list(range(len(values)))
    scale = spacing(values)
    if scale == "symlog":  # a zero among values that are spaced logarithmically
        axis.set_xscale("symlog", linthresh=min(value for value in values if value > 0))
    else:
        axis.set_xscale(scale)
    few = len(values) <= 8
    if few or places is not values:
        axis.set_xticks(places, [_label(value) for value in values])
        axis.set_xticks([], minor=True)
    at = dict(zip(map(repr, values), places, strict=True))
    tops: dict[Any, float] = {}
    for row in reversed(found.rows):  # the best last, on top
        place = at[repr(row["settings"][name])]
        if row["diverged"]:
            axis.plot([place], [0.03], "x", color=BEST, ms=6, transform=axis.get_xaxis_transform())
            continue
        tops[place] = row["value"]
        chosen = row["settings"] == found.best
        half = None if row["interval95"] is None else [row["interval95"]]
        colour = BEST if chosen else QUIET
        axis.errorbar([place], [row["value"]], half, fmt="o", color=colour, ms=6 if chosen else 4, lw=1.2, capsize=2)
    if few:
        line = sorted(tops)
        axis.plot(line, [tops[place] for place in line], color=INK, lw=1.2, zorder=1)
    axis.margins(x=0.1)
    axis.set(xlabel=name, ylabel=f"validation {found.select.removeprefix('-')}")
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _heat_map(figure: Any, axis: Any, found: Sweep, varied: Sequence[str], values: dict[str, list]) -> None:
    across, down = varied
    cells = np.full((len(values[down]), len(values[across])), np.nan)
    for row in found.rows:
        place = values[down].index(row["settings"][down]), values[across].index(row["settings"][across])
        cells[place] = np.nan if row["diverged"] else row["value"]
        edge = {"weight": "bold"} if row["settings"] == found.best else {}
        text = "diverged" if row["diverged"] else f"{row['value']:.4g}"
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
        axis.text(*reversed(place), text, ha="center", va="center", fontsize=8, color=INK, bbox=box, **edge)
    colours = "viridis_r" if found.select.startswith("-") else "viridis"
    image = axis.imshow(cells, cmap=colours, aspect="auto", origin="lower")
    axis.set_xticks(range(len(values[across])), [_label(value) for value in values[across]])
    axis.set_yticks(range(len(values[down])), [_label(value) for value in values[down]])
    axis.set(xlabel=across, ylabel=down)
    figure.colorbar(image, ax=axis, label=f"validation {found.select.removeprefix('-')}")


def _numbers(values: Sequence) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _distinct(values: Sequence) -> list:
    """The different values: numbers in order, others in the order of their names."""
    kept = {repr(value): value for value in values}
    return sorted(kept.values(), key=lambda value: value if _numbers(values) else _label(value))


def spacing(values: Sequence) -> str:
    """The scale of an axis for sorted `values`: "log" where their ratios are more alike than their differences."""
    if not _numbers(values) or min(values) < 0:
        return "linear"
    positive = np.asarray([value for value in values if value > 0], float)
    if len(positive) < 3:
        logarithmic = len(positive) == 2 and positive[1] >= 10 * positive[0]
    else:
        unevenness = [np.std(gaps) / np.mean(gaps) for gaps in (np.diff(np.log(positive)), np.diff(positive))]
        logarithmic = unevenness[0] < unevenness[1]
    return ("log" if len(positive) == len(values) else "symlog") if logarithmic else "linear"


def _label(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(getattr(value, "__name__", value))
