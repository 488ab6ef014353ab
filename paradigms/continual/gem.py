"""Gradient episodic memory: updates that do not point against the gradients of what a memory holds (GEM, A-GEM)."""

import jax
import jax.numpy as jnp
import optax

from paradigms.batch import weigh
from paradigms.continual import incoming
from paradigms.continual.memory import Memory
from paradigms.continual.replay import storing
from paradigms.objective import Aggregator, Objective, Tree, concrete, hide, own, total


def agem(name: str = "memory") -> Aggregator:
    """g - (g'r / r'r) r where g'r < 0, else g (Chaudhry et al., 2019, eq. 11), r the gradient on replayed rows.

    ``Trainer(replay(child, ring(...), counts=earlier), optimizer, agem())``: g sums the gradients of the losses outside the
    memory, r those of the losses "name/...", which only say where not to go and are not trained on; without `earlier` what
    is remembered of the present task has its say too. Where r is 0 (nothing is remembered), g. The optimizer comes after: its
    momentum and its scaling are not held to the constraint.

    Args:
      name: of the `replay`; inside `multitask` with the task, "task/memory".

    Raises:
      ValueError: (at init) no loss has that name.
    """

    def combine(grads, losses, state, ctx):
        del losses, ctx
        stream, past = _split(grads, name)
        g, r = _sum(stream), _sum(past)
        dot, square = jnp.asarray(optax.tree.vdot(g, r)), jnp.asarray(optax.tree.vdot(r, r))
        step = jnp.where(dot < 0, dot / jnp.where(square > 0, square, 1), 0)
        return jax.tree.map(lambda g, r: g - step.astype(g.dtype) * r, g, r), state

    return Aggregator(lambda params, names: _named(names, name), combine)


def gem(margin: float = 0.5, name: str = "memory", ridge: float = 1e-3) -> Aggregator:
    """min over x of |x - g|^2 with x'g_t >= 0 for every past task t (Lopez-Paz and Ranzato, 2017, eq. 8).

    Solved by its dual: v = argmin over v >= margin of 1/2 v'GG'v + g'G'v, x = g + G'v (eq. 11), G the gradients of the
    losses "name/...", one a task (`episodic_memory`), g the sum of the others. Only where some g'g_t < 0; else x = g.
    ``Trainer(episodic_memory(child, ring(256, 20), 20), optimizer, gem())``. A loss without gradient, such as that of a
    task that has not come, is no constraint. Needs the inner products alone, and solves on the device.

    Args:
      margin: 0 or more; more than 0 moves towards what is remembered (the paper's memory strength). With 0, a ridge of 0
        and one loss in the memory it is `agem`.
      name: of the `episodic_memory`.
      ridge: added to the diagonal of GG', as in the authors' code; 0 is eq. 11.

    Raises:
      ValueError: a negative margin or ridge, or (at init) no loss has that name.
    """
    for setting, value in (("margin", margin), ("ridge", ridge)):
        if concrete(value) and value < 0:
            raise ValueError(f"{setting}={value}: must be 0 or more")

    def combine(grads, losses, state, ctx):
        del losses, ctx
        stream, past = _split(grads, name)
        g = _sum(stream)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *past)
        gram = _products(stacked, stacked)
        against = _products(stacked, jax.tree.map(lambda leaf: leaf[None], g))[:, 0]
        v = _dual(gram, against, margin, ridge)
        move = lambda g, each: g + jnp.tensordot(v.astype(g.dtype), each, 1, precision="highest")
        return jax.tree.map(move, g, stacked), state

    return Aggregator(lambda params, names: _named(names, name), combine)


def episodic_memory(child: Objective, memory: Memory, tasks: int, name: str = "memory") -> Objective:
    """The child's losses on the stream, and for each past task their sum on all its stored rows, "name/0", "name/1", ...

    For `gem`. Tasks are past from their "end" on; of the present and future ones, and of those without stored rows, the
    loss is 0 and so is its gradient. The tasks are gone through one after the other in a loop that skips those to come, and
    that makes losses and gradients together: the losses are given as linear in the params, with those values and
    gradients. So T of them cost T backward passes whoever differentiates them, and have no second derivative. Rows of the
    stream are inserted once the update is made. Batch statistics move on the stream alone.

    Args:
      child: what the stream is trained on.
      memory: keeps `tasks` blocks of equal size one behind the other: ``ring(size, tasks)``, by the leaf "task".
      tasks: how many will come, 1 or more.
      name: the slot of ``state``: {"kept": the memory, "incoming": the rows of this step}.

    Raises:
      ValueError: fewer than 1 task, or (at init) a memory that does not divide into as many blocks.
    """
    if tasks < 1:
        raise ValueError(f"tasks={tasks}: must be 1 or more")
    inner = hide(child, name)

    def init(key, batch):
        params, state = child.init(key, batch)
        slot = incoming.init(memory, batch)
        stored = jax.eval_shape(memory.stored, slot["kept"])[1].shape[0]
        if stored % tasks:
            raise ValueError(f"memory: has {stored} slots for {tasks} tasks; use ring(size, {tasks})")
        return params, own(state, name, slot)

    def losses(params, state, batch, ctx):
        slot = state[name]
        values, (new, aux) = inner.losses(params, state, batch, ctx)
        here = jax.lax.stop_gradient(params)

        def one(block):
            task, past, valid = block

            def loss(params):
                return total(inner.losses(params, state, weigh(past, valid), ctx.fold(name).fold(task))[0])

            nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(jax.value_and_grad(loss), here))
            return jax.lax.cond((task < ctx.task) & jnp.any(valid > 0), jax.value_and_grad(loss), lambda _: nothing, here)

        stored, valid = memory.stored(slot["kept"])
        blocks = jax.tree.map(lambda leaf: leaf.reshape(tasks, -1, *leaf.shape[1:]), (stored, valid.astype(jnp.float32)))
        at, slopes = jax.lax.map(one, (jnp.arange(tasks), *blocks))
        away = jax.tree.map(jnp.subtract, params, here)  # 0, with the derivative of params
        along = lambda slope, d: jnp.tensordot(slope, d, d.ndim, precision="highest")
        linear = at + sum(jax.tree.leaves(jax.tree.map(along, slopes, away)))
        for task in range(tasks):
            values = own(values, f"{name}/{task}", linear[task])
        # the state asks for nothing of the loop, or an aggregator, which asks for losses and state apart, would run it twice
        return values, ({**new, name: incoming.wait(slot, batch, ())}, aux)

    return inner._replace(init=init, losses=losses, after=storing(inner, memory, name))


