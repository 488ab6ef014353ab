"""The pages of runs, made from nothing but the files in their folders."""

import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np

from experiments import files
from experiments.runner import read_config
from paradigms import logging, report


def load(folder: pathlib.Path) -> report.Record:
    """What the folder of a run holds; the result is {} where the run has not ended, the name that of the folder.

    Raises:
      ValueError: it is no run's, one of its files is damaged, or it has neither a result nor rows.
    """
    if not (folder / "config.json").exists():
        inner = sorted(path.parent for path in folder.glob("*/config.json"))
        advice = f"such as {inner[-1]}" if inner else "OUT/<experiment>/<id>"
        raise ValueError(f"{folder}: no run, it has no config.json; give the folder of one, {advice}")
    config = read_config(folder)
    history = {_part(folder, log): _rows(log) for log in sorted(folder.rglob("*.jsonl"))}
    result = _result(folder / "result.json") if (folder / "result.json").exists() else {}
    if not result and not any(history.values()):
        raise ValueError(f"{folder}: has neither a result nor logged rows yet; wait for its first, or give another run")
    metrics = {**result.get("metrics", {}), **_arrays(folder / "arrays.npz")}
    result = {**result, "experiment": config["experiment"], "metrics": metrics}
    return report.Record(folder.resolve().name, config["settings"], history, result, report.read_examples(folder))


def write(folders: Sequence[pathlib.Path], out: pathlib.Path) -> pathlib.Path:
    """Writes the page of one run, or of several side by side.

    Raises:
      ValueError: as `load`.
    """
    runs = [load(folder) for folder in folders]
    unended = [run.name for run, folder in zip(runs, folders, strict=True) if not (folder / "result.json").exists()]
    ended = f"Not ended, there is no result yet: {', '.join(unended)}." if unended else ""
    names = list(dict.fromkeys(run.result["experiment"] for run in runs))
    if len(runs) > 1:
        return report.compare(out, ", ".join(names), runs, note=ended)
    (run,) = runs
    note = ended or f"Run {run.name}"
    return report.html(out, names[0], run.config, run.history, run.result, examples=run.examples, note=note)


def _part(folder: pathlib.Path, log: pathlib.Path) -> str:
    """``supervised`` for ``supervised/metrics.jsonl``, and nothing for the run's own ``metrics.jsonl``."""
    name = log.relative_to(folder).with_suffix("").as_posix()
    return "" if name == "metrics" else name.removesuffix("/metrics")


def _rows(log: pathlib.Path) -> list[dict]:
    try:
        rows = logging.read(log)
        if not all(isinstance(row["step"], int | float) for row in rows):
            raise TypeError("a step is no number")
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{log}: cannot be read ({error}); restore the file, or remove it") from None
    return rows


def _result(path: pathlib.Path) -> dict:
    result = files.read(path)
    for name in ("metrics", "published", "versions", "seconds", "memory"):
        part = result.setdefault(name, {})
        good = isinstance(part, dict)
        if good and name in ("metrics", "published"):
            good = all(
                isinstance(one, dict) and "mean" in one and isinstance(one.get("values", []), list) for one in part.values()
            )
            good = good and all(_number(one.get(key)) for one in part.values() for key in ("mean", "interval95", "std"))
        elif good and name != "versions":
            good = all(map(_number, part.values()))
        if not good:
            raise ValueError(f'{path}: "{name}" is not what a run writes; restore the file')
    return result


def _number(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read ({error}); restore the file, or remove it") from None
