import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paradigms.data import augment as lift
from paradigms.data import (
    blur,
    chain,
    colour_jitter,
    crop,
    cutmix,
    cutout,
    flip,
    greyscale,
    mixup,
    randaugment,
    random_resized_crop,
    rotate,
    solarise,
    translate,
    trivial_augment,
)
from paradigms.data import augment as _  # noqa: F401
from paradigms.data.augment import resize, rotation, warp
from paradigms.data.colour import shift_hue
from paradigms.data.policies import autocontrast, equalise, operation, posterise

X = np.random.default_rng(0).random((9, 8, 3), np.float32)
KEYS = jax.random.split(jax.random.key(0), 40)


def _many(fn, x=X):
    return np.asarray(jax.jit(jax.vmap(fn, (0, None)))(KEYS, x))
