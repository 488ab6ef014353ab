"""The network of few-shot learning."""

import math

from flax import nnx

from paradigms.nn.layers import (
    Chain,
    Layers,
    Normalize,
    Numbers,
    average_pool,
    check_image,
    convolution,
    current_batch_norm,
    flatten,
    linear_head,
    max_pool,
    outputs,
)


class Conv4(nnx.Module):
    """Four blocks of convolution, normalisation and ReLU: the network of few-shot learning (Vinyals et al., 2016).

    ``pool=False`` halves by stride 2 and averages the positions that are left, as MAML does on Omniglot (Finn et al.,
    2017); ``pool=True`` halves by 2x2 max-pooling and keeps the positions, as on miniImageNet (``image=(84, 84, 3),
    channels=32, pool=True``: features (B, 800)) and in Prototypical Networks (64 channels). ``features``: (B, channels),
    with ``pool`` times the positions left.

    Parameters by default: 112,261.

    Args:
      image: (height, width, channels) of the images; with ``pool`` height and width at least 16, without it images of
        other sizes are taken as well.
      classes: number of logits; 0 for none, the features alone.
      channels: of each convolution.
      pool: max-pooling rather than strides.
      norm: normalisation, by default by the statistics of the batch at hand; ``batch_norm`` keeps running averages.
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: with ``pool`` images other than ``image``, other
        channels, or integers other than uint8.
    """

    def __init__(
        self,
        image=(28, 28, 1),
        classes=5,
        *,
        channels=64,
        pool=False,
        norm=current_batch_norm,
        mean: Numbers = 0.0,
        std: Numbers = 1.0,
        dtype=None,
        rngs,
    ):
        check_image(image, 16 if pool else 1)
        height, width, depth = image
        layers: Layers = {"normalize": Normalize(mean, std, dtype, image if pool else None)}
        for index in range(1, 5):
            layers[f"conv{index}"] = convolution(depth, channels, 3, 1 if pool else 2, use_bias=True, dtype=dtype, rngs=rngs)
            layers[f"norm{index}"] = norm(channels, dtype=dtype, rngs=rngs)
            layers[f"relu{index}"] = nnx.relu
            if pool:
                layers[f"pool{index}"] = max_pool
            depth = channels
        layers["flatten"] = flatten if pool else average_pool
        features = channels * (math.prod(n // 16 for n in (height, width)) if pool else 1)
        self.encoder = Chain(**layers)
        self.head = linear_head(features, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)
