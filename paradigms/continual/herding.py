"""Herding: the few rows whose mean of features follows the mean of all, in the order of their use; and the memory of them."""

import jax
import jax.numpy as jnp

from paradigms.continual.memory import Groups, Memory, at_least_one, by_label, slotted


def herding(features: jax.Array, weight: jax.Array, n: int) -> jax.Array:
    """Rows chosen one by one so that the mean of the chosen is near the mean of all (Rebuffi et al., 2017, algorithm 4).

    p_k = argmin_x |mu - (phi(x) + sum_{j<k} phi(p_j)) / k|, no row twice, phi unit vectors and mu their mean made a unit
    vector again. As |phi| = 1, that is argmax_x phi(x) . (k mu - sum_{j<k} phi(p_j)). Any first rows of the order are
    what herding fewer rows gives.

    Args:
      features: (rows, width), normalised here.
      weight: (rows,), 0 or False is a row that does not take part.
      n: how many, 1 or more.

    Returns:
      (n,) int32 numbers of rows, the best first; -1 where no row is left.
    """
    real, phi = weight > 0, unit(features)
    mean = unit(jnp.sum(jnp.where(real[:, None], phi, 0), 0))

    def pick(k, carry):
        order, left, chosen = carry
        gain = phi @ ((k + 1) * mean - chosen)
        best = jnp.argmax(jnp.where(left, gain, -jnp.inf)).astype(jnp.int32)
        order = order.at[k].set(jnp.where(jnp.any(left), best, -1))
        return order, left.at[best].set(False), chosen + phi[best]

    start = jnp.full(n, -1, jnp.int32), real, jnp.zeros_like(mean)
    return jax.lax.fori_loop(0, n, pick, start)[0]


def herded(capacity: int, classes: int, most: int | None = None, new: int | None = None, of: Groups = by_label) -> Memory:
    """Keeps of each class the rows that `herding` chooses, as many of each (Rebuffi et al., 2017, algorithms 4 and 5).

    For whole classes at a boundary, not for a stream: the classes of a batch are chosen anew among its rows, by its leaf
    "features" (rows, width), which is not stored; those stored before keep their first ``capacity // classes so far`` rows.
    Rows of class c are slots ``c * most`` and those behind it, the best first. Replay is uniform over all that is stored.

    Args:
      capacity: rows of all classes together, at least one for each class that will come.
      classes: number of classes, 1 or more. Rows of other classes are not stored.
      most: slots of a class, 1 or more: the rows of one class where fewer have come. Default: ``capacity // classes``.
      new: classes that one batch may have, of more those of the highest numbers are not stored. Default: `classes`; each
        costs a choice of `most` rows, whether or not it is there.
      of: ``batch -> (rows,) int``, the class of each row.

    Raises:
      ValueError: a number below 1, by default a capacity of less than one row a class, or (at insert) no leaf "features".
    """
    at_least_one(capacity=capacity, classes=classes)
    if most is None and capacity < classes:
        raise ValueError(f"capacity={capacity}: must be at least {classes}, one row a class")
    most, new = (capacity // classes if most is None else most), (classes if new is None else new)
    at_least_one(most=most, new=new)

    def place(book, batch, real, key):
        del key
        if "features" not in batch:
            raise ValueError(f'batch: has no leaf "features" (leaves: {sorted(batch)}) to choose by')
        group = of(batch).astype(jnp.int32)  # slots are numbers far beyond the labels
        real, nowhere = real & (group >= 0) & (group < classes), len(group)
        here = jnp.unique(jnp.where(real, group, classes), size=min(new, nowhere), fill_value=classes)
        chosen = jax.lax.map(lambda c: herding(batch["features"], real & (group == c), most), here)
        slots = here[:, None] * most + jnp.arange(most)[None]
        slot = jnp.full(nowhere, classes * most).at[jnp.where(chosen < 0, nowhere, chosen)].set(slots, mode="drop")
        count = book["count"].at[here].set(jnp.sum(chosen >= 0, 1, dtype=jnp.int32), mode="drop")
        return slot, {"count": jnp.minimum(count, capacity // jnp.maximum(jnp.sum(count > 0), 1))}

    start = lambda: {"count": jnp.zeros(classes, jnp.int32)}
    memory = slotted(start, place, lambda book: book["count"], most, classes)
    stored = lambda batch: {name: leaf for name, leaf in batch.items() if name != "features"}
    return memory._replace(init=lambda batch: memory.init(stored(batch)))


def unit(vectors: jax.Array) -> jax.Array:
    """Vectors (..., width) divided by their lengths; a zero stays zero."""
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(vectors**2, -1, keepdims=True), 1e-24))
