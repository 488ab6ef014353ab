"""Any network as two pure functions over nested dicts of arrays, and the adapters for Flax's two APIs."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

Tree = Any


class Apply(Protocol):
    """``apply(params, state, x, *, train, key) -> (outputs, state)``."""

    def __call__(
        self, params: Tree, state: Tree, x: Any, /, *, train: bool = False, key: "jax.Array | None" = None
    ) -> tuple[dict, Tree]:
        """Outputs and the new state."""
        ...


class Model(NamedTuple):
    """A network.

    Attributes:
      init: ``(key, x) -> (params, state)``, nested dicts of arrays; `x` is a batch of inputs, example axis first.
      apply: ``(params, state, x, *, train=False, key=None) -> (outputs, state)``. ``outputs`` holds "logits" and, where
        the network has an encoder, "features". ``key`` drives dropout; ``state`` (batch statistics) moves when training.
    """

    init: Callable[[jax.Array, Any], tuple[Tree, Tree]]
    apply: Apply


def _named(outputs) -> dict:
    return dict(outputs) if isinstance(outputs, Mapping) else {"logits": outputs}


def _accepts(function, name: str) -> bool:
    return name in inspect.signature(function).parameters


def from_functions(init, apply) -> Model:
    """A `Model` from two plain functions.

    Args:
      init: ``(key, x) -> params``, a dict of arrays.
      apply: ``(params, x) -> logits`` or a dict with "logits" and "features".
    """

    def apply_fn(params, state, x, /, *, train=False, key=None):
        del train, key
        return _named(apply(params, x)), state

    return Model(lambda key, x: (init(key, x), {}), apply_fn)


def from_nnx(factory: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """A `Model` from a Flax NNX module.

    Args:
      factory: ``(rngs) -> module``; the module maps a batch of inputs to logits or to a dict. A module that draws random
        numbers takes ``rngs`` in its call and hands it on: ``self.dropout(x, rngs=rngs)``.

    Raises:
      ValueError: the module keeps a random stream in its own state, which would give every task of a vmapped inner loop
        the same dropout mask.
    """
    abstract = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
    if jax.tree.leaves(nnx.state(abstract, nnx.RngState)):
        raise ValueError(
            "factory: the module keeps a random stream in its state, so vmapped tasks would share one dropout mask; build "
            "nnx.Dropout(rate) without rngs and call it as self.dropout(x, rngs=rngs)"
        )
    graphdef = nnx.graphdef(abstract)
    takes_rngs = _accepts(type(abstract).__call__, "rngs")

    def init(key, x=None):
        del x
        _, params, state = nnx.split(factory(nnx.Rngs(key)), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(params, state, x, /, *, train=False, key=None):
        module = nnx.merge(graphdef, params, state)
        module.train() if train else module.eval()
        rngs = {"rngs": nnx.Rngs(key)} if takes_rngs and key is not None else {}
        outputs = _named(module(x, **rngs))
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))

    return Model(init, apply)


def from_linen(module) -> Model:
    """A `Model` from a Flax Linen module, used as it is.

    The module's ``__call__`` maps a batch of inputs to logits or to a dict; where it takes ``train``, or
    ``deterministic``, it is told. Its
    random streams are called "dropout". Sown values are not part of a carried state and are dropped.
    """
    call = type(module).__call__

    def told(train):
        flags = {"train": train, "deterministic": not train}
        return {name: value for name, value in flags.items() if _accepts(call, name)}

    def init(key, x):
        variables = dict(module.init({"params": key, "dropout": key}, x, **told(False)))
        variables.pop("intermediates", None)
        return variables.pop("params", {}), variables

    def apply(params, state, x, /, *, train=False, key=None):
        rngs = None if key is None else {"dropout": key}
        mutable = list(state) if train else False
        outputs = module.apply({"params": params, **state}, x, mutable=mutable, rngs=rngs, **told(train))
        outputs, state = (outputs[0], {**state, **outputs[1]}) if train else (outputs, state)
        return _named(outputs), state

    return Model(init, apply)
