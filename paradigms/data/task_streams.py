"""Task streams: a data set split by class, or shown through another view in every task (permuted, rotated), or your own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.data.bind import bind
from paradigms.data.checks import check_arrays
from paradigms.data.load import Data
from paradigms.data.tasks import PARTS, Tasks


def split_classes(data: Data, per_task: int = 2, shuffled: bool = False, shared: bool = False) -> Tasks:
    """Split streams: `per_task` classes after `per_task` (split MNIST, CIFAR).

    Labels are numbers of outputs: the k-th class of task t is output ``t * per_task + k``.

    Args:
      data: a set of images with labels.
      per_task: classes a task; divides the number of classes.
      shuffled: every run has its own order of classes; else it is theirs by number.
      shared: all tasks share the outputs 0 to ``per_task - 1`` (domain-incremental).

    Raises:
      ValueError: classes that do not divide, or labels that do not fit them.
    """
    if per_task < 1 or data.classes % per_task:
        raise ValueError(f"per_task={per_task}: must divide the {data.classes} classes")
    tasks = data.classes // per_task
    outputs = per_task if shared else data.classes
    table = np.ones((tasks, outputs), bool) if shared else np.repeat(np.eye(tasks, dtype=bool), per_task, 1)
    parts = {part: _grouped(getattr(data, part), getattr(data, part)["y"], data.classes, part) for part in PARTS}
    plan = bind(_classes, tasks, per_task, shuffled)
    return _tasks(parts, table, plan, bind(_relabelled, 0 if shared else per_task), per_task)


def permuted(data: Data, tasks: int = 20, plain_first: bool = False, pad: int = 0) -> Tasks:
    """Every task is the whole set under another permutation of the pixels (Goodfellow et al., 2014).

    Args:
      tasks: 1 or more; every run has its own permutations.
      plain_first: the first task is not permuted.
      pad: zeros added on every side of the image before.
    """
    return _seen_anew(data, tasks, bind(_permutations, plain_first), pad)


def rotated(data: Data, tasks: int = 20, low: float = 0.0, high: float = 180.0) -> Tasks:
    """Every task is the whole set turned by another angle (Lopez-Paz and Ranzato, 2017), by the nearest pixel, zeros outside.

    Args:
      tasks: 1 or more; every run has its own angles, uniform in [low, high), in degrees counter-clockwise.
    """
    if not low <= high:
        raise ValueError(f"low={low}, high={high}: low must not exceed high")
    return _seen_anew(data, tasks, bind(_turns, float(low), float(high)), 0)


def tasks_of(tasks: Sequence[Data], table: Any = None) -> Tasks:
    """A stream of your own: task t is the data set ``tasks[t]``.

    Args:
      tasks: sets whose arrays agree in name, dtype and shape of an example; labels are numbers of outputs.
      table: (tasks, outputs) bool, the outputs of each task. Default: those that its training labels name.
    """
    if not tasks:
        raise ValueError("tasks: is empty; give at least one data set")
    for number, data in enumerate(tasks):
        if jax.tree.map(_kind, data.train) != jax.tree.map(_kind, tasks[0].train):
            raise ValueError(f"tasks: the arrays of number {number} differ in name, dtype or shape from those of the first")
    parts = {}
    for part in PARTS:
        splits = [getattr(data, part) for data in tasks]
        rows = {name: np.concatenate([split[name] for split in splits]) for name in splits[0]}
        parts[part] = _grouped(rows, np.repeat(np.arange(len(tasks)), [len(s["y"]) for s in splits]), len(tasks), part)
    if table is None:
        outputs = 1 + max(int(np.max(data.train["y"])) for data in tasks)
        table = np.stack([np.isin(np.arange(outputs), data.train["y"]) for data in tasks])
    table = np.asarray(table, bool)
    if table.ndim != 2 or len(table) != len(tasks):
        raise ValueError(f"table: has shape {table.shape}; give (tasks, outputs), with {len(tasks)} tasks")
    return _tasks(parts, table, bind(_classes, len(tasks), 1, False), bind(_as_it_is), 1)


def _kind(leaf):
    return leaf.dtype, leaf.shape[1:]


def _grouped(split: dict, groups: np.ndarray, count: int, part: str) -> dict:
    check_arrays(split, what=part)
    if groups.min() < 0 or groups.max() >= count:
        raise ValueError(f"{part}: has labels from {groups.min()} to {groups.max()}, outside the {count} classes")
    rows, counts = np.argsort(groups, kind="stable"), np.bincount(groups, minlength=count)
    if not counts.all():
        raise ValueError(f"{part}: class or task {int(np.argmin(counts))} has no examples; each split needs some of every one")
    arrays = {"rows": {k: v[rows] for k, v in split.items()}, "first": np.cumsum(counts) - counts, "count": counts}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, np.int32 if leaf.dtype == np.int64 else None), arrays)


def _tasks(parts: dict, table: np.ndarray, plan: Callable, view: Callable, groups: int) -> Tasks:
    sizes = {part: int(np.sort(np.asarray(arrays["count"]))[-groups:].sum()) for part, arrays in parts.items()}
    return Tasks(parts, table, plan, view, sizes)


def _seen_anew(data: Data, tasks: int, maps: Callable, pad: int) -> Tasks:
    if tasks < 1:
        raise ValueError(f"tasks={tasks}: must be 1 or more")
    shape = data.train["x"].shape[1:]
    if len(shape) != 3 or shape[2] != 1:
        raise ValueError(f"data: images have shape {shape}; these streams take one channel, (height, width, 1)")
    margins = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    splits = {part: getattr(data, part) for part in PARTS}
    splits = {part: {**split, "x": np.pad(split["x"], margins)} for part, split in splits.items()} if pad else splits
    parts = {part: _grouped(split, np.zeros(len(split["y"]), int), 1, part) for part, split in splits.items()}
    side = shape[0] + 2 * pad, shape[1] + 2 * pad
    return _tasks(parts, np.ones((tasks, data.classes), bool), bind(_views, tasks, maps, side), bind(_mapped), 1)


# ---- plans: what depends on the run's key alone


def _classes(key, tasks, per_task, shuffled):
    classes = jnp.arange(tasks * per_task, dtype=jnp.int32)
    classes = jax.random.permutation(key, classes) if shuffled else classes
    return {"groups": classes.reshape(tasks, per_task)}


def _views(key, tasks, maps, side):
    groups = jnp.zeros((tasks, 1), jnp.int32)
    return {"groups": groups, "maps": jax.vmap(lambda task: maps(jax.random.fold_in(key, task), task, side))(jnp.arange(tasks))}


def _permutations(key, task, side, plain_first):
    pixels = jnp.arange(side[0] * side[1], dtype=jnp.int32)
    shuffled = jax.random.permutation(key, pixels)
    return jnp.where(task == 0, pixels, shuffled) if plain_first else shuffled


def _turns(key, task, side, low, high):
    """For every pixel of the turned image the nearest pixel of the image, or -1 outside."""
    del task
    angle = jnp.deg2rad(jax.random.uniform(key, (), minval=low, maxval=high))
    height, width = side
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
    row = jnp.round(jnp.cos(angle) * y + jnp.sin(angle) * x + (height - 1) / 2).astype(jnp.int32)
    column = jnp.round(jnp.cos(angle) * x - jnp.sin(angle) * y + (width - 1) / 2).astype(jnp.int32)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return jnp.where(inside, row * width + column, -1).ravel()


# ---- views: a split's rows as their tasks show them


def _gather(rows, which):
    return jax.tree.map(lambda leaf: leaf.at[which].get(mode="promise_in_bounds"), rows)


def _as_it_is(plan, rows, tasks, which):
    del plan, tasks
    return _gather(rows, which)


def _relabelled(plan, rows, tasks, which, stride):
    batch = _gather(rows, which)
    place = jnp.argmax(plan["groups"][tasks] == batch["y"][:, None], 1).astype(jnp.int32)
    return {**batch, "y": tasks * stride + place}


def _mapped(plan, rows, tasks, which):
    x = rows["x"]
    flat, maps = x.reshape(len(x), -1), plan["maps"][tasks]
    seen = flat.at[which[:, None], jnp.maximum(maps, 0)].get(mode="promise_in_bounds")
    seen = jnp.where(maps < 0, jnp.zeros((), x.dtype), seen)
    batch = _gather({k: leaf for k, leaf in rows.items() if k != "x"}, which)
    return {**batch, "x": seen.reshape(len(which), *x.shape[1:])}
