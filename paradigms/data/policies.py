"""RandAugment and TrivialAugment: random operations out of a fixed list. Conventions as in `augment.py`."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from paradigms.data.augment import rotation, warp
from paradigms.data.bind import Bound, bind
from paradigms.data.colour import blend, luma

_BINS = 30  # magnitudes are counted 0 to 30, as in the reference implementations

# Largest strengths of the two papers: shear, shift (share of the width, or pixels), angle in degrees, factor of
# colour, contrast, brightness and sharpness, and how many bits posterise removes.
_RANDAUGMENT = (0.3, ("share", 150 / 331), 30.0, 0.9, 4)
_TRIVIAL = (0.99, ("pixels", 32.0), 135.0, 0.99, 6)


def randaugment(n: int = 2, m: int = 9) -> Bound:
    """`n` operations drawn uniformly with replacement, all at magnitude `m` (Cubuk et al. 2020).

    The list is identity, autocontrast, equalise, posterise, solarise, colour, contrast, brightness, sharpness, rotate,
    shear and shift along each axis; signed operations draw their sign. What a warp moves in is zero. Ranges as in
    torchvision. Every operation is computed for every example and one kept, since examples differ inside one program.

    Args:
      n: how many operations, >= 0; 0 is the identity.
      m: magnitude, 0 to 30.

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where n or m is outside its range.
    """
    if n < 0:
        raise ValueError(f"n is {n} operations, must be >= 0 (0 is the identity)")
    if not 0 <= m <= _BINS:
        raise ValueError(f"m is {m}, must be in [0, {_BINS}]: the magnitude is counted in thirtieths of the range")
    return bind(_randaugment, n, m)


def _randaugment(key, x, n, m):
    def once(x, key):
        return _apply(jax.random.uniform(key, (2,), x.dtype), x, jnp.asarray(m / _BINS, x.dtype), _RANDAUGMENT), None

    return lax.scan(once, x, jax.random.split(key, n))[0] if n else x


def trivial_augment() -> Bound:
    """One operation of RandAugment's list at a magnitude uniform in 0 to 30, wide ranges (Müller & Hutter 2021).

    Returns:
      The function `(key, x) -> x` of one image.
    """
    return bind(_trivial_augment)


def _trivial_augment(key, x):
    uniform = jax.random.uniform(key, (3,), x.dtype)
    return _apply(uniform[:2], x, jnp.floor(uniform[2] * (_BINS + 1)) / _BINS, _TRIVIAL)


def _apply(uniform, x, magnitude, ranges):
    op = jnp.floor(uniform[0] * _COUNT).astype(jnp.int32)
    sign = jnp.where(uniform[1] < 0.5, -1, 1).astype(x.dtype)
    return operation(x, op, magnitude, sign, ranges)


def operation(x, op, magnitude, sign, ranges=_RANDAUGMENT):
    """Operation number `op` (int scalar, 0 to 13) on one image, at `magnitude` in [0, 1] and `sign` -1 or 1.

    Args:
      x: (H, W, C) float in [0, 1].
      op: index into identity, shear x, shear y, shift x, shift y, rotate, autocontrast, equalise, posterise, solarise,
        colour, contrast, brightness, sharpness.
      magnitude, sign: float scalars.
      ranges: largest strengths, RandAugment's or TrivialAugment's.

    Returns:
      (H, W, C).
    """
    shear, (unit, shift), degrees, factor, bits = ranges
    signed = magnitude * sign
    pixels = signed * shift * (jnp.array(x.shape[:2], x.dtype) if unit == "share" else jnp.ones(2, x.dtype))
    turned = rotation(signed * jnp.asarray(math.radians(degrees), x.dtype))
    one, zero, sheared = jnp.ones((), x.dtype), jnp.zeros((), x.dtype), signed * shear
    matrix = jnp.stack([one, jnp.where(op == 2, sheared, zero), jnp.where(op == 1, sheared, zero), one]).reshape(2, 2)
    matrix = jnp.where(op == 5, turned, matrix)
    offset = jnp.where(op == jnp.array([4, 3]), pixels, 0)
    # One warp serves all five geometric operations: under vmap each branch of a switch would be paid for.
    x = jnp.where((op >= 1) & (op <= 5), warp(x, matrix, offset), x)
    strength = 1 + signed * factor
    return lax.switch(
        jnp.maximum(op - 5, 0),
        (
            lambda x: x,
            autocontrast,
            equalise,
            lambda x: posterise(x, 8 - jnp.round(magnitude * bits)),
            lambda x: jnp.where(x >= 1 - magnitude, 1 - x, x),
            lambda x: blend(x, luma(x), strength),
            lambda x: blend(x, luma(x).mean(axis=(0, 1), keepdims=True), strength),
            lambda x: blend(x, 0.0, strength),
            lambda x: blend(x, smooth(x), strength),
        ),
        x,
    )


_COUNT = 14


def autocontrast(x):
    """Each channel stretched so that it spans [0, 1]; a constant channel stays.

    Args:
      x: (H, W, C) float.

    Returns:
      (H, W, C).
    """
    low, high = x.min(axis=(0, 1), keepdims=True), x.max(axis=(0, 1), keepdims=True)
    span = high - low
    return jnp.where(span > 0, (x - low) / jnp.where(span > 0, span, 1), x)


def equalise(x):
    """Each channel with its histogram of 256 levels made flat, as PIL's `equalize`.

    Args:
      x: (H, W, C) float in [0, 1].

    Returns:
      (H, W, C).
    """
    levels = jnp.round(jnp.clip(x, 0, 1) * 255).astype(jnp.int32)
    channels = jnp.broadcast_to(jnp.arange(x.shape[-1]), levels.shape)
    counts = jnp.zeros((256, x.shape[-1]), jnp.int32).at[levels, channels].add(1)
    last = jnp.take_along_axis(counts, levels.max(axis=(0, 1))[None, :], axis=0)  # (1, C): count of the top level
    step = (x.shape[0] * x.shape[1] - last) // 255
    table = jnp.clip((step // 2 + jnp.cumsum(counts, axis=0) - counts) // jnp.maximum(step, 1), 0, 255)
    return jnp.where((step > 0)[None], table[levels, channels].astype(x.dtype) / 255, x)


def posterise(x, bits):
    """Only the upper bits of 256 levels kept.

    Args:
      x: float in [0, 1], of any shape.
      bits: number scalar, 0 to 8, may be traced.

    Returns:
      As x.
    """
    unit = 2 ** (8 - bits)
    return jnp.floor(jnp.round(x * 255) / unit) * unit / 255


def smooth(x):
    """The 3 x 3 kernel (1 1 1, 1 5 1, 1 1 1) / 13, the border kept, as PIL's SMOOTH.

    Args:
      x: (H, W, C) float; smaller than 3 x 3 it stays.

    Returns:
      (H, W, C).
    """
    height, width, _ = x.shape
    if min(height, width) < 3:
        return x
    total = sum(x[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    return x.at[1:-1, 1:-1].set((total + 4 * x[1:-1, 1:-1]) / 13)
