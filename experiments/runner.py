"""Finds the experiments, runs one, and makes the table of what runs produced.

An experiment is a file ``<paradigm>/<benchmark>.py``, or ``tour.py``, with a docstring (its first line is the summary
in the list), a frozen dataclass ``Config``, ``run(config, folder) -> {metric: number or list over seeds}``, and
optionally ``PUBLISHED = {metric: {"mean": ..., "std": ..., "source": ...}}``, ``PROTOCOL = "..."`` and ``CHOICES``, the
names of settings that choose among published protocols, all literals.
Larger arrays that ``run`` returns, such as a confusion matrix, go to ``arrays.npz`` and the report. Nothing but
literals is read for the list, so it does not import jax.
"""

import ast
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import time
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
MARKERS = "<!-- results -->", "<!-- /results -->"
COMPILE = ("backend_compile_duration", "jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")


class Entry(NamedTuple):
    """An experiment as its source says it, not imported."""

    name: str
    summary: str
    published: dict[str, dict]


@dataclasses.dataclass(frozen=True)
class Options:
    """What every experiment understands besides its own settings."""

    out: pathlib.Path = pathlib.Path("runs")
    """Folder of runs; this one goes to OUT/<experiment>/<id>."""
    resume: pathlib.Path | None = None
    """Folder of a run that was cut short: from the checkpoints it has, it goes on. The other flags must be the same."""
    save_result: bool = False
    """Also write the result to experiments/results, from which the README's table is made; with the default settings."""
    debug: bool = False
    """Show the traceback of an error."""


def find(root: pathlib.Path = HERE) -> dict[str, Entry]:
    """Every experiment below `root` by its dotted name, such as ``continual.permuted_mnist``."""
    files = [*root.glob("tour.py"), *sorted(root.glob("*/*.py"))]
    files = [file for file in files if not file.stem.startswith("_") and file.parent.name not in ("speed", "results")]
    names = {".".join(file.relative_to(root).with_suffix("").parts): file for file in files}
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
    loaded = map(_read, sorted((root / "results").glob("*.json")))
    return {result["experiment"]: result for result in loaded}


