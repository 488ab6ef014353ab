"""The record that every training paradigm is made of, and the few helpers that wrappers share.

A paradigm is a leaf (``supervised``, ``byol``), a transform ``Objective -> Objective`` (``adversarial``, ``maml``,
``rehearsal``, ``ewc``) or an aggregator of the gradients of named losses (``pcgrad``). All of them speak this record,
so any of them composes with any other. The rules that keep this true:

1. A wrapper owns one named slot of ``params`` or ``state``, adds it with `own` (which raises on a clash) and hands its
   child the child's slots alone, by `hide`.
2. A wrapper that changes the structure of a batch does so wherever a batch appears.
3. ``losses`` may run several times in one step. Each wrapper documents whose state survives.
4. Keys are folded from ``ctx.key`` by name (`Context.fold`); no key lives in a state.
5. Inside one step every shape is fixed. Only ``boundary`` may return a new structure.
6. A degenerate setting (radius 0, weight 0, no steps, an empty buffer) equals the child exactly.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

Tree = Any
Batch = dict[str, Any]
Losses = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every objective is told, besides its own params and state.

    Attributes:
      key: typed PRNG key of this step; take a part of it with `fold`, never use it directly twice.
      step: int32 scalar, the number of updates made so far. Schedules inside methods are functions of it.
      task: int32 scalar, the number of ``boundary`` "end" events so far.
      train: static. True while training (dropout on, batch statistics moving), False when predicting.
    """

    key: jax.Array
    step: jax.Array
    task: jax.Array
    train: bool = dataclasses.field(default=False, metadata={"static": True})

    def fold(self, name: "str | int | jax.Array") -> "Context":
        """The same context with a key of its own for `name` (a string, or an index such as a task's number)."""
        return dataclasses.replace(self, key=fold(self.key, name))


def context(key: "jax.Array | None" = None, step=0, task=0, train: bool = False) -> Context:
    """A `Context` from plain values, for calling an objective by hand (``key=None`` is key 0)."""
    key = jax.random.key(0) if key is None else key
    return Context(key, jnp.asarray(step, jnp.int32), jnp.asarray(task, jnp.int32), train)


