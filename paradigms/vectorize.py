"""Seeds and hyper-parameters as an axis of one compiled program."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.pure import Pure
from paradigms.trainer import Trainer

MOST = 100_000  # runs; beyond it their table alone fills the host's memory
Over = Callable[[Callable[[Any], Any], Any], Any]


def one_by_one(function, xs):
    """Runs one after the other inside one program (`jax.lax.map`): fastest on a CPU, where a step fills the cores."""
    return jax.lax.map(function, xs)


def side_by_side(function, xs):
    """Runs in lockstep (`jax.vmap`): fastest on accelerators, where one small run does not fill the device."""
    return jax.vmap(function)(xs)


def grid(**values: Sequence[Any]) -> dict[str, list]:
    """Columns of every combination: ``vectorize(make, seeds=5, **grid(learning_rate=[.1, .01], decay=[0., 1e-4]))``."""
    rows = list(itertools.product(*values.values()))
    return {name: [row[i] for row in rows] for i, name in enumerate(values)}


def vectorize(make: Callable[..., Trainer], seeds: int = 1, over: Over | None = None, **settings: Sequence[float]) -> Trainer:
    """One trainer for many runs: one compilation, one input pipeline, every array with an axis of runs in front.

    ``make`` runs inside the program with traced scalars, so it builds the objective and the optimizer from them as from
    plain floats; schedules multiply a unit schedule by the traced rate.

    Args:
      make: ``(**settings) -> Trainer``; called with no arguments where there are no settings.
      seeds: number of seeds a setting. Seed `s` has the same key under every setting.
      over: how the runs share the program, `one_by_one` or `side_by_side`; default: the former on a CPU, the latter
        elsewhere, as measured by ``experiments/speed``.
      **settings: a column of floats for each argument of `make`, all of one length (`grid` makes them).

    Returns:
      a `Trainer` with ``runs = seeds * settings``, settings-major; ``trainer.table`` lists each run's seed and settings.

    Raises:
      ValueError: columns of different lengths, fewer than one seed, or a setting `make` refuses.
    """
    columns = {name: np.asarray(column, np.float32) for name, column in settings.items()}
    lengths = {name: column.shape for name, column in columns.items()}
    if any(len(shape) != 1 for shape in lengths.values()) or len(set(lengths.values())) > 1:
        raise ValueError(f"settings: columns have shapes {lengths}; give each one list of the same length (see grid)")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: must be 1 or more")
    count = len(next(iter(columns.values()))) if columns else 1
    if count == 0:
        raise ValueError("settings: columns are empty; give at least one value")
    if seeds * count > MOST:
        raise ValueError(f"seeds={seeds}: {seeds * count} runs are too many for one program; {MOST} at most, so split them")
    rows = [{name: float(column[i]) for name, column in columns.items()} for i in range(count)]
    trainers = [make(**row) for row in rows]  # checks every setting while its values are concrete
    if not isinstance(trainers[0], Trainer) or trainers[0].runs:
        raise ValueError(f"make: returned {type(trainers[0]).__name__}; it must return a Trainer of one run")
    if over is None:
        over = one_by_one if jax.default_backend() == "cpu" else side_by_side
    scalars = {name: jnp.repeat(jnp.asarray(column), seeds) for name, column in columns.items()}
    seed = jnp.tile(jnp.arange(seeds), count)

    def lift(call, *mapped):
        return over(lambda x: call(make(**x[0]).pure, *x[1:]), (scalars, *mapped))

    functions = Pure(
        init=lambda key, batch: lift(lambda pure, s: pure.init(jax.random.fold_in(key, s), batch), seed),
        step=lambda state, batch: lift(lambda pure, s: pure.step(s, batch), state),
        scan=lambda state, source, n: lift(lambda pure, s: pure.scan(s, source, n), state),
        advance=lambda state, source, n: lift(lambda pure, s: pure.advance(s, source, n), state),
        boundary=lambda state, batches, event: lift(lambda pure, s: pure.boundary(s, batches, event), state),
        predict=lambda state, batch: lift(lambda pure, s: pure.predict(s, batch), state),
        tally=lambda state, source, score: lift(lambda pure, s: pure.tally(s, source, score), state),
    )
    table = [{"seed": s, **row} for row in rows for s in range(seeds)]
    return Trainer.around(functions, [trainer for trainer in trainers for _ in range(seeds)], table)