def _read(path: pathlib.Path) -> dict:
    """The object in a JSON file; a ValueError that names the file where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give another path, or restore the file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object; restore the file")
    return content


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
        for metric in [metric for metric in metrics if metric in published] or list(metrics)[:1]:
            cells = name, metric, shown(published.get(metric), "std"), shown(metrics[metric])
            cells += str(len(metrics[metric]["values"])), f"{result['device']}, {result['seconds']['run']:.0f} s"
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
    _write(path, f"{before}{start}\n{table(root)}\n{end}{after}")


def _write(path: pathlib.Path, text: str) -> None:
    """All of `text` or nothing: a kill half-way leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _json(value: Any) -> Any:
    """`value` in JSON's types: paths, dtypes and functions by name, None where a number is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json(one) for one in value]
    if callable(tolist := getattr(value, "tolist", None)):  # an array or a NumPy number
        return _json(tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else getattr(value, "__name__", str(value))


def open_folder(name: str, config: dict, options: Options) -> pathlib.Path:
    """The folder of a new run, with ``config.json`` in it, or of the one to resume.

    Raises:
      ValueError: the folder to resume is not one of a run of this experiment, or it has another configuration.
    """
    if options.resume is not None:
        stored = _read(options.resume / "config.json")
        if (other := options.resume.resolve().parent.name) != name:
            raise ValueError(f"--resume {options.resume}: holds a run of {other}; give a folder OUT/{name}/<id>")
        if changed := sorted(key for key in {*stored, *config} if stored.get(key) != config.get(key)):
            was = {key: stored.get(key) for key in changed}
            raise ValueError(f"--resume {options.resume}: started with {was}; give the same flags")
        return options.resume
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    now = datetime.datetime.now(datetime.UTC)
    parent, number = options.out / name, 1
    while True:  # two runs of one second are told apart by a number
        folder = parent / (f"{now:%Y%m%dT%H%M%SZ}-{digest}" + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if parent.exists() and not parent.is_dir():
                raise
            number += 1
    _write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


@contextlib.contextmanager
def compile_seconds():
    """Yields a function: the seconds that jax has traced, lowered and compiled so far.

    Tracing one function inside another reports both, so what is added up is the time covered, not the durations.
    """
    import jax

    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event.rpartition("/")[2] in COMPILE:
            end = time.monotonic()
            spans.append((end - duration_secs, end))

    def covered():
        total, reach = 0.0, -math.inf
        for start, end in sorted(spans):
            total, reach = total + max(0.0, end - max(start, reach)), max(reach, end)
        return total

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield covered
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def device() -> str:
    """What computes: ``cpu: AMD EPYC 7763, 2 cores`` or ``gpu: NVIDIA H200``."""
    import jax

    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{devices[0].platform}: " + (f"{len(devices)} x " if len(devices) > 1 else "") + devices[0].device_kind
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu: {model}, {cores} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of what the numbers depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for package in ("paradigms", "jax", "jaxlib", "flax", "optax", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def execute(module: Any, name: str, config: Any, options: Options, root: pathlib.Path = HERE) -> tuple[pathlib.Path, dict]:
    """Runs one experiment and writes ``config.json``, ``result.json`` and ``report.html``; their folder and the result.

    A run that had ended is not run again: its result is given. ``seconds`` in the result are those of this process; a
    resumed run counts from where it went on.
    """
    if options.save_result:
        _check_default(module, config)
    if options.resume is not None and (options.resume / "result.json").exists():
        folder = open_folder(name, _json(config), options)
        result = _read(folder / "result.json")
        _save(result, options, root)
        return folder, result
    import numpy as np

    from paradigms import logging, report
    from paradigms.evaluation import interval

    plain = _json(config)
    folder = open_folder(name, plain, options)
    print(f"{name}: {folder}", file=sys.stderr)
    start = time.monotonic()
    with compile_seconds() as compiled:
        measured = {metric: np.asarray(values) for metric, values in module.run(config, folder).items()}
        compile_time = compiled()
    seconds = {"compile": compile_time, "run": time.monotonic() - start - compile_time}
    metrics, arrays = {}, {metric: values for metric, values in measured.items() if values.ndim > 1}
    for metric in [metric for metric in measured if metric not in arrays]:
        mean, half = interval(measured[metric])
        metrics[metric] = {"mean": mean, "interval95": half, "values": np.atleast_1d(measured[metric])}
    result = {"experiment": name, "protocol": getattr(module, "PROTOCOL", ""), "config": plain, "metrics": metrics}
    result |= {"published": getattr(module, "PUBLISHED", {}), "device": device(), "versions": versions()}
    result = _json({**result, "seconds": {key: round(value, 2) for key, value in seconds.items()}})

    if arrays:
        np.savez(folder / "arrays.npz", **arrays)  # pyright: ignore[reportArgumentType]
    _write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    _save(result, options, root)
    if not (folder / "report.html").exists() or options.resume is not None:
        logs = sorted(folder.rglob("*.jsonl"))
        history = {str(log.relative_to(folder).with_suffix("")): logging.read(log) for log in logs}
        history = {"" if label == "metrics" else label: rows for label, rows in history.items()}
        page = {**result, "metrics": {**result["metrics"], **arrays}}
        report.html(folder / "report.html", name, plain, history, page)

    return folder, result


def _check_default(module: Any, config: Any) -> None:
    """Refuses to save numbers that are not those of the protocol; more or fewer seeds are."""
    free = {"seeds", "key", *getattr(module, "CHOICES", ())}
    default = module.Config()
    fields = [field.name for field in dataclasses.fields(config) if field.name not in free]
    changed = {field: getattr(config, field) for field in fields if getattr(config, field) != getattr(default, field)}
    if changed:
        raise ValueError(f"--save-result: {changed} is not the protocol's; leave these settings at their defaults")


def _save(result: dict, options: Options, root: pathlib.Path) -> None:
    """Writes the result from which the table is made; metrics of another choice of the protocol stay beside it."""
    if not options.save_result:
        return
    path = root / "results" / f"{result['experiment']}.json"
    before = _read(path)["metrics"] if path.exists() else {}
    _write(path, json.dumps({**result, "metrics": {**before, **result["metrics"]}}, indent=2) + "\n")


def require(config: Any, **limits: float) -> None:
    """Checks the settings of a ``Config`` from its ``__post_init__``: each at least as large as its limit.

    Raises:
      ValueError: one is not, by its flag.
    """
    for name, least in limits.items():
        if not getattr(config, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {least} or more")
