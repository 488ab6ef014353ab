"""Augmentations of one image's geometry: crop, flip, translate, rotate, random-resized crop, cutout.

Every factory here and in `colour.py` and `policies.py` returns a pure function `(key, x) -> x` of one image x
(H, W, C) float32 in [0, 1], same shape and dtype out, to `jax.vmap` over keys and images (`augment` does) inside the
jitted step. Functions built with equal settings compare equal, so rebuilding them does not recompile.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paradigms.data.bind import Bound, bind

_MODES = ("constant", "reflect", "edge", "symmetric", "wrap")


def crop(padding: int = 4, mode: str = "constant") -> Bound:
    """Pad by `padding` pixels on each side, cut a window of the original size at random (He et al. 2016, section 4.2).

    Args:
      padding: pixels, >= 0; 0 is the identity.
      mode: of `jnp.pad`: "constant" (zeros), "reflect", "edge", "symmetric" or "wrap".

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where padding is negative or the mode is another.
    """
    if padding < 0:
        raise ValueError(f"padding is {padding} pixels, must be >= 0 (0 switches the crop off)")
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}, must be one of {', '.join(_MODES)}")
    return bind(_crop, padding, mode)


def _crop(key, x, padding, mode):
    if padding == 0:
        return x
    padded = jnp.pad(x, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return _window(padded, top, left, x.shape)


def _window(x, top, left, shape):
    # Rows, then columns: two gathers of whole slices. A batched dynamic_slice becomes a scalar loop on CPUs.
    rows = jnp.take(x, top + jnp.arange(shape[0]), axis=0, mode="clip")
    return jnp.take(rows, left + jnp.arange(shape[1]), axis=1, mode="clip")


def translate(pixels: int) -> Bound:
    """Shift by up to `pixels` whole pixels along each axis, uniformly; what moves in is zero.

    Args:
      pixels: >= 0; 0 is the identity.

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where pixels is negative.
    """
    if pixels < 0:
        raise ValueError(f"pixels is {pixels}, must be >= 0 (0 switches the translation off)")
    return bind(_crop, pixels, "constant")


def flip(p: float = 0.5) -> Bound:
    """Mirror left and right at random.

    Args:
      p: probability in [0, 1]; 0 is the identity.

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where p is outside [0, 1].
    """
    return bind(_flip, probability(p))


def _flip(key, x, p):
    return jnp.where(jax.random.bernoulli(key, p), x[:, ::-1], x)


def rotate(degrees: float) -> Bound:
    """Turn about the centre by an angle uniform in [-degrees, degrees], bilinear, zeros outside.

    Args:
      degrees: finite, >= 0; 0 is the identity.

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where degrees is negative, NaN or infinite.
    """
    if not 0 <= degrees < math.inf:
        raise ValueError(f"degrees is {degrees}, must be finite and >= 0: the angle is drawn from [-degrees, degrees]")
    return bind(_rotate, float(degrees))


def _rotate(key, x, degrees):
    angle = jax.random.uniform(key, (), x.dtype, -1, 1) * jnp.asarray(math.radians(degrees), x.dtype)
    return warp(x, rotation(angle), jnp.zeros(2, x.dtype))


def rotation(angle):
    """The (2, 2) matrix, rows first, that makes `warp` turn the picture counter-clockwise.

    Args:
      angle: float scalar, in radians.

    Returns:
      (2, 2) of its dtype.
    """
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])


def warp(x, matrix, offset):
    """The image whose pixel at p is x at `centre + matrix @ (p - centre) + offset`, bilinear, zeros outside.

    Args:
      x: (H, W, C) float.
      matrix: (2, 2) float, acting on (row, column).
      offset: (2,) float, in pixels.

    Returns:
      (H, W, C), of x's dtype.
    """
    height, width, channels = x.shape
    rows = jnp.arange(height, dtype=x.dtype)[:, None] - (height - 1) / 2
    columns = jnp.arange(width, dtype=x.dtype)[None, :] - (width - 1) / 2
    row = matrix[0, 0] * rows + matrix[0, 1] * columns + ((height - 1) / 2 + offset[0])
    column = matrix[1, 0] * rows + matrix[1, 1] * columns + ((width - 1) / 2 + offset[1])
    top, left = jnp.floor(row), jnp.floor(column)
    down, right = row - top, column - left
    flat, out = x.reshape(-1, channels), jnp.zeros_like(x)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        i, j = top + dy, left + dx
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        weight = (down if dy else 1 - down) * (right if dx else 1 - right)
        # Far outside, the float would not fit the integer: clip before the cast.
        index = jnp.clip(i, 0, height - 1).astype(jnp.int32) * width + jnp.clip(j, 0, width - 1).astype(jnp.int32)
        out += jnp.where(inside, weight, 0)[..., None] * flat[index]
    return out


def random_resized_crop(scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Bound:
    """Cut a box of random area and aspect, resize it to the full size, bilinear (Szegedy et al. 2015).

    Ten boxes are drawn as in torchvision and the first that fits is used; where none does, the whole image is.

    Args:
      scale: range of the box's share of the area, in (0, 1]. (1, 1) with ratio (1, 1) is the identity on squares.
      ratio: range of width / height, > 0, uniform in the logarithm.

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where a range is empty or outside its bounds.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}, must be (low, high) with 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio is {ratio}, must be (low, high) with 0 < low <= high")
    return bind(_random_resized_crop, tuple(scale), tuple(ratio))


