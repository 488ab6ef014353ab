"""The tables of results in the README: one of an experiment where it asks for it, else a line a number."""

import os
import pathlib
import re

from experiments import files
from experiments.catalog import HERE, find, results, shown

MARKERS = "<!-- results -->", "<!-- /results -->"


def tables(root: pathlib.Path = HERE) -> str:
    """The Markdown tables of all results.

    First a line for every metric with a published number, or an experiment's first, of experiments without ``GRIDS``; then
    the grids of the others.
    """
    lines = ["| experiment | metric | published (± std) | ours (± 95%) | runs | device |", "|---|---|---|---|---|---|"]
    grids, entries = [], find(root)
    for name, result in results(root).items():
        patterns = entries[name].grids if name in entries else {}
        grids += [grid(f"`{name}`, {title}", result, pattern) for title, pattern in patterns.items()]
        metrics, published = result["metrics"], result["published"]
        for metric in ([metric for metric in published if metric in metrics] or list(metrics)[:1]) * (not patterns):
            number = metrics[metric]
            cells = name, metric, shown(published.get(metric), "std"), shown(number)
            cells += str(len(number["values"])), f"{number['device']}, {number['seconds']:.0f} s"
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n\n".join(["\n".join(lines), *filter(None, grids)])


def grid(title: str, result: dict, pattern: str) -> str:
    """A table of the metrics that a pattern names, with the published number in brackets; nothing where none was measured.

    Numbers further than two published standard deviations from the published one have a star, where it has one.

    Raises:
      ValueError: the pattern is no regular expression with the groups "row" and "column", or puts two metrics in one cell.
    """
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"GRIDS: {title} has {pattern!r}, which is no regular expression ({error})") from None
    if not {"row", "column"} <= set(groups):
        raise ValueError(f"GRIDS: {title} has {pattern!r}, which lacks a group (?P<row>...) or (?P<column>...)")
    published, order = result["published"], [*result["published"], *result["metrics"]]
    found = {metric: match for metric in order if metric in result["metrics"] and (match := re.fullmatch(pattern, metric))}
    if not found:
        return ""
    place = {metric: (match["row"], match["column"] or "") for metric, match in found.items()}
    if len(set(place.values())) < len(place):
        raise ValueError(f"GRIDS: {title} has {pattern!r}, which gives one cell to several of {list(place)}")
    rows = list(dict.fromkeys(row for row, _ in place.values()))
    columns = list(dict.fromkeys(column for _, column in place.values()))
    cells = {where: _cell(result["metrics"][metric], published.get(metric)) for metric, where in place.items()}
    numbers = [result["metrics"][metric] for metric in found]
    runs = sorted({len(number["values"]) for number in numbers})
    seconds = sorted(number["seconds"] for number in numbers)
    devices = ", ".join(sorted({re.sub(r", \d+ cores?$", "", number["device"]) for number in numbers}))
    caption = f"**{title}**: {' or '.join(map(str, runs))} runs, {devices}, {seconds[0]:.0f} to {seconds[-1]:.0f} s a command"
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| " + " | ".join([row, *(cells.get((row, column), "") for column in columns)]) + " |" for row in rows]
    return "\n".join([caption, "", *lines])


def _cell(number: dict, published: dict | None) -> str:
    if published is None:
        return shown(number)
    far = published.get("std") and abs(number["mean"] - published["mean"]) > 2 * published["std"]
    return f"{shown(number)}{'*' if far else ''} ({shown(published, 'std')})"


def update_readme(path: str | os.PathLike, root: pathlib.Path = HERE) -> None:
    """Puts `tables` between the two marker comments of a Markdown file.

    Raises:
      ValueError: the file lacks the markers ``<!-- results -->`` and ``<!-- /results -->``.
    """
    path = pathlib.Path(path)
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        raise ValueError(f"{path}: no place for the tables; add the lines {MARKERS[0]} and {MARKERS[1]}")
    files.write(path, f"{before}{start}\n{tables(root)}\n{end}{after}")
