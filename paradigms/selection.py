"""The best of each run by validation, and where it stopped early."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.objective import Tree, copy
from paradigms.pure import TrainState

logger = logging.getLogger("paradigms")


class Selection:
    """The best and the stopped states of each run.

    Args:
      state: the first state.
      runs: how many runs are trained together, or None.
      select: the metric of validation that decides; "-name" where smaller is better.
      patience: evaluations without a new best after which a run stops, or None.

    Attributes:
      tree: all of it, as arrays that a checkpoint can hold.
    """

    def __init__(self, state: TrainState, runs: int | None, select: str, patience: int | None):
        shape = () if runs is None else (runs,)
        kept = copy((state.params, state.state))
        self.tree = {
            "best": kept,
            "value": jnp.full(shape, -jnp.inf),
            "step": jnp.zeros(shape, jnp.int32),
            "stale": jnp.zeros(shape, jnp.int32),
            "stopped": copy(kept) if patience else (),
        }
        self.sign, self.name = (-1, select[1:]) if select.startswith("-") else (1, select)
        self.patience = patience

    def running(self) -> jax.Array:
        """Which runs have not stopped early, bool, () or (runs,)."""
        return self.tree["stale"] < self.patience if self.patience else jnp.ones_like(self.tree["stale"], bool)

    def named(self, found: dict) -> np.ndarray:
        """The value that decides, larger is better; a ValueError if the evaluation has none of that name."""
        if self.name not in found:
            raise ValueError(f'select="{self.name}": the evaluation has {sorted(found)}; name one of them')
        return self.sign * np.asarray(found[self.name])

    def update(self, state: TrainState, found: dict, step: int) -> None:
        """Takes note of what an evaluation of `state` at `step` found; what is not finite is never the best."""
        tree, now = self.tree, (state.params, state.state)
        running = self.running()
        value = jnp.asarray(self.named(found), jnp.float32)
        better = running & (value > tree["value"]) & np.isfinite(found.get("loss", 0.0))
        stale = jnp.where(better, 0, tree["stale"] + running)
        if self.patience:
            tree["stopped"] = _where(running, now, tree["stopped"])
        self.tree = tree | {
            "best": _where(better, now, tree["best"]),
            "value": jnp.where(better, value, tree["value"]),
            "step": jnp.where(better, step, tree["step"]),
            "stale": stale,
        }

    def finished(self) -> bool:
        """Whether every run has stopped early."""
        return not bool(np.any(self.running()))

    def result(self, state: TrainState) -> tuple[TrainState, TrainState, Any]:
        """The state where each run ended, the one with its best params, and the step of these."""
        if self.patience:
            params, carried = _where(self.running(), (state.params, state.state), self.tree["stopped"])
            state = state._replace(params=params, state=carried)
        if not np.all(np.isfinite(self.tree["value"])):
            logger.warning("no evaluation was finite in some run: its best weights are the initial ones, at step 0")
        params, carried = self.tree["best"]
        return state, state._replace(params=params, state=carried), np.asarray(self.tree["step"])


@jax.jit
def _where(mask: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b), new, old)
