"""What a trainer compiles, as pure functions of one state: the training step and all that is made of it."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from paradigms.gradients import accumulated, gradients, split_taps
from paradigms.mesh import split_arrays, split_rows, whole
from paradigms.objective import Batch, Context, Objective, Tree, Update, fold, total

logger = logging.getLogger("paradigms")


class TrainState(NamedTuple):
    """Everything a run needs to go on.

    Attributes:
      step: int32 scalar, updates made. task: int32 scalar, tasks ended. key: the root key of the run.
      params, state: the objective's. opt_state: optax's. aggregate_state: the aggregator's, or None.
    """

    step: jax.Array
    task: jax.Array
    key: jax.Array
    params: Tree
    state: Tree
    opt_state: Tree
    aggregate_state: Tree


class Pure(NamedTuple):
    """A trainer's functions before compilation, for use inside a ``jit``, ``vmap`` or ``scan`` of your own.

    Attributes:
      init: ``(key, batch) -> TrainState``.
      step: ``(state, batch) -> (state, metrics)``.
      scan: ``(state, source, n) -> (state, metrics stacked over n)``, `n` static.
      advance: ``(state, source, n) -> (state, metrics averaged over n)``, `n` an array.
      boundary: ``(state, batches, event) -> state``, `event` static.
      predict: ``(state, batch) -> outputs``.
      tally: ``(state, source, score) -> sums``, `score` static.
    """

    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict]]
    scan: Callable[..., tuple[TrainState, dict]]
    advance: Callable[..., tuple[TrainState, dict]]
    boundary: Callable[..., TrainState]
    predict: Callable[..., dict]
    tally: Callable[..., Tree]


def pure(
    objective: Objective, optimizer, aggregate=None, microbatches: int = 1, guard: bool = False, mesh: Mesh | None = None
) -> Pure:
    """The functions of `Trainer`, uncompiled; the arguments are the trainer's."""
    optimizer = optax.with_extra_args_support(optimizer)
    compute = accumulated(gradients(objective, each=aggregate is not None), microbatches)

    def aggregate_init(params, state, batch, ctx):
        if aggregate is None:
            return None
        names, _ = jax.eval_shape(objective.losses, params, state, batch, ctx)
        return aggregate.init(split_taps(params)[0], tuple(names))

    def init(key, batch):
        batch, zero = split_rows(batch, mesh), jnp.zeros((), jnp.int32)
        params, state = objective.init(fold(key, "init"), batch)
        aggregate_state = aggregate_init(params, state, batch, Context(key, zero, zero, train=True))
        opt_state = optimizer.init(split_taps(params)[0])
        return split_arrays(TrainState(zero, zero, fold(key, "run"), params, state, opt_state, aggregate_state), mesh)

    def step(old: TrainState, batch: Batch):
        batch = split_rows(batch, mesh)
        ctx = Context(fold(old.key, old.step), old.step, old.task, train=True)
        grads, values, state, aux = compute(old.params, old.state, batch, ctx)
        summed = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), grads.values())
        loss = total(values)

        def update():
            trained, taps = split_taps(old.params)
            direction, aggregate_state = split_taps(summed)[0], old.aggregate_state
            if aggregate is not None:
                each = {name: split_taps(grad)[0] for name, grad in grads.items()}
                direction, aggregate_state = aggregate.combine(each, values, aggregate_state, ctx.fold("aggregate"))

            def value_fn(p):
                return total(objective.losses({**p, **taps}, old.state, batch, ctx)[0])

            updates, opt_state = optimizer.update(
                direction, old.opt_state, trained, value=loss, grad=direction, value_fn=value_fn
            )
            moved: Tree = optax.apply_updates(trained, updates)
            params = {**moved, **taps}
            return *objective.after(params, state, Update(old.params, summed, updates), ctx), opt_state, aggregate_state

        def skip():
            return old.params, old.state, old.opt_state, old.aggregate_state

        metrics = {**aux, **values, "loss": loss}
        if guard:
            good = finite((loss, summed))
            new = jax.lax.cond(good, update, skip)  # not a select of each array, which would copy the large ones
            metrics["skipped"] = 1.0 - good
        else:
            new = update()
        return split_arrays(TrainState(old.step + 1, old.task, old.key, *new), mesh), metrics

    def opened(old: TrainState, source):
        key = fold(old.key, "data")
        source = source.opened(key) if hasattr(source, "opened") else source
        return lambda step: source.batch(key, step)

    def scan(old: TrainState, source, n: int):
        batch = opened(old, source)
        many = _ahead(jax.eval_shape(batch, old.step), n)
        if many == 1:
            return jax.lax.scan(lambda s, _: step(s, batch(s.step)), old, length=n)

        def block(s, _):
            return jax.lax.scan(step, s, jax.vmap(batch)(s.step + jnp.arange(many)))

        new, metrics = jax.lax.scan(block, old, length=n // many)
        return new, jax.tree.map(lambda leaf: leaf.reshape(n, *leaf.shape[2:]), metrics)

    def advance(old: TrainState, source, n):
        batch = opened(old, source)

        def body(_, carry):
            state, sums = carry
            state, metrics = step(state, batch(state.step))
            return state, jax.tree.map(jnp.add, sums, metrics)

        _, shapes = jax.eval_shape(lambda s: step(s, batch(s.step)), old)
        state, sums = jax.lax.fori_loop(0, n, body, (old, optax.tree.zeros_like(shapes)))
        return state, jax.tree.map(lambda total: total / jnp.maximum(n, 1).astype(total.dtype), sums)

    def tally(old: TrainState, source, score):
        batch = opened(old, source)

        def one(number):
            rows = split_rows(batch(number), mesh)
            return score(predict(old, rows), rows)

        sums = optax.tree.zeros_like(jax.eval_shape(one, jnp.zeros((), jnp.int32)))
        add = lambda number, sums: jax.tree.map(jnp.add, sums, one(number))
        return jax.lax.fori_loop(0, source.steps_per_epoch, add, sums)

    def boundary(old: TrainState, batches: Tree, event: str):
        if hasattr(batches, "steps_per_epoch"):
            batches = jax.lax.map(opened(old, batches), jnp.arange(batches.steps_per_epoch))
        ctx = Context(fold(fold(old.key, old.step), event), old.step, old.task, train=False)
        params, state = objective.boundary(old.params, old.state, batches, ctx, event)
        opt_state, aggregate_state = old.opt_state, old.aggregate_state
        if _shapes(params) != _shapes(old.params):
            logger.warning('boundary "%s" changed the structure of params: the next step compiles anew', event)
            opt_state = _transplant(opt_state, optimizer.init(split_taps(params)[0]))
            if aggregate is not None:
                if batches is None:
                    raise ValueError("batches=None: the aggregator starts anew on changed params; pass the task's batches")
                first = jax.tree.map(lambda leaf: leaf[0], batches)
                aggregate_state = _transplant(aggregate_state, aggregate_init(params, state, first, ctx))
        task = old.task + (event == "end")
        return split_arrays(TrainState(old.step, task, old.key, params, state, opt_state, aggregate_state), mesh)

    def predict(old: TrainState, batch: Batch):
        ctx = Context(fold(old.key, "predict"), old.step, old.task, train=False)
        return whole(objective.predict(old.params, old.state, batch, ctx)[0], mesh)

    return Pure(init, step, scan, advance, boundary, predict, tally)


def finite(tree: Tree) -> jax.Array:
    """Whether every number of every float array is finite, and none so large that a sum of its array is not."""

    def sums(leaf):
        leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)).reshape(-1, leaf.shape[-1] if leaf.ndim else 1)
        return jnp.ones((1, len(leaf)), leaf.dtype) @ leaf  # keeps inf and NaN; XLA's CPU reductions are many times slower

    found = [jnp.isfinite(sums(leaf)).all() for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack(found).all() if found else jnp.array(True)


def _ahead(batch: Batch, n: int) -> int:
    """How many of `n` batches are made at once: as many small ones as a processor's cache holds, and a divisor of `n`.

    Every random draw is a loop of its own on a CPU, and some kernels elsewhere. For a small network a batch of a few rows
    takes as long to draw as to learn from; 64 together take hardly longer than one.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    most = min(n, 64, 2**18 // max(size, 1))
    return next((many for many in range(most, 1, -1) if n % many == 0), 1)


def _shapes(tree: Tree) -> dict:
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(tree)}


def _transplant(old: Tree, new: Tree) -> Tree:
    """`new` with the leaves of `old` wherever path, shape and dtype are the same."""
    kept = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(old)}

    def pick(path, leaf):
        before = kept.get(jax.tree_util.keystr(path))
        same = before is not None and before.shape == leaf.shape and before.dtype == leaf.dtype
        return before if same else leaf

    return jax.tree.map_with_path(pick, new)
