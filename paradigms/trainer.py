"""The trainer: an objective, an optax optimizer and, where losses compete, an aggregator, compiled as one step."""

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify
from jax.sharding import Mesh

from paradigms import watch
from paradigms.mesh import current
from paradigms.objective import Aggregator, Batch, Objective, Tree, check
from paradigms.pure import Pure, TrainState, pure


class Trainer:
    """Trains an objective; every method is compiled once and the state is donated.

    Args:
      objective: what is trained.
      optimizer: any optax transformation. It receives ``value``, ``grad`` and ``value_fn``, so L-BFGS, Polyak steps and
        plateau schedules work unwrapped.
      aggregate: combines the gradients of the named losses (`pcgrad`); None sums the losses.
      microbatches: gradient accumulation: the batch is cut into this many equal parts, run one after the other. State
        threads through them, ``after`` runs once, and losses that couple a batch's examples see a part at a time; a memory
        replays in every part.
      guard: a step whose loss or gradient is not finite changes nothing but the step's number, and is counted in the
        metric "skipped" (0 or 1).
      mesh: devices (see `paradigms.mesh`): the batch is split over the first axis of the mesh, the large arrays of the
        state over the others. Default: the mesh of ``jax.set_mesh``, or one device.

    Attributes:
      guard: as given.
      table: each run's seed and settings (see `vectorize`).
      runs: None, or how many runs are trained side by side (see `vectorize`); then every array of the state, the metrics
        and the outputs has them as its first axis.
      members: the trainer of each run alone, for ``jax.tree.map(lambda leaf: leaf[run], state)``; of one run, itself.
      pure: the same functions uncompiled.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        aggregate: Aggregator | None = None,
        microbatches: int = 1,
        guard: bool = False,
        mesh: Mesh | None = None,
    ):
        if microbatches < 1:
            raise ValueError(f"microbatches={microbatches}: must be 1 (none) or more")
        mesh = current(mesh)
        self._compile(pure(objective, optimizer, aggregate, microbatches, guard, mesh))
        self.objective, self.guard, self.runs, self.table, self.members = objective, guard, None, [{}], [self]
        self._parts = microbatches * (mesh.shape[mesh.axis_names[0]] if mesh else 1)

    @classmethod
    def around(cls, functions: Pure, members: "list[Trainer]", table: list[dict]) -> "Trainer":
        """The compiled interface around `functions` that carry many runs: the trainer and the settings of each."""
        trainer = cls.__new__(cls)
        trainer._compile(functions)
        trainer.objective, trainer.guard, trainer._parts = members[0].objective, members[0].guard, members[0]._parts
        trainer.runs, trainer.table, trainer.members = len(table), table, members
        return trainer

    def _compile(self, functions: Pure) -> None:
        def boundary(state, batches, event):
            checked = checkify.checkify(functools.partial(functions.boundary, event=event), errors=checkify.user_checks)
            return checked(state, batches)

        self.pure = functions
        self._init = jax.jit(functions.init)
        self._step = jax.jit(functions.step, donate_argnums=0)
        self._scan = jax.jit(functions.scan, donate_argnums=0, static_argnums=2)
        self._advance = jax.jit(functions.advance, donate_argnums=0)
        self._boundary = jax.jit(boundary, static_argnums=2)
        self._predict = jax.jit(functions.predict)
        self._tally = jax.jit(functions.tally, static_argnums=2)

    def init(self, key: "jax.Array | int", batch: Batch) -> TrainState:
        """A fresh state; `batch` gives shapes and is checked against the objective.

        Args:
          key: a typed PRNG key, or a seed. All randomness of the run follows from it.
          batch: concrete arrays, the example axis first, of the size that ``step`` will see.

        Raises:
          ValueError: what does not fit, before anything is compiled.
        """
        self._fits(np.shape(jax.tree.leaves(batch)[0])[0])
        check(self.objective, batch)
        watch.look(self, batch)
        key = jax.random.key(int(key)) if isinstance(key, numbers.Integral) else key
        return self._init(key, batch)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """One update. `state` is donated: use the one returned.

        Returns:
          the new state, and metrics as device scalars: every named loss, "loss" (their sum) and the objective's ``aux``.
        """
        self._fits(np.shape(jax.tree.leaves(batch)[0])[0])
        return self._step(state, batch)

    def scan(self, state: TrainState, source: Any, n: int) -> tuple[TrainState, dict]:
        """`n` updates in one call, on batches that `source` makes from the run's key and the step.

        Args:
          state: donated.
          source: ``source.batch(key, step)`` inside the program, after ``source.chunk(step, n)`` on the host (see
            `paradigms.data.Source`).
          n: number of updates, static: each value compiles once.

        Returns:
          the new state, and metrics stacked over the `n` updates.
        """
        self._fits(getattr(source, "batch_size", self._parts))
        chunk = source.chunk(state.step, n)
        return self._scan(state, chunk, n)

    def advance(self, state: TrainState, source: Any, n: int) -> tuple[TrainState, dict]:
        """`n` updates in one call like `scan`, in one program for every `n`: metrics are their means over the updates.

        Args:
          state: donated.
          source: on the device (`paradigms.data.resident`, `Tasks.train`).
          n: number of updates, 0 or more; with runs, the same for all.
        """
        self._fits(source.batch_size)
        return self._advance(state, source, jnp.asarray(n, jnp.int32))

    def tally(self, state: TrainState, source: Any, score: Callable[[dict, Batch], Tree]) -> Tree:
        """The sums of ``score(outputs, batch)`` over one pass through `source`, in one call: what a whole split is worth.

        Args:
          state: not donated.
          source: on the device, in order, padding of weight 0 (`Tasks.whole`).
          score: ``(outputs, batch) -> tree of sums over the rows``; a function made anew compiles anew.
        """
        return self._tally(state, source, score)

    def boundary(self, state: TrainState, batches: Tree, event: str = "end") -> TrainState:
        """Tells the objective that a task or phase starts or ends; "end" also moves ``task`` on.

        Args:
          state: not donated.
          batches: data of the task, stacked to leaves (n, batch, ...); or a source that has it, one pass through which is
            stacked (`Tasks.whole`); or None where no wrapper needs it.
          event: "start", "end" or a phase's name.

        Returns:
          the new state. Where params changed structure, optimizer leaves of unchanged path and shape are kept.

        Raises:
          ValueError: a check of the objective failed, such as a Fisher information that is zero everywhere.
        """
        error, state = self._boundary(state, batches, event)
        if message := error.get():
            raise ValueError(message)
        return state

    def predict(self, state: TrainState, batch: Batch) -> dict:
        """The objective's answer to a batch in evaluation mode: "logits", "features", ..., one row an example."""
        return self._predict(state, batch)

    def _fits(self, rows: int) -> None:
        if rows % self._parts:
            raise ValueError(f"batch: {rows} rows do not divide into {self._parts} equal parts (microbatches x devices)")
