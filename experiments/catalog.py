"""Which experiments there are, what runs of them gave, and the table of both in the README.

An experiment is a file ``<paradigm>/<benchmark>.py``, or ``tour.py``, with a docstring (its first line is the summary
in the list), a frozen dataclass ``Config``, ``run(config, folder) -> {metric: number or list over seeds}``, where a
number may be ``{"mean": ..., "interval95": ..., "tasks": n}``, its interval over the tasks of one run, and optionally
``PUBLISHED = {metric: {"mean": ..., "std": ..., "source": ...}}``, ``PROTOCOL = "..."`` and ``CHOICES``, the names of
settings that choose among published protocols, all literals. Nothing but literals is read for the list, so it does not
import jax.

It can be swept (``python -m experiments sweep <name>``) where it also has ``training(config) -> dict``, the arguments of
`paradigms.sweep` but for the settings: "make", a function ``config -> Trainer`` whose floats may be traced, "source",
"steps", "validation", and options such as "key" and "chunk". Settings that are no floats are set before ``training`` is
called, for "make", "source" and "steps"; all else is that of the first.
"""

import ast
import contextlib
import math
import os
import pathlib
from typing import NamedTuple

from experiments import files

HERE = pathlib.Path(__file__).parent
MARKERS = "<!-- results -->", "<!-- /results -->"
OTHER = ("commands", "results", "speed")  # folders that hold no experiments


class Entry(NamedTuple):
    """An experiment as its source says it, not imported."""

    name: str
    summary: str
    published: dict[str, dict]


def find(root: pathlib.Path = HERE) -> dict[str, Entry]:
    """Every experiment below `root` by its dotted name, such as ``continual.permuted_mnist``."""
    paths = [*root.glob("tour.py"), *sorted(root.glob("*/*.py"))]
    paths = [file for file in paths if not file.stem.startswith("_") and file.parent.name not in OTHER]
    names = {".".join(file.relative_to(root).with_suffix("").parts): file for file in paths}
    entries = {name: _entry(name, ast.parse(file.read_text(encoding="utf-8"))) for name, file in names.items()}
    return {name: entry for name, entry in entries.items() if entry is not None}


def _entry(name: str, tree: ast.Module) -> Entry | None:
    if not any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
        return None
    published = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == "PUBLISHED" for target in targets):
            with contextlib.suppress(ValueError):  # not a literal: the list goes without it
                published = ast.literal_eval(node.value)
    return Entry(name, (ast.get_docstring(tree) or "").partition("\n")[0].strip(), published)


def results(root: pathlib.Path = HERE) -> dict[str, dict]:
    """The contents of ``results/*.json`` by experiment."""
    loaded = map(files.read, sorted((root / "results").glob("*.json")))
    return {result["experiment"]: result for result in loaded}


def shown(number: dict | None, spread: str = "interval95") -> str:
    """``{"mean": 0.8821, "interval95": 0.0039}`` as ``0.8821 ± 0.0039``; a dash for None."""
    if not number or number.get("mean") is None:
        return "—" if not number else "nan"
    mean, half = number["mean"], number.get(spread)
    if not half or not math.isfinite(half):
        return f"{mean:.4g}"
    digits = min(max(1 - math.floor(math.log10(half)), 0), 8)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(root: pathlib.Path = HERE) -> str:
    """The Markdown table of all results: every metric with a published number, else an experiment's first."""
    lines = ["| experiment | metric | published (± std) | ours (± 95%) | runs | device |", "|---|---|---|---|---|---|"]
    for name, result in results(root).items():
        metrics, published = result["metrics"], result["published"]
        for metric in [metric for metric in published if metric in metrics] or list(metrics)[:1]:
            number = metrics[metric]
            cells = name, metric, shown(published.get(metric), "std"), shown(number)
            cells += str(len(number["values"])), f"{number['device']}, {number['seconds']:.0f} s"
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def update_readme(path: str | os.PathLike, root: pathlib.Path = HERE) -> None:
    """Puts `table` between the two marker comments of a Markdown file.

    Raises:
      ValueError: the file lacks the markers ``<!-- results -->`` and ``<!-- /results -->``.
    """
    path = pathlib.Path(path)
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        raise ValueError(f"{path}: no place for the table; add the lines {MARKERS[0]} and {MARKERS[1]}")
    files.write(path, f"{before}{start}\n{table(root)}\n{end}{after}")
