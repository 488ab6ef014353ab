"""The tables of a page, as HTML: every text escaped, numbers in line at their decimal points."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from paradigms.evaluation import interval

NOTHING = "—"
MANY = 40  # numbers of a run without published ones beside them: more are a grid by the parts of their names


class Number(NamedTuple):
    """A measured or published number as a table shows it."""

    mean: float | None
    spread: float | None = None
    runs: int | None = None
    source: str = ""


def shown(mean: float | None, spread: float | None = None) -> str:
    """A number and its spread, unless that is rounding, as text to what the spread allows: ``0.8821 ± 0.0039``."""
    if mean is None or not np.isfinite(mean):
        return "nan"
    if not spread or not 1e-7 * abs(mean) < spread < np.inf:
        return f"{mean:.4g}"
    digits = int(np.clip(1 - np.floor(np.log10(spread)), 0, 8))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def measured(metrics: Mapping[str, Any]) -> dict[str, Number]:
    """The numbers among a result's metrics: records with mean and interval, or values; arrays of more axes are none."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found[name] = Number(value["mean"], value.get("interval95"), len(value.get("values", [0])))
        elif np.ndim(value) < 2 and np.size(value):
            found[name] = Number(*interval(value), np.size(value))
    return found


def published(result: Mapping[str, Any]) -> dict[str, Number]:
    """The published numbers of a result, by metric."""
    numbers = result.get("published", {})
    return {name: Number(one["mean"], one.get("std"), None, str(one.get("source") or "")) for name, one in numbers.items()}


def aligned(numbers: Sequence[Number | None]) -> list[str]:
    """The cells of a column, a dash for None, filled up with spaces as wide as digits so that the points are in line."""
    texts = [shown(number.mean, number.spread) if number else NOTHING for number in numbers]
    means = [text.partition(" ")[0] for text in texts]
    wholes = [mean.partition(".")[0] for mean in means]
    left = max(map(len, wholes), default=0)
    return ["\u2007" * (left - len(whole)) + text for whole, text in zip(wholes, texts, strict=True)]


def results(metrics: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The tables of one run: ours beside the published ones; the rest as grids where they are more than `MANY`."""
    ours, theirs = measured(metrics), published(result)
    rest = {name: number for name, number in ours.items() if name not in theirs}
    if len(rest) <= MANY:
        return listed(ours, theirs)
    return listed({name: ours[name] for name in ours if name not in rest}, theirs) + grids(rest)


def listed(ours: Mapping[str, Number], theirs: Mapping[str, Number]) -> str:
    """A row for each metric, in the order of ours."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    cells = [ours.get(name) for name in names], [theirs.get(name) for name in names]
    columns: list[Sequence[str]] = [[escape(name) for name in names], aligned(cells[0])]
    columns.append([str(number.runs) if number else "0" for number in cells[0]])
    head = ["metric", "mean ± 95% interval", "runs"]
    if theirs:
        spreads = [" (std)" if number and number.spread else "" for number in cells[1]]
        columns.append([text + note for text, note in zip(aligned(cells[1]), spreads, strict=True)])
        columns.append([_source(number) if number else "" for number in cells[1]])
        head += ["published", "source"]
    return table(head, zip(*columns, strict=True), "numbers") if names else ""


def grids(numbers: Mapping[str, Number]) -> str:
    """The metric ``a/b/c`` in the row ``a/b`` and the column ``c``; rows without a column in common are tables apart."""
    rows, apart = {}, []
    for name, number in numbers.items():
        row, _, head = name.rpartition("/")
        rows.setdefault(row, {})[head] = number
    for row, cells in rows.items():
        group = next((group for group in apart if any(cells.keys() & other.keys() for other in group.values())), None)
        if group is None:
            apart.append(group := {})
        group[row] = cells
    return "".join(map(_grid, apart))


def _grid(rows: Mapping[str, Mapping[str, Number]]) -> str:
    heads = list(dict.fromkeys(head for cells in rows.values() for head in cells))
    columns = [[escape(row) for row in rows], *(aligned([cells.get(head) for cells in rows.values()]) for head in heads)]
    runs = sorted({number.runs for cells in rows.values() for number in cells.values() if number.runs})
    corner = f"mean ± 95% interval, runs: {' or '.join(map(str, runs))}"
    return table([corner, *map(escape, heads)], zip(*columns, strict=True), "numbers")


def side_by_side(labels: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """The table of several runs: a column each, then the published numbers."""
    ours = [measured(result.get("metrics", {})) for result in results]
    theirs = [published(result) for result in results]
    names = list(dict.fromkeys(name for one in (*ours, *theirs) for name in one))
    columns: list[Sequence[str]] = [[escape(name) for name in names]]
    columns += [aligned([one.get(name) for name in names]) for one in ours]
    head = ["metric", *labels]
    if any(theirs):
        columns.append(["<br>".join(dict.fromkeys(_cited(one[name]) for one in theirs if name in one)) for name in names])
        head.append("published")
    return table(head, zip(*columns, strict=True), "numbers") if names else ""


def _cited(number: Number) -> str:
    return shown(number.mean, number.spread) + (" (std) " if number.spread else " ") + _source(number)


def _source(number: Number) -> str:
    return f'<span class="quiet">{escape(number.source)}</span>' if number.source else ""


def settings(config: Mapping[str, Any]) -> str:
    """The table of one run's settings."""
    return table(("setting", "value"), [(escape(str(key)), setting(value)) for key, value in config.items()])


def apart(corner: str, labels: Sequence[str], each: Sequence[Mapping[str, Any]], cell: Callable) -> tuple[str, dict]:
    """The table of what differs between runs, each value as `cell` makes it, "" where nothing does; what all share."""
    names = list(dict.fromkeys(name for one in each for name in one))
    same = {name: each[0][name] for name in names if all(name in one and one[name] == each[0][name] for one in each)}
    differ = [name for name in names if name not in same]
    rows = [(escape(name), *(cell(one[name]) if name in one else NOTHING for one in each)) for name in differ]
    return table((corner, *labels), rows) if rows else "", same


def setting(value: Any) -> str:
    """A setting's value as code."""
    return f"<code>{escape(value if isinstance(value, str) else json.dumps(value, default=str))}</code>"


def facts(result: Mapping[str, Any]) -> dict[str, str]:
    """What a result says of how it came about, as plain text: protocol, device, versions, times, memory."""
    found = {name: str(result.get(name) or "") for name in ("protocol", "device")}
    found["versions"] = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    found["time"] = ", ".join(f"{name} {value:,.1f} s" for name, value in result.get("seconds", {}).items() if value)
    found["memory"] = ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in result.get("memory", {}).items() if value)
    return {name: text for name, text in found.items() if text}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of cells that are HTML already; the first cell of a row heads it."""
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    cells = ((f'<th scope="row">{first}</th>', *(f"<td>{cell}</td>" for cell in rest)) for first, *rest in rows)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table></div>'
