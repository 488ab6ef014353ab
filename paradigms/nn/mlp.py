"""The multilayer perceptron."""

from flax import nnx

from paradigms.nn.layers import Chain, Normalize, Numbers, dropout_layer, flatten, linear_head, no_norm, outputs


class MLP(nnx.Module):
    """Fully connected layers over flattened inputs: (B, ...) with ``in_features`` values an example to (B, classes).

    The default is the 784-100-100-10 network of permuted and rotated MNIST (Lopez-Paz and Ranzato, 2017). ``features``:
    (B, hidden[-1]), the last hidden layer.

    Parameters by default: 89,610.

    Args:
      in_features: values of an example, float32 in [0, 1] or uint8.
      hidden: widths of the hidden layers, at least one.
      classes: number of logits; 0 for none, the features alone.
      activation: after each hidden layer, elementwise.
      norm: normalisation between a hidden layer and its activation, such as ``batch_norm``.
      dropout: the share of values dropped in training after each activation, in [0, 1).
      mean: subtracted from pixels in [0, 1]; a number, or one a channel.
      std: divided by afterwards; positive, a number or one a channel.
      kernel_init: of the weights of every layer, such as ``nnx.initializers.glorot_uniform()``; default: that of He et al.
        (2015) in the hidden layers and of LeCun et al. (1998) in the head. Biases begin at 0.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: an argument outside what is said above; in the call: examples of another size, or integers other than
        uint8.
    """

    def __init__(
        self,
        in_features=784,
        hidden=(100, 100),
        classes=10,
        *,
        activation=nnx.relu,
        norm=no_norm,
        dropout=0.0,
        mean: Numbers = 0.0,
        std: Numbers = 1.0,
        kernel_init=None,
        dtype=None,
        rngs,
    ):
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden={hidden} needs at least one positive width, such as (100,)")
        hidden_init = nnx.initializers.he_normal() if kernel_init is None else kernel_init
        layers = {"normalize": Normalize(mean, std, dtype, in_features), "flatten": flatten}
        for index, width in enumerate(hidden, 1):
            layers[f"linear{index}"] = nnx.Linear(in_features, width, kernel_init=hidden_init, dtype=dtype, rngs=rngs)
            layers[f"norm{index}"] = norm(width, dtype=dtype, rngs=rngs)
            layers[f"activation{index}"] = activation
            layers[f"dropout{index}"] = dropout_layer(dropout)
            in_features = width
        self.encoder = Chain(**layers)
        options = {} if kernel_init is None else {"kernel_init": kernel_init}
        self.head = linear_head(in_features, classes, dtype=dtype, rngs=rngs, **options)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)
