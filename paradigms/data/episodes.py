"""Few-shot episodes sampled on the device from a labelled split."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paradigms.data.bind import bind
from paradigms.data.checks import check_count, check_labels
from paradigms.data.order import order
from paradigms.data.sources import Source
from paradigms.data.transforms import pixels


class ClassDraw(NamedTuple):
    """How the classes of a task are drawn: as distinct numbers below versions * classes, uniformly.

    Attributes:
      versions: how many classes each class of the split stands for, >= 1: number n is version n % versions of class
        n // versions.
      turns: `(key, version) -> quarter turns`, both (ways,) int32, of all images of a class; None turns none.
    """

    versions: int
    turns: Callable | None


_UNTURNED = ClassDraw(1, None)


def unturned() -> ClassDraw:
    """Distinct classes, their images as they are."""
    return _UNTURNED


def turned() -> ClassDraw:
    """Distinct classes, each turned by 0, 90, 180 or 270 degrees, drawn for each class of each task (Finn et al., 2017).

    A class is in a task at most once, so it never meets itself turned otherwise.
    """
    return ClassDraw(1, _any_turn)


def turned_apart() -> ClassDraw:
    """Every class turned by 0, 90, 180 and 270 degrees as four classes, which may meet in a task (Santoro et al., 2016)."""
    return ClassDraw(4, _own_turn)


def _any_turn(key, version):
    return jax.random.randint(key, version.shape, 0, 4)


def _own_turn(key, version):
    return version


def episodes(split: dict, *, ways: int, shots: int, queries: int, tasks: int, classes: ClassDraw = _UNTURNED) -> Source:
    """Batches of classification tasks (Vinyals et al., 2016): random classes, in a random order of labels for each task.

    A batch is ``{"support": {"x": (tasks, ways * shots, ...), "y": (tasks, ways * shots)}, "query": ...}``; support and
    query rows of a class are disjoint, labels are 0 to ways - 1, images float32 in [0, 1].

    Args:
      split: {"x", "y"}, examples first; each class with the rows of the smallest class, the first of them.
      ways: classes a task, 1 to the classes there are to draw from.
      shots: support rows a class, >= 1.
      queries: query rows a class, >= 1.
      tasks: tasks a batch, >= 1.
      classes: how a task's classes are drawn: `unturned()`, or, for square images (N, S, S) or (N, S, S, C), `turned()` or
        `turned_apart()`. Support and query images of a class are turned alike, counterclockwise as by `np.rot90`.

    Returns:
      A source of such batches; `size` counts the rows in use.

    Raises:
      ValueError: no "x" or "y", or labels that are not integers (N,); counts that are no integers >= 1; fewer classes than
        `ways`, or a class with fewer rows than shots + queries; images to turn that are not square.
      TypeError: `classes` is no `ClassDraw`.
    """
    labels = check_labels(split)
    check_count(ways=ways, shots=shots, queries=queries, tasks=tasks)
    if "x" not in split:
        raise ValueError(f'split has no inputs "x", only {sorted(split)}')
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    fewest = min(len(rows) for rows in members)
    if not isinstance(classes, ClassDraw):
        raise TypeError(f"classes is {classes!r}, must be a ClassDraw: unturned(), turned() or turned_apart()")
    offered = classes.versions * len(members)
    if ways > offered:
        versions = f", each in {classes.versions} versions" if classes.versions > 1 else ""
        raise ValueError(f"ways={ways}: must be in [1, {offered}], the classes of the split{versions}")
    if shots + queries > fewest:
        raise ValueError(
            f"shots={shots}, queries={queries}: have to be at most {fewest} together, the rows of the smallest class"
        )
    shape = split["x"].shape
    if classes.turns is not None and (len(shape) not in (3, 4) or shape[1] != shape[2]):
        raise ValueError(
            f'split["x"] has shape {shape}, must be square images (N, S, S) or (N, S, S, C) to be turned: resize them, or '
            "pass classes=unturned()"
        )
    table = np.stack([rows[:fewest] for rows in members]).astype(np.int32)
    arrays = {"x": jnp.array(split["x"]), "rows": jnp.asarray(table)}
    return Source(arrays, bind(_sample, ways, shots, queries, tasks, classes), table.size, tasks)


def _sample(arrays, key, step, ways, shots, queries, tasks, draw):
    table = arrays["rows"]
    classes, each = table.shape

    def task(key):
        of_classes, of_rows, of_turns = jax.random.split(key, 3)
        numbers = order(of_classes, 0, jnp.arange(ways), draw.versions * classes)
        # div, rem and, below, bits: XLA:CPU computes them again for each pixel, and with // and % took 5 times as long
        versions = np.int32(draw.versions)
        chosen, version = lax.div(numbers, versions), lax.rem(numbers, versions)
        # each class an "epoch" of its own: another permutation of its rows
        picked = order(of_rows, jnp.arange(ways)[:, None], jnp.arange(shots + queries)[None], each)
        rows = jnp.take_along_axis(table[chosen], picked, axis=1)
        labels = jnp.broadcast_to(jnp.arange(ways, dtype=jnp.int32)[:, None], rows.shape)
        turns = None if draw.turns is None else draw.turns(of_turns, version)

        def part(select):
            x = arrays["x"][select(rows)]
            x = x if turns is None else _turn(x, turns)
            return {"x": pixels(x.reshape(-1, *x.shape[2:])), "y": select(labels).reshape(-1)}

        return {"support": part(lambda r: r[:, :shots]), "query": part(lambda r: r[:, shots:])}

    return jax.vmap(task)(jax.random.split(jax.random.fold_in(key, step), tasks))


def _turn(images, turns):
    """Images (ways, rows, S, S, ...), those of each class by its own number of quarter turns (ways,), 0 to 3."""
    turns = turns.reshape(-1, *[1] * (images.ndim - 1))
    images = jnp.where((turns & 2) > 0, jnp.rot90(images, 2, axes=(2, 3)), images)
    return jnp.where((turns & 1) > 0, jnp.rot90(images, 1, axes=(2, 3)), images)
