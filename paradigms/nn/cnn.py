"""Small convolutional networks for images of 28 to 84 pixels.

Every one takes ``image``, the (height, width, channels) of its input, as float32 in [0, 1] or uint8, and returns
``{"features", "logits"}`` in float32; ``classes=0`` leaves the head out.
"""

from typing import Any

from flax import nnx

from paradigms.nn.layers import (
    Chain,
    Layers,
    Normalize,
    Numbers,
    batch_norm,
    check_image,
    convolution,
    dropout_layer,
    flatten,
    linear_head,
    max_pool,
    outputs,
)


def _dense(in_features, features, dtype, rngs):
    return nnx.Linear(in_features, features, kernel_init=nnx.initializers.he_normal(), dtype=dtype, rngs=rngs)


class SmallCNN(nnx.Module):
    """3x3 convolutions, each with pooling and batch normalisation, and a hidden layer: the quick network for 28x28 images.

    Pooling comes before normalisation and ReLU, which commutes with ReLU and leaves a quarter of the values to
    normalise. ``features``: (B, hidden).

    Parameters by default: 421,834.

    Args:
      image: (height, width, channels) of the images, height and width at least 2 to the number of convolutions.
      classes: number of logits; 0 for none, the features alone.
      channels: of the convolutions, at least one.
      hidden: width of the hidden layer.
      dropout: the share of values dropped in training before and after the hidden layer, in [0, 1).
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: images other than ``image``, or integers other
        than uint8.
    """

    def __init__(
        self,
        image=(28, 28, 1),
        classes=10,
        *,
        channels=(32, 64),
        hidden=128,
        dropout=0.0,
        mean: Numbers = 0.0,
        std: Numbers = 1.0,
        dtype=None,
        rngs,
    ):
        if not channels:
            raise ValueError(f"channels={channels!r}: at least one convolution, for example (32, 64)")
        check_image(image, 2 ** len(channels))
        height, width, depth = image
        layers: Layers = {"normalize": Normalize(mean, std, dtype, image)}
        for index, features in enumerate(channels, 1):
            layers[f"conv{index}"] = convolution(depth, features, use_bias=True, dtype=dtype, rngs=rngs)
            layers[f"pool{index}"] = max_pool
            layers[f"norm{index}"] = batch_norm(features, dtype=dtype, rngs=rngs)
            layers[f"relu{index}"] = nnx.relu
            height, width, depth = height // 2, width // 2, features
        self.encoder = Chain(
            **layers,
            dropout1=dropout_layer(dropout),
            flatten=flatten,
            linear=_dense(height * width * depth, hidden, dtype, rngs),
            relu=nnx.relu,
            dropout2=dropout_layer(dropout),
        )
        self.head = linear_head(hidden, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)


class LeNet(nnx.Module):
    """LeNet-5 with ReLU and max-pooling (LeCun et al., 1998). ``features``: (B, 84).

    Parameters by default: 61,706.

    Args:
      image: (height, width, channels) of the images, height and width at least 14.
      classes: number of logits; 0 for none, the features alone.
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: images other than ``image``, or integers other
        than uint8.
    """

    def __init__(self, image=(28, 28, 1), classes=10, *, mean: Numbers = 0.0, std: Numbers = 1.0, dtype=None, rngs):
        check_image(image, 14)
        height, width, depth = image
        positions = ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
        self.encoder = Chain(
            normalize=Normalize(mean, std, dtype, image),
            conv1=convolution(depth, 6, 5, use_bias=True, dtype=dtype, rngs=rngs),
            relu1=nnx.relu,
            pool1=max_pool,
            conv2=convolution(6, 16, 5, padding="VALID", use_bias=True, dtype=dtype, rngs=rngs),
            relu2=nnx.relu,
            pool2=max_pool,
            flatten=flatten,
            linear1=_dense(positions * 16, 120, dtype, rngs),
            relu3=nnx.relu,
            linear2=_dense(120, 84, dtype, rngs),
            relu4=nnx.relu,
        )
        self.head = linear_head(84, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)


