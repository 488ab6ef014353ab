"""Runs one experiment: its folder, its result and its report.

Arrays of more than one axis that ``run`` returns, such as a confusion matrix, go to ``arrays.npz`` and the report.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
import sys
import time
from typing import Any, Literal

from experiments import devices, files, machine, watching
from experiments import settings as checked
from experiments.catalog import HERE


@dataclasses.dataclass(frozen=True)
class Options:
    """What every experiment understands besides its own settings."""

    out: pathlib.Path = pathlib.Path("runs")
    """Folder of runs; this one goes to OUT/<experiment>/<id>."""
    resume: pathlib.Path | None = None
    """Folder of a run that was cut short: from the checkpoints it has, it goes on. The other flags must be the same."""
    override: bool = False
    """With --resume: go on although the other flags are not the same."""
    save_result: bool = False
    """Also write the result to experiments/results, from which the README's table is made; with the default settings."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Write the rows of metrics there too, in the run's folder; neither needs a network."""
    profile: bool = False
    """Write a trace of one chunk of training to the run's folder, profile/."""
    dry_run: bool = False
    """Show parameters, memory and FLOPs a step, and train nothing."""
    mesh: str = ""
    """Devices by axis, such as data=4,model=2: the batch is split over the first, large arrays over the others."""
    distributed: bool = False
    """This is one of several processes, which a cluster or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID name."""
    deterministic: bool = False
    """The same bits each time, also on a GPU, where that is slower."""
    debug: bool = False
    """Run without jit, stop at the first NaN and say where; show the traceback of an error."""


def open_folder(record: dict, options: Options) -> pathlib.Path:
    """The folder of a new run, with `record` as its ``config.json``, or of the one to resume.

    Raises:
      ValueError: the folder to resume is not one of a run of this experiment, or it has other settings.
    """
    name = record["experiment"]
    if options.resume is not None:
        stored = read_config(options.resume)
        if stored["experiment"] != name:
            raise ValueError(f"--resume {options.resume}: holds a run of {stored['experiment']}; give a folder OUT/{name}/<id>")
        was, now = ({"deterministic": False, **one.pop("settings"), **one} for one in (dict(stored), dict(record)))
        changed = {key: was.get(key) for key in sorted({*was, *now}) if was.get(key) != now.get(key)}
        if changed and not options.override:
            raise ValueError(f"--resume {options.resume}: started with {changed}; give the same flags, or --override")
        if changed:
            print(f"--override: goes on with other settings; it started with {changed}", file=sys.stderr)
            files.write(options.resume / "config.json", json.dumps(record, indent=2) + "\n")
        return options.resume
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
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
    files.write(folder / "config.json", json.dumps(record, indent=2) + "\n")
    return folder


def read_config(folder: pathlib.Path) -> dict:
    """A run's ``config.json``: ``{"experiment": name, "settings": {...}}`` and what else it ran under.

    Raises:
      ValueError: there is none, or it is not a run's.
    """
    stored = files.read(folder / "config.json")
    if not isinstance(stored.get("experiment"), str) or not isinstance(stored.get("settings"), dict):
        raise ValueError(f'{folder / "config.json"}: no run\'s, it needs "experiment" and "settings"; give another folder')
    return stored


def read_result(folder: pathlib.Path, name: str) -> dict:
    """The ``result.json`` of a run of the experiment `name` that has ended.

    Raises:
      ValueError: it is not one of this experiment, or not whole.
    """
    result = files.read(folder / "result.json")
    whole = all(isinstance(result.get(part), dict) for part in ("metrics", "published", "seconds"))
    if result.get("experiment") != name or not whole:
        raise ValueError(f"{folder / 'result.json'}: no result of {name}; remove it, and the run goes on where it was")
    return result


def execute(module: Any, name: str, config: Any, options: Options, root: pathlib.Path = HERE) -> tuple[pathlib.Path, dict]:
    """Runs one experiment and writes ``config.json``, ``result.json`` and ``report.html``; their folder and the result.

    A run that had ended is not run again: its result is given. ``seconds`` in the result are those of this process; a
    resumed run counts from where it went on.
    """
    if options.save_result:
        _check_default(module, config)
    checked.bounded(config)
    watching.ready(options.log, options.deterministic)
    devices.join(options.distributed)
    settings = files.plain(config)
    record = {"experiment": name, "settings": settings, "deterministic": options.deterministic}
    if options.resume is not None and (options.resume / "result.json").exists():
        folder = open_folder(record, options)
        result = read_result(folder, name)
        _save(result, options, root)
        return folder, result
    import numpy as np

    from experiments import pages
    from paradigms import watch
    from paradigms.evaluation import interval
    from paradigms.interrupt import Stopped

    with devices.using(options.mesh):
        folder = devices.agreed(lambda: open_folder(record, options))
        print(f"{name}: {folder}", file=sys.stderr)
        start = time.monotonic()
        watched = watching.watched(folder, name, settings, options.log, options.profile, options.debug)
        with watch.compile_seconds() as compiled, watch.described(record), watched:
            try:
                found = module.run(config, folder)
            except (Stopped, KeyboardInterrupt) as stopped:
                stopped.add_note(str(folder))  # where it goes on
                raise
            compile_time = compiled()
    seconds = {"compile": compile_time, "run": time.monotonic() - start - compile_time}
    # a number whose interval is not over runs, but over the tasks of one, comes with it
    known = {metric: {**value, "values": [value["mean"]]} for metric, value in found.items() if isinstance(value, dict)}
    measured = {metric: np.asarray(values) for metric, values in found.items() if metric not in known}
    metrics, arrays = {}, {metric: values for metric, values in measured.items() if values.ndim > 1}
    for metric in [metric for metric in found if metric not in arrays]:
        if metric in known:
            metrics[metric] = known[metric]
            continue
        mean, half = interval(measured[metric])
        metrics[metric] = {"mean": mean, "interval95": half, "values": np.atleast_1d(measured[metric])}
    result = {"experiment": name, "protocol": getattr(module, "PROTOCOL", ""), "config": settings, "metrics": metrics}
    result |= {"published": getattr(module, "PUBLISHED", {}), "device": machine.device(), "versions": machine.versions()}
    result |= {"seconds": {key: round(value, 2) for key, value in seconds.items()}, "memory": machine.peak_memory()}
    result = files.plain({**result, "deterministic": options.deterministic})

    if devices.first():
        if arrays:
            np.savez(folder / "arrays.npz", **arrays)  # pyright: ignore[reportArgumentType]
        files.write(folder / "result.json", json.dumps(result, indent=2) + "\n")
        _save(result, options, root)
        if not (folder / "report.html").exists() or options.resume is not None:
            pages.write([folder], folder / "report.html")
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
    """Writes the result from which the table is made; metrics of another choice of the protocol stay beside it.

    Each metric has the device and the seconds of the run that measured it.
    """
    if not options.save_result:
        return
    path = root / "results" / f"{result['experiment']}.json"
    before = files.read(path)["metrics"] if path.exists() else {}
    where = {"device": result["device"], "seconds": result["seconds"]["run"]}
    now = {metric: {**number, **where} for metric, number in result["metrics"].items()}
    files.write(path, json.dumps({**result, "metrics": {**before, **now}}, indent=2) + "\n")


def require(config: Any, **limits: float) -> None:
    """Checks the settings of a ``Config`` from its ``__post_init__``: each at least as large as its limit.

    Raises:
      ValueError: one is not, by its flag.
    """
    for name, least in limits.items():
        if not getattr(config, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {least} or more")
