"""What a run does about steps whose loss or gradient is not finite."""

import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.objective import Tree, copy, fold
from paradigms.pure import TrainState, finite
from paradigms.trainer import Trainer

logger = logging.getLogger("paradigms")


class Nonfinite(NamedTuple):
    """After `after` bad steps in a row go back to the last good state, at most `rollbacks` times; then it is an error.

    A run that goes back keeps the number of its step, so it meets other batches than those that it failed on. Of runs that
    are trained together each goes back on its own, and only when all have failed is it an error.

    Attributes:
      after: bad steps in a row, 1 or more, or infinity. More than 1 needs a trainer that skips them (``guard=True``).
      rollbacks: how often a run may go back; 0 keeps no copy of the state.
    """

    after: float = 1
    rollbacks: int = 0


RAISE = Nonfinite()
SKIP = Nonfinite(after=math.inf)


def rollback(after: int = 10, times: int = 3) -> Nonfinite:
    """Skip bad steps, and go back to the last good state after `after` of them in a row, up to `times` times a run."""
    return Nonfinite(after, times)


class Diverged(ValueError):
    """A run failed for good.

    Attributes:
      step: the number of the step. loss: its loss. rows: the examples of its batch, or None where they have no numbers.
    """

    def __init__(self, step: int, loss: float, rows: "np.ndarray | None", run: int | None = None, guard: bool = True):
        self.step, self.loss, self.rows = step, loss, rows
        what = f"the gradient is not finite (loss {loss:g})" if math.isfinite(loss) else f"the loss is {loss:g}"
        what += "" if guard or math.isfinite(loss) else " (or the gradient of the step before was not finite)"
        where = f" of run {run}" if run is not None else ""
        batch = "" if rows is None else f"; its batch had the examples {np.ravel(rows).tolist()}"
        super().__init__(
            f"step {step}{where}: {what}{batch}; lower the learning rate or look at the data, or train with guard=True and "
            "nonfinite=SKIP or rollback()"
        )


class Monitor:
    """Follows a run on the host, a chunk at a time.

    Attributes:
      tree: the last good state, where one is kept; goes into checkpoints.
    """

    def __init__(self, policy: Nonfinite, trainer: Trainer, source: Any, state: TrainState):
        if not policy.after >= 1 or policy.rollbacks < 0:
            raise ValueError(f"nonfinite={policy}: after must be 1 or more and rollbacks 0 or more")
        if (policy.after > 1 or policy.rollbacks) and not trainer.guard:
            raise ValueError(f"nonfinite={policy}: needs a trainer that skips bad steps; make it with guard=True")
        self.policy, self.trainer, self.source = policy, trainer, source
        self.tree: Tree = copy(_content(state)) if policy.rollbacks else ()
        count = trainer.runs or 1
        self.streak, self.gone_back, self.failed = np.zeros(count, int), np.zeros(count, int), np.zeros(count, bool)

    def notes(self) -> dict:
        """What `load` needs to go on, as JSON."""
        return {name: getattr(self, name).tolist() for name in ("streak", "gone_back", "failed")}

    def load(self, notes: dict) -> None:
        """Goes on from `notes`."""
        for name, value in notes.items():
            setattr(self, name, np.asarray(value, getattr(self, name).dtype))

    def check(self, state: TrainState, values: dict, done: int, running: Any = True) -> TrainState:
        """The state to go on with, after the chunk that ended at step `done` with the metrics `values` (runs, n) or (n,).

        `running` says which runs count; those that have stopped early do not.

        Raises:
          Diverged: all runs have failed.
        """
        loss = np.atleast_2d(np.asarray(values["loss"], np.float64))
        bad = ~np.isfinite(loss) | (np.atleast_2d(values["skipped"]) > 0 if "skipped" in values else False)
        bad &= np.broadcast_to(np.asarray(running), len(loss))[:, None]
        back = np.zeros(len(loss), bool)
        for run, row in enumerate(bad):
            for i, one in enumerate(row):
                self.streak[run] = self.streak[run] + 1 if one else 0
                if self.streak[run] >= self.policy.after and not self.failed[run]:
                    self._act(run, back, state, done - loss.shape[1] + i, float(loss[run, i]))
        if self.policy.rollbacks:
            state, self.tree = _exchange(_mask(back, self.trainer), _mask(~np.any(bad, 1), self.trainer), state, self.tree)
        return state

    def _act(self, run: int, back: np.ndarray, state: TrainState, step: int, loss: float) -> None:
        if self.gone_back[run] < self.policy.rollbacks:
            back[run], self.streak[run] = True, 0
            self.gone_back[run] += 1
            logger.warning("step %d, run %d: %g bad steps in a row: back to the last good state", step, run, self.policy.after)
            return
        self.failed[run] = True
        if self.failed.all():
            raise self._error(state, step, run, loss)
        logger.warning("step %d: run %d has failed (loss %g); the others go on", step, run, loss)

    def _error(self, state: TrainState, step: int, run: int, loss: float) -> Diverged:
        which = getattr(self.source, "which", None)
        key = state.key if self.trainer.runs is None else state.key[run]
        rows = None if which is None else np.asarray(which(fold(key, "data"), step))
        return Diverged(step, loss, rows, None if self.trainer.runs is None else run, self.trainer.guard)

    def sound(self, state: TrainState, done: int) -> None:
        """Before a checkpoint of a trainer without guard: the last gradient may have been the bad one.

        Raises:
          Diverged: of one run, its params are not finite; a vectorized run has its failures counted by their losses.
        """
        if self.trainer.runs is None and not self.trainer.guard and not bool(_finite(state.params)):
            raise self._error(state, done - 1, 0, 0.0)


_finite = jax.jit(finite)


def _content(state: TrainState) -> tuple:
    return state.params, state.state, state.opt_state, state.aggregate_state


def _mask(runs: Any, trainer: Trainer) -> Any:
    return runs if trainer.runs else runs[0]


@jax.jit
def _exchange(back, good, state: TrainState, snapshot: Tree) -> tuple[TrainState, Tree]:
    """The state, with the snapshot's content where it goes `back`; the snapshot, with the state's where that is `good`."""

    def where(mask, new, old):
        wide = lambda leaf: jnp.reshape(mask, jnp.shape(mask) + (1,) * (leaf.ndim - jnp.ndim(mask)))
        return jax.tree.map(lambda a, b: jnp.where(wide(a), a, b), new, old)

    now = _content(state)
    params, carried, opt_state, aggregate_state = where(back, snapshot, now)
    state = state._replace(params=params, state=carried, opt_state=opt_state, aggregate_state=aggregate_state)
    return state, where(good, now, snapshot)