def fold(key: jax.Array, name: "str | int | jax.Array") -> jax.Array:
    """A key that depends on `key` and `name` alone: strings by their CRC-32, so it is the same in every process."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) if isinstance(name, str) else name)


class Update(NamedTuple):
    """What ``after`` may see of an update; never the batch.

    Attributes:
      old: params before the update.
      grads: gradient of the summed losses, before any clipping, ``grads["taps"]`` included.
      updates: what the optimizer added to ``old`` (without ``taps``).
    """

    old: Tree
    grads: Tree
    updates: Tree


def keep(params: Tree, state: Tree, update: Update, ctx: Context) -> tuple[Tree, Tree]:
    """The default ``after``: nothing changes."""
    del update, ctx
    return params, state


def pass_by(params: Tree, state: Tree, batches: Tree, ctx: Context, event: str) -> tuple[Tree, Tree]:
    """The default ``boundary``: nothing changes."""
    del batches, ctx, event
    return params, state


class Objective(NamedTuple):
    """A training paradigm as five pure functions. It holds no arrays.

    ``params`` and ``state`` are nested dicts. ``params["model"]`` is the network, shared by every wrapper around it;
    ``params["taps"]`` is reserved for zeros that are differentiated with the rest and never optimized (their leading
    axis is the example axis); ``state`` is carried and never differentiated. A batch is a dict whose leaves all have
    the example axis first.

    Attributes:
      init: ``(key, batch) -> (params, state)``. A leaf initialises the network from ``fold(key, "model")``, so that
        objectives given one key share it. Copies what it snapshots, since buffers are donated.
      losses: ``(params, state, batch, ctx) -> ({name: scalar}, (state, aux))``. Losses stay named and unsummed until
        the trainer. The part of a name before its last "/" names the forward pass the loss came from: an aggregator
        pulls losses of one forward back together and differentiates the others one by one. ``aux`` are scalars to
        log; its reserved entry ``per_example`` holds unreduced losses and is dropped by the trainer.
      predict: ``(params, state, batch, ctx) -> ({"logits": ..., "features": ...}, state)``, one row an example.
      after: ``(params, state, update, ctx) -> (params, state)``, once an update: moving averages, path integrals,
        freezing. Default: nothing.
      boundary: ``(params, state, batches, ctx, event) -> (params, state)`` at "start" and "end" of a task or a named
        phase; ``batches`` are stacked, leaves (n, batch, ...), or None. May return new shapes. Default: nothing.
    """

    init: Callable[[jax.Array, Batch], tuple[Tree, Tree]]
    losses: Callable[[Tree, Tree, Batch, Context], tuple[Losses, tuple[Tree, dict]]]
    predict: Callable[[Tree, Tree, Batch, Context], tuple[dict, Tree]]
    after: Callable[[Tree, Tree, Update, Context], tuple[Tree, Tree]] = keep
    boundary: Callable[[Tree, Tree, Tree, Context, str], tuple[Tree, Tree]] = pass_by


class Aggregator(NamedTuple):
    """Gradients of the named losses to one gradient, in the trainer only (wrappers sum their child's losses).

    Attributes:
      init: ``(params, names) -> state``.
      combine: ``(grads, losses, state, ctx) -> (grad, state)`` with ``grads`` a dict of one gradient a loss.
    """

    init: Callable[[Tree, tuple[str, ...]], Tree]
    combine: Callable[[dict[str, Tree], Losses, Tree, Context], tuple[Tree, Tree]]


def total(losses: Losses) -> jax.Array:
    """The sum of the named losses, a scalar."""
    return sum(losses.values(), start=jnp.zeros(()))


def own(slots: dict, name: str, value: Tree) -> dict:
    """`slots` with a slot `name` of the caller's.

    Raises:
      ValueError: `name` is taken; wrappers take a ``name=`` argument to say another.
    """
    if name in slots:
        raise ValueError(f'slot "{name}" is already taken (slots: {sorted(slots)}); wrap with name="{name}2"')
    return {**slots, name: value}


def hide(child: Objective, name: str) -> Objective:
    """`child` that neither sees nor changes the slot `name` of params and state: what a wrapper calls and forwards."""

    def without(slots):
        return {k: v for k, v in slots.items() if k != name}

    def put_back(slots, old):
        return {**slots, name: old[name]} if name in old else slots

    def losses(params, state, batch, ctx):
        values, (new, aux) = child.losses(without(params), without(state), batch, ctx)
        return values, (put_back(new, state), aux)

    def predict(params, state, batch, ctx):
        outputs, new = child.predict(without(params), without(state), batch, ctx)
        return outputs, put_back(new, state)

    def after(params, state, update, ctx):
        seen = Update(*(without(part) for part in update))
        new_params, new_state = child.after(without(params), without(state), seen, ctx)
        return put_back(new_params, params), put_back(new_state, state)

    def boundary(params, state, batches, ctx, event):
        new_params, new_state = child.boundary(without(params), without(state), batches, ctx, event)
        return put_back(new_params, params), put_back(new_state, state)

    return Objective(child.init, losses, predict, after, boundary)


def merge(before: Tree, stacked: Tree) -> Tree:
    """One state from the states of a child that ran under ``vmap``, e.g. once a task.

    Floats of ``model`` (batch statistics) are averaged over the leading axis; every other slot stays as it was before:
    the average of two memories is no memory.
    """
    if "model" not in before:
        return before
    model = jax.tree.map(
        lambda old, new: jnp.mean(new, 0, dtype=new.dtype) if jnp.issubdtype(new.dtype, jnp.floating) else old,
        before["model"],
        stacked["model"],
    )
    return {**before, "model": model}


def check(objective: Objective, batch: Batch) -> None:
    """Traces `objective` on a concrete `batch` without compiling or computing anything.

    What does not fit (shapes, a loss for another kind of output, labels beyond the logits) raises here, in the words of
    the objective that noticed. `batch` may be a whole data set: nothing is computed on it.
    """

    params, state = jax.eval_shape(lambda key: objective.init(key, batch), jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path((params, state)):
        if math.prod(leaf.shape) >= 2**40:  # some compilers do not survive it
            raise ValueError(f"params{jax.tree_util.keystr(path[1:])}: has shape {leaf.shape}; make the network smaller")
    jax.eval_shape(objective.losses, params, state, batch, context(train=True))


def concrete(x: Any) -> bool:
    """Whether `x` has values that a check may look at: False inside jit, vmap, grad."""
    return not isinstance(x, Tracer) and not isinstance(x, jax.ShapeDtypeStruct)


def copy(tree: Tree) -> Tree:
    """A copy of every array, for snapshots kept beside the original: one buffer cannot be donated twice."""
    return jax.tree.map(jnp.copy, tree)
