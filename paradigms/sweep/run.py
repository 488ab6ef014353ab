"""The sweep: settings in groups of one shape, each group one program, each setting judged on validation."""

import functools
import json
import logging as messages
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import ConcretizationTypeError, TracerArrayConversionError, TracerIntegerConversionError

from paradigms.evaluation import interval
from paradigms.fit import Run, fit
from paradigms.nonfinite import Diverged
from paradigms.objective import Batch
from paradigms.trainer import Trainer
from paradigms.vectorize import Over, vectorize

logger = messages.getLogger("paradigms")
UNTRACEABLE = ConcretizationTypeError, TracerArrayConversionError, TracerIntegerConversionError


class Sweep(NamedTuple):
    """What `sweep` found.

    Attributes:
      rows: one dict a setting, the best first: "number" (its place in the columns), "settings", "value" (the mean over
        seeds of the best validation), "interval95" (its half-width, None for one seed), "values" and "best_step" (one a
        seed), "diverged" (how many seeds ended in no numbers; their values are NaN). Settings with a diverged seed come
        last; of equals the earlier comes first.
      best: the settings of the first row; None where every setting diverged.
      select: the metric, as it was given.
    """

    rows: list[dict]
    best: dict | None
    select: str


def numeric(settings: Mapping[str, Sequence], apart: Sequence[str] = ()) -> list[str]:
    """The settings that train together: columns of numbers, at least one of them a float, that `apart` does not name."""

    def number(value):
        return isinstance(value, int | float) and not isinstance(value, bool)

    def floats(column):
        return all(map(number, column)) and any(isinstance(value, float) for value in column)

    return [name for name, column in settings.items() if name not in apart and floats(column)]


