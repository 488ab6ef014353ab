"""Learned rates of the inner loop: factors of its optimizer's updates that the outer loop trains."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paradigms.data.checks import check_count
from paradigms.objective import Tree, concrete


class Rates(NamedTuple):
    """Rates with values of their own; with ``optax.sgd(1.0)`` as the inner optimizer they are its learning rates.

    Attributes:
      init: ``(key, fast) -> values``.
      at: ``(values, i) -> factors`` of the updates of step `i`, an array or scalar for each array of ``fast``.
    """

    init: Callable[[jax.Array, Tree], Tree]
    at: Callable[[Tree, jax.Array], Tree]


def per_parameter(low: float = 0.005, high: float = 0.1) -> Rates:
    """A rate for every number: Meta-SGD (Li et al., 2017, eq. 3). They start uniform in [low, high] and may turn negative.

    Meta-SGD is ``maml(child, optax.sgd(1.0), 1, rates=per_parameter())``.
    """
    if concrete(low) and concrete(high) and not low <= high:
        raise ValueError(f"low={low}, high={high}: low must not exceed high")

    def init(key, fast):
        leaves, structure = jax.tree.flatten(fast)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.uniform(k, a.shape, a.dtype, low, high) for k, a in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    return Rates(init, lambda values, i: values)


def per_tensor_and_step(rate: float, steps: int) -> Rates:
    """A rate for every array and step, all starting at `rate`: LSLR of MAML++ (Antoniou et al., 2019, section 4).

    Args:
      rate: where they start.
      steps: inner steps of training, as many as `maml` makes. Steps beyond them, in an evaluation, take the last of the
        steps + 1 rates, which that training never uses and so stays `rate`.
    """
    check_count(steps=steps)

    def init(key, fast):
        del key
        return jax.tree.map(lambda leaf: jnp.full(steps + 1, rate, leaf.dtype), fast)

    return Rates(init, lambda values, i: jax.tree.map(lambda rates: rates[jnp.minimum(i, steps)], values))
