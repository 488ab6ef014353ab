"""The parts every network shares: input normalisation, convolution and normalisation layers, pooling, the chain.

A normalisation layer is an argument of the networks: a function ``norm(features, dtype=..., rngs=...)`` that returns a
module. ``batch_norm``, ``current_batch_norm``, ``last_batch_norm``, ``group_norm`` and ``no_norm`` are five.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from paradigms.nn.conv import conv2d

Numbers = float | Sequence[float]  # one, or one a channel
Padding = str | int | Sequence[tuple[int, int]]
Layers = dict[str, Callable[..., Any]]

he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Normalize(nnx.Module):
    """Images in [0, 1], or uint8 scaled by 1/255, to ``(x - mean) / std`` in the compute dtype.

    ``mean`` and ``std`` are numbers or one number a channel; they are constants, not parameters. As the first layer
    of a network it keeps the network's input in pixel units, which is what an attack's epsilon is measured in.

    Args:
      mean: subtracted; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the result; default that of the input, float32 for uint8.
      image: the shape of an example, (height, width, channels), or the number of its values; None takes any.

    Raises:
      ValueError: an entry of ``std`` is not positive; in the call: integers other than uint8, or an example that is not
        of ``image``.
    """

    def __init__(self, mean: Numbers = 0.0, std: Numbers = 1.0, dtype=None, image: int | Sequence[int] | None = None):
        self.mean, self.std = (tuple(float(value) for value in np.atleast_1d(given)) for given in (mean, std))
        self.dtype = dtype
        self.image = image if image is None else tuple(image) if isinstance(image, Sequence) else int(image)
        if min(self.std) <= 0:
            raise ValueError(f"std={std} has an entry that is not positive; pass the standard deviation of each channel")

    def __call__(self, x):
        """Normalise images (..., channels), or vectors with one mean and deviation."""
        shape = x.shape[1:]
        if self.image is not None and self.image != (math.prod(shape) if isinstance(self.image, int) else shape):
            want = f"{self.image} values" if isinstance(self.image, int) else f"image={self.image}"
            raise ValueError(f"x of shape {x.shape} has examples of {shape}, the network was built for {want}")
        if x.dtype == jnp.uint8:
            x = x.astype(jnp.float32) / 255
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x is {x.dtype}; pass floats in [0, 1], or uint8, which is scaled by 1/255")
        channels = (1,) * (x.ndim - 1) + (-1,)
        mean, std = (jnp.asarray(value, x.dtype).reshape(channels) for value in (self.mean, self.std))
        return ((x - mean) / std).astype(self.dtype or x.dtype)


class Chain(nnx.Module):
    """Named layers one after another; those that take ``rngs`` (dropout, other chains) are given them.

    The names are the paths of the parameters, so filters and checkpoints can refer to them.
    """

    def __init__(self, **layers):
        self.order = tuple(layers)
        self.random = tuple(name for name, f in layers.items() if "rngs" in inspect.signature(f).parameters)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x, *, rngs=None):
        """Apply the layers in order."""
        for name in self.order:
            layer = getattr(self, name)
            x = layer(x, rngs=rngs) if name in self.random else layer(x)
        return x


def outputs(encoder, head, x, rngs=None):
    """``{"features", "logits"}`` of a network in float32; without a head the features alone."""
    features = encoder(x, rngs=rngs)
    answer = {"features": features.astype(jnp.float32)}
    if head is not None:
        answer["logits"] = head(features).astype(jnp.float32)
    return answer


def check_image(image, smallest=1):
    """Raise ValueError unless ``image`` is (height, width, channels), height and width at least ``smallest``."""
    if len(image) != 3 or min(image[:2]) < smallest or image[2] < 1:
        raise ValueError(f"image={image} must be (height, width, channels), height and width at least {smallest}")


def dropout_layer(rate):
    """``nnx.Dropout(rate)``; raises ValueError for a rate outside [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout={rate} is not in [0, 1); pass the share of values to drop")
    return nnx.Dropout(rate)


def linear_head(features, classes, *, dtype=None, rngs, **options):
    """The last layer, or None where ``classes`` is 0: the network then gives its features alone.

    Args:
      features: of its input.
      classes: number of logits, or 0.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.
      **options: of ``nnx.Linear``.

    Raises:
      ValueError: ``classes`` is negative.
    """
    if classes < 0:
        raise ValueError(f"classes={classes} is negative; pass the number of classes, or 0 for a network without a head")
    return nnx.Linear(features, classes, dtype=dtype, rngs=rngs, **options) if classes else None


def convolution(
    in_features, features, size=3, strides=1, padding: Padding = "SAME", *, use_bias=False, dtype=None, rngs, **options: Any
):
    """A square ``nnx.Conv`` through :func:`conv2d`, He initialised (He et al., 2015)."""
    options = {"kernel_init": he_normal, **options}
    return nnx.Conv(
        in_features,
        features,
        (size, size),
        strides,
        padding=padding,
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=conv2d,
        rngs=rngs,
        **options,
    )


def batch_norm(features, *, momentum=0.9, epsilon=1e-5, dtype=None, rngs, **options):
    """Batch normalisation (Ioffe and Szegedy, 2015) with running averages for evaluation."""
    return nnx.BatchNorm(features, momentum=momentum, epsilon=epsilon, dtype=dtype, rngs=rngs, **options)


class CurrentBatchNorm(nnx.Module):
    """Batch normalisation by the batch at hand in training and evaluation alike; it carries no state.

    What MAML and its successors use: support batches normalise the inner steps, and the query batch itself (the
    transductive setting) the evaluation.
    """

    def __init__(self, features, *, epsilon=1e-5, use_scale=True, dtype=None, rngs=None):
        del rngs
        self.scale = nnx.Param(jnp.ones((features,))) if use_scale else None
        self.bias = nnx.Param(jnp.zeros((features,)))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x):
        """Normalise (..., features) over all other axes."""
        axes, channels = tuple(range(x.ndim - 1)), (1,) * (x.ndim - 1) + (-1,)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = self.statistics(wide.mean(axes), wide.var(axes))
        factor = lax.rsqrt(var.reshape(channels) + self.epsilon)
        if self.scale is not None:
            factor = factor * self.scale[...].reshape(channels)
        wide = (wide - mean.reshape(channels)) * factor + self.bias[...].reshape(channels)
        return wide.astype(self.dtype or x.dtype)

    def statistics(self, mean, var):
        """What normalises, from the mean and the variance of the batch at hand."""
        return mean, var


