"""A network with context parameters: the few numbers that CAVIA adapts."""

import jax.numpy as jnp

from paradigms.data.checks import check_count
from paradigms.model import Model


def with_context(model: Model, size: int) -> Model:
    """`model` whose inputs have `size` further features, the same for all examples: the context (Zintgraf et al., 2019).

    Its params are ``{"network": ..., "context": (size,) zeros}``. CAVIA is
    ``maml(supervised(with_context(model, 5)), inner, adapts=reset(only("context")))``.

    Args:
      model: takes inputs (rows, ..., features + size); for images the context is channels that are constant over an image.
      size: >= 1.
    """
    check_count(size=size)

    def widened(x, context):
        return jnp.concatenate([x, jnp.broadcast_to(context.astype(x.dtype), (*x.shape[:-1], size))], -1)

    def init(key, x):
        params, state = model.init(key, widened(x, jnp.zeros(size)))
        return {"network": params, "context": jnp.zeros(size)}, state

    def apply(params, state, x, /, *, train=False, key=None):
        return model.apply(params["network"], state, widened(x, params["context"]), train=train, key=key)

    return Model(init, apply)
