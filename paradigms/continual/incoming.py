"""The rows of a step wait in the state until the update is made: what every replaying objective does with its memory.

A slot is ``{"kept": the memory, "incoming": the rows of this step}``. ``losses`` puts rows in by `wait`, ``after`` moves them
into the memory by `store`: a step that is skipped stores nothing, and copies no memory. There is room for as many rows a
step as the batch of init had.
"""

import jax
import jax.numpy as jnp

from paradigms.batch import rows, unweighted
from paradigms.continual.memory import Memory
from paradigms.objective import Batch, Tree, copy


def init(memory: Memory, batch: Batch) -> Tree:
    """The slot of an empty memory.

    Raises:
      ValueError: leaves of the batch that differ in rows.
    """
    if len({leaf.shape[0] for leaf in jax.tree.leaves(batch)}) > 1:
        raise ValueError(f"batch: leaves have {jax.tree.map(len, batch)} rows; what is stored together must agree in rows")
    none = {"rows": copy(unweighted(batch)), "weight": jnp.zeros(rows(batch)), "count": jnp.zeros((), jnp.int32)}
    return {"kept": memory.init(batch), "incoming": none}


def wait(slot: Tree, batch: Batch, replayed: Tree) -> Tree:
    """The slot with the rows of a batch, or of a part of one (a micro-batch), behind those it has of this step.

    Args:
      batch: rows of weight 0 are padding and will not be stored.
      replayed: everything that was read from the memory in this step.
    """
    # the write waits for the read, by a term that is always 0 (nothing exceeds inf); else XLA copies the memory
    read = sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(replayed))
    count, waiting = rows(batch), slot["incoming"]
    weight = batch.get("weight", jnp.ones(count)) + (jnp.abs(read) > jnp.inf)
    place = waiting["count"] + jnp.arange(count)
    put = lambda old, leaf: old.at[place].set(leaf.astype(old.dtype), mode="drop")
    held = {"rows": waiting["rows"], "weight": waiting["weight"]}
    new = jax.tree.map(put, held, {"rows": unweighted(batch), "weight": weight})
    return {**slot, "incoming": {**new, "count": waiting["count"] + count}}


def store(memory: Memory, slot: Tree, key: jax.Array, told: "Batch | None" = None) -> Tree:
    """The slot with the waiting rows in the memory, and none waiting.

    Args:
      told: further leaves, one row for each waiting row, that the policy of the memory asks for and that are not stored.
    """
    waiting = slot["incoming"]
    kept = memory.insert(slot["kept"], {**waiting["rows"], **(told or {}), "weight": waiting["weight"]}, key)
    none = {**waiting, "weight": jnp.zeros_like(waiting["weight"]), "count": jnp.zeros_like(waiting["count"])}
    return {"kept": kept, "incoming": none}
