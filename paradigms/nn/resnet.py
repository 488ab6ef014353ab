"""Residual networks: ResNet, pre-activation ResNet and WideResNet.

They take images (B, H, W, channels) of any size, as float32 in [0, 1] or uint8, and return ``{"features", "logits"}``
in float32; ``classes=0`` leaves the head out. The features are the last maps averaged over their positions.
"""

from flax import nnx

from paradigms.nn.layers import (
    Chain,
    Layers,
    Normalize,
    Numbers,
    average_pool,
    batch_norm,
    convolution,
    dropout_layer,
    linear_head,
    outputs,
)

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Residual(nnx.Module):
    """``after(shortcut(before(x)) + branch(before(x)))``; with ``raw_shortcut`` the shortcut skips ``before``."""

    def __init__(self, branch, shortcut=None, before=None, after=None, raw_shortcut=False):
        self.branch, self.shortcut, self.before, self.after = branch, shortcut, before, after
        self.raw_shortcut = raw_shortcut

    def __call__(self, x, *, rngs=None):
        """(B, H, W, C) to (B, H / stride, W / stride, features)."""
        ready = x if self.before is None else self.before(x)
        kept = x if self.raw_shortcut else ready
        kept = kept if self.shortcut is None else self.shortcut(kept)
        total = kept + self.branch(ready, rngs=rngs)
        return total if self.after is None else self.after(total)


def _basic(inside, outside, stride, dtype, rngs):
    """Two 3x3 convolutions, ReLU after the sum."""
    make = {"dtype": dtype, "rngs": rngs}
    return Chain(
        conv1=convolution(inside, outside, 3, stride, padding=1, **make),
        norm1=batch_norm(outside, **make),
        relu1=nnx.relu,
        conv2=convolution(outside, outside, 3, padding=1, **make),
        norm2=batch_norm(outside, **make),
    )


