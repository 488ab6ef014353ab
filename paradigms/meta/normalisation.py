"""Whose statistics normalise a task: those that thread through it, the support set's, or those of each inner step.

The layer decides the rest. ``nn.current_batch_norm`` keeps no statistics and normalises by the batch at hand, so queries
are answered together (transductive: each sees the others). ``nn.batch_norm`` keeps running averages, which normalise when
predicting. The modes here say what an inner loop does with statistics that are kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paradigms.data.checks import check_count
from paradigms.meta.parts import overlay, pick
from paradigms.objective import Tree


class Normalisation(NamedTuple):
    """How normalisation goes through the steps of a task.

    Attributes:
      init: ``(params, state) -> (own params, own state)``, both {} where it has none.
      enter: ``(i, params, state, own params, own state) -> (params, state)`` that step `i` sees.
      leave: ``(i, state, own state) -> own state`` after step `i`.
      of_support: the queries are normalised by the support set's statistics under the adapted params.
    """

    init: Callable[[Tree, Tree], tuple[Tree, Tree]]
    enter: Callable[..., tuple[Tree, Tree]]
    leave: Callable[..., Tree]
    of_support: bool = False


def threaded() -> Normalisation:
    """Statistics thread through a task's passes and are averaged over tasks; predictions use the running averages.

    With layers that keep none (``nn.current_batch_norm``) this is the transductive setting of Finn et al. (2017).
    """
    return Normalisation(
        lambda params, state: ({}, {}), lambda i, params, state, own, kept: (params, state), lambda i, state, kept: kept
    )


def support_statistics() -> Normalisation:
    """Queries are normalised by the statistics of the support set, in training and when predicting (inductive).

    After the last step the support set passes once more, through the adapted params, and sets the statistics; the queries
    then pass in evaluation mode, without dropout. It is for layers that keep the last batch's statistics,
    ``nn.last_batch_norm``; running averages (``nn.batch_norm``) the support set only moves a little.
    """

    def init(params, state):
        _kept(state, "nn.last_batch_norm for support_statistics")
        return {}, {}

    return threaded()._replace(init=init, of_support=True)


def per_step(steps: int) -> Normalisation:
    """Every inner step has running statistics, scales and biases of its own: BNRS and BNWB of MAML++ (Antoniou et al., 2019).

    They belong to the layers that keep statistics (``nn.batch_norm``). These scales and biases are learned in the outer
    loop and do not adapt, as in the paper.

    Args:
      steps: inner steps of training, 0 or more. Queries have the set with the number of steps made, at most ``steps``.
    """
    check_count(steps=steps, least=0)

    def init(params, state):
        kept = _kept(state, "nn.batch_norm for per_step")
        layers = {tuple(key.key for key in path[:-1]) for path, _ in jax.tree.leaves_with_path(kept)}
        own = pick(params, lambda path, leaf: path[0] == "model" and path[1:-1] in layers)
        return tuple(jax.tree.map(lambda leaf: jnp.stack([leaf] * (steps + 1)), part) for part in (own, kept))

    def enter(i, params, state, own, kept):
        own, kept = (jax.tree.map(lambda leaf: leaf[jnp.minimum(i, steps)], part) for part in (own, kept))
        return overlay(params, own), {**state, "model": overlay(state["model"], kept)}

    def leave(i, state, kept):
        new = pick(state["model"], _floats)
        return jax.tree.map(lambda stack, leaf: stack.at[jnp.minimum(i, steps)].set(leaf), kept, new)

    return Normalisation(init, enter, leave)


def _kept(state: Tree, norm: str) -> Tree:
    kept = pick(state.get("model", {}), _floats)
    if not kept:
        raise ValueError(f"normalisation: the network keeps no statistics; build it with norm={norm}")
    return kept


def _floats(path: tuple[str, ...], leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
