"""Runs an experiment again from the config.json of a run alone, and says whether its metrics are the same."""

import dataclasses
import importlib
import pathlib
import sys

import tyro


@dataclasses.dataclass(frozen=True)
class Flags:
    run: tyro.conf.Positional[pathlib.Path]
    """Folder of the run, OUT/<experiment>/<id>; of it only config.json is needed."""
    out: pathlib.Path = pathlib.Path("runs")
    """Folder of runs; the new one goes to OUT/<experiment>/<id>."""


def main(flags: Flags, root: pathlib.Path) -> int:
    """Runs the command; returns the exit code: 0, or 1 where the metrics are not those of the run."""
    from experiments import catalog, files, runner, settings

    stored, path = runner.read_config(flags.run), flags.run / "config.json"
    name, deterministic = stored["experiment"], stored.get("deterministic", False)
    if name not in catalog.find(root):  # the names of a catalogue, so that a file cannot have anything else imported
        raise ValueError(f"{path}: no experiment {name[:80]!r}; python -m {root.name} lists them")
    if not isinstance(deterministic, bool):
        raise ValueError(f"{path}: deterministic is {deterministic!r}, must be true or false")
    before = files.read(flags.run / "result.json") if (flags.run / "result.json").exists() else None
    module = importlib.import_module(f"{root.name}.{name}")
    config = settings.restore(module.Config, stored["settings"], str(path))
    options = runner.Options(out=flags.out, deterministic=deterministic)
    folder, result = runner.execute(module, name, config, options, root)
    print(folder)
    return 0 if before is None else compare(before.get("metrics"), result["metrics"], flags.run)


def compare(before: object, after: dict, run: pathlib.Path) -> int:
    """Says on standard error in what the values of metrics differ; returns 0 where in nothing, else 1."""
    was = {name: one.get("values") for name, one in before.items() if isinstance(one, dict)} if isinstance(before, dict) else {}
    now = {name: one["values"] for name, one in after.items()}
    changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    for name in changed:
        print(f"{name}: {now.get(name)}, was {was.get(name)}", file=sys.stderr)
    verdict = f"{len(changed)} of {len({**was, **now})} metrics differ from" if changed else f"all {len(now)} metrics equal"
    print(f"{verdict} those of {run}", file=sys.stderr)
    return 1 if changed else 0
