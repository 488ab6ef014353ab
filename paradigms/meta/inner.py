"""The inner problem of one task: some optimizer steps on its support set, and what they change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paradigms.batch import rows
from paradigms.data.checks import check_count
from paradigms.data.order import locate, order
from paradigms.meta.normalisation import Normalisation, threaded
from paradigms.meta.parts import Part, everything, overlay, select
from paradigms.meta.rates import Rates
from paradigms.objective import Batch, Context, Objective, Tree, concrete, fold, total


class Inner(NamedTuple):
    """How a task is learned.

    Attributes:
      optimizer: lowers the child's summed losses on the support set.
      part: which of the child's params adapt.
      rates: learned factors of the optimizer's updates, or None.
      normalisation: how statistics go through the steps.
      batch_size: rows of the support set that a step sees, by turns in random order; None is all of them.
    """

    optimizer: optax.GradientTransformation
    part: Part = everything()
    rates: Rates | None = None
    normalisation: Normalisation = threaded()
    batch_size: int | None = None


def check(inner: Inner, steps: Any, least: int = 0) -> None:
    """Raises for settings of an inner loop that are out of range or of another kind; a traced number of steps passes.

    Raises:
      ValueError: steps below `least` or a batch size below 1, or no integers.
      TypeError: what is no optimizer, part, rates or normalisation.
    """
    if concrete(steps):
        check_count(least, steps=steps)
    if inner.batch_size is not None:
        check_count(batch_size=inner.batch_size)
    check_kind(optax.GradientTransformation, inner=inner.optimizer)
    check_kind(Part, adapts=inner.part)
    check_kind(Normalisation, normalisation=inner.normalisation)
    if inner.rates is not None:
        check_kind(Rates, rates=inner.rates)


def check_kind(kind: type, **given: Any) -> None:
    """Raises TypeError, by the name of its argument, for what is no `kind`."""
    for name, value in given.items():
        if not isinstance(value, kind):
            hint = "; call it" if callable(value) else ""
            raise TypeError(f"{name}={value!r}: must be a {kind.__name__}{hint}")


class Carry(NamedTuple):
    """What a step hands to the next.

    Attributes:
      made: int32 scalar, steps made. fast: the params that adapt. state: the child's. kept: that of normalisation.
      opt_state: the inner optimizer's.
    """

    made: jax.Array
    fast: Tree
    state: Tree
    kept: Tree
    opt_state: Tree


class Loop(NamedTuple):
    """The inner problem of one task, as a hypergradient sees it.

    Attributes:
      step: ``(carry, through, pull) -> carry``. ``through`` is applied to the gradient before the optimizer has it (the
        identity, or ``stop_gradient``), ``pull``: fast -> scalar is added to the loss.
      loss: ``(given, fast, carry) -> scalar``, the loss of the whole support set.
      given: what the support loss depends on besides the fast params: the other params and the support set.
      steps: how many, an int, or, where nothing is differentiated, a traced int.
      update: int32 scalar, the number of outer updates made so far.
    """

    step: Callable[..., Carry]
    loss: Callable[[Tree, Tree, Carry], jax.Array]
    given: Tree
    steps: Any
    update: jax.Array


def problem(child: Objective, inner: Inner, params: Tree, own: Tree, state: Tree, kept: Tree):
    """``(support, ctx, steps) -> (Loop, Carry)``: the inner problem of a task, and where it starts.

    Args:
      child: see `Inner`.
      inner: see `Inner`.
      params: the child's.
      own: ``{"rates": ..., "normalisation": ...}``, the learned values of `inner`.
      state: the child's.
      kept: the statistics of ``inner.normalisation``.
    """
    optimizer = optax.with_extra_args_support(inner.optimizer)

    def start(support: Batch, ctx: Context, steps: Any) -> tuple[Loop, Carry]:
        def loss(given, fast, carry, batch):
            params, own = given
            seen, state = enter(inner, params, own, carry._replace(fast=fast))
            values, (new, _) = child.losses(seen, state, batch, ctx.fold(carry.made))
            return total(values), new

        def step(carry, through=lambda grads: grads, pull=lambda fast: 0.0):
            batch = minibatch(support, carry.made, ctx, inner.batch_size)

            def lowered(fast):
                value, new = loss((params, own), fast, carry, batch)
                return value + pull(fast), new

            (value, state), grads = jax.value_and_grad(lowered, has_aux=True)(carry.fast)
            value, grads = through((value, grads))
            told = {"value": value, "grad": grads, "value_fn": lambda fast: lowered(fast)[0]}
            updates, opt_state = optimizer.update(grads, carry.opt_state, carry.fast, **told)
            if inner.rates is not None:
                updates = jax.tree.map(jnp.multiply, updates, inner.rates.at(own["rates"], carry.made))
            fast: Tree = optax.apply_updates(carry.fast, updates)
            return Carry(carry.made + 1, fast, state, inner.normalisation.leave(carry.made, state, carry.kept), opt_state)

        def whole(given, fast, carry):
            params, own, support = given
            return loss((params, own), fast, carry, support)[0]

        fast = select(params, inner.part)
        carry = Carry(jnp.zeros((), jnp.int32), fast, state, kept, optimizer.init(fast))
        return Loop(step, whole, (params, own, support), steps, ctx.step), carry

    return start


def enter(inner: Inner, params: Tree, own: Tree, carry: Carry) -> tuple[Tree, Tree]:
    """The params and the state with which the child goes into the pass after the steps that `carry` has made."""
    adapted = overlay(params, carry.fast)
    return inner.normalisation.enter(carry.made, adapted, carry.state, own.get("normalisation", {}), carry.kept)


def minibatch(support: Batch, i: jax.Array, ctx: Context, batch_size: int | None) -> Batch:
    """What step `i` sees of the support set: every row once before any comes again."""
    count = rows(support)
    if batch_size is None or batch_size >= count:
        return support
    chosen = order(fold(ctx.key, "minibatch"), *locate(i, batch_size, count), count)
    return jax.tree.map(lambda leaf: leaf[chosen], support)


def init(inner: Inner, key: jax.Array, params: Tree, state: Tree) -> tuple[Tree, Tree]:
    """``(own, kept)``, what `inner` learns and what it carries; {} where it has none."""
    own, kept = inner.normalisation.init(params, state)
    own = {"normalisation": own} if own else {}
    if inner.rates is not None:
        own["rates"] = inner.rates.init(fold(key, "rates"), select(params, inner.part))
    return own, kept


def check_differentiable(optimizer: optax.GradientTransformation, fast: Tree, second_order: bool) -> None:
    """Raises ValueError where an update of `optimizer` has no derivative, or no finite one at a gradient of zero.

    Tried on arrays of the structure of `fast` with at most two numbers an axis. Adam's square root of a second moment of
    zero would make a meta-gradient NaN as soon as one entry of an inner gradient is zero, as after a dead ReLU; first order
    does not differentiate it. A search along a line differentiates the loss itself, in a loop of no known length.
    """
    tiny = jax.tree.map(lambda leaf: np.ones([min(n, 2) for n in leaf.shape], leaf.dtype), fast)
    optimizer = optax.with_extra_args_support(optimizer)

    def updates(grads):
        told = {"value": np.float32(1), "grad": grads, "value_fn": lambda fast: optax.tree.norm(fast, squared=True)}
        moved, _ = optimizer.update(grads, optimizer.init(tiny), tiny, **told)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(moved))

    slope, zeros = jax.grad(updates), jax.tree.map(np.zeros_like, tiny)
    try:
        jax.eval_shape(slope, zeros)
    except ValueError as error:
        if "while_loop" not in str(error):
            raise
        raise ValueError("inner: its update searches in a loop that has no derivative; take another, or implicit()") from error
    if not second_order:
        return
    with jax.ensure_compile_time_eval():
        slopes = jax.tree.leaves(slope(zeros))
    if all(map(concrete, slopes)) and not all(np.isfinite(slope).all() for slope in slopes):
        raise ValueError(
            "inner: the derivative of its update is not finite where a gradient is zero, so the meta-gradient would be NaN; "
            "give Adam and its kin eps_root, as in optax.adam(rate, eps_root=1e-8), clip by element (optax.clip), not by the "
            "global norm, or take first_order() or implicit()"
        )
