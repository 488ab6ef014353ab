"""A run on one page: its configuration, its results beside the published ones, and its learning curves.

The page is one file that needs no network. Nothing here touches pyplot or its global figures.
"""

import base64
import html as markup
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paradigms.evaluation import interval

Rows = Sequence[Mapping[str, Any]]

TRAIN, VALIDATION, OTHER = "#3b6fb6", "#d1622b", ("#4a8c5c", "#8a5fa8", "#7a7a7a", "#b0892f")
LOWER_IS_BETTER = ("loss", "error", "mse", "rmse", "mae", "ece", "nll", "perplexity", "forgetting")


def learning_curves(history: Rows, path: "str | os.PathLike | None" = None, best: str | None = None):
    """One panel a metric, with a line a split: the mean over runs, and its 95% interval as a band.

    ``train/loss`` and ``validation/loss`` share the panel ``loss``, so that the gap between them is seen. A circle
    is where validation was best, a dotted line through every panel the step where `best` was.

    Args:
      history: rows ``{"step": 100, "train/loss": ..., ...}``, numbers or (runs,) of them; rows may lack keys.
      path: where to save the figure; the ending says the format (png, svg, pdf). None saves nothing.
      best: the key that says the best step by its mean; default ``validation/accuracy``, else ``validation/loss``, else
        the first key of validation. Keys that end in "loss", "error" and the like are best where smallest.

    Returns:
      a `matplotlib.figure.Figure`.

    Raises:
      ValueError: `history` has no number to draw, or `best` is not among its keys.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = _curves(history)
    if not curves:
        raise ValueError(f"history: {len(history)} rows without numbers; log some with fit before drawing them")
    if best is not None and best not in curves:
        raise ValueError(f"best={best!r}: not logged; there are {sorted(curves)}")
    panels: dict[str, list[str]] = {}
    for key in sorted(curves, key=_place):
        panels.setdefault(key.partition("/")[2] or key, []).append(key)
    mark = best or next(
        (key for key in ("validation/accuracy", "validation/loss", *sorted(curves)) if _marks(key, curves)), None
    )

    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, keys) in zip(axes.flat, panels.items(), strict=False):
        for number, key in enumerate(keys):
            steps, mean, half = curves[key]
            colour, marker = _colour(key, number), "o" if len(steps) == 1 else None
            axis.plot(steps, mean, color=colour, lw=1.7, marker=marker, label=_split(key))
            axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.18, lw=0)
        axis.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
        if len(keys) > 1 or "/" in keys[0]:
            axis.legend(frameon=False, fontsize=9)
        if marks := [key for key in keys if key == best or _marks(key, curves)]:
            step, value = _best(marks[0], curves[marks[0]])
            colour = _colour(marks[0], keys.index(marks[0]))
            axis.plot([step], [value], "o", ms=6, mfc="white", mec=colour, mew=1.6)
            axis.set_title(f"best {value:.4g} at {step:g}", loc="right", fontsize=9, color=colour)
        if mark:
            axis.axvline(_best(mark, curves[mark])[0], color="#555555", lw=0.9, ls=":")
    if path is not None:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
    return figure


def confusion(matrix: Any, names: Sequence[str] | None = None):
    """A figure of a confusion matrix (C, C), true by predicted: shares of each true class, counts up to 20 classes."""
    from matplotlib.figure import Figure

    matrix = np.asarray(matrix, np.float64)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-12)
    classes = len(matrix)
    size = min(max(3.6, 0.42 * classes + 1.4), 9.0)
    figure = Figure(figsize=(size + 0.7, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xlabel="predicted", ylabel="true")
    if classes <= 20:
        labels = [str(name) for name in (names if names is not None else range(classes))]
        axis.set_xticks(range(classes), labels, rotation=90 if names is not None else 0)
        axis.set_yticks(range(classes), labels)
        for (row, column), value in np.ndenumerate(matrix):
            if value:
                colour = "white" if share[row, column] > 0.5 else "#333333"
                axis.text(column, row, f"{value:g}", ha="center", va="center", fontsize=7.5, color=colour)
    figure.colorbar(image, ax=axis, shrink=0.75, label="share of the true class")
    return figure


def html(
    path: "str | os.PathLike",
    title: str,
    config: Mapping[str, Any],
    history: "Rows | Mapping[str, Rows]" = (),
    result: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes one self-contained page: results, learning curves, confusion matrix, more figures, configuration.

    Args:
      path: the file to write; folders are made.
      title: the heading.
      config: settings of the run, shown as a table.
      history: rows as in `learning_curves`, or a dict of them, one set of curves for each name.
      result: a run's result as in ``result.json``, or plain metrics ``{name: number or (runs,)}``. Square arrays whose
        name ends in "confusion", (C, C) or (runs, C, C), are drawn, summed over the runs.
      figures: matplotlib figures by caption.

    Returns:
      `path`.
    """
    result = dict(result or {})
    measured = result.get("metrics", {}) if "experiment" in result else result
    published = result.get("published", {})
    matrices = {name: np.asarray(value) for name, value in measured.items() if _is_confusion(name, value)}
    parts = [f"<h1>{markup.escape(title)}</h1>", _facts(result)]
    if rows := _result_rows(measured, published):
        parts += ["<h2>Results</h2>", _table(("metric", "mean ± 95% interval", "runs", "published", "source"), rows)]
    histories = dict(history) if isinstance(history, Mapping) else {"": history}
    if any(_curves(one) for one in histories.values()):
        parts += ["<h2>Learning curves</h2>", LEGEND]
        parts += [_picture(learning_curves(rows), name) for name, rows in histories.items() if _curves(rows)]
    for name, matrix in matrices.items():
        each = matrix.reshape(-1, *matrix.shape[-2:])
        note = f"counts of {len(each)} runs together" if len(each) > 1 else ""
        parts += [f"<h2>{markup.escape(name)}</h2>", _picture(confusion(each.sum(0)), note)]
    if figures:
        parts += ["<h2>Figures</h2>", *(_picture(figure, caption) for caption, figure in figures.items())]
    settings = [(markup.escape(str(key)), f"<code>{markup.escape(_setting(value))}</code>") for key, value in config.items()]
    parts += ["<h2>Configuration</h2>", _table(("setting", "value"), settings)]
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = PAGE.replace("@title", markup.escape(title)).replace("@body", "\n".join(parts))
    path.write_text(page, encoding="utf-8")
    return path