class LastBatchNorm(CurrentBatchNorm):
    """Batch normalisation whose statistics in evaluation are those of the last training batch, with their derivative.

    With `paradigms.meta.support_statistics` the queries of a task are normalised by its support set, and the meta-gradient
    goes through the statistics. (``nnx.BatchNorm`` of momentum 0 keeps the same numbers and cuts their derivative.)
    """

    def __init__(self, features, *, epsilon=1e-5, use_scale=True, dtype=None, rngs=None):
        super().__init__(features, epsilon=epsilon, use_scale=use_scale, dtype=dtype, rngs=rngs)
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))
        self.use_running_average = False

    def statistics(self, mean, var):
        """Those of the batch at hand, which are kept, or in evaluation the ones kept."""
        if self.use_running_average:
            return self.mean[...], self.var[...]
        self.mean[...], self.var[...] = mean, var
        return mean, var


def current_batch_norm(features, *, dtype=None, rngs=None):
    """:class:`CurrentBatchNorm` as a ``norm`` argument."""
    return CurrentBatchNorm(features, dtype=dtype, rngs=rngs)


def last_batch_norm(features, *, dtype=None, rngs=None):
    """:class:`LastBatchNorm` as a ``norm`` argument."""
    return LastBatchNorm(features, dtype=dtype, rngs=rngs)


def group_norm(features, *, groups=8, dtype=None, rngs):
    """Group normalisation (Wu and He, 2018): no batch statistics, so examples do not see each other.

    Args:
      features: channels, the last axis of the input.
      groups: number of groups of channels, each normalised by itself.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: ``groups`` does not divide ``features``.
    """
    if features % groups:
        raise ValueError(f"groups={groups} does not divide features={features}; pass a divisor")
    return nnx.GroupNorm(features, num_groups=groups, dtype=dtype, rngs=rngs)


def no_norm(features, *, dtype=None, rngs=None):
    """The identity, as a ``norm`` argument."""
    del features, dtype, rngs
    return lambda x: x


def flatten(x):
    """(B, ...) to (B, features)."""
    return x.reshape(x.shape[0], -1)


def average_pool(x):
    """The mean over all positions: (B, H, W, C) to (B, C), summed in float32."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def max_pool(x, window=2):
    """Maximum over square windows of (B, H, W, C) that do not overlap; rows and columns left over are dropped.

    A reshape and a maximum: the gradient of ``lax.reduce_window``, which scatters by comparison, is 3 times slower.

    Args:
      x: (B, H, W, C).
      window: height and width of a window, and its stride.

    Raises:
      ValueError: the images are smaller than a window.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    if min(rows, columns) < 1:
        raise ValueError(f"max_pool: x of shape {x.shape} is smaller than window={window}; use larger images or fewer pools")
    x = x[:, : rows * window, : columns * window]
    return x.reshape(batch, rows, window, columns, window, channels).max((2, 4))


def count_parameters(params):
    """The number of scalars in a tree of arrays, or of shapes from ``jax.eval_shape``."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
