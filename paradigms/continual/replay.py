"""Replay with forwards of its own: the losses of the stream and of what a memory replays stay apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paradigms.batch import rows, unweighted, weigh
from paradigms.continual import incoming
from paradigms.continual.memory import Memory, by_task
from paradigms.continual.scenario import class_incremental, present
from paradigms.model import Model
from paradigms.objective import Batch, Context, Objective, Tree, concrete, hide, own
from paradigms.supervised import supervised

Counts = Callable[[Batch, Context], jax.Array]


def all_rows(batch: Batch, ctx: Context) -> jax.Array:
    """Every replayed row counts, those of the present task too."""
    del ctx
    return jnp.ones(rows(batch), bool)


def earlier(batch: Batch, ctx: Context) -> jax.Array:
    """The rows of tasks that have ended, by the leaf "task": A-GEM asks nothing of the present one (Chaudhry et al., 2019).

    Raises:
      ValueError: the rows have no "task".
    """
    return by_task(batch) < ctx.task


def replay(
    child: Objective,
    memory: Memory,
    size: int | None = None,
    weight: float = 1.0,
    replayed: Objective | None = None,
    counts: Counts = all_rows,
    name: str = "memory",
) -> Objective:
    """Experience replay in two forwards: the losses on the stream plus `weight` times those on `size` replayed rows.

    Each has a mean of its own, where `rehearsal` has one over both, and the losses stay apart: an aggregator (`agem`) can
    tell them by the name. Rows are inserted once the update is made, as in `rehearsal`. Batch statistics (the slot "model"
    of the state) see the stream and then the replayed rows, two batches; every other slot of the child (queues, memories)
    the stream alone. While the memory is empty the replayed losses are 0 and change nothing: the child exactly.
    Predictions and boundaries are the child's.

    Order: ``replay(augmented(x, ...), memory)`` stores plain rows and augments them anew each time. A penalty inside is
    counted in both losses, ``replay(ewc(x), memory)``; outside once, ``ewc(replay(x, memory))``.

    Args:
      child: what the stream is trained on; for episodes a row is a task.
      memory: what is kept and drawn, such as `reservoir`.
      size: rows replayed a step. Default: as many as the batch has. 0 is the child.
      weight: of the replayed losses, 0 or more; 0 is the child (but for batch statistics).
      replayed: what the replayed rows are trained on, over the child's own slots. Default: the child.
      counts: ``(replayed rows, ctx) -> (rows,) bool``, which of them count: `all_rows` or `earlier`. A draw is not repeated
        for those that do not.
      name: the slot of ``state``: {"kept": the memory, "incoming": the rows of this step}.

    Returns:
      an objective with the child's losses, and those on the replayed rows as "name/loss"; likewise ``aux``.

    Raises:
      ValueError: a negative size or weight, or (at init) leaves of the batch that differ in rows.
    """
    check_size(size)
    if concrete(weight) and weight < 0:
        raise ValueError(f"weight={weight}: must be 0 or more")
    inner = hide(child, name)
    second = inner if replayed is None else hide(replayed, name)

    def init(key, batch):
        params, state = child.init(key, batch)
        return params, own(state, name, incoming.init(memory, batch))

    def losses(params, state, batch, ctx):
        slot, n = state[name], rows(batch) if size is None else size
        values, (state, aux) = inner.losses(params, state, batch, ctx)
        if n == 0:
            return values, ({**state, name: incoming.wait(slot, batch, ())}, aux)
        past, valid = drawn(memory, slot["kept"], batch, ctx.fold(name).key, n)
        valid = valid * counts(past, ctx)
        again, (moved, more) = second.losses(params, state, weigh(past, valid), ctx.fold(f"{name}/losses"))
        some = jnp.any(valid > 0)
        for loss, value in again.items():
            values = own(values, f"{name}/{loss}", jnp.where(some, weight * value, 0))
        told = {f"{name}/{metric}": value for metric, value in more.items() if metric != "per_example"}
        state = {**passed(state, moved, some), name: incoming.wait(slot, batch, past)}
        return values, (state, {**aux, **told})

    return inner._replace(init=init, losses=losses, after=storing(inner, memory, name))


def er_ace(model: Model, memory: Memory, table: Any, size: int | None = None, name: str = "memory") -> Objective:
    """Replay with asymmetric cross-entropy (Caccia et al., 2022): a stream that does not push old classes away.

    On the stream only the classes present in the batch compete, on replayed rows all that were seen so far.

    Args:
      model: the network, one head for all classes.
      memory, size, name: as in `replay`.
      table: (tasks, classes) bool, the classes of each task.
    """
    stream = supervised(model, active=class_incremental(table, present(table)))
    return replay(stream, memory, size, replayed=supervised(model, active=class_incremental(table)), name=name)


# ---- what every objective with replayed forwards shares


def check_size(size: int | None) -> None:
    """Raises a ValueError where `size` is negative."""
    if size is not None and size < 0:
        raise ValueError(f"size={size}: must be 0 or more")


def drawn(memory: Memory, kept: Tree, batch: Batch, key: jax.Array, n: int) -> tuple[Batch, jax.Array]:
    """`n` rows of the memory and their weights (n,): 1, and 0 where the memory had none and a row of `batch` stands in.

    A network never sees rows that are no rows: zeros can make gradients that are not finite.
    """
    count = rows(batch)
    old, valid = memory.sample(kept, key, n)

    def fill(old, new):
        new = jnp.asarray(new)[jnp.arange(n) % count].astype(old.dtype)
        return jnp.where(valid.reshape(-1, *[1] * (old.ndim - 1)), old, new)

    return jax.tree.map(fill, old, unweighted(batch)), valid.astype(jnp.float32)


def passed(state: Tree, moved: Tree, some: jax.Array) -> Tree:
    """`state` with the batch statistics that a further forward has moved, where there were rows for it."""
    if "model" not in state:
        return state
    return {**state, "model": jax.tree.map(lambda new, old: jnp.where(some, new, old), moved["model"], state["model"])}


def storing(inner: Objective, memory: Memory, name: str) -> Callable:
    """The ``after`` that moves the rows of the step into the memory."""

    def after(params, state, update, ctx):
        params, state = inner.after(params, state, update, ctx)
        slot = state[name]
        # the write waits for every gradient, by a term that is always 0: with an aggregator there are several reads of the
        # memory, and `incoming.wait` knows of one; else XLA copies the memory
        made = sum(jnp.sum(leaf.ravel()[:1], dtype=jnp.float32) for leaf in jax.tree.leaves(update.grads))
        late = {**slot["incoming"], "weight": slot["incoming"]["weight"] + (jnp.abs(made) > jnp.inf)}
        slot = incoming.store(memory, {**slot, "incoming": late}, ctx.fold(f"{name}/insert").key)
        return params, {**state, name: slot}

    return after
