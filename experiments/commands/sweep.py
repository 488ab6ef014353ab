"""Sweeps settings of an experiment: grid or random search, chosen by validation; the same command goes on where it was.

``sweep supervised.digits --set learning_rate=1e-4,1e-3,1e-2 --set weight_decay=0,0.05 --set seeds=3`` crosses the lists;
one value alone only changes that setting. ``--random 20 --set "learning_rate=log_uniform(1e-4,1e-1)" --set "hidden=64
64,256"`` draws. Values are written as after the experiment's own flags; it needs a function ``training`` (see catalog.py).
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib
import io
import json
import logging
import pathlib
import re
import shlex
import typing
from typing import Any

import tyro

from experiments import catalog, files

DRAW = re.compile(r"(uniform|log_uniform)\(([^,()]+),([^,()]+)\)")


@dataclasses.dataclass(frozen=True)
class Flags:
    experiment: tyro.conf.Positional[str]
    """Its name, such as supervised.digits."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]]
    """A setting and its values, once for each: NAME=VALUE,VALUE,...; with --random also NAME=log_uniform(LOW,HIGH) or
    NAME=uniform(LOW,HIGH)."""
    random: int | None = None
    """Draw this many settings instead of trying all combinations."""
    key: int = 0
    """Seed of the draw."""
    select: str = "accuracy"
    """The validation metric that chooses; =-loss where smaller is better."""
    patience: int | None = None
    """Stop a run after this many evaluations without a new best."""
    apart: tuple[str, ...] = ()
    """Settings of floats that cannot be traced, such as the rate of a dropout layer: trained one after the other."""
    together: int = 64
    """At most this many runs in one program."""
    out: pathlib.Path = pathlib.Path("runs")
    """Folder of runs; the sweep goes to OUT/sweeps/<experiment>/<id>, the same for the same flags."""
    folder: pathlib.Path | None = None
    """The sweep's folder, instead."""


def main(flags: Flags, root: pathlib.Path) -> int:
    """Runs the command; returns the exit code."""
    module = load(flags.experiment, root)
    base, columns = settings(module, flags)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row in rows:  # every setting passes the experiment's own checks before one is trained
        dataclasses.replace(base, **row)

    from experiments.__main__ import show
    from paradigms import sweep as train
    from paradigms.sweep import plot, table

    options = {"select": flags.select, "patience": flags.patience, "apart": flags.apart, "together": flags.together}
    about = files.plain({"experiment": flags.experiment, "config": base})
    text = json.dumps(files.plain([about, columns, options]), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    folder = flags.folder or flags.out / "sweeps" / flags.experiment / digest
    logging.basicConfig(format="%(message)s")
    logging.getLogger("paradigms").setLevel(logging.INFO)  # says which group is on its way
    print(f"{flags.experiment}: {len(rows)} settings, {folder}", flush=True)
    found = train(**arguments(module, base, columns, flags.apart), settings=columns, folder=folder, about=about, **options)
    plot(found, folder / "response.png")
    show(flags.experiment, *table(found))
    print(f"{folder / 'response.png'}\n{folder}")
    return 0


def load(name: str, root: pathlib.Path) -> Any:
    """The experiment's module; a ValueError where there is none, or none that can be swept."""
    names = list(catalog.find(root))
    if name not in names:
        close = difflib.get_close_matches(name, names, 3, 0.4)
        raise ValueError(f"no experiment {name!r}; did you mean {' or '.join(close) or 'another'}?")
    module = importlib.import_module(f"{root.name}.{name}")
    if not hasattr(module, "training"):
        raise ValueError(f"{name}: cannot be swept, its file has no function training(config); see experiments/catalog.py")
    return module


def settings(module: Any, flags: Flags) -> tuple[Any, dict[str, list]]:
    """The configuration with every setting of one value, and the columns of the others."""
    from paradigms import choice, grid, random_search

    several, one = {}, {}
    for text in flags.set:
        name, values = parse(text, module.Config)
        if name in {**several, **one}:
            raise ValueError(f"--set {name}: is given twice; give all its values at once")
        if callable(values) and flags.random is None:
            raise ValueError(f"--set {text}: a distribution; say how many settings to draw, --random 20")
        (several if callable(values) or len(values) > 1 else one)[name] = values
    if fixed := sorted({"seeds", "key"} & several.keys()):
        raise ValueError(f"--set {fixed[0]}: every setting is trained with the same; give one value")
    if not several:
        raise ValueError("--set: nothing varies; give several values, --set NAME=VALUE,VALUE")
    base = dataclasses.replace(module.Config(), **{name: values[0] for name, values in one.items()})
    if flags.random is None:
        return base, grid(**several)
    draws = {name: values if callable(values) else choice(values) for name, values in several.items()}
    return base, random_search(flags.random, flags.key, **draws)


def parse(text: str, config: type) -> tuple[str, Any]:
    """``rate=1e-3,1e-2`` as the setting's name and its values, or its distribution."""
    from paradigms import log_uniform, uniform

    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    known = sorted(field.name for field in dataclasses.fields(config))
    if not equals or name not in known:
        raise ValueError(f"--set {text}: write NAME=VALUE,VALUE with a NAME of {', '.join(known)}")
    if draw := DRAW.fullmatch(values.replace(" ", "")):
        low, high = (_value(part, name, config) for part in draw.groups()[1:])
        if not isinstance(low, float) or not isinstance(high, float):
            raise ValueError(f"--set {text}: {name} is no float; give a list, from which --random chooses")
        return name, {"uniform": uniform, "log_uniform": log_uniform}[draw[1]](low, high)
    return name, [_value(part, name, config) for part in values.split(",")]


def _value(text: str, name: str, config: type) -> Any:
    """One value, read as the experiment's own flag would be."""
    said, flag, kind = io.StringIO(), f"--{name.replace('_', '-')}", typing.get_type_hints(config)[name]
    alone = dataclasses.make_dataclass("Alone", [(name, kind)])
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            words = shlex.split(text)
            given = [f"{flag}={text}"] if len(words) == 1 else [flag, *words]  # with "=", a minus is no flag of its own
            return getattr(tyro.cli(tyro.conf.FlagConversionOff[alone], args=given), name)
    except SystemExit:
        kind = getattr(kind, "__name__", kind) if isinstance(kind, type) else kind
        raise ValueError(f"--set {name}: {text!r} is no {kind}; write it as after {flag}") from None


def arguments(module: Any, base: Any, columns: dict[str, list], apart: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of `paradigms.sweep`, from what the experiment's ``training`` gives for each group of settings."""
    from paradigms.sweep import numeric

    varied = numeric(columns, apart)

    @functools.lru_cache(1)
    def group(**fixed):
        return module.training(dataclasses.replace(base, **fixed))

    def make(**values):
        config = copy.copy(base)
        for name, value in values.items():  # past the checks of Config, which traced numbers cannot take
            object.__setattr__(config, name, value)
        return group(**{name: value for name, value in values.items() if name not in varied})["make"](config)

    first = group(**{name: column[0] for name, column in columns.items() if name not in varied})
    per_group = {name: lambda name=name, **fixed: group(**fixed)[name] for name in ("source", "steps")}
    return {"seeds": getattr(base, "seeds", 1), **first, "make": make, **per_group}
