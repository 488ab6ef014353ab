"""Distillation from the network as it was before the task."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paradigms.batch import weighted_mean
from paradigms.continual.scenario import outputs_of, past, seen
from paradigms.objective import Context, Objective, Tree, concrete, copy, hide, own
from paradigms.supervised import CLOSED

# ctx -> the outputs that share a softmax, of the teacher and of the student: each (groups, outputs) bool. A group without
# an output of the teacher is not there.
Heads = Callable[[Context], tuple[jax.Array, jax.Array]]
Mix = Callable[[jax.Array], tuple[Any, Any]]


def joint(table: Any) -> Heads:
    """One softmax over the outputs of all tasks before: of one head that grows, or that all tasks share.

    Args:
      table: (tasks, outputs) bool, as `paradigms.data.Tasks` has it.
    """
    old = past(table)
    return lambda ctx: (old({}, ctx), old({}, ctx))


def separate(table: Any) -> Heads:
    """A softmax for the head of each task before, averaged over heads (task-incremental)."""
    heads = outputs_of(table)

    def each(ctx):
        masks = jnp.asarray(heads) & (jnp.arange(len(heads)) < ctx.task)[:, None]
        return masks, masks

    return each


def extended(table: Any) -> Heads:
    """`joint`, but the student's softmax is over the outputs seen so far: the new ones get the target 0.

    That of van de Ven and Tolias (2019) for class-incremental streams; it also pushes the new outputs down.
    """
    old, now = past(table), seen(table)
    return lambda ctx: (old({}, ctx), now({}, ctx))


def plain(tasks: jax.Array) -> tuple[float, float]:
    """The child's losses and the distillation as they are."""
    del tasks
    return 1.0, 1.0


def by_tasks(tasks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1/t and 1 - 1/t in task number t, from 1: every task counts alike (van de Ven and Tolias, 2019)."""
    share = 1 / tasks.astype(jnp.float32)
    return share, 1 - share


def lwf(
    child: Objective,
    table: Any,
    weight: float = 1.0,
    temperature: float = 2.0,
    *,
    heads: Callable[[Any], Heads] = joint,
    mix: Mix = plain,
    answers: Objective | None = None,
    name: str = "lwf",
) -> Objective:
    """Learning without forgetting: the outputs of previous tasks stay where they were on the new inputs (Li and Hoiem, 2017).

    Adds weight T^2 KL(softmax(z*/T) || softmax(z/T)), the mean over heads and examples: z the logits on the inputs of the
    batch, z* those of the teacher, which is the child's params and state at the last "end", in evaluation mode. KL differs
    from the paper's cross-entropy (eq. 2 and 3) by a constant, and is 0 where the student is the teacher. In the first
    task there are no previous outputs and nothing is added. There is no warm-up of a new head: train it first, with the rest
    frozen, where it matters.

    Logits must be open in training for all previous outputs. A child that closes them (a task-incremental scenario does, and
    `present`) needs an objective that answers for it, without the scenario:

        lwf(supervised(model, active=task_incremental(table)), table, heads=separate, answers=supervised(model))

    Order: ``rehearsal(lwf(x))`` distils replayed rows too, ``lwf(rehearsal(x))`` those of the stream alone, and its
    teacher holds a copy of the memory.

    Args:
      child: any objective.
      table: (tasks, outputs) bool, the outputs of each task.
      weight: 0 or more; 0 is the child.
      temperature: T, > 0.
      heads: which outputs share a softmax, from the table: `joint`, `separate` or `extended`.
      mix: number of tasks so far, the present one included, to the factors of (the child's losses, the distillation):
        `plain`, `by_tasks`.
      answers: an objective whose ``predict`` on the child's params and state gives the logits. Default: the child.
      name: the slot of ``state``, {"params", "state"} of the teacher, and of the loss.

    Raises:
      ValueError: weight or temperature out of range, or (at init) logits that do not fit the table.
    """
    if concrete(weight) and weight < 0:
        raise ValueError(f"weight={weight}: must be 0 or more")
    if concrete(temperature) and temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be > 0")
    table = outputs_of(table)
    inner, groups = hide(child, name), heads(table)
    answer = inner if answers is None else hide(answers, name)

    def init(key, batch):
        params, state = child.init(key, batch)
        return params, own(state, name, teacher(params, state))

    def losses(params, state, batch, ctx):
        values, rest = inner.losses(params, state, batch, ctx)
        student = answer.predict(params, state, batch, ctx)[0]["logits"]
        if student.shape[-1] != table.shape[1]:
            raise ValueError(f"table: has {table.shape[1]} outputs, but the logits have {student.shape[-1]}; they must agree")
        old, quiet = state[name], dataclasses.replace(ctx, train=False)
        target = jax.lax.stop_gradient(answer.predict(old["params"], old["state"], batch, quiet)[0]["logits"])
        kept, scale = mix(ctx.task + 1)
        distance = weighted_mean(_divergence(target / temperature, student / temperature, *groups(ctx)), batch)
        values = {key: kept * value for key, value in values.items()}
        return own(values, name, scale * weight * temperature**2 * distance), rest

    def boundary(params, state, batches, ctx, event):
        params, state = inner.boundary(params, state, batches, ctx, event)
        return params, {**state, name: teacher(params, state)} if event == "end" else state

    def teacher(params, state):
        held = {slot: value for slot, value in params.items() if slot != "taps"}
        return {"params": copy(held), "state": copy({slot: value for slot, value in state.items() if slot != name})}

    return inner._replace(init=init, losses=losses, boundary=boundary)


def _divergence(target: Tree, student: Tree, old: jax.Array, competing: jax.Array) -> jax.Array:
    """KL between softmaxes over each group of outputs, (..., outputs) and (groups, outputs) to (...), the mean over groups."""

    def one(old, competing):
        lead = (1,) * (target.ndim - 1)
        log_p = jax.nn.log_softmax(jnp.where(old.reshape(*lead, -1), target, CLOSED))
        log_q = jax.nn.log_softmax(jnp.where(competing.reshape(*lead, -1), student, CLOSED))
        return jnp.sum(jnp.where(old.reshape(*lead, -1), jnp.exp(log_p) * (log_p - log_q), 0), -1)

    there = jnp.any(old, -1).sum()
    return jax.vmap(one)(old, competing).sum(0) / jnp.maximum(there, 1).astype(target.dtype)
