"""Which experiments there are, and what runs of them gave.

An experiment is a file ``<paradigm>/<benchmark>.py``, or ``tour.py``, with a docstring (its first line is the summary
in the list), a frozen dataclass ``Config``, ``run(config, folder) -> {metric: number or list over seeds}``, where a
number may be ``{"mean": ..., "interval95": ..., "tasks": n}``, its interval over the tasks of one run, and optionally
``PUBLISHED = {metric: {"mean": ..., "std": ..., "source": ...}}``, ``PROTOCOL = "..."``, ``CHOICES``, the names of
settings that choose among published protocols, and ``GRIDS = {title: pattern}``, tables of its metrics in the README (a
regular expression with the groups "row" and "column"), all literals. Nothing but literals is read for the list, so it does
not import jax.

It can be swept (``python -m experiments sweep <name>``) where it also has ``training(config) -> dict``, the arguments of
`paradigms.sweep` but for the settings: "make", a function ``config -> Trainer`` whose floats may be traced, "source",
"steps", "validation", and options such as "key" and "chunk". Settings that are no floats are set before ``training`` is
called, for "make", "source" and "steps"; all else is that of the first.
"""

import ast
import contextlib
import math
import pathlib
from typing import NamedTuple

from experiments import files

HERE = pathlib.Path(__file__).parent
OTHER = ("commands", "results", "speed")  # folders that hold no experiments


class Entry(NamedTuple):
    """An experiment as its source says it, not imported."""

    name: str
    summary: str
    published: dict[str, dict]
    grids: dict[str, str]


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
    said = {"PUBLISHED": {}, "GRIDS": {}}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Name) and target.id in said:
                with contextlib.suppress(ValueError):  # not a literal: the list goes without it
                    said[target.id] = ast.literal_eval(node.value)
    return Entry(name, (ast.get_docstring(tree) or "").partition("\n")[0].strip(), said["PUBLISHED"], said["GRIDS"])


def results(root: pathlib.Path = HERE) -> dict[str, dict]:
    """The contents of ``results/*.json`` by experiment."""
    loaded = map(files.read, sorted((root / "results").glob("*.json")))
    return {result["experiment"]: result for result in loaded}


def shown(number: dict | None, spread: str = "interval95") -> str:
    """``{"mean": 0.8821, "interval95": 0.0039}`` as ``0.8821 ± 0.0039``; a dash for None."""
    if not number or number.get("mean") is None:
        return "—" if not number else "nan"
    mean, half = number["mean"], number.get(spread)
    if not half or not 1e-7 * abs(mean) < half < math.inf:
        return f"{mean:.4g}"
    digits = min(max(1 - math.floor(math.log10(half)), 0), 8)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
