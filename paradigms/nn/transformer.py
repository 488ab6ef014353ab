"""The transformer: causal (GPT) or bidirectional (BERT's encoder, pre-norm)."""

import jax
import jax.numpy as jnp
from flax import nnx

from paradigms.nn.layers import dropout_layer, linear_head


class Block(nnx.Module):
    """Pre-norm self-attention and a GELU perceptron of four times the width, each added to the stream (B, L, width)."""

    def __init__(self, width, heads, layers, causal, dropout, bias, dtype, rngs):
        def linear(inside, outside, std):
            init = nnx.initializers.normal(std)
            return nnx.Linear(inside, outside, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs)

        residual = 0.02 / (2 * layers) ** 0.5  # keeps the stream's variance independent of depth (Radford et al., 2019)
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, use_bias=bias, dtype=dtype, rngs=rngs)
        self.attend = linear(width, 3 * width, 0.02)
        self.project = linear(width, width, residual)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, use_bias=bias, dtype=dtype, rngs=rngs)
        self.expand = linear(width, 4 * width, 0.02)
        self.contract = linear(4 * width, width, residual)
        self.dropout = dropout_layer(dropout)
        self.heads, self.causal = heads, causal

    def attention(self, x, rngs):
        """Scaled dot-product attention (Vaswani et al., 2017); scores and softmax in float32."""
        batch, length, width = x.shape
        queries, keys, values = jnp.moveaxis(self.attend(x).reshape(batch, length, 3, self.heads, -1), 2, 0)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=wide)
        scores = scores / (width // self.heads) ** 0.5
        if self.causal:
            past = jnp.tril(jnp.ones((1, 1, length, length), bool))
            scores = jnp.where(past, scores, jnp.finfo(scores.dtype).min)
        weights = self.dropout(jax.nn.softmax(scores).astype(values.dtype), rngs=rngs)
        return self.project(jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, length, width))

    def __call__(self, x, *, rngs=None):
        """(B, L, width) to the same."""
        x = x + self.dropout(self.attention(self.norm1(x), rngs), rngs=rngs)
        hidden = self.contract(nnx.gelu(self.expand(self.norm2(x)), approximate=False))
        return x + self.dropout(hidden, rngs=rngs)


class TransformerEncoder(nnx.Module):
    """Token and position embeddings, ``layers`` blocks and the last normalisation: (B, L) integers to (B, L, width)."""

    def __init__(self, vocabulary, length, layers, heads, width, causal, dropout, bias, dtype, rngs):
        init = nnx.initializers.normal(0.02)
        self.token = nnx.Embed(vocabulary, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.position = nnx.Embed(length, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.dropout = dropout_layer(dropout)
        self.blocks = tuple(f"block{index}" for index in range(1, layers + 1))
        for name in self.blocks:
            setattr(self, name, Block(width, heads, layers, causal, dropout, bias, dtype, rngs))
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, use_bias=bias, dtype=dtype, rngs=rngs)
        self.length = length

    def __call__(self, tokens, *, rngs=None):
        """Features of every position."""
        if tokens.shape[1] > self.length:
            raise ValueError(f"tokens of shape {tokens.shape} are longer than length={self.length}; build a longer network")
        x = self.token(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        x = self.dropout(x, rngs=rngs)
        for name in self.blocks:
            x = getattr(self, name)(x, rngs=rngs)
        return self.norm(x)


class Transformer(nnx.Module):
    """GPT-style transformer (Radford et al., 2019): tokens (B, L) to features (B, L, width) and logits.

    The default is nanoGPT's character model for a CPU; its GPU model is ``Transformer(65, 256, layers=6, heads=6,
    width=384, dropout=0.2)``.

    Parameters by default: 804,096.

    Args:
      vocabulary: number of tokens; x is integers below it.
      length: the most positions L that x may have.
      classes: number of logits at each position, by a linear head, 0 for none. Default: the vocabulary, with the token
        embedding as the head (tied; Press and Wolf, 2017).
      layers: number of blocks.
      heads: of attention; a divisor of ``width``.
      width: of the embeddings and of every block.
      causal: each position sees itself and those before it; False lets it see all, for masked language models and
        classification.
      dropout: the share of values dropped in training of embeddings, attention weights and branches, in [0, 1).
      bias: in the linear layers and normalisations.
      dtype: of the computation; parameters stay float32.
      rngs: `nnx.Rngs` that initialise the parameters.

    Raises:
      ValueError: ``heads`` does not divide ``width``, ``dropout`` outside [0, 1), ``classes`` negative; in the call:
        more than ``length`` positions.
    """

    def __init__(
        self,
        vocabulary=65,
        length=64,
        classes=None,
        *,
        layers=4,
        heads=4,
        width=128,
        causal=True,
        dropout=0.0,
        bias=False,
        dtype=None,
        rngs,
    ):
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}; pass a divisor")
        self.encoder = TransformerEncoder(vocabulary, length, layers, heads, width, causal, dropout, bias, dtype, rngs)
        self.tied = classes is None
        self.head = None if self.tied else linear_head(width, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        """The features, and with a head the logits, in float32."""
        features = self.encoder(x, rngs=rngs)
        answer = {"features": features.astype(jnp.float32)}
        head = self.encoder.token.attend if self.tied else self.head
        if head is not None:
            answer["logits"] = head(features).astype(jnp.float32)
        return answer
