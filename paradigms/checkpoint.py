"""Checkpoints of a run through orbax: whole trees of arrays by step, written in the background, checked when read."""

import functools
import importlib.metadata
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.objective import Tree

logger = logging.getLogger("paradigms")


class Keep(NamedTuple):
    """Which checkpoints stay on the disk.

    Attributes:
      last: this many of the latest, 1 or more; the one before is what a damaged one falls back to.
      every: also those whose step is a multiple of this.
      best: also this many with the best value of validation (the mean over runs).
    """

    last: int = 2
    every: int | None = None
    best: int = 0


LATEST = Keep()


class Restored(NamedTuple):
    """Attributes: ``step``, the ``tree`` saved for it, and its ``notes``."""

    step: int
    tree: Tree
    notes: dict


class Checkpoints:
    """The checkpoints in a folder. Use as a context manager, so that the last write is finished.

    A write that fails (a full disk, no permission) is an error in the log, not in the run: what was saved earlier stays,
    and the next `save`, or the end, tries again.

    Args:
      folder: where they lie, one folder a step; made when missing.
      keep: which of them stay.

    Attributes:
      failed: the step of a write that failed and was not made good, or None.
    """

    def __init__(self, folder: "pathlib.Path | str", keep: Keep = LATEST):
        if keep.last < 1 or keep.best < 0 or (keep.every is not None and keep.every < 1):
            raise ValueError(f"keep={keep}: last and every must be 1 or more, best 0 or more")
        self.folder, self.keep, self.failed = pathlib.Path(folder).resolve(), keep, None
        self._writing: tuple | None = None
        self._manager = self._open()

    def _open(self):
        from orbax.checkpoint.experimental import v1

        training: Any = v1.training  # its own annotations do not accept its own policies
        policies = training.preservation_policies
        stay = [policies.LatestN(self.keep.last)]
        if self.keep.every:
            stay.append(policies.EveryNSteps(self.keep.every))
        if self.keep.best:
            stay.append(policies.BestN(get_metric_fn=lambda metrics: metrics["value"], n=self.keep.best))
        return training.Checkpointer(
            str(self.folder),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(stay),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, tree: Tree, notes: "dict | None" = None, value: "float | None" = None) -> None:
        """Starts writing `tree` (arrays, typed keys included) for `step`; returns before it is on the disk.

        Args:
          step: 0 or more.
          tree: copied first: the next step is donated the buffers that the writer would still be reading.
          notes: JSON to keep beside it.
          value: what `Keep.best` goes by; larger is better, None is worst.
        """
        self._settle()
        self._start(step, jax.tree.map(jnp.copy, tree), dict(notes or {}), value)

    def _start(self, step, tree, notes, value):
        if self.failed is not None:
            self._manager = self._open()  # which removes what was half written
        self._writing = step, tree, notes, value
        sums = np.asarray(_fingerprint(tree)).tolist()
        value = -float("inf") if value is None or not np.isfinite(value) else float(value)
        try:
            metadata = {"notes": notes, "fingerprint": sums, "versions": versions()}
            self._manager.save_async(step, tree, overwrite=True, custom_metadata=metadata, metrics={"value": value})
        except Exception as error:
            self._fail(error)

    def _settle(self) -> None:
        """Waits for the write that is under way, and notes whether it failed."""
        if self._writing is None:
            return
        try:
            self._manager.wait()
            if not (self.folder / str(self._writing[0])).is_dir():  # a failure that orbax has lost
                raise OSError("it is not there")
            self.failed = self._writing = None
        except Exception as error:  # orbax raises ValueError, OSError and its own, by where the disk failed
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        step = self._writing[0] if self._writing else None
        self.failed = step
        logger.error(
            "the checkpoint of step %s could not be written to %s (%s): the run goes on in memory and tries again; "
            "free space or mend the permissions. Earlier checkpoints are kept.",
            *(step, self.folder, " ".join(str(error).split())[:300]),
        )
        try:
            self._manager.close()
        except Exception as again:  # of the same failure
            logger.debug("closing after a failed write: %s", again)
        try:
            self._manager = self._open()  # which knows what is really there
        except Exception as again:
            logger.error("%s cannot be opened (%s)", self.folder, again)

    def finish(self) -> bool:
        """Waits until all is on the disk, after trying a failed write once more; whether it is."""
        self._settle()
        if self.failed is not None and self._writing is not None:
            self._start(*self._writing)
            self._settle()
        return self.failed is None

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, ascending."""
        return [int(found.step) for found in self._manager.checkpoints]

    def restore(self, like: Tree) -> Restored | None:
        """The latest whole checkpoint, or None where there is none.

        One that is damaged is said, moved to the folder "damaged" beside the checkpoints, and the one before is taken.

        Args:
          like: a tree of the structure, shapes, dtypes and devices to restore to; another mesh than the one that saved
            is fine.

        Raises:
          ValueError: there are checkpoints, and none of them can be read.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                tree, metadata = self._load(step, like)
            except Exception as error:
                failures.append((step, " ".join(str(error).split())[:200]))
                continue
            for bad, reason in failures:
                logger.warning("the checkpoint of step %d is damaged (%s): falls back to step %d", bad, reason, step)
                self._put_aside(bad)
            if failures:
                self._manager = self._open()
            return Restored(step, tree, metadata["notes"])
        if failures:
            step, reason = failures[0]
            raise ValueError(f"{self.folder}: no checkpoint is whole (step {step}: {reason}); remove them to start anew")
        return None

    def _load(self, step: int, like: Tree) -> tuple[Tree, dict]:
        metadata: Any = self._manager.metadata(step).custom_metadata
        if not isinstance(metadata, dict) or "fingerprint" not in metadata:
            raise ValueError("its metadata is missing")
        tree = self._manager.load(step, like)
        if np.asarray(_fingerprint(tree)).tolist() != metadata["fingerprint"]:
            raise ValueError("its numbers are not those that were saved")
        return tree, metadata

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self.folder.with_name("damaged")
            aside.mkdir(exist_ok=True)
            number = len(list(aside.iterdir()))
            (self.folder / str(step)).rename(aside / f"{step}-{number}")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.finish()
        self._manager.close()


@jax.jit
def _fingerprint(tree: Tree) -> jax.Array:
    """A number a leaf that changes when any one value does: the bits of each, mixed with its place, and summed."""

    def one(leaf):
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            leaf = jnp.stack([leaf.real, leaf.imag])
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        width = 8 * min(leaf.dtype.itemsize, 4)  # eight bytes become two numbers of four
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            place = place * np.uint32(bits.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        x = bits + place * np.uint32(0x9E3779B1)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # MurmurHash3's last step, a bijection
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return jnp.sum(x, dtype=jnp.uint32)

    leaves = [one(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves) if leaves else jnp.zeros(0, jnp.uint32)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what a checkpoint's numbers depend on, as far as installed."""
    found = {}
    for package in ("paradigms", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