def _bottleneck(inside, outside, stride, dtype, rngs):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions at a quarter of the width."""
    make = {"dtype": dtype, "rngs": rngs}
    width = outside // 4
    return Chain(
        conv1=convolution(inside, width, 1, **make),
        norm1=batch_norm(width, **make),
        relu1=nnx.relu,
        conv2=convolution(width, width, 3, stride, padding=1, **make),
        norm2=batch_norm(width, **make),
        relu2=nnx.relu,
        conv3=convolution(width, outside, 1, **make),
        norm3=batch_norm(outside, **make),
    )


def _overlapping_max_pool(x):
    return nnx.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])  # pyright: ignore[reportArgumentType]


class ResNet(nnx.Module):
    """ResNet of depth 18, 34 or 50 (He et al., 2016a).

    ``features``: (B, 8 * width), or (B, 32 * width) at depth 50.

    Parameters by default: 11,173,962. With ``stem="imagenet", classes=1000``: 11,689,512 at depth 18 and 25,557,032
    at 50.

    Args:
      depth: 18, 34 or 50.
      classes: number of logits; 0 for none, the features alone.
      channels: of the images.
      stem: "cifar", a 3x3 convolution, or "imagenet", a 7x7 convolution of stride 2 and 3x3 max-pooling.
      stem_padding: of the CIFAR stem; solo-learn's networks use 2.
      width: channels of the first stage; each later stage doubles them.
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: images of other channels, or integers other than
        uint8.
    """

    def __init__(
        self,
        depth=18,
        classes=10,
        *,
        channels=3,
        stem="cifar",
        stem_padding=1,
        width=64,
        mean: Numbers = 0.0,
        std: Numbers = 1.0,
        dtype=None,
        rngs,
    ):
        if depth not in _BLOCKS:
            raise ValueError(f"depth={depth} is not one of {tuple(_BLOCKS)}")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem={stem!r} is neither 'cifar' (3x3, stride 1) nor 'imagenet' (7x7, stride 2, max-pooling)")
        make = {"dtype": dtype, "rngs": rngs}
        small = stem == "cifar"
        layers = {
            "normalize": Normalize(mean, std, dtype),
            "conv": convolution(channels, width, padding=stem_padding, **make)
            if small
            else convolution(channels, width, 7, 2, 3, **make),
            "norm": batch_norm(width, **make),
            "relu": nnx.relu,
        }
        if not small:
            layers["pool"] = _overlapping_max_pool
        branch, factor = (_bottleneck, 4) if depth >= 50 else (_basic, 1)
        inside = width
        for stage, blocks in enumerate(_BLOCKS[depth]):
            outside = factor * width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                shortcut = None
                if stride != 1 or inside != outside:
                    shortcut = Chain(conv=convolution(inside, outside, 1, stride, **make), norm=batch_norm(outside, **make))
                layers[f"stage{stage + 1}_block{block + 1}"] = Residual(
                    branch(inside, outside, stride, **make), shortcut, after=nnx.relu
                )
                inside = outside
        self.encoder = Chain(**layers, average=average_pool)
        self.head = linear_head(inside, classes, **make)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)


def _preactivation(inside, outside, stride, dropout, dtype, rngs):
    """Normalisation and ReLU first; a shortcut that changes shape takes their result, the identity the raw input."""
    make = {"dtype": dtype, "rngs": rngs}
    branch = Chain(
        conv1=convolution(inside, outside, 3, stride, padding=1, **make),
        norm=batch_norm(outside, **make),
        relu=nnx.relu,
        dropout=dropout_layer(dropout),
        conv2=convolution(outside, outside, 3, padding=1, **make),
    )
    change = stride != 1 or inside != outside
    shortcut = convolution(inside, outside, 1, stride, **make) if change else None
    before = Chain(norm=batch_norm(inside, **make), relu=nnx.relu)
    return Residual(branch, shortcut, before=before, raw_shortcut=not change)


def _preactivation_network(stages, blocks, classes, channels, width, dropout, mean, std, dtype, rngs):
    """The stem, the stages (widths) of pre-activation blocks, the last normalisation; and the head."""
    make = {"dtype": dtype, "rngs": rngs}
    layers: Layers = {"normalize": Normalize(mean, std, dtype), "conv": convolution(channels, width, padding=1, **make)}
    inside = width
    for stage, outside in enumerate(stages):
        for block in range(blocks[stage]):
            stride = 2 if stage and not block else 1
            layers[f"stage{stage + 1}_block{block + 1}"] = _preactivation(inside, outside, stride, dropout, **make)
            inside = outside
    encoder = Chain(**layers, norm=batch_norm(inside, **make), relu=nnx.relu, average=average_pool)
    return encoder, linear_head(inside, classes, **make)


class PreActResNet(nnx.Module):
    """Pre-activation ResNet of depth 18 or 34 with the CIFAR stem (He et al., 2016b), used in adversarial training.

    With the last normalisation that Rice et al. (2020) and Wong et al. (2020) use. ``features``: (B, 8 * width).

    Parameters by default: 11,172,170.

    Args:
      depth: 18 or 34.
      classes: number of logits; 0 for none, the features alone.
      channels: of the images.
      width: channels of the first stage; each later stage doubles them.
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: images of other channels, or integers other than
        uint8.
    """

    def __init__(
        self, depth=18, classes=10, *, channels=3, width=64, mean: Numbers = 0.0, std: Numbers = 1.0, dtype=None, rngs
    ):
        if depth not in (18, 34):
            raise ValueError(f"depth={depth} is not one of (18, 34)")
        stages = tuple(width * 2**stage for stage in range(4))
        self.encoder, self.head = _preactivation_network(
            stages, _BLOCKS[depth], classes, channels, width, 0.0, mean, std, dtype, rngs
        )

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)


class WideResNet(nnx.Module):
    """WideResNet (Zagoruyko and Komodakis, 2016): three stages of pre-activation blocks, from ``16 * widen`` channels.

    ``features``: (B, 64 * widen).

    Parameters by default: 36,479,194.

    Args:
      depth: 6 n + 4 for n blocks a stage: 10, 16, 22, 28, ...
      widen: factor of the channels.
      classes: number of logits; 0 for none, the features alone.
      channels: of the images.
      dropout: the share of values dropped in training between the two convolutions of a block, in [0, 1).
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: images of other channels, or integers other than
        uint8.
    """

    def __init__(
        self,
        depth=28,
        widen=10,
        classes=10,
        *,
        channels=3,
        dropout=0.0,
        mean: Numbers = 0.0,
        std: Numbers = 1.0,
        dtype=None,
        rngs,
    ):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth} is not 6 * n + 4; pass 10, 16, 22, 28, 34 or 40")
        stages, blocks = tuple(16 * widen * 2**stage for stage in range(3)), ((depth - 4) // 6,) * 3
        self.encoder, self.head = _preactivation_network(stages, blocks, classes, channels, 16, dropout, mean, std, dtype, rngs)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)
