"""Recurrent networks over tokens and over the rows of an image, with the GRU and LSTM cells of flax."""

import jax.numpy as jnp
from flax import nnx
from jax import lax

from paradigms.nn.layers import Chain, Normalize, Numbers, check_image, dropout_layer, linear_head, outputs


class Recurrence(nnx.Module):
    """Stacked cells along the second axis, from a carry of zeros: (B, L, in_features) to every output (B, L, hidden).

    Args:
      in_features: values of an input.
      hidden: width of a cell.
      layers: number of cells on one another.
      cell: ``nnx.GRUCell`` (Cho et al., 2014) or ``nnx.LSTMCell`` (Hochreiter and Schmidhuber, 1997).
      dropout: the share of values dropped in training after each layer, in [0, 1).
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: another ``cell``, or ``dropout`` outside [0, 1).
    """

    def __init__(self, in_features, hidden, layers, cell, dropout, dtype, rngs):
        if cell not in (nnx.GRUCell, nnx.LSTMCell):
            raise ValueError(f"cell={cell} is neither nnx.GRUCell nor nnx.LSTMCell")
        self.cells = tuple(f"cell{index}" for index in range(1, layers + 1))
        for name in self.cells:
            setattr(self, name, cell(in_features, hidden, dtype=dtype, rngs=rngs))
            in_features = hidden
        self.dropout = dropout_layer(dropout)
        self.hidden, self.pair = hidden, cell is nnx.LSTMCell

    def __call__(self, x, *, rngs=None):
        """Every output of the last cell."""
        x = jnp.swapaxes(x, 0, 1)
        for name in self.cells:
            cell = getattr(self, name)
            carry = jnp.zeros((x.shape[1], self.hidden), x.dtype)
            _, x = lax.scan(lambda carry, row: cell(carry, row), (carry, carry) if self.pair else carry, x)
            x = self.dropout(x, rngs=rngs)
        return jnp.swapaxes(x, 0, 1)


class TokenRNN(nnx.Module):
    """A recurrent language model: tokens (B, L) to features (B, L, hidden) and logits (B, L, classes), one a position.

    The default is the network of Shakespeare in federated learning (McMahan et al., 2017) but for its vocabulary of 65
    characters: an embedding of 8 and two LSTM layers of 256.

    Parameters by default: 813,897.

    Args:
      vocabulary: number of tokens; x is integers below it.
      classes: number of logits; default the vocabulary, 0 for none, the features alone.
      embedding: width of the embedding.
      hidden: width of a cell.
      layers: number of cells on one another.
      cell: ``nnx.LSTMCell`` or ``nnx.GRUCell``.
      dropout: the share of values dropped in training after each layer, in [0, 1).
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: another ``cell``, ``dropout`` outside [0, 1) or ``classes`` negative.
    """

    def __init__(
        self,
        vocabulary=65,
        classes=None,
        *,
        embedding=8,
        hidden=256,
        layers=2,
        cell=nnx.LSTMCell,
        dropout=0.0,
        dtype=None,
        rngs,
    ):
        self.encoder = Chain(
            token=nnx.Embed(vocabulary, embedding, dtype=dtype, rngs=rngs),
            recurrence=Recurrence(embedding, hidden, layers, cell, dropout, dtype, rngs),
        )
        self.head = linear_head(hidden, vocabulary if classes is None else classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)


def _rows(x):
    """Images (B, H, W, C) as sequences of rows (B, H, W*C)."""
    return x.reshape(*x.shape[:2], -1)


def _last(x):
    return x[:, -1]


class RowRNN(nnx.Module):
    """A recurrent classifier that reads an image row by row: (B, H, W, C) to features (B, hidden), its last output.

    Parameters by default: 61,578.

    Args:
      image: (height, width, channels) of the images, float32 in [0, 1] or uint8.
      classes: number of logits; 0 for none, the features alone.
      hidden: width of a cell.
      layers: number of cells on one another.
      cell: ``nnx.GRUCell`` or ``nnx.LSTMCell``.
      dropout: the share of values dropped in training after each layer, in [0, 1).
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
        hidden=128,
        layers=1,
        cell=nnx.GRUCell,
        dropout=0.0,
        mean: Numbers = 0.0,
        std: Numbers = 1.0,
        dtype=None,
        rngs,
    ):
        check_image(image)
        self.encoder = Chain(
            normalize=Normalize(mean, std, dtype, image),
            rows=_rows,
            recurrence=Recurrence(image[1] * image[2], hidden, layers, cell, dropout, dtype, rngs),
            last=_last,
        )
        self.head = linear_head(hidden, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        return outputs(self.encoder, self.head, x, rngs)
