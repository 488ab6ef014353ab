"""What methods over episodes share: tasks side by side, what an episode must have, one row an example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.batch import rows, weighted_mean
from paradigms.objective import Batch, Context, Objective, Tree, concrete, merge


def each(function: Callable[[Context, Batch], Any], batch: Batch, ctx: Context) -> Any:
    """``function(ctx, episode)`` for every task of the batch under ``vmap``, each with keys of its own."""
    episodes = {part: batch[part] for part in ("support", "query")}
    return jax.vmap(lambda i, episode: function(ctx.fold(i), episode))(jnp.arange(rows(episodes)), episodes)


def flat(tree: Tree) -> Tree:
    """Leaves (tasks, rows, ...) as (tasks * rows, ...)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def together(episode: Batch) -> Batch:
    """One task's support rows and then its query rows, as one batch of the leaves that both have."""
    support, query = episode["support"], episode["query"]
    both = {name: (support[name], query[name]) for name in support if name in query}
    return {name: jax.tree.map(lambda *parts: jnp.concatenate(parts), *pair) for name, pair in both.items()}


def seen(episode: Batch) -> tuple[Batch, int]:
    """``(examples, asked)``: what passes through a network together, support rows first, and the first row to be answered.

    A query set that has the support rows beside it, and says so by a leaf "beside", is all there is to see.
    """
    if "beside" in episode["query"]:
        return {name: leaf for name, leaf in episode["query"].items() if name != "beside"}, 0
    return together(episode), rows(episode["support"])


def features(of: str, outputs: dict) -> jax.Array:
    """``outputs["features"]`` as (rows, width).

    Raises:
      ValueError: there are none; `of` is the argument to blame.
    """
    if "features" not in outputs:
        raise ValueError(
            f'{of}: gives {sorted(outputs)} and no "features"; take a network that returns {{"features": ...}}, as those of '
            "paradigms.nn do"
        )
    return outputs["features"].reshape(len(outputs["features"]), -1)


def mean_over_tasks(found: tuple[dict, Tree, dict], state: Tree, batch: Batch) -> tuple[dict, tuple[Tree, dict]]:
    """What ``losses`` returns, from the losses, states and aux of all tasks: means under the tasks' weights.

    Batch statistics are averaged over tasks, whatever their weights, and the rest of the state stays (see
    `paradigms.objective.merge`).
    """
    values, states, aux = found
    values, aux = ({name: weighted_mean(v, batch) for name, v in part.items()} for part in (values, aux))
    return values, (merge(state, states), aux)


def scalars(aux: dict) -> dict:
    """``aux`` without its reserved entry: what can be averaged over tasks."""
    return {name: value for name, value in aux.items() if name != "per_example"}


def init(of: str, child: Objective, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
    """``child.init`` on the first task's queries, after a check of the rows of all tasks.

    Args:
      of: the method, for errors.

    Raises:
      ValueError: the batch is no episode; what the child refuses.
    """
    require(of, batch)
    for part in ("support", "query"):
        if all(map(concrete, jax.tree.leaves(batch[part]))):  # the values of all tasks, not of the first alone
            examples = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), batch[part])
            jax.eval_shape(lambda key, examples=examples: child.init(key, examples), key)
    return child.init(key, jax.tree.map(lambda leaf: leaf[0], batch["query"]))


def require(of: str, batch: Batch) -> None:
    """Raises ValueError unless the batch has "support" and "query"."""
    for part in ("support", "query"):
        if part not in batch:
            raise ValueError(f'batch: {of} needs {{"support": ..., "query": ...}} and got leaves {sorted(batch)}')
