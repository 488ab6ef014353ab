"""Reptile: towards the weights that each task would learn."""

import dataclasses
import operator

import optax
from jax import lax

from paradigms.meta import inner as loops
from paradigms.meta import tasks
from paradigms.meta.hypergradients import first_order
from paradigms.meta.parts import Part, everything, select
from paradigms.objective import Objective, concrete


def reptile(
    child: Objective,
    inner: optax.GradientTransformation,
    steps: int,
    *,
    batch_size: int | None = None,
    adapts: Part | None = None,
) -> Objective:
    """Moves the params towards those that a task's support set teaches (Nichol et al., 2018, algorithm 2).

    The update is theta <- theta + eps * mean over tasks of (phi - theta), with phi the params after some inner steps. It is
    the gradient step of rate eps on the loss "reptile", 1/2 |theta - phi|^2 with phi constant, so the outer optimizer is
    ``optax.sgd(eps)`` with eps falling to 0, or any other. One step with plain SGD is joint training and does not
    meta-learn.

    Batches, states and ``predict`` are those of `maml`. The query set does not train: its loss and aux, after adaptation,
    are aux. Episodes with more shots than will be seen later, in minibatches, are what the paper trains on.

    Args:
      child: any objective.
      inner: the inner optimizer; its state starts anew in every task. The authors' is Adam without momentum,
        ``optax.adam(1e-3, b1=0)``, whose second moments they carry from task to task.
      steps: inner steps, 0 or more; 0 learns nothing.
      batch_size: rows of the support set a step sees, by turns in random order; None is all of them.
      adapts: what the inner steps change, and with it what is learned; default `everything`.

    Raises:
      TypeError: an argument of another kind.
      ValueError: steps is negative, batch_size below 1, or adapts resets; (at init) the batch is no episode, or nothing adapts.
    """
    how = loops.Inner(inner, adapts or everything(), batch_size=batch_size)
    loops.check(how, steps)
    steps = operator.index(steps) if concrete(steps) else steps
    if adapts is not None and adapts.reset:
        raise ValueError("adapts: starts from zeros in every task, so Reptile would learn nothing; leave reset(...) out")

    def init(key, batch):
        params, state = tasks.init("reptile", child, key, batch)
        select(params, how.part)
        return params, state

    def adapt(params, state, support, ctx):
        loop, carry = loops.problem(child, how, params, {}, state, {})(support, ctx, steps)
        return first_order().run(loop, carry, None)[0]

    def losses(params, state, batch, ctx):
        def one(ctx, episode):
            carry = lax.stop_gradient(adapt(params, state, episode["support"], ctx.fold("support")))
            gap = optax.tree.sub(select(params, how.part), carry.fast)
            adapted, at = loops.enter(how, lax.stop_gradient(params), {}, carry)
            query, (new, aux) = child.losses(adapted, at, episode["query"], ctx.fold("query"))
            told = {**tasks.scalars(aux), **{f"query/{name}": value for name, value in query.items()}}
            return {"reptile": optax.tree.norm(gap, squared=True) / 2}, new, told

        return tasks.mean_over_tasks(tasks.each(one, batch, ctx), state, batch)

    def predict(params, state, batch, ctx):
        def one(ctx, episode):
            carry = adapt(params, state, episode["support"], dataclasses.replace(ctx.fold("support"), train=True))
            return child.predict(*loops.enter(how, params, {}, carry), episode["query"], ctx.fold("query"))[0]

        return tasks.flat(tasks.each(one, batch, ctx)), state

    def boundary(params, state, batches, ctx, event):
        return child.boundary(params, state, None if batches is None else tasks.flat(batches["query"]), ctx, event)

    return Objective(init, losses, predict, child.after, boundary)