def sweep(
    make: Callable[..., Trainer],
    source: Any,
    steps: "int | Callable[..., int]",
    settings: Mapping[str, Sequence],
    *,
    validation: Batch,
    seeds: int = 1,
    apart: Sequence[str] = (),
    together: int = 64,
    over: Over | None = None,
    select: str = "accuracy",
    folder: "pathlib.Path | str | None" = None,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Sweep:
    """Trains every setting and ranks them by validation; the test split has no part in it.

    Settings of floats vary inside one program (`vectorize`); the others (widths, names, switches) change its shape or its
    code, so that each of their combinations is a group of its own, one after the other. Each run has its own best
    weights and, with ``patience``, its own early stop, so a result does not depend on what trains beside it.

    Args:
      make: ``(**settings) -> Trainer``; floats may arrive traced (see `vectorize`).
      source: batches, as `fit` takes them, or a function ``(**fixed) -> source`` of the group's other settings.
      steps: updates a run, or a function ``(**fixed) -> steps``.
      settings: columns, one list of values for each argument of `make` (`paradigms.grid`, `random_search`).
      validation: the split by which weights and settings are chosen.
      seeds: runs a setting; every setting has the same ones.
      apart: settings of floats that must not be traced, such as the rate of a dropout layer: one after the other.
      together: at most this many runs in one program, for the memory they take.
      over: how they share it (see `vectorize`).
      select: the validation metric; "-name" where smaller is better ("-loss").
      folder: of the sweep; None writes nothing. One that was cut short goes on where it was: groups that ended are read,
        the one that had not ended goes on from its last checkpoint. ``sweep.json`` holds the outcome.
      about: facts that make another sweep, such as the data's name; recorded, and compared when the sweep goes on.
      **options: of `fit`: ``key``, ``chunk``, ``patience``, ``measure``, ``evaluate_every``, ``checkpoint_every``, ``log``.

    Raises:
      ValueError: columns of different lengths, a setting `make` refuses or cannot take traced, a folder with another
        sweep, and what `fit` refuses.
    """
    rows = _rows(settings, seeds, together, apart)
    varied = numeric(settings, apart)
    groups = _groups(rows, varied, max(1, together // seeds))
    home = None if folder is None else pathlib.Path(folder)
    if home is not None:
        plan = {"settings": rows, "seeds": seeds, "select": select, "apart": list(apart), "together": together}
        plan |= {"steps": "by setting" if callable(steps) else steps, "about": dict(about or {})}
        _claim(home, plan | {name: options.get(name) for name in ("key", "chunk", "patience", "evaluate_every")})

    scores = []
    for number, members in enumerate(groups):
        record = None if home is None else home / f"{number:03d}" / "scores.json"
        if record is not None and record.exists():
            scores += _read(record)
            continue
        fixed = {name: value for name, value in rows[members[0]].items() if name not in varied}
        columns = {name: [rows[member][name] for member in members] for name in varied}
        logger.info("group %d of %d: %d settings x %d seeds %s", number + 1, len(groups), len(members), seeds, fixed or "")
        one = functools.partial(make, **fixed)
        trainer = vectorize(one, seeds, over, **columns)
        batches = source if hasattr(source, "chunk") else source(**fixed)
        updates = steps(**fixed) if callable(steps) else steps
        if record is not None:
            often = {"checkpoint_every": options.get("chunk", 100), **options}
            options = {**often, "folder": record.parent, "resume": True}
        try:
            run = fit(trainer, batches, updates, validation=validation, select=select, **options)
            values, best_step = _best(run, select)
        except Diverged as error:  # all of them
            logger.warning("group %d of %d: every run diverged, the last at step %d", number + 1, len(groups), error.step)
            values, best_step = np.full(len(members) * seeds, np.nan), np.zeros(len(members) * seeds, int)
        except Exception as error:
            _explain(error, one, batches, columns)
            raise
        found = _scores(members, values.reshape(-1, seeds), best_step.reshape(-1, seeds))
        if record is not None:
            _write(record, found)
        scores += found

    sweep = _ranked(rows, scores, select)
    if home is not None:
        _write(home / "sweep.json", {**(about or {}), **sweep._asdict()})
    return sweep


def _rows(settings, seeds, together, apart) -> list[dict]:
    lengths = {name: len(column) for name, column in settings.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise ValueError(f"settings: columns have lengths {lengths}; give each as many values, 1 or more (see grid)")
    for name, value in (("seeds", seeds), ("together", together)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be 1 or more")
    if unknown := sorted(set(apart) - set(settings)):
        raise ValueError(f"apart={list(apart)}: {unknown} are no settings; there are {sorted(settings)}")
    if taken := sorted({"make", "seeds", "over"} & set(numeric(settings, apart))):
        raise ValueError(f"settings: {taken} are arguments of vectorize itself; give them other names in make")
    plain = {name: getattr(column, "tolist", lambda column=column: list(column))() for name, column in settings.items()}
    return [dict(zip(plain, values, strict=True)) for values in zip(*plain.values(), strict=True)]


def _groups(rows: list[dict], varied: Sequence[str], size: int) -> list[list[int]]:
    """The numbers of the settings that share a program, at most `size` of them."""
    alike: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        alike.setdefault(repr({name: value for name, value in row.items() if name not in varied}), []).append(number)
    return [members[start : start + size] for members in alike.values() for start in range(0, len(members), size)]


def _claim(home: pathlib.Path, plan: dict) -> None:
    """Writes down what the folder's sweep is, or refuses to go on with another one."""
    path, plan = home / "plan.json", json.loads(_text(plan))
    begun = any(home.glob("*/scores.json")) or any(home.glob("*/checkpoints/*"))
    if begun and path.exists():
        before = _read(path)
        changed = {name: before.get(name) for name in {**before, **plan} if before.get(name) != plan.get(name)}
        if changed:
            raise ValueError(f"folder={str(home)!r}: holds a sweep with {changed}; give the same, or another folder")
    elif begun:
        raise ValueError(f"folder={str(home)!r}: holds runs but no plan.json; give another folder")
    _write(path, plan)


def _best(run: Run, select: str) -> tuple[np.ndarray, np.ndarray]:
    """The best validation of each run, NaN where it diverged in the end, and its step."""
    name, steps = f"validation/{select.removeprefix('-')}", np.asarray(run.best_step)
    curve = {row["step"]: np.asarray(row[name]) for row in run.history if name in row}
    values = np.asarray([curve[int(step)][i] if step else np.nan for i, step in enumerate(steps)], np.float64)
    leaves = [leaf for leaf in jax.tree.leaves(run.state.params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    finite = np.all([jnp.isfinite(leaf).reshape(len(steps), -1).all(1) for leaf in leaves], 0)
    return np.where(finite, values, np.nan), np.where(finite, steps, 0)


def _scores(members: Sequence[int], values: np.ndarray, best_step: np.ndarray) -> list[dict]:
    rows = zip(members, values.tolist(), best_step.tolist(), np.isnan(values).sum(1).tolist(), strict=True)
    return [dict(zip(("number", "values", "best_step", "diverged"), row, strict=True)) for row in rows]


def _ranked(rows: list[dict], scores: list[dict], select: str) -> Sweep:
    sign, found = -1 if select.startswith("-") else 1, []
    for score in sorted(scores, key=lambda score: score["number"]):
        values = [float("nan") if value is None else value for value in score["values"]]
        mean, half = interval(values)
        found.append({**score, "settings": rows[score["number"]], "value": mean, "interval95": half, "values": values})
    found.sort(key=lambda row: (row["diverged"] > 0, np.isnan(row["value"]), -sign * row["value"]))  # stable: ties keep order
    if found[0]["diverged"]:
        logger.warning("every setting diverged in some seed: none is chosen; lower the learning rates")
        return Sweep(found, None, select)
    return Sweep(found, found[0]["settings"], select)


def _from_tracing(error: BaseException | None) -> bool:
    """Whether a traced number was used as a plain one: jax says so itself, or is what made another error."""
    return error is not None and (
        isinstance(error, UNTRACEABLE) or _from_tracing(error.__cause__) or _from_tracing(error.__context__)
    )


def _explain(error: Exception, make, source, columns: Mapping[str, Sequence]) -> None:
    """Raises what says which settings `make` needs as plain numbers, where `error` comes from that."""
    if not _from_tracing(error):
        return
    batch, guilty = source.chunk(0, 1).batch(jax.random.key(0), 0), []
    for name, column in columns.items():
        others = {other: values[0] for other, values in columns.items() if other != name}
        pure = vectorize(functools.partial(make, **others), 1, None, **{name: column[:1]}).pure
        try:
            jax.eval_shape(lambda pure=pure: pure.step(pure.init(jax.random.key(0), batch), batch))
        except Exception:
            guilty.append(name)
    if guilty:
        fix = f"give apart={guilty} to train its values one after the other"
        raise ValueError(f"settings: make needs {' and '.join(guilty)} as a plain number; {fix}") from error


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error}); restore it, or give another folder") from None


def _text(content: Any) -> str:
    def number(value):
        if isinstance(value, float) and not np.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: number(one) for key, one in value.items()}
        return [number(one) for one in value] if isinstance(value, list | tuple) else value

    return json.dumps(number(content), indent=2, default=lambda value: getattr(value, "__name__", str(value))) + "\n"


def _write(path: pathlib.Path, content: Any) -> None:
    """All of it or nothing: a kill half-way leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(_text(content), encoding="utf-8")
    os.replace(part, path)
