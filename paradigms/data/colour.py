"""Augmentations of one image's colours: jitter, greyscale, blur, solarise. Conventions as in `augment.py`."""

import math

import jax
import jax.numpy as jnp

from paradigms.data.augment import probability
from paradigms.data.bind import Bound, bind

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision


def luma(x):
    """The weighted sum of three channels (ITU-R BT.601); of any other number, their mean.

    Args:
      x: (H, W, C) float.

    Returns:
      (H, W, 1).
    """
    if x.shape[-1] == 3:
        return (x * jnp.array(_LUMA, x.dtype).reshape(1, 1, 3)).sum(axis=-1, keepdims=True)
    return x.mean(axis=-1, keepdims=True)


def blend(x, other, factor):
    """`other + factor * (x - other)` clipped to [0, 1].

    Args:
      x: (H, W, C) float.
      other: array or number that broadcasts against x.
      factor: float scalar: 1 gives x, 0 other, above 1 leads away from other.

    Returns:
      (H, W, C).
    """
    return jnp.clip(x + (factor - 1) * (x - other), 0, 1)


def colour_jitter(
    brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1, p: float = 1.0
) -> Bound:
    """Random brightness, contrast, saturation and hue, in this order, with probability p (Chen et al. 2020, SimCLR).

    torchvision draws the order of the four too; under vmap that would compute every order. Saturation and hue leave
    images that have not three channels as they are. All strengths 0 is the identity.

    Args:
      brightness, contrast, saturation: b >= 0; the factor is uniform in [max(0, 1 - b), 1 + b].
      hue: in [0, 0.5], turns of the colour circle; the shift is uniform in [-hue, hue].
      p: probability in [0, 1].

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where a strength or p is outside its range.
    """
    for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, must be finite and >= 0 (0 leaves it alone)")
    if not 0 <= hue <= 0.5:
        raise ValueError(f"hue is {hue}, must be in [0, 0.5] turns of the colour circle")
    return bind(_colour_jitter, float(brightness), float(contrast), float(saturation), float(hue), probability(p))


def _colour_jitter(key, x, brightness, contrast, saturation, hue, p):
    # One draw of all the numbers: each call of the generator compiles, and runs, a loop of its own on CPUs.
    uniform = jax.random.uniform(key, (5,), x.dtype)
    out = x
    if brightness:
        out = blend(out, 0.0, _factor(uniform[0], brightness))
    if contrast:
        out = blend(out, luma(out).mean(axis=(0, 1), keepdims=True), _factor(uniform[1], contrast))
    if saturation and x.shape[-1] == 3:
        out = blend(out, luma(out), _factor(uniform[2], saturation))
    if hue and x.shape[-1] == 3:
        out = shift_hue(out, hue * (2 * uniform[3] - 1))
    return jnp.where(uniform[4] < p, out, x)


def _factor(uniform, strength):
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * uniform


def shift_hue(x, turns):
    """The hue moved, value and chroma kept, as through HSV and back.

    Args:
      x: (H, W, 3) float in [0, 1].
      turns: float scalar, turns of the colour circle.

    Returns:
      (H, W, 3).
    """
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value, low = x.max(axis=-1), x.min(axis=-1)
    chroma = value - low
    safe = jnp.where(chroma == 0, 1, chroma)
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = (sixth + 6 * turns)[..., None] + jnp.array([5, 3, 1], x.dtype).reshape(1, 1, 3)
    sixth = sixth % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(sixth, 4 - sixth), 0, 1)


def greyscale(p: float = 0.2) -> Bound:
    """Replace every channel by the luma (ITU-R BT.601) at random.

    Args:
      p: probability in [0, 1]; 0 is the identity.

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where p is outside [0, 1].
    """
    return bind(_greyscale, probability(p))


def _greyscale(key, x, p):
    return jnp.where(jax.random.bernoulli(key, p), luma(x), x)


def blur(sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5, radius: int | None = None) -> Bound:
    """Gaussian blur of a standard deviation uniform in `sigma`, with probability p (Chen et al. 2020, appendix A).

    Args:
      sigma: (low, high), pixels, 0 < low <= high.
      p: probability in [0, 1]; 0 is the identity.
      radius: the kernel has 2 * radius + 1 taps; None is a twentieth of the height, at least 1, so that the kernel
        spans a tenth of the image as in the paper. The border is repeated.

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where sigma, p or radius is outside its range.
    """
    if not 0 < sigma[0] <= sigma[1]:
        raise ValueError(f"sigma is {sigma}, must be (low, high) with 0 < low <= high, in pixels")
    if radius is not None and radius < 1:
        raise ValueError(f"radius is {radius}, must be >= 1, or None for a twentieth of the height")
    return bind(_blur, tuple(sigma), probability(p), radius)


def _blur(key, x, sigma, p, radius):
    uniform = jax.random.uniform(key, (2,), x.dtype)
    radius = radius or max(1, x.shape[0] // 20)
    taps = jnp.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = jax.nn.softmax(-0.5 * (taps / (sigma[0] + (sigma[1] - sigma[0]) * uniform[0])) ** 2)
    padded = jnp.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    # Shifted slices: a convolution with one kernel an example would be a grouped one, far slower.
    rows = sum((kernel[i] * padded[i : i + x.shape[0]] for i in range(2 * radius + 1)), jnp.zeros((), x.dtype))
    both = sum(kernel[i] * rows[:, i : i + x.shape[1]] for i in range(2 * radius + 1))
    return jnp.where(uniform[1] < p, both, x)


def solarise(threshold: float = 0.5, p: float = 0.2) -> Bound:
    """Invert what is at or above a threshold, x to 1 - x, at random (BYOL, Grill et al. 2020).

    Args:
      threshold: a pixel value; above 1 nothing is inverted.
      p: probability in [0, 1]; 0 is the identity.

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where threshold is NaN or p outside [0, 1].
    """
    if math.isnan(threshold):
        raise ValueError("threshold is nan, must be a pixel value, as a rule in [0, 1]")
    return bind(_solarise, float(threshold), probability(p))


def _solarise(key, x, threshold, p):
    return jnp.where(jax.random.bernoulli(key, p) & (x >= threshold), 1 - x, x)