def _named(names: tuple[str, ...], name: str) -> tuple:
    if not any(loss.startswith(f"{name}/") for loss in names):
        raise ValueError(f'losses: none is named "{name}/..." (losses: {list(names)}); train what replays from name="{name}"')
    return ()


def _split(grads: dict[str, Tree], name: str) -> tuple[list[Tree], list[Tree]]:
    """The gradients on the stream, and those on what is remembered."""
    past = [grad for loss, grad in grads.items() if loss.startswith(f"{name}/")]
    return [grad for loss, grad in grads.items() if not loss.startswith(f"{name}/")], past


def _sum(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *trees)


def _products(a: Tree, b: Tree) -> jax.Array:
    """(A, B) inner products of stacked trees, in float32 or wider."""

    def products(x, y):
        x, y = (leaf.reshape(leaf.shape[0], -1) for leaf in (x, y))
        return jnp.matmul(x, y.T, precision="highest", preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))

    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(products, a, b))))


def _dual(gram: jax.Array, against: jax.Array, margin, ridge) -> jax.Array:
    """argmin over v >= margin of 1/2 v'(gram + ridge)v + against'v; 0 where `against` is nowhere negative, or a row is 0."""
    size = jnp.diagonal(gram)
    real = size > 0
    unit = jnp.where(real, jax.lax.rsqrt(jnp.where(real, size + ridge, 1)), 0)  # tasks differ in scale: rows of length 1
    scaled = unit[:, None] * (gram + ridge * jnp.eye(len(size), dtype=gram.dtype)) * unit[None]
    # with v = margin + unit u: u >= 0 and the linear term that follows
    linear = unit * (against + margin * (jnp.where(real[None], gram, 0).sum(1) + ridge))
    u = nonnegative(scaled, linear, jnp.any(against < 0))
    return jnp.where(jnp.any(against < 0), jnp.where(real, margin + unit * u, 0), 0)


def nonnegative(p: jax.Array, c: jax.Array, needed: "jax.Array | bool" = True) -> jax.Array:
    """argmin over u >= 0 of 1/2 u'pu + c'u by active sets (Lawson and Hanson, 1974, chapter 23, on the normal equations).

    Args:
      p: (n, n) positive semidefinite, with ones on the diagonal, or zeros for variables that stay 0.
      c: (n,).
      needed: False returns zeros at once.

    Returns:
      (n,).
    """
    n, tiny = len(c), jnp.finfo(p.dtype).eps
    lifted = p + 4 * tiny * jnp.eye(n, dtype=p.dtype)  # parallel gradients share what they ask for

    def step(carry):
        u, free, fresh, barred, _, count = carry
        system = jnp.where(free[:, None] & free[None], lifted, jnp.eye(n, dtype=p.dtype))
        best = jnp.where(free, jnp.linalg.solve(system, jnp.where(free, -c, 0)), 0)
        low = free & (best <= 0)
        ratio = jnp.where(low, u / jnp.where(low, jnp.maximum(u - best, jnp.finfo(p.dtype).tiny), 1), 1)
        reach = jnp.min(ratio)  # how far to go until the first variable is 0
        out = low & (ratio <= reach)
        u, free = jnp.where(out, 0, u + reach * (best - u)), free & ~out
        # a variable that came in and goes out where it stood was let in by rounding: not again before another one moves
        barred = jnp.where(jnp.any(fresh & ~out), False, barred | (fresh & out))
        pull, noise = -(p @ u + c), 8 * tiny * (jnp.abs(p) @ u + jnp.abs(c))
        ready = ~jnp.any(low) & ~free & ~barred & (jnp.diagonal(p) > 0) & (pull > noise)
        fresh = ready & (jnp.arange(n) == jnp.argmax(jnp.where(ready, pull, -jnp.inf)))
        return u, free | fresh, fresh, barred, ~(jnp.any(low) | jnp.any(fresh)), count + 1

    none = jnp.zeros(n, bool)
    start = jnp.zeros_like(c), none, none, none, ~jnp.asarray(needed), jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(lambda carry: ~carry[4] & (carry[5] < 10 * n), step, start)[0]
