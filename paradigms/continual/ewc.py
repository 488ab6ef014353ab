"""Elastic weight consolidation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.experimental import checkify

from paradigms.objective import Batch, Context, Objective, Tree, concrete, copy, hide, own

Importance = Callable[[Objective, Tree, Tree, Tree, Context], Tree]


def exact_fisher(child: Objective, params: Tree, state: Tree, batches: Tree, ctx: Context) -> Tree:
    """diag F = E_x sum_c p(c|x) (d log p(c|x) / d theta)^2, in evaluation mode, the mean over examples (Martens, 2020, sec. 5).

    Examples count by their weight; 0 is padding. The expectation over labels is exact, from ``child.predict``'s logits,
    so no labels are needed. An example with several rows of logits (an episode) is their product distribution: its rows'
    informations add up. So do those of several tasks (`multitask`), each by the weights of its own batch. Memory grows with
    batch x logits x params.

    Args:
      batches: stacked batches, leaves (n, batch, ...).

    Returns:
      a tree like `params`, 0 or more.
    """

    def one(example):
        single = jax.tree.map(lambda leaf: leaf[None], example)

        def log_p(params):
            answers = _answers(child.predict(params, state, single, ctx)[0], single)
            values = [jax.nn.log_softmax(logits.reshape(-1, logits.shape[-1])) for logits, _ in answers]
            return values, (values, [weight for _, weight in answers])

        jacobians, (values, weights) = jax.jacrev(log_p, has_aux=True)(params)

        def information(value, weight, jacobian):
            p = weight.astype(value.dtype) * jnp.exp(value)
            return jax.tree.map(lambda j: jnp.tensordot(p, j**2, 2), jacobian)

        return list(map(information, values, weights, jacobians)), weights

    def batch_sum(batch):
        return jax.tree.map(lambda leaf: jnp.sum(leaf, 0), jax.vmap(one)(batch))

    sums, counts = jax.tree.map(lambda leaf: jnp.sum(leaf, 0), jax.lax.map(batch_sum, batches))
    means = [
        jax.tree.map(lambda f, n=count: f / jnp.maximum(n, 1e-30).astype(f.dtype), total)
        for total, count in zip(sums, counts, strict=True)
    ]
    return jax.tree.map(lambda *tasks: sum(tasks[1:], start=tasks[0]), *means)


def _answers(outputs: dict, batch: Batch) -> list[tuple[jax.Array, jax.Array]]:
    """The logits for a batch of one example and its weight; of several tasks, those of each."""
    tasks = {name: part for name, part in outputs.items() if isinstance(part, dict)}
    if not tasks:
        return [(outputs["logits"], jnp.ravel(batch.get("weight", jnp.ones(1)))[0])]
    return [pair for name, part in tasks.items() for pair in _answers(part, batch.get(name, batch))]


def ewc(child: Objective, weight: float, importance: Importance = exact_fisher, name: str = "ewc") -> Objective:
    """Adds weight/2 sum_i F_i (theta_i - theta*_i)^2, F summed over the tasks so far (Kirkpatrick et al., 2017, eq. 3).

    One anchor theta*, the params at the last boundary, as Huszar (2018) derives. Before the first boundary F is 0 and the
    losses are the child's. At the "end" of a task the importance is estimated on the batches of the boundary.

    Order: ``ewc(maml(x))`` holds the meta-learned weights, ``maml(ewc(x))`` penalises the adapted ones.

    Args:
      child: any objective whose ``predict`` gives the logits that `importance` needs.
      weight: 0 or more; 0 is the child. Its scale belongs to the importance's normalisation (here: mean over examples).
      importance: ``(child, params, state, batches, ctx) -> tree like params``.
      name: the slot of ``state``, and of the loss.

    Raises:
      ValueError: (at a boundary) the importance is zero everywhere, so that nothing would be held.
    """
    if concrete(weight) and weight < 0:
        raise ValueError(f"weight={weight}: must be 0 or more")
    inner = hide(child, name)

    def init(key, batch):
        params, state = child.init(key, batch)
        held = {slot: value for slot, value in params.items() if slot != "taps"}
        return params, own(state, name, {"fisher": optax.tree.zeros_like(held), "anchor": copy(held)})

    def losses(params, state, batch, ctx):
        values, rest = inner.losses(params, state, batch, ctx)
        mine = state[name]
        terms = jax.tree.map(
            lambda f, old, w: jnp.sum(f * (w - old) ** 2),
            mine["fisher"],
            mine["anchor"],
            {k: params[k] for k in mine["anchor"]},
        )
        return own(values, name, weight / 2 * sum(jax.tree.leaves(terms))), rest

    def boundary(params, state, batches, ctx, event):
        params, state = inner.boundary(params, state, batches, ctx, event)
        if event != "end":
            return params, state
        if batches is None:
            raise ValueError(f'batches=None: {name} estimates an importance at "end"; pass the task\'s batches')
        held = {slot: params[slot] for slot in state[name]["anchor"]}
        new = importance(inner, held, state, batches, ctx.fold(name))
        some = jnp.any(jnp.stack([jnp.any(f > 0) for f in jax.tree.leaves(new)]))
        checkify.debug_check(some, f"{name}: the importance is zero everywhere; this estimator does not fit the objective")
        fisher = jax.tree.map(lambda old, new: _grown(old, new.shape) + new, state[name]["fisher"], new)
        return params, {**state, name: {"fisher": fisher, "anchor": copy(held)}}

    return inner._replace(init=init, losses=losses, boundary=boundary)


def _grown(importance: jax.Array, shape: tuple) -> jax.Array:
    """The importance of params that grew at their ends (new classes, new units): nothing is known of what is new."""
    if importance.shape == shape:  # scalars cannot be padded
        return importance
    return jnp.pad(importance, [(0, after - before) for before, after in zip(importance.shape, shape, strict=True)])
