"""Checkpoints of a run through orbax: whole trees of arrays by step, written in the background."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from paradigms.objective import Tree


class Checkpoints:
    """The checkpoints in a folder. Use as a context manager, so that the last write is finished.

    Args:
      folder: where they lie, one folder a step; made when missing.
      keep: how many of the latest are kept, 1 or more.
    """

    def __init__(self, folder: "pathlib.Path | str", keep: int = 2):
        from orbax.checkpoint.experimental import v1

        if keep < 1:
            raise ValueError(f"keep={keep}: must be 1 or more")
        training: Any = v1.training  # its own annotations do not accept its own policies
        self._manager = training.Checkpointer(
            str(pathlib.Path(folder).resolve()),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
        )

    def save(self, step: int, tree: Tree) -> None:
        """Starts writing `tree` (arrays, typed keys included) for `step`; returns before it is on the disk."""
        # a copy, because the next step is donated the buffers that the writer would still be reading
        self._manager.save_async(step, jax.tree.map(jnp.copy, tree), overwrite=True)

    def latest(self) -> int | None:
        """The last step with a whole checkpoint, or None."""
        last = self._manager.latest
        return None if last is None else int(last.step)

    def load(self, step: int, like: Tree) -> Tree:
        """The tree saved for `step`, with the structure, dtypes and devices of `like`."""
        return self._manager.load(step, like)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()
