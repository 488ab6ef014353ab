"""Families of tasks that a function makes up, as episodes."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from paradigms.data.bind import bind
from paradigms.data.checks import check_count
from paradigms.data.sources import Source


def task_family(sample: Callable, tasks: int) -> Source:
    """Batches of tasks made by a function of a key.

    Every task of every step has a key of its own, a function of (key, step, task). A batch is what `sample` returns
    with a leading task axis, its values as they are. Families are endless: a batch counts as an epoch.

    Args:
      sample: `key -> {"support": batch, "query": batch}`, pure and jittable; each batch a dict of arrays, examples first.
        Equal functions share programs: define it once, or `bind` its settings; a closure made anew compiles anew.
      tasks: tasks a batch, >= 1.

    Returns:
      A source of {"support": {"x": (tasks, rows, ...), ...}, "query": ...}, with whatever leaves `sample` gives.

    Raises:
      TypeError: `sample` is no function, or is not hashable.
      ValueError: `sample` returns no episode, or tasks < 1.
    """
    if not callable(sample):
        raise TypeError(f'sample is a {type(sample).__name__}, must be a function key -> {{"support": batch, "query": batch}}')
    check_count(tasks=tasks)
    _check_episode(jax.eval_shape(sample, jax.random.key(0)))
    return Source({}, bind(_tasks, sample, tasks), tasks, tasks)


def _tasks(arrays, key, step, sample, tasks):
    return jax.vmap(sample)(jax.random.split(jax.random.fold_in(key, step), tasks))


def _check_episode(episode) -> None:
    parts = {"support", "query"}
    if not isinstance(episode, dict) or set(episode) != parts:
        found = f"the leaves {sorted(episode)}" if isinstance(episode, dict) else f"a {type(episode).__name__}"
        raise ValueError(f'sample returns {found}, must return {{"support": batch, "query": batch}}')
    for name in sorted(parts):
        if not isinstance(episode[name], dict):
            kind = type(episode[name]).__name__
            raise ValueError(
                f'sample returns a {kind} as {name!r}, must be a dict of arrays such as {{"x": inputs, "y": targets}}'
            )
        shapes = {leaf: getattr(values, "shape", ()) for leaf, values in episode[name].items()}
        if not shapes or not all(shapes.values()) or len({shape[:1] for shape in shapes.values()}) > 1:
            raise ValueError(f"sample returns {name!r} of shapes {shapes}, must be arrays of as many rows each, examples first")


def sinusoids(
    *,
    shots: int,
    queries: int,
    tasks: int,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, math.pi),
    inputs: tuple[float, float] = (-5.0, 5.0),
) -> Source:
    """Regression tasks y = A sin(x - phi) (Finn et al., 2017), A and phi drawn once a task, x for each row, all uniformly.

    A batch is ``{"support": {"x": (tasks, shots, 1), "y": (tasks, shots, 1)}, "query": ...}`` of `queries` rows, float32.

    Args:
      shots: support rows a task, >= 1.
      queries: query rows a task, >= 1.
      tasks: tasks a batch, >= 1.
      amplitude: (low, high) of A; low = high fixes it, here and below.
      phase: (low, high) of phi, in radians.
      inputs: (low, high) of x.

    Returns:
      A source of such batches, endless: a batch counts as an epoch.

    Raises:
      ValueError: a count below 1; a range that is not two finite numbers in order.
    """
    check_count(shots=shots, queries=queries)
    ranges = [_range(*given) for given in (("amplitude", amplitude), ("phase", phase), ("inputs", inputs))]
    return task_family(bind(_sinusoid, shots, queries, *ranges), tasks)


def _sinusoid(key, shots, queries, amplitude, phase, inputs):
    drawn = jax.random.uniform(key, (2 + shots + queries,), jnp.float32)  # in one: each draw is a loop on a CPU
    within = lambda values, low, high: low + (high - low) * values
    a, phi, x = within(drawn[0], *amplitude), within(drawn[1], *phase), within(drawn[2:, None], *inputs)
    rows = {"x": x, "y": a * jnp.sin(x - phi)}
    return {"support": jax.tree.map(lambda r: r[:shots], rows), "query": jax.tree.map(lambda r: r[shots:], rows)}


def _range(name, given) -> tuple[float, float]:
    try:
        low, high = map(float, given)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"{name} is {given!r}, must be two finite numbers (low, high) with low <= high")
    return low, high
