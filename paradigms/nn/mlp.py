"""The multilayer perceptron."""

from flax import nnx

from paradigms.nn.layers import Chain, Normalize, Numbers, flatten, linear_head, no_norm, outputs


class MLP(nnx.Module):
    """Fully connected layers over flattened inputs: (B, ...) with ``in_features`` values an example to (B, classes).

    The default is the 784-100-100-10 network of permuted and rotated MNIST (Lopez-Paz and Ranzato, 2017). ``norm`` is a
    normalisation layer after each hidden layer, such as ``batch_norm``. ``features`` are the last hidden layer.

    Parameters by default: 89,610.
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
        dtype=None,
        rngs,
    ):
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden={hidden} needs at least one positive width, such as (100,)")
        layers = {"normalize": Normalize(mean, std, dtype), "flatten": flatten}
        for index, width in enumerate(hidden, 1):
            layers[f"linear{index}"] = nnx.Linear(
                in_features, width, kernel_init=nnx.initializers.he_normal(), dtype=dtype, rngs=rngs
            )
            layers[f"norm{index}"] = norm(width, dtype=dtype, rngs=rngs)
            layers[f"activation{index}"] = activation
            layers[f"dropout{index}"] = nnx.Dropout(dropout)
            in_features = width
        self.encoder = Chain(**layers)
        self.head = linear_head(in_features, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)
