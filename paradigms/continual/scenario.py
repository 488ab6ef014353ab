"""What a continual learner is told: the protocols of van de Ven and Tolias (2019), and who competes in loss and answer.

The same stream gives very different numbers under different rules (an EWC that seems to work with task labels is at chance
without), so the rules are a value of their own: the outputs that compete in the loss and in the answer, for
``supervised(model, active=scenario)``, and what the method may know.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.objective import Batch, Context
from paradigms.supervised import Active


class Scenario(NamedTuple):
    """A protocol; call it as the ``active`` of `supervised`.

    Attributes:
      name: "task", "domain" or "class".
      train: the outputs that compete in the loss.
      answer: those that compete in the answer.
      labels: what is known, {"train": whether the task is known in training, "test": and in the test}.
    """

    name: str
    train: Active
    answer: Active
    labels: dict[str, bool]

    def __call__(self, batch: Batch, ctx: Context) -> jax.Array:
        """``(batch, ctx) -> (rows or 1, outputs)``, in training those of the loss, else those of the answer."""
        return (self.train if ctx.train else self.answer)(batch, ctx)


def task_incremental(table: Any) -> Scenario:
    """Each example's task is known always; only that task's outputs compete: one head a task, on shared features.

    Args:
      table: (tasks, outputs) bool, as `paradigms.data.Tasks` has it.
    """
    return Scenario("task", of_task(table), of_task(table), {"train": True, "test": True})


def domain_incremental(table: Any) -> Scenario:
    """All tasks share all outputs, and the task is not known in the test."""
    return Scenario("domain", every(table), every(table), {"train": True, "test": False})


def class_incremental(table: Any, train: Active | None = None) -> Scenario:
    """One head for all classes; the answer is among those seen so far and the task is not known in the test.

    Args:
      table: (tasks, outputs) bool.
      train: the outputs that compete in the loss: `seen` (van de Ven and Tolias, 2019; default), `every` (Buzzega et al.,
        2020), `of_task` (the "labels trick"), `present`.
    """
    return Scenario("class", seen(table) if train is None else train, seen(table), {"train": True, "test": False})


def outputs_of(table: Any) -> np.ndarray:
    """A table of the outputs of tasks as (tasks, outputs) bool.

    Raises:
      ValueError: it has other axes.
    """
    table = np.asarray(table, bool)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"table: has shape {table.shape}; give (tasks, outputs), as paradigms.data.Tasks has it")
    return table


def every(table: Any) -> Active:
    """All outputs, whether or not their classes have come."""
    whole = np.ones((1, outputs_of(table).shape[1]), bool)
    return lambda batch, ctx: jnp.asarray(whole)


def of_task(table: Any) -> Active:
    """The outputs of each example's own task, by the leaf "task" of the batch."""
    table = outputs_of(table)

    def active(batch, ctx):
        if "task" not in batch:
            raise ValueError(f'batch: has no leaf "task" (leaves: {sorted(batch)}), but the outputs of its task are asked for')
        return jnp.asarray(table)[batch["task"]]

    return active


def seen(table: Any) -> Active:
    """The outputs of the tasks up to the present one, by the number of boundaries so far."""
    sofar = np.logical_or.accumulate(outputs_of(table))
    return lambda batch, ctx: jnp.asarray(sofar)[jnp.minimum(ctx.task, len(sofar) - 1)][None]


def past(table: Any) -> Active:
    """The outputs of the tasks before the present one; none in the first."""
    table = outputs_of(table)
    before = np.concatenate([np.zeros_like(table[:1]), np.logical_or.accumulate(table)])
    return lambda batch, ctx: jnp.asarray(before)[jnp.minimum(ctx.task, len(before) - 1)][None]


def present(table: Any) -> Active:
    """The outputs whose classes the batch has, in training (Caccia et al., 2022); in the answer those `seen`."""
    outputs, sofar = outputs_of(table).shape[1], seen(table)

    def active(batch, ctx):
        if not ctx.train:
            return sofar(batch, ctx)
        real = batch["weight"] > 0 if "weight" in batch else jnp.ones(batch["y"].shape, bool)
        return jnp.zeros((1, outputs), bool).at[0, jnp.where(real, batch["y"], outputs)].set(True, mode="drop")

    return active
