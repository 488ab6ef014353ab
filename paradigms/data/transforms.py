"""Transforms of a batch, `(key, batch) -> batch`: per-example augmentations lifted, mixtures, and their composition."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.data.augment import box_mask
from paradigms.data.bind import Bound, bind

_OF_IMAGES = tuple(f"paradigms.data.{name}" for name in ("augment", "colour", "policies"))


def pixels(x):
    """uint8 images as float32 in [0, 1], x times 1 / 255; other dtypes as they are.

    Args:
      x: array of any shape.

    Returns:
      x itself, or float32 of the same shape where it was uint8.
    """
    # A product: XLA turns a division by a constant into one anyway, and eager code would differ in the last bit.
    return x.astype(jnp.float32) * np.float32(1 / 255) if x.dtype == jnp.uint8 else x


def augment(*fns: Callable) -> Bound:
    """Per-example functions `(key, x) -> x`, applied in order to the leaf "x" of a batch, one key an example.

    Args:
      *fns: the augmentations of this package, which take images (H, W, C), or functions of your own. None given is the
        identity.

    Returns:
      `(key, batch) -> batch`. It raises ValueError where "x" is not floating, or not (B, H, W, C) for this package's
      augmentations; `pixels` makes floats of uint8.

    Raises:
      TypeError: where a function is not hashable.
    """
    return bind(_augment, fns)


def _augment(key, batch, fns):
    x = _floating(batch["x"], "augment")
    rows = x.shape[0]

    def one(key, x):
        for i, fn in enumerate(fns):
            # Here and not before: a function of one's own may come first and make images of rows.
            if isinstance(fn, Bound) and fn.fn.__module__ in _OF_IMAGES:
                _images((rows, *x.shape), "augment")
            x = fn(jax.random.fold_in(key, i), x)
        return x

    return {**batch, "x": jax.vmap(one)(jax.random.split(key, rows), x)}


def _floating(x, of):
    """x, checked: integers would be cut to 0 and 1 in silence."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'{of}: batch["x"] is {x.dtype}, must be floating: paradigms.data.pixels(x) makes [0, 1] of uint8')
    return x


def _images(shape, of):
    if len(shape) != 4:
        raise ValueError(
            f'{of}: batch["x"] has shape {shape}, must be floating images (B, H, W, C), as paradigms.data.pixels gives: '
            "reshape it, with a last axis of 1 where there are no channels"
        )


def chain(*transforms: Callable) -> Bound:
    """Transforms of a batch, one after the other, each with its own key.

    Args:
      *transforms: functions `(key, batch) -> batch`. None given is the identity.

    Returns:
      One such function.

    Raises:
      TypeError: where a transform is not hashable.
    """
    return bind(_chain, transforms)


def _chain(key, batch, transforms):
    for i, transform in enumerate(transforms):
        batch = transform(jax.random.fold_in(key, i), batch)
    return batch


def soft_labels(y, classes: int):
    """Labels as rows.

    Args:
      y: (B,) int, or (B, classes), which stays as it is.
      classes: number of classes.

    Returns:
      (B, classes) float32, one-hot. The row of a label outside [0, classes) is NaN: a traced value cannot raise, and
      zeros would train on, unseen.
    """
    if y.ndim != 1:
        return y
    rows = jax.nn.one_hot(y, classes, dtype=jnp.float32)
    return jnp.where(rows.any(axis=1, keepdims=True), rows, jnp.nan)


def mixup(alpha: float, classes: int) -> Bound:
    """Convex mixtures of the examples and of their labels (Zhang et al. 2018).

    x' = lam x + (1 - lam) x~ and the same for y, with one lam ~ Beta(alpha, alpha) a batch. x~ is the batch moved by
    one row: batches come in random order already, so no permutation (a sort) is drawn.

    Only "x" and "y" are mixed. Weights are not: a row of weight 0 may be mixed into its neighbour. A batch of one is
    unchanged, but for its label. A label outside [0, classes) makes its row and the next NaN, which the loss shows.

    Args:
      alpha: finite, >= 0; 0 leaves the examples as they are (labels still become rows).
      classes: number of classes; the labels come out as (B, classes) float32.

    Returns:
      `(key, batch) -> batch`, "x" floating of any shape. It raises ValueError where "x" is not floating.

    Raises:
      ValueError: where alpha is negative, NaN or infinite, or classes < 1.
    """
    return bind(_mixup, *_mixture(alpha, classes))


def _mixture(alpha, classes):
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}, must be finite and >= 0 (0 mixes nothing)")
    if classes < 1:
        raise ValueError(f"classes is {classes}, must be the number of classes, >= 1")
    return float(alpha), int(classes)


def _mixup(key, batch, alpha, classes):
    x, y = _floating(batch["x"], "mixup"), soft_labels(batch["y"], classes)
    if alpha == 0:
        return {**batch, "y": y}
    lam = jax.random.beta(key, alpha, alpha, dtype=x.dtype)
    mix = lambda a: lam.astype(a.dtype) * a + (1 - lam.astype(a.dtype)) * jnp.roll(a, 1, axis=0)
    return {**batch, "x": mix(x), "y": mix(y)}


def cutmix(alpha: float, classes: int) -> Bound:
    """A box of each image replaced by the same box of another, labels mixed by area (Yun et al. 2019).

    The box covers 1 - lam of the image, lam ~ Beta(alpha, alpha), around a uniform centre, clipped at the border; the
    labels use the area that is left after clipping. One box a batch; partners as in `mixup`.

    Only "x" and "y" are mixed. Weights are not: a row of weight 0 may be mixed into its neighbour. A batch of one is
    unchanged, but for its label. A label outside [0, classes) makes its row and the next NaN, which the loss shows.

    Args:
      alpha: finite, >= 0; 0 leaves the examples as they are (labels still become rows).
      classes: number of classes; the labels come out as (B, classes) float32.

    Returns:
      `(key, batch) -> batch`. It raises ValueError where "x" is not floating (B, H, W, C).

    Raises:
      ValueError: where alpha is negative, NaN or infinite, or classes < 1.
    """
    return bind(_cutmix, *_mixture(alpha, classes))


def _cutmix(key, batch, alpha, classes):
    x, y = _floating(batch["x"], "cutmix"), soft_labels(batch["y"], classes)
    _images(x.shape, "cutmix")
    if alpha == 0:
        return {**batch, "y": y}
    height, width = x.shape[1:3]
    of_lam, of_centre = jax.random.split(key)
    side = jnp.sqrt(1 - jax.random.beta(of_lam, alpha, alpha, dtype=x.dtype))
    size = jnp.array([height, width], x.dtype)
    centre = jnp.floor(jax.random.uniform(of_centre, (2,), x.dtype) * size)
    half = jnp.floor(side * size) / 2
    (top, left), (bottom, right) = jnp.floor(centre - half), jnp.floor(centre + half)
    mask = box_mask(height, width, top, left, bottom, right)
    share = mask.mean(dtype=y.dtype)
    mixed = jnp.where(mask[None, :, :, None], jnp.roll(x, 1, axis=0), x)
    return {**batch, "x": mixed, "y": (1 - share) * y + share * jnp.roll(y, 1, axis=0)}
