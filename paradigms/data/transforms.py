"""Transforms of a batch, `(key, batch) -> batch`: per-example augmentations lifted, mixtures, and their composition."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.data.augment import box_mask
from paradigms.data.bind import Bound, bind


def pixels(x):
    """uint8 images as float32 in [0, 1], x times 1 / 255; other dtypes as they are."""
    # A product: XLA turns a division by a constant into one anyway, and eager code would differ in the last bit.
    return x.astype(jnp.float32) * np.float32(1 / 255) if x.dtype == jnp.uint8 else x


def augment(*fns: Callable) -> Bound:
    """Per-example functions `(key, x) -> x`, applied in order to the leaf "x" of a batch, one key an example."""
    return bind(_augment, fns)


def _augment(key, batch, fns):
    def one(key, x):
        for i, fn in enumerate(fns):
            x = fn(jax.random.fold_in(key, i), x)
        return x

    x = batch["x"]
    return {**batch, "x": jax.vmap(one)(jax.random.split(key, x.shape[0]), x)}


def chain(*transforms: Callable) -> Bound:
    """Transforms of a batch, one after the other, each with its own key. None given is the identity."""
    return bind(_chain, transforms)


def _chain(key, batch, transforms):
    for i, transform in enumerate(transforms):
        batch = transform(jax.random.fold_in(key, i), batch)
    return batch


def soft_labels(y, classes: int):
    """Labels (B,) int as one-hot (B, classes) float32; labels that are rows already stay."""
    return jax.nn.one_hot(y, classes, dtype=jnp.float32) if y.ndim == 1 else y


def mixup(alpha: float, classes: int) -> Bound:
    """Convex mixtures of the examples and of their labels (Zhang et al. 2018).

    x' = lam x + (1 - lam) x~ and the same for y, with one lam ~ Beta(alpha, alpha) a batch. x~ is the batch moved by
    one row: batches come in random order already, so no permutation (a sort) is drawn. Only "x" and "y" are mixed.

    Args:
      alpha: >= 0; 0 leaves the examples as they are (labels still become rows).
      classes: number of classes; the labels come out as (B, classes) float32.

    Raises:
      ValueError: where alpha is negative or classes < 1.
    """
    return bind(_mixup, *_mixture(alpha, classes))


def _mixture(alpha, classes):
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}, must be >= 0 (0 mixes nothing)")
    if classes < 1:
        raise ValueError(f"classes is {classes}, must be the number of classes, >= 1")
    return float(alpha), int(classes)


def _mixup(key, batch, alpha, classes):
    x, y = batch["x"], soft_labels(batch["y"], classes)
    if alpha == 0:
        return {**batch, "y": y}
    lam = jax.random.beta(key, alpha, alpha, dtype=x.dtype)
    mix = lambda a: lam.astype(a.dtype) * a + (1 - lam.astype(a.dtype)) * jnp.roll(a, 1, axis=0)
    return {**batch, "x": mix(x), "y": mix(y)}


def cutmix(alpha: float, classes: int) -> Bound:
    """A box of each image replaced by the same box of another, labels mixed by area (Yun et al. 2019).

    The box covers 1 - lam of the image, lam ~ Beta(alpha, alpha), around a uniform centre, clipped at the border; the
    labels use the area that is left after clipping. One box a batch; partners as in `mixup`.

    Args:
      alpha: >= 0; 0 leaves the examples as they are (labels still become rows).
      classes: number of classes; the labels come out as (B, classes) float32.

    Raises:
      ValueError: where alpha is negative or classes < 1.
    """
    return bind(_cutmix, *_mixture(alpha, classes))


def _cutmix(key, batch, alpha, classes):
    x, y = batch["x"], soft_labels(batch["y"], classes)
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
