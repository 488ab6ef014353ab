"""Model-agnostic meta-learning: params from which a few inner steps on a task's support set answer its query set."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paradigms.meta import inner as loops
from paradigms.meta import tasks
from paradigms.meta.hypergradients import Hypergradient, unrolled
from paradigms.meta.normalisation import Normalisation, threaded
from paradigms.meta.parts import Part, everything, select
from paradigms.meta.rates import Rates
from paradigms.objective import Objective, concrete, hide, own


def maml(
    child: Objective,
    inner: optax.GradientTransformation,
    steps: int = 1,
    *,
    hypergradient: Hypergradient | None = None,
    adapts: Part | None = None,
    rates: Rates | None = None,
    step_losses: Callable[[jax.Array], jax.Array] | None = None,
    normalisation: Normalisation | None = None,
    batch_size: int | None = None,
    name: str = "maml",
) -> Objective:
    """Params from which a few gradient steps on a task's support set do well on its query set (Finn et al., 2017, eq. 1).

    theta_0 = theta, theta_k = theta_{k-1} - inner(grad L_support(theta_{k-1})); the loss is the mean over tasks of
    L_query(theta_K), differentiated through the steps. Support losses are means over examples; a rate that was published
    for their sum over the classes is to be multiplied by the number of classes.

    A batch is an episode: ``{"support": batch, "query": batch}`` under a leading axis of tasks. Each task has keys of its
    own. The child's state threads through a task's steps; over tasks, batch statistics are averaged and the rest stays.
    ``predict`` adapts to the support set and answers the query set, tasks and queries flattened into rows.

    Args:
      child: any objective.
      inner: the inner optimizer.
      steps: inner steps, 0 or more; 0 is the child on the query set. It may be a traced integer where nothing is
        differentiated, as in `evaluate_episodes`.
      hypergradient: how the derivative is taken: `unrolled` (default), `first_order`, `truncated`, `annealed` (MAML++),
        `implicit` (iMAML).
      adapts: what the inner steps change: `everything` (default), `only("head")` (ANIL), `without("head")` (BOIL),
        `reset(only("context"))` (CAVIA).
      rates: learned rates: `per_parameter` (Meta-SGD), `per_tensor_and_step` (MAML++). None: the optimizer's own.
      step_losses: ``update -> (steps,)`` weights of the query losses after each step, as `multi_step` gives (MAML++);
        None is the loss after the last.
      normalisation: `threaded` (default), `support_statistics`, `per_step` (MAML++).
      batch_size: rows of the support set a step sees, by turns in random order; None is all of them.
      name: the slot of ``params`` and ``state`` that holds the rates and the statistics of steps, if there are any.

    Raises:
      TypeError: an argument of another kind, such as ``first_order`` for ``first_order()``.
      ValueError: steps is negative, or 0 with step_losses; batch_size below 1; rates or step_losses with an implicit
        hypergradient; (at init) the batch is no episode, nothing adapts, or the inner optimizer has no finite second
        derivative where a gradient is zero, such as Adam without ``eps_root``, or none, such as L-BFGS.
    """
    how = loops.Inner(inner, adapts or everything(), rates, normalisation or threaded(), batch_size)
    loops.check(how, steps, least=0 if step_losses is None else 1)
    steps = operator.index(steps) if concrete(steps) else steps
    hypergradient = unrolled() if hypergradient is None else hypergradient
    loops.check_kind(Hypergradient, hypergradient=hypergradient)
    for argument, given in {"rates": rates, "step_losses": step_losses}.items():
        if given is not None and not hypergradient.of_steps:
            raise ValueError(f"{argument}: an implicit gradient does not go through the steps; leave {argument} out")
    inside = hide(child, name)

    def init(key, batch):
        if not isinstance(steps, int):
            raise ValueError("steps: is traced; training needs an int, and only predictions take a traced number of steps")
        params, state = tasks.init("maml", child, key, batch)
        fast = select(params, how.part)
        if hypergradient.of_steps and steps:
            loops.check_differentiable(inner, fast, hypergradient.second_order)
        learned, kept = loops.init(how, key, params, state)
        return own(params, name, learned) if learned else params, own(state, name, kept) if kept else state

    def adaptation(params, state):
        """How a task starts, ``(support, ctx, steps) -> (Loop, Carry)``, and what answers its queries afterwards."""
        learned, kept = params.get(name, {}), state.get(name, {})
        params, state = ({k: v for k, v in part.items() if k != name} for part in (params, state))
        start = loops.problem(child, how, params, learned, state, kept)

        def answering(carry, support, ctx):
            seen, at = loops.enter(how, params, learned, carry)
            if how.normalisation.of_support:  # once more, under the adapted params
                _, (at, _) = child.losses(seen, at, support, ctx.fold("statistics"))
            return seen, at

        return start, answering

    def losses(params, state, batch, ctx):
        start, answering = adaptation(params, state)

        def one(ctx, episode):
            support, here = ctx.fold("support"), ctx.fold("query")
            here = dataclasses.replace(here, train=here.train and not how.normalisation.of_support)

            def answer(carry):
                seen, at = answering(carry, episode["support"], support)
                values, (new, aux) = child.losses(seen, at, episode["query"], here)
                return values, (new, how.normalisation.leave(carry.made, new, carry.kept)), tasks.scalars(aux)

            loop, carry = start(episode["support"], support, steps)
            if step_losses is None:
                return answer(hypergradient.run(loop, carry, None)[0])
            values, *rest = hypergradient.run(loop, carry, answer)[1]
            weights = step_losses(ctx.step)
            if weights.shape != (steps,):
                raise ValueError(f"step_losses: gives weights of shape {weights.shape} for steps={steps}; give one a step")
            return {key: weights @ value for key, value in values.items()}, *jax.tree.map(lambda leaf: leaf[-1], rest)

        values, (states, kept), aux = tasks.each(one, batch, ctx)
        values, (new, aux) = tasks.mean_over_tasks((values, states, aux), state, batch)
        if name in state:
            new = {**new, name: jax.tree.map(lambda leaf: jnp.mean(leaf, 0), kept)}
        return values, (new, aux)

    def predict(params, state, batch, ctx):
        start, answering = adaptation(params, state)

        def one(ctx, episode):
            support = dataclasses.replace(ctx.fold("support"), train=True)
            loop, carry = start(episode["support"], support, steps)
            carry, _ = hypergradient.run(loop, carry, None)
            return child.predict(*answering(carry, episode["support"], support), episode["query"], ctx.fold("query"))[0]

        return tasks.flat(tasks.each(one, batch, ctx)), state

    def boundary(params, state, batches, ctx, event):
        # the child sees the query sets of all the tasks as its stacked batches
        return inside.boundary(params, state, None if batches is None else tasks.flat(batches["query"]), ctx, event)

    return Objective(init, losses, predict, inside.after, boundary)


def multi_step(steps: int, over: int, every: int = 1) -> Callable[[jax.Array], jax.Array]:
    """Weights of the losses after each inner step, annealed to the last one alone (Antoniou et al., 2019, section 4).

    At epoch e of E: w_i = max(1/K - e / (K E), 0.03 / K) for i < K, w_K = min(1/K + e (K - 1) / (K E), 1 - (K - 1) 0.03 / K);
    from epoch E on the last alone.

    Args:
      steps: K, inner steps.
      over: E, epochs until only the last loss counts.
      every: updates an epoch.

    Returns:
      ``update -> (steps,)`` float32.
    """
    if min(steps, over, every) < 1:
        raise ValueError(f"steps={steps}, over={over}, every={every}: must be 1 or more")

    def weights(update: Any) -> jax.Array:
        epoch = update // every
        early = jnp.maximum(1 / steps - epoch / (steps * over), 0.03 / steps)
        last = jnp.minimum(1 / steps + epoch * (steps - 1) / (steps * over), 1 - (steps - 1) * 0.03 / steps)
        annealing = jnp.append(jnp.full(steps - 1, early), last)
        return jnp.where(epoch < over, annealing, jnp.append(jnp.zeros(steps - 1), 1.0))

    return weights