def _random_resized_crop(key, x, scale, ratio):
    height, width, _ = x.shape
    # One draw of all the numbers: each call of the generator compiles, and runs, a loop of its own on CPUs.
    uniform = jax.random.uniform(key, (22,), x.dtype)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[:10])
    aspect = jnp.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * uniform[10:20])
    boxes = jnp.round(jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)]))
    whole = jnp.array([height, width], x.dtype)
    fits = ((boxes >= 1) & (boxes <= whole[:, None])).all(axis=0)
    box = jnp.where(fits.any(), boxes[:, jnp.argmax(fits)], whole)
    place = jnp.floor(uniform[20:] * (whole - box + 1))
    place = jnp.minimum(place, whole - box)
    return resize(x, place, box)


def resize(x, place, box):
    """A box of the image stretched to the image's own (H, W).

    Bilinear with half-pixel centres, clamped at the border of the box; as two matrix products, which beat gathers.

    Args:
      x: (H, W, C) float.
      place: (2,) float, the box's upper left corner, (row, column) in pixels.
      box: (2,) float, its height and width, in pixels.

    Returns:
      (H, W, C).
    """
    rows = _interpolation(x.shape[0], place[0], box[0], x.dtype)
    columns = _interpolation(x.shape[1], place[1], box[1], x.dtype)
    return jnp.einsum("ab,bdc,ed->aec", rows, x, columns, precision=lax.Precision.HIGHEST)


def _interpolation(size, start, length, dtype):
    """(size, size): row i holds the weights of the source pixels of output pixel i."""
    pixels = jnp.arange(size, dtype=dtype)
    at = jnp.clip((pixels + 0.5) * (length / size) - 0.5, 0, length - 1) + start
    return jnp.maximum(0, 1 - jnp.abs(at[:, None] - pixels[None, :]))


def cutout(size: int, fill: float | tuple[float, ...] = 0.0) -> Bound:
    """Blank a square of side `size` centred on a uniform pixel, clipped at the border (DeVries & Taylor 2017).

    Args:
      size: pixels, >= 0; 0 is the identity.
      fill: value in [0, 1], or one a channel; the paper's zero after normalisation is the mean of the data.

    Returns:
      The function `(key, x) -> x` of one image.

    Raises:
      ValueError: where size is negative or fill outside [0, 1].
    """
    if size < 0:
        raise ValueError(f"size is {size} pixels, must be >= 0 (0 switches cutout off)")
    if not ((np.asarray(fill) >= 0) & (np.asarray(fill) <= 1)).all():
        raise ValueError(f"fill is {fill}, must be in [0, 1], as the images are, or one such value a channel")
    return bind(_cutout, size, fill)


def _cutout(key, x, size, fill):
    height, width, channels = x.shape
    top, left = jax.random.randint(key, (2,), 0, jnp.array([height, width])) - size // 2
    fill = jnp.broadcast_to(jnp.asarray(fill, x.dtype), (channels,)).reshape(1, 1, channels)
    return jnp.where(box_mask(height, width, top, left, top + size, left + size)[..., None], fill, x)


def box_mask(height, width, top, left, bottom, right):
    """The mask of a box, which may reach outside.

    Args:
      height, width: of the image, static ints.
      top, left, bottom, right: number scalars, may be traced; bottom and right are the first outside.

    Returns:
      (H, W) bool, true inside the box.
    """
    rows, columns = jnp.arange(height), jnp.arange(width)
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None, :]


def probability(p: float) -> float:
    """A probability, checked.

    Args:
      p: in [0, 1].

    Returns:
      `p` as a float.

    Raises:
      ValueError: where it lies outside.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}, must be a probability in [0, 1]")
    return float(p)