def _curves(history: Rows) -> dict[str, tuple[np.ndarray, ...]]:
    """Steps, mean and half-width (0 where there is none) of every key that has numbers."""
    points: dict[str, dict[int, tuple[float, float]]] = {}
    for row in history:
        for key, value in row.items():
            if key != "step" and value is not None and np.ndim(value) < 2 and np.size(value):
                values = np.asarray(value)
                if values.dtype.kind in "fiub" or (values.dtype.kind == "O" and None in values):
                    mean, half = interval(values.astype(np.float64))
                    points.setdefault(key, {})[row["step"]] = (mean, half or 0.0)
    return {key: tuple(np.array(column) for column in zip(*((step, *p) for step, p in sorted(at.items())), strict=True))
            for key, at in points.items()}  # fmt: skip


def _split(key: str) -> str:
    return key.partition("/")[0]


def _place(key: str) -> tuple:
    split, _, name = key.partition("/")
    return {"loss": 0, "accuracy": 1}.get(name or split, 2), name or split, split not in ("train",), key


def _colour(key: str, number: int) -> str:
    return {"train": TRAIN, "validation": VALIDATION}.get(_split(key), OTHER[number % len(OTHER)])


def _lower(key: str) -> bool:
    return key.rpartition("/")[2].endswith(LOWER_IS_BETTER) or "loss" in key


def _marks(key: str, curves: dict) -> bool:
    return key.startswith("validation/") and key in curves and bool(np.isfinite(curves[key][1]).any())


def _best(key: str, curve: tuple) -> tuple[float, float]:
    steps, mean, _ = curve
    at = np.nanargmin(mean) if _lower(key) else np.nanargmax(mean)
    return steps[at], mean[at]


def _is_confusion(name: str, value: Any) -> bool:
    if not name.endswith("confusion") or isinstance(value, Mapping):
        return False
    shape = np.shape(value)
    return len(shape) in (2, 3) and shape[-1] == shape[-2]


def _result_rows(measured: Mapping[str, Any], published: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name in [*measured, *(name for name in published if name not in measured)]:
        value, paper = measured.get(name), published.get(name, {})
        if isinstance(value, Mapping):
            mean, half, runs = value["mean"], value.get("interval95"), len(value.get("values", [0]))
        elif value is None:
            mean, half, runs = None, None, 0
        elif np.ndim(value) < 2 and np.size(value):
            (mean, half), runs = interval(value), np.size(value)
        else:
            continue
        ours, theirs = shown(mean, half) if runs else "", shown(paper["mean"], paper.get("std")) if paper else ""
        source = markup.escape(str(paper.get("source", "")))
        rows.append((markup.escape(name), ours, str(runs), theirs + (" (std)" if paper.get("std") else ""), source))
    return rows


def shown(mean: float | None, spread: float | None = None) -> str:
    """A number and its spread as text, rounded to what the spread allows: ``0.8821 ± 0.0039``."""
    if mean is None or not np.isfinite(mean):
        return "nan"
    if not spread or not np.isfinite(spread):
        return f"{mean:.4g}"
    digits = int(np.clip(1 - np.floor(np.log10(spread)), 0, 8))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _facts(result: Mapping[str, Any]) -> str:
    seconds = result.get("seconds", {})
    facts = [result.get("protocol"), result.get("device")]
    facts += [f"{name} {version}" for name, version in result.get("versions", {}).items()]
    facts += [f"{name} {value:.1f} s" for name, value in seconds.items()]
    return f'<p class="facts">{" · ".join(markup.escape(str(fact)) for fact in facts if fact)}</p>'


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heading = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(figure: Any, caption: str = "") -> str:
    # An image of its own document: the ids inside several SVGs of one page would clash.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = f"<figcaption>{markup.escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{markup.escape(caption or "figure")}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}{text}</figure>"


LEGEND = (
    "<p>Lines are means over runs, bands their 95% intervals. Circles are where validation was best, the dotted line "
    "is the best step.</p>"
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@title</title><style>
body{font:16px/1.5 system-ui,sans-serif;color:#1f2328;background:#fff;
 max-width:1080px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #e3e6ea}
.facts{color:#666;font-size:.9rem;margin:0}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.32rem 1.1rem .32rem 0;border-bottom:1px solid #eceff2;vertical-align:top}
th{color:#666;font-weight:600}code{font:.88em ui-monospace,monospace}
figure{margin:1rem 0}img{max-width:100%;height:auto}figcaption{color:#666;font-size:.9rem}
</style></head><body>
@body
</body></html>
"""
