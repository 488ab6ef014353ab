"""How the derivative of adapted params is taken: through all steps, some, none, or by the implicit function theorem."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from paradigms.data.checks import check_count
from paradigms.meta.inner import Carry, Loop
from paradigms.objective import Tree, concrete

Observe = Callable[[Carry], Any]
Solve = Callable[[Callable[[Tree], Tree], Tree], Tree]


class Hypergradient(NamedTuple):
    """Runs an inner loop so that its result has the derivative wanted.

    Attributes:
      run: ``(loop, carry, observe) -> (carry, seen)`` with ``seen`` what ``observe(carry)`` gave after each step, stacked,
        or None where ``observe`` is.
      second_order: whether the inner optimizer's update is differentiated with respect to the gradient.
      of_steps: whether the derivative is that of the steps, so that what they are made of, such as rates, is learned.
    """

    run: Callable[[Loop, Carry, Observe | None], tuple[Carry, Any]]
    second_order: bool
    of_steps: bool = True


def unrolled(checkpoint: bool = True) -> Hypergradient:
    """Through all steps: MAML's own (Finn et al., 2017, eq. 1).

    Args:
      checkpoint: recompute each step in the backward pass, so that memory hardly grows with the steps; it costs one
        more forward and backward pass of the support set a step. A single step is never recomputed.
    """

    def run(loop, carry, observe):
        return _steps(loop.step, carry, 0, loop.steps, observe, checkpoint)

    return Hypergradient(run, second_order=True)


def first_order() -> Hypergradient:
    """As if the support gradients were constants (Finn et al., 2017, section 5.2); with SGD each step's Jacobian is then I."""
    return truncated(0)


def truncated(last: int) -> Hypergradient:
    """Through the `last` steps; the support gradients of those before are constants. 0 is first order, all are `unrolled`."""
    check_count(last=last, least=0)

    def run(loop, carry, observe):
        if not isinstance(loop.steps, int):  # nothing is differentiated
            return _steps(loop.step, carry, 0, loop.steps, observe)
        before = max(loop.steps - last, 0)
        carry, early = _steps(lambda c: loop.step(c, lax.stop_gradient), carry, 0, before, observe)
        carry, late = _steps(loop.step, carry, before, loop.steps, observe, checkpoint=True)
        return carry, None if observe is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), early, late)

    return Hypergradient(run, second_order=last > 0)


def annealed(updates: int, first: Hypergradient | None = None, then: Hypergradient | None = None) -> Hypergradient:
    """`first` for so many updates of the outer loop, `then` afterwards: derivative-order annealing (Antoniou et al., 2019).

    Args:
      updates: of the outer loop, 0 or more.
      first: default `first_order`.
      then: default `unrolled`.
    """
    check_count(updates=updates, least=0)
    first, then = first_order() if first is None else first, unrolled() if then is None else then

    def run(loop, carry, observe):
        def branch(how):
            # recomputes nothing; without it the branches save different things, and jax 0.10 makes a program of them that
            # does not verify
            return jax.checkpoint(lambda c: how.run(loop, c, observe), policy=jax.checkpoint_policies.everything_saveable)

        return lax.cond(loop.update < updates, branch(first), branch(then), carry)

    return Hypergradient(run, first.second_order or then.second_order, first.of_steps and then.of_steps)


def implicit(strength: float, solve: Solve | None = None) -> Hypergradient:
    """iMAML (Rajeswaran et al., 2019, eq. 4 and 6): of phi* = argmin L_support(phi) + strength/2 |phi - theta|^2.

    The inner steps lower that objective, and the derivative is that of its exact minimiser, whatever the steps were:
    d phi*/d theta = (I + H/strength)^-1, with H the Hessian of the support loss at the last phi. Memory does not depend
    on the steps. Params that do not adapt have their derivative through the same equation; learned rates have none, and are
    refused. With `per_step` normalisation H is that of the set which the queries have.

    Args:
      strength: lambda of the proximal term, positive.
      solve: `conjugate_gradients` (default) or `neumann`, for the linear system.
    """
    if concrete(strength) and not strength > 0:
        raise ValueError(f"strength={strength}: must be positive; an inner loop without a pull to the start is unrolled()")
    solve = conjugate_gradients() if solve is None else solve

    def run(loop, carry, observe):
        del observe  # refused by `maml`: there is no derivative through the steps to observe
        if isinstance(loop.steps, int) and loop.steps == 0:  # no problem was solved, so no minimiser is differentiated
            return carry, None
        theta, start = carry.fast, lax.stop_gradient(carry)

        def pull(fast):
            return strength / 2 * optax.tree.norm(optax.tree.sub(fast, start.fast), squared=True)

        done, _ = _steps(lambda c: loop.step(c, lax.stop_gradient, pull), start, 0, loop.steps, None)
        if not isinstance(loop.steps, int):  # nothing is differentiated
            return done, None
        done = lax.stop_gradient(done)

        def residual(given, fast, theta):  # zero at the minimiser, whose derivative is therefore -A^-1 of this one's
            slope = jax.grad(loop.loss, argnums=1)(given, fast, done)
            return jax.tree.map(lambda g, f, t: g + strength * (f - t), slope, fast, theta)

        fixed = lax.stop_gradient(loop.given)

        def matvec(v):
            return jax.jvp(lambda fast: residual(fixed, fast, start.fast), (done.fast,), (v,))[1]

        here = residual(loop.given, done.fast, theta)
        nothing = jax.tree.map(lambda r: lax.stop_gradient(r) - r, here)  # zero, with the derivative of -residual
        shift = lax.custom_linear_solve(matvec, nothing, solve, symmetric=True)
        return done._replace(fast=jax.tree.map(jnp.add, done.fast, shift)), None

    return Hypergradient(run, second_order=False, of_steps=False)


def conjugate_gradients(iterations: int = 5) -> Solve:
    """At most so many iterations of conjugate gradients from zero."""
    check_count(iterations=iterations)
    return lambda matvec, b: jax.scipy.sparse.linalg.cg(matvec, b, maxiter=iterations)[0]


def neumann(terms: int, rate: float) -> Solve:
    """The first `terms` terms of A^-1 = rate * sum_k (I - rate A)^k (Lorraine et al., 2020); rate below 2 / |A|."""
    check_count(terms=terms)

    def solve(matvec, b):
        def add(carry):
            k, term, total = carry
            term = jax.tree.map(lambda t, m: t - rate * m, term, matvec(term))
            return k + 1, term, jax.tree.map(jnp.add, total, term)

        def more(carry):  # a right-hand side of zero, as in the forward pass, costs nothing
            return (carry[0] < terms) & jnp.any(jnp.stack([jnp.any(t != 0) for t in jax.tree.leaves(carry[1])]))

        return jax.tree.map(lambda t: rate * t, lax.while_loop(more, add, (jnp.ones((), jnp.int32), b, b))[2])

    return solve


def _steps(step, carry, start, stop, observe, checkpoint=False):
    """Steps `start` to `stop`; a number of steps that is traced cannot be differentiated, a single one is not recomputed."""
    if not isinstance(stop, int):
        return lax.fori_loop(start, stop, lambda _, carry: step(carry), carry), None

    def body(carry, _):
        carry = step(carry)
        return carry, None if observe is None else observe(carry)

    if stop - start == 1:  # outside of a loop: tasks begin with the same params, and their rows go through one product
        carry, seen = body(carry, None)
        return carry, jax.tree.map(lambda leaf: leaf[None], seen)
    return lax.scan(jax.checkpoint(body) if checkpoint else body, carry, length=stop - start)
