"""Threat models: which perturbations of an input an adversary may choose."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paradigms.objective import concrete


class Threat(NamedTuple):
    """A set of perturbations, an example a row of the first axis.

    Attributes:
      radius: size of the set, in the units of the input (pixels in [0, 1]).
      start: ``(key, x) -> delta``, uniform in the set.
      direction: ``grad -> delta``, the steepest ascent of unit size under the set's norm.
      project: ``delta -> delta``, the nearest point of the set.
    """

    radius: float
    start: Callable[[jax.Array, jax.Array], jax.Array]
    direction: Callable[[jax.Array], jax.Array]
    project: Callable[[jax.Array], jax.Array]


def linf(radius: float) -> Threat:
    """max |delta_i| <= radius (Goodfellow et al., 2015)."""
    _check(radius)

    def start(key, x):
        return radius * jax.random.uniform(key, x.shape, x.dtype, -1, 1)

    return Threat(radius, start, jnp.sign, lambda delta: jnp.clip(delta, -radius, radius))


def l2(radius: float) -> Threat:
    """|delta|_2 <= radius for each example. The start is uniform in the ball: a direction times U^(1/d)."""
    _check(radius)

    def start(key, x):
        to, far = jax.random.split(key)
        size = x[0].size
        distance = jax.random.uniform(far, x.shape[:1], x.dtype) ** (1 / size)
        return radius * _rows(distance, x) * direction(jax.random.normal(to, x.shape, x.dtype))

    def direction(grad):
        # first to a largest entry of 1: the squares of a confident network's gradients underflow
        largest = jnp.max(jnp.abs(grad.reshape(grad.shape[0], -1)), -1)
        grad = grad / _rows(jnp.where(largest > 0, largest, 1), grad)
        return grad / _rows(jnp.maximum(_norm(grad), 1e-12), grad)

    def project(delta):
        return delta * _rows(jnp.minimum(1, radius / jnp.maximum(_norm(delta), 1e-12)), delta)

    return Threat(radius, start, direction, project)


def _check(radius):
    if concrete(radius) and not radius >= 0:
        raise ValueError(f"radius={radius}: must be 0 or more, in the units of the input")


def _norm(x):
    return jnp.sqrt(jnp.sum(x.reshape(x.shape[0], -1) ** 2, -1))


def _rows(values, like):
    return values.reshape(-1, *[1] * (like.ndim - 1))
