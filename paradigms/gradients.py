"""From an objective to gradients: summed or one a loss, whole or in micro-batches, with taps set apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paradigms.objective import Batch, Context, Losses, Objective, Tree, Update, total

Gradients = Callable[[Tree, Tree, Batch, Context], tuple[dict[str, Tree], Losses, Tree, dict]]


def split_taps(params: Tree) -> tuple[Tree, Tree]:
    """``params`` without the reserved slot "taps", and a dict of that slot alone (empty where there is none)."""
    rest = {name: slot for name, slot in params.items() if name != "taps"}
    return rest, {name: slot for name, slot in params.items() if name == "taps"}


def gradients(objective: Objective, each: bool) -> Gradients:
    """A function ``(params, state, batch, ctx) -> (grads, losses, state, aux)``.

    ``grads`` has one gradient a named loss where `each`, else one entry "loss", the gradient of their sum.
    """

    def compute(params, state, batch, ctx):
        @jax.jit  # traced once, however many groups of losses are pulled back
        def losses(params):
            values, (new_state, aux) = objective.losses(params, state, batch, ctx)
            return values, (new_state, {k: v for k, v in aux.items() if k != "per_example"})

        def summed(params):
            values, rest = losses(params)
            return total(values), (values, rest)

        if not each:
            grads, (values, (new_state, aux)) = jax.grad(summed, has_aux=True)(params)
            return {"loss": grads}, values, new_state, aux
        grads, values, (new_state, aux) = _jacobian(losses, params)
        return grads, values, new_state, aux

    return compute


def _jacobian(losses, params: Tree) -> tuple[dict[str, Tree], Losses, Any]:
    """One gradient a loss. Losses of one forward are pulled back together, which shares the arithmetic; losses with
    forwards of their own are pulled back alone, since together each would pay for the backward passes of all."""
    names, _ = jax.eval_shape(losses, params)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    grads, values, rest = {}, {}, None
    for members in groups.values():

        def group(params, members=members):
            values, rest = losses(params)
            return jnp.stack([values[name] for name in members]), rest

        stacked, pull, rest = jax.vjp(group, params, has_aux=True)
        (rows,) = jax.vmap(pull)(jnp.eye(len(members), dtype=stacked.dtype))
        for i, name in enumerate(members):
            grads[name], values[name] = jax.tree.map(lambda row, i=i: row[i], rows), stacked[i]
    return grads, values, rest


def accumulated(compute: Gradients, parts: int) -> Gradients:
    """`compute` over `parts` equal parts of the batch, one after the other: means of gradients, losses and aux.

    A part counts by its share of the batch's weight, so that means over examples are those of the whole batch. The state
    threads through the parts. Taps are cut along with the batch, and their gradients put together again.
    """
    if parts == 1:
        return compute

    def cut(leaf):
        return leaf.reshape(parts, -1, *leaf.shape[1:])

    def accumulate(params, state, batch, ctx):
        trained, taps = split_taps(params)

        def one(state, x):
            i, part, tap = x
            grads, values, state, aux = compute({**trained, **tap}, state, part, ctx.fold(i))
            apart = {name: split_taps(grad) for name, grad in grads.items()}
            means = ({name: grad for name, (grad, _) in apart.items()}, values, aux)
            return state, means, {name: tap for name, (_, tap) in apart.items()}

        def body(carry, x):
            share, x = x
            state, means, tap = one(carry[0], x)
            add = lambda a, b: a + share.astype(a.dtype) * b
            return (state, jax.tree.map(add, carry[1], means)), jax.tree.map(lambda g: share.astype(g.dtype) * g, tap)

        weight = cut(batch["weight"]).reshape(parts, -1).sum(1) if "weight" in batch else jnp.ones(parts)
        shares = jnp.where(weight.sum() > 0, weight / jnp.maximum(weight.sum(), 1e-30), 1 / parts)
        xs = (shares, (jnp.arange(parts), jax.tree.map(cut, batch), jax.tree.map(cut, taps)))
        _, shapes, _ = jax.eval_shape(one, state, jax.tree.map(lambda x: x[0], xs[1]))
        (state, (grads, values, aux)), taps = jax.lax.scan(body, (state, optax.tree.zeros_like(shapes)), xs)
        taps = jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:]), taps)
        return {name: {**grads[name], **taps[name]} for name in grads}, values, state, aux

    return accumulate


def descent(objective: Objective, optimizer: optax.GradientTransformation) -> Callable[..., tuple[Tree, Tree, Tree]]:
    """``(params, state, opt_state, batch, ctx) -> (params, state, opt_state)``: an update inside another program, as a
    boundary makes it that trains. ``opt_state`` starts as ``optimizer.init(split_taps(params)[0])``."""
    compute = gradients(objective, each=False)

    def update(params, state, opt_state, batch, ctx):
        grads, _, state, _ = compute(params, state, batch, ctx)
        trained, taps = split_taps(params)
        updates, opt_state = optimizer.update(split_taps(grads["loss"])[0], opt_state, trained)
        moved: Tree = optax.apply_updates(trained, updates)
        return *objective.after({**moved, **taps}, state, Update(params, grads["loss"], updates), ctx), opt_state

    return update
