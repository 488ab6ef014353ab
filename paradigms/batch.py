"""What a batch is, and the few ways in which wrappers look into one.

A batch is a dict whose leaves all have the example axis first: ``x`` and, where they apply, ``y``, ``task``, ``weight``
(float, 0 is padding) and ``index``. An episode is ``{"support": batch, "query": batch}`` under a leading task axis, with
an optional ``weight`` a task; a query set with the leaf ``beside`` begins with the rows of the support set. A batch for
several objectives is a dict of batches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from paradigms.objective import Batch, Tree


def rows(batch: Batch) -> int:
    """The number of examples (tasks, for episodes)."""
    return jax.tree.leaves(batch)[0].shape[0]


def weighted_mean(values: jax.Array, batch: Batch) -> jax.Array:
    """The mean of `values` (examples, ...) under ``batch["weight"]``: sum(w v) / sum(w), and 0 where every weight is 0.

    Weights are (examples,), or as fine as the values, such as one a token; axes they do not have are averaged.

    Raises:
      ValueError: weights of another shape.
    """
    if "weight" not in batch:
        return jnp.mean(values)
    wide = jnp.promote_types(values.dtype, jnp.float32)  # in float16 the sum of a batch overflows
    weight = batch["weight"].astype(wide)
    if weight.shape != values.shape[: weight.ndim]:
        raise ValueError(f"batch: weight has shape {weight.shape} for values of shape {values.shape}; give one an example")
    values = jnp.mean(values, tuple(range(weight.ndim, values.ndim)), dtype=wide)
    return (jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), jnp.finfo(wide).tiny)).astype(values.dtype)


def weigh(batch: Batch, weight: jax.Array) -> Batch:
    """`batch` with its weights multiplied by `weight` (examples,), at the level that holds examples or episodes."""
    if "x" in batch or "support" in batch:
        return {**batch, "weight": batch["weight"] * weight if "weight" in batch else weight}
    return {name: weigh(part, weight) for name, part in batch.items()}


def unweighted(batch: Batch) -> Batch:
    """`batch` without its weights of examples or episodes."""
    return {name: leaf for name, leaf in batch.items() if name != "weight"}


def inputs(batch: Batch) -> Tree:
    """The leaves called "x", wherever the batch holds them: what an attack may change."""
    found = {name: leaf if name == "x" else inputs(leaf) for name, leaf in batch.items() if _holds(name, leaf)}
    return {name: part for name, part in found.items() if not isinstance(part, dict) or part}


def with_inputs(batch: Batch, x: Tree) -> Batch:
    """`batch` with the leaves that `inputs` found replaced by `x`."""
    return {
        name: (x[name] if name == "x" else with_inputs(leaf, x[name])) if name in x else leaf for name, leaf in batch.items()
    }


def on_inputs(function: Callable[[jax.Array], jax.Array], batch: Batch) -> Batch:
    """`batch` with `function` applied to every leaf called "x"."""
    return with_inputs(batch, jax.tree.map(function, inputs(batch)))


def _holds(name: str, leaf) -> bool:
    return name == "x" or isinstance(leaf, dict)