class WongCNN(nnx.Module):
    """The MNIST network of fast adversarial training (Wong et al., 2020): two strided 4x4 convolutions.

    ``features``: (B, 100). Parameters by default: 166,406.

    Args:
      image: (height, width, channels) of the images, height and width at least 4.
      classes: number of logits; 0 for none, the features alone.
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: images other than ``image``, or integers other
        than uint8.
    """

    def __init__(self, image=(28, 28, 1), classes=10, *, mean: Numbers = 0.0, std: Numbers = 1.0, dtype=None, rngs):
        check_image(image, 4)
        height, width, depth = image
        self.encoder = Chain(
            normalize=Normalize(mean, std, dtype, image),
            conv1=convolution(depth, 16, 4, 2, padding=((1, 1), (1, 1)), use_bias=True, dtype=dtype, rngs=rngs),
            relu1=nnx.relu,
            conv2=convolution(16, 32, 4, 2, padding=((1, 1), (1, 1)), use_bias=True, dtype=dtype, rngs=rngs),
            relu2=nnx.relu,
            flatten=flatten,
            linear=_dense((height // 4) * (width // 4) * 32, 100, dtype, rngs),
            relu3=nnx.relu,
        )
        self.head = linear_head(100, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)


class TradesCNN(nnx.Module):
    """The MNIST network of TRADES (Zhang et al., 2019; after Carlini and Wagner, 2017); its last layer starts at zero.

    ``features``: (B, 200). Parameters by default: 312,202.

    Args:
      image: (height, width, channels) of the images, height and width at least 16.
      classes: number of logits; 0 for none, the features alone.
      dropout: the share of values dropped in training between the two hidden layers, in [0, 1).
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: images other than ``image``, or integers other
        than uint8.
    """

    def __init__(
        self, image=(28, 28, 1), classes=10, *, dropout=0.5, mean: Numbers = 0.0, std: Numbers = 1.0, dtype=None, rngs
    ):
        check_image(image, 16)
        height, width, depth = image
        positions = (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
        layers: Layers = {"normalize": Normalize(mean, std, dtype, image)}
        for index, features in enumerate((32, 32, 64, 64), 1):
            layers[f"conv{index}"] = convolution(depth, features, padding="VALID", use_bias=True, dtype=dtype, rngs=rngs)
            layers[f"relu{index}"] = nnx.relu
            if index % 2 == 0:
                layers[f"pool{index // 2}"] = max_pool
            depth = features
        self.encoder = Chain(
            **layers,
            flatten=flatten,
            linear1=_dense(positions * 64, 200, dtype, rngs),
            relu5=nnx.relu,
            dropout=dropout_layer(dropout),
            linear2=_dense(200, 200, dtype, rngs),
            relu6=nnx.relu,
        )
        self.head = linear_head(200, classes, dtype=dtype, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)


class MadryCNN(nnx.Module):
    """The network of the MNIST challenge (Madry et al., 2018). ``features``: (B, 1024).

    Parameters by default: 3,274,634.

    Args:
      image: (height, width, channels) of the images, height and width at least 4.
      classes: number of logits; 0 for none, the features alone.
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: images other than ``image``, or integers other
        than uint8.
    """

    def __init__(self, image=(28, 28, 1), classes=10, *, mean: Numbers = 0.0, std: Numbers = 1.0, dtype=None, rngs):
        check_image(image, 4)
        height, width, depth = image
        start: dict[str, Any] = {
            "kernel_init": nnx.initializers.truncated_normal(0.1),
            "bias_init": nnx.initializers.constant(0.1),
        }
        self.encoder = Chain(
            normalize=Normalize(mean, std, dtype, image),
            conv1=convolution(depth, 32, 5, use_bias=True, dtype=dtype, rngs=rngs, **start),
            relu1=nnx.relu,
            pool1=max_pool,
            conv2=convolution(32, 64, 5, use_bias=True, dtype=dtype, rngs=rngs, **start),
            relu2=nnx.relu,
            pool2=max_pool,
            flatten=flatten,
            linear=nnx.Linear((height // 4) * (width // 4) * 64, 1024, dtype=dtype, rngs=rngs, **start),
            relu3=nnx.relu,
        )
        self.head = linear_head(1024, classes, dtype=dtype, rngs=rngs, **start)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)
