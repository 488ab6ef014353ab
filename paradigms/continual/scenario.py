"""What a continual learner is told: the protocols of van de Ven and Tolias (2019), and who competes in loss and answer.

The same stream gives very different numbers under different rules (an EWC that seems to work with task labels is at chance
without), so the rules are a value of their own: the outputs that compete in the loss and in the answer, for
``supervised(model, active=scenario)``, and what is known of the tasks, which `told` enforces.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.objective import Batch, Context, Objective, concrete
from paradigms.supervised import Active


class Known(NamedTuple):
    """What is known of the tasks.

    Attributes:
      train: whether examples say their task in training.
      test: whether they do in the test.
      boundaries: whether it is known where a task begins and ends, and so how many have.
    """

    train: bool
    test: bool
    boundaries: bool


class Scenario(NamedTuple):
    """A protocol; call it as the ``active`` of `supervised`.

    Attributes:
      name: "task", "domain", "class" or "free".
      train: the outputs that compete in the loss.
      answer: those that compete in the answer.
      known: what is known of the tasks.
    """

    name: str
    train: Active
    answer: Active
    known: Known

    def __call__(self, batch: Batch, ctx: Context) -> jax.Array:
        """``(batch, ctx) -> (rows or 1, outputs)``, in training those of the loss, else those of the answer."""
        return (self.train if ctx.train else self.answer)(batch, ctx)


def task_incremental(table: Any) -> Scenario:
    """Each example's task is known always; only that task's outputs compete: one head a task, on shared features.

    Args:
      table: (tasks, outputs) bool, as `paradigms.data.Tasks` has it.
    """
    return Scenario("task", of_task(table), of_task(table), Known(train=True, test=True, boundaries=True))


def domain_incremental(table: Any) -> Scenario:
    """All tasks share all outputs, and the task is not known in the test."""
    return Scenario("domain", every(table), every(table), Known(train=True, test=False, boundaries=True))


def class_incremental(table: Any, train: Active | None = None) -> Scenario:
    """One head for all classes; the answer is among those seen so far and the task is not known in the test.

    Args:
      table: (tasks, outputs) bool.
      train: the outputs that compete in the loss: `seen` (van de Ven and Tolias, 2019; default), `every` (Buzzega et al.,
        2020), `of_task` (the "labels trick"), `present`.
    """
    among = seen(table) if train is None else train
    return Scenario("class", among, seen(table), Known(train=True, test=False, boundaries=True))


def task_free(table: Any) -> Scenario:
    """A stream of examples and nothing else: no tasks, no boundaries (Aljundi et al., 2019a); all outputs compete."""
    return Scenario("free", every(table), every(table), Known(train=False, test=False, boundaries=False))


def told(child: Objective, scenario: Scenario) -> Objective:
    """`child`, told no more than the scenario says is known: the outermost transform of a benchmark.

    Where the task of an example is not known the batch has no leaf "task", in training or in the test, so that a method which
    looks at it raises instead of cheating. Where boundaries are not known ``boundary`` does nothing and ``ctx.task`` is 0: what
    consolidates at boundaries never does, and scenarios that open outputs as tasks come (`seen`) do not fit.
    With all known, as in `task_incremental`, it is the child. Scores look at the batch themselves, and still see everything.
    """
    known = scenario.known

    def of(ctx):
        return ctx if known.boundaries else dataclasses.replace(ctx, task=jnp.zeros_like(ctx.task))

    def seen_by(train, batch):
        return batch if (known.train if train else known.test) else _without_task(batch)

    def boundary(params, state, batches, ctx, event):
        if not known.boundaries:
            return params, state
        batches = None if batches is None else seen_by(True, batches)
        return child.boundary(params, state, batches, ctx, event)

    return Objective(
        init=lambda key, batch: child.init(key, seen_by(True, batch)),
        losses=lambda params, state, batch, ctx: child.losses(params, state, seen_by(ctx.train, batch), of(ctx)),
        predict=lambda params, state, batch, ctx: child.predict(params, state, seen_by(ctx.train, batch), of(ctx)),
        after=lambda params, state, update, ctx: child.after(params, state, update, of(ctx)),
        boundary=boundary,
    )


def _without_task(batch: Batch) -> Batch:
    """The batch without leaves "task", wherever it holds them; a part of that name, of several objectives, stays."""
    parts = {name: leaf for name, leaf in batch.items() if name != "task" or isinstance(leaf, dict)}
    return {name: _without_task(leaf) if isinstance(leaf, dict) else leaf for name, leaf in parts.items()}


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
        task = batch["task"]
        if concrete(task) and np.size(task):
            low, high = np.min(np.asarray(task)), np.max(np.asarray(task))
            if not 0 <= low <= high < len(table):
                raise ValueError(f"batch: tasks go from {low} to {high}, and the table has {len(table)}; give each a row")
        return jnp.asarray(table)[task]

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
