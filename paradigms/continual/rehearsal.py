"""Rehearsal: training on the stream together with what a memory replays."""

import jax
import jax.numpy as jnp

from paradigms.batch import rows, weigh
from paradigms.continual.memory import Memory
from paradigms.objective import Objective, hide, own


def rehearsal(child: Objective, memory: Memory, size: int | None = None, name: str = "memory") -> Objective:
    """Experience replay: the child's losses on the batch joined with `size` replayed rows (Chaudhry et al., 2019).

    One forward over the joint batch, whose mean is over stream and replay alike; the stream's rows are inserted after.
    While the memory is empty the replayed rows repeat the stream's at weight 0, which equals the child exactly (a child
    with batch statistics: where `size` is a multiple of the batch). Predictions and boundaries are the child's.

    Order: ``rehearsal(adversarial(x))`` stores clean rows, ``adversarial(rehearsal(x))`` stores attacked ones.

    Args:
      child: any objective; for episodes a row is a task.
      memory: what is kept and drawn, such as `reservoir`.
      size: rows replayed a step. Default: as many as the batch has. 0 is the child.
      name: the slot of ``state`` that holds the memory.

    Raises:
      ValueError: a negative size, or (at init) leaves of the batch that differ in rows.
    """
    if size is not None and size < 0:
        raise ValueError(f"size={size}: must be 0 or more")
    inner = hide(child, name)

    def init(key, batch):
        if len({leaf.shape[0] for leaf in jax.tree.leaves(batch)}) > 1:
            raise ValueError(f"batch: leaves have {jax.tree.map(len, batch)} rows; what is stored together must agree in rows")
        params, state = child.init(key, batch)
        return params, own(state, name, memory.init(batch))

    def losses(params, state, batch, ctx):
        count = rows(batch)
        n = count if size is None else size
        draw, place = jax.random.split(ctx.fold(name).key)
        replayed, valid = memory.sample(state[name], draw, n)
        stream = {leaf: value for leaf, value in batch.items() if leaf != "weight"}

        def join(new, old):
            fill = jnp.asarray(new)[jnp.arange(n) % count]
            old = jnp.where(valid.reshape(-1, *[1] * (old.ndim - 1)), old, fill)
            return jnp.concatenate([new, old.astype(new.dtype)])

        weight = jnp.concatenate([batch.get("weight", jnp.ones(count)), valid.astype(jnp.float32)])
        joint = weigh(jax.tree.map(join, stream, replayed), weight)
        values, (state, aux) = inner.losses(params, state, joint, ctx)
        # the write waits for the read, by a term that is always 0 (nothing exceeds inf); else XLA copies the buffer
        read = sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(replayed))
        stored = {**batch, "weight": weight[:count] + (jnp.abs(read) > jnp.inf)}
        return values, ({**state, name: memory.insert(state[name], stored, place)}, aux)

    return inner._replace(init=init, losses=losses)
