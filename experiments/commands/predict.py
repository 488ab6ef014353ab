"""Predicts with the network of a run on images, arrays or tables: file, row, class and probability, as CSV."""

import csv
import dataclasses
import pathlib
import sys
from typing import Any

import tyro


@dataclasses.dataclass(frozen=True)
class Flags:
    run: tyro.conf.Positional[pathlib.Path]
    """Folder of the run, OUT/<experiment>/<id>."""
    files: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """PNG or JPEG images, .npz or .npy files (the array x, or the only one), or .csv files (an example a line)."""
    part: str | None = None
    """Which network, where the run saved several."""
    out: pathlib.Path | None = None
    """A new file NAME.csv in the folder of the run, instead of the standard output."""


def main(flags: Flags, root: pathlib.Path) -> int:
    """Runs the command; returns the exit code."""
    del root
    from experiments import files, inputs
    from paradigms import load_run

    if not flags.files:
        raise ValueError("predict: no files; give images, arrays or tables")
    out = None if flags.out is None else files.new(flags.run, flags.out, ".csv")
    network = load_run(flags.run, flags.part)
    head, rows = (), []
    for path in flags.files:
        x, changes = inputs.read(path, network)
        if changes:
            print(f"{path}: {changes}", file=sys.stderr)
        try:
            head, answers = _answers(network, x)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        rows += [(path, row, *answer) for row, answer in enumerate(answers)]

    if out is None:
        _write(sys.stdout, head, rows)
    else:
        with out.open("x", encoding="utf-8", newline="") as file:
            _write(file, head, rows)
        print(out)
    return 0


def _answers(network: Any, x: Any) -> tuple[tuple[str, ...], list]:
    """The names of the columns, and for every example its class and probability; without classes, the outputs."""
    import numpy as np

    logits = network.predict(x).get("logits")
    if logits is None or logits.ndim > 2 or (network.classes and logits.ndim != 2):
        shape = "no logits" if logits is None else f"logits of shape {logits.shape}"
        raise ValueError(f"the network gives {shape}, not one answer an example; use paradigms.load_run in Python")
    if not np.isfinite(logits).all():
        raise ValueError("the network's answer is not finite: its training went wrong; give another run")
    logits = logits.astype(np.float64).reshape(len(x), -1)
    if not network.classes:
        return tuple(f"output{i}" for i in range(logits.shape[1])), [[f"{one:.6g}" for one in row] for row in logits]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    best, shares = logits.argmax(1), odds.max(1) / odds.sum(1)
    return ("class", "probability"), [(network.classes[i], f"{p:.6g}") for i, p in zip(best, shares, strict=True)]


def _write(file: Any, head: tuple, rows: list) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([("file", "row", *head), *rows])
