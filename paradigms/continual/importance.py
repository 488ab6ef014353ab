"""How much each parameter matters to a task: diagonal Fisher informations, and the sensitivity of the outputs.

An estimator is ``(child, params, state, batches, ctx) -> tree like params``, 0 or more; ``batches`` are stacked, leaves
(n, batch, ...). The scale of what it returns, and so that of the weight of a penalty, is part of its definition.

There are five Fisher informations in use and they differ by orders of magnitude: `exact_fisher` and its estimate
`sampled_fisher` are the Fisher; `empirical_fisher` takes the data's labels, and vanishes where they are fitted;
`labelled_fisher` weighs that by the labels' probabilities; `batched_fisher` squares the mean over a batch instead of taking
the mean of squares.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paradigms.batch import rows
from paradigms.continual.rowwise import MAGNITUDE, SQUARE, Elementwise, rowwise
from paradigms.objective import Batch, Context, Objective, Tree, fold, total

Importance = Callable[[Objective, Tree, Tree, Tree, Context], Tree]
# (logits (rows, classes), the batch of this one example, key) -> (scalars (K,), their factors (K,))
Score = Callable[[jax.Array, Batch, jax.Array], tuple[jax.Array, jax.Array]]


def exact_fisher(child: Objective, params: Tree, state: Tree, batches: Tree, ctx: Context) -> Tree:
    """diag F = E_x sum_c p(c|x) (d log p(c|x) / d theta)^2, in evaluation mode, the mean over examples (Martens, 2020, sec. 5).

    Examples count by their weight; 0 is padding. The expectation over labels is exact, from ``child.predict``'s logits,
    so no labels are needed; closed logits have p = 0. An example with several rows of logits (an episode) is their product
    distribution: its rows' informations add up. So do those of several tasks (`multitask`), each by the weights of its own
    batch. One backward pass a class; for the memory see `rowwise`.

    Args:
      batches: stacked batches, leaves (n, batch, ...).

    Returns:
      a tree like `params`, 0 or more.
    """

    def score(logits, batch, key):
        del batch, key
        log_p = jax.nn.log_softmax(logits).ravel()
        return log_p, jnp.exp(log_p)

    return _expected(score, SQUARE, child, params, state, batches, ctx)


def sampled_fisher(child: Objective, params: Tree, state: Tree, batches: Tree, ctx: Context) -> Tree:
    """`exact_fisher` estimated from one label y ~ p(y|x) an example: unbiased, and one backward pass however many classes."""

    def score(logits, batch, key):
        del batch
        return _log_likelihood(logits, jax.random.categorical(key, logits))

    return _expected(score, SQUARE, child, params, state, batches, ctx)


def empirical_fisher(child: Objective, params: Tree, state: Tree, batches: Tree, ctx: Context) -> Tree:
    """E_(x,y) (d log p(y|x) / d theta)^2 with the label y of the data, the leaf "y" (of the query set, for episodes).

    Not a Fisher information: it goes to 0 as the data are fitted (Kunstner et al., 2019).
    """

    def score(logits, batch, key):
        del key
        return _log_likelihood(logits, batch.get("query", batch)["y"].reshape(logits.shape[0]))

    return _expected(score, SQUARE, child, params, state, batches, ctx)


def labelled_fisher(child: Objective, params: Tree, state: Tree, batches: Tree, ctx: Context) -> Tree:
    """E_(x,y) p(y|x) (d log p(y|x) / d theta)^2: of the sum over classes in `exact_fisher`, the term of the data's label.

    What the code of Buzzega et al. (2020) takes. Where `empirical_fisher` is ruled by the examples that the network gets
    wrong, these count for little here, and so do those it is sure of.
    """

    def score(logits, batch, key):
        del key
        log_p, _ = _log_likelihood(logits, batch.get("query", batch)["y"].reshape(logits.shape[0]))
        return log_p, jnp.exp(log_p)

    return _expected(score, SQUARE, child, params, state, batches, ctx)


def output_sensitivity(child: Objective, params: Tree, state: Tree, batches: Tree, ctx: Context) -> Tree:
    """E_x |d ||f(x)||^2 / d theta|, f the logits: the importance of memory aware synapses (Aljundi et al., 2018, eq. 2 and 3).

    The absolute value is of each example's gradient. Needs no labels. Closed logits are constants and contribute nothing.
    """

    def score(logits, batch, key):
        del batch, key
        return jnp.sum(logits**2)[None], jnp.ones(1, logits.dtype)

    return _expected(score, MAGNITUDE, child, params, state, batches, ctx)


def batched_fisher(child: Objective, params: Tree, state: Tree, batches: Tree, ctx: Context) -> Tree:
    """The square of the gradient of the child's training losses on a batch, the mean over batches by their weight.

    What many implementations call the Fisher. It is not: the gradient is a mean over B examples, so that near a minimum,
    where it is noise, this is about 1/B of `empirical_fisher`, and it depends on B. It needs no logits and fits losses that
    couple the examples of a batch (`byol`, contrastive ones). Losses run in training mode; the state they leave is dropped.
    """

    def one(number, batch):
        here = dataclasses.replace(ctx.fold(number), train=True)
        grad = jax.grad(lambda p: total(child.losses(p, state, batch, here)[0]))(params)
        weight = jnp.sum(batch["weight"]) if "weight" in batch else jnp.ones(())
        return jax.tree.map(lambda g: weight.astype(g.dtype) * g**2, grad), weight

    return _divide(*_sum(one, batches))


def grown(old: Tree, onto: Tree) -> Tree:
    """`onto` with `old` written over it: what is known of params that grew at their ends (new classes, units, leaves)."""
    known = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(old)}

    def write(path, leaf):
        before = known.get(jax.tree_util.keystr(path))
        if before is None or before.shape == leaf.shape:
            return leaf if before is None else before
        return leaf.at[tuple(map(slice, before.shape))].set(before)

    return jax.tree.map_with_path(write, onto)


def _log_likelihood(logits, y):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1)
    return jnp.sum(picked)[None], jnp.ones(1, logits.dtype)


def _expected(score: Score, f: Elementwise, child, params, state, batches, ctx) -> Tree:
    """sum over tasks of E_example sum_k factor_k f(d scalar_k / d theta), `score` giving scalars and factors."""

    def one(params, example):
        """The scalars of one example, and their factors times its weight; a list with one entry a task."""
        batch = jax.tree.map(lambda leaf: leaf[None], example["batch"])
        key = fold(fold(ctx.key, example["number"]), example["row"])
        values, factors, weights = [], [], []
        for logits, part in _answers(child.predict(params, state, batch, ctx)[0], batch):
            value, factor = score(logits.reshape(-1, logits.shape[-1]), part, key)
            weight = jnp.ravel(part.get("weight", jnp.ones(1)))[0]
            values.append(value)
            factors.append(jax.lax.stop_gradient(factor * weight.astype(factor.dtype)))
            weights.append(weight)
        return values, (factors, weights)

    def batch_sums(number, batch):
        size = rows(batch)
        examples = {"batch": batch, "number": jnp.full(size, number), "row": jnp.arange(size)}
        values, pull, (factors, weights) = jax.vjp(lambda p: rowwise(one, f, p, examples), params, has_aux=True)

        def information(task):
            seeds = f.root(factors[task])

            def add(k, sums):  # the backward pass of scalar k, of all examples at once
                only = jnp.where(jnp.arange(seeds.shape[1])[None] == k, seeds, 0)
                cotangent = [only if i == task else jnp.zeros_like(value) for i, value in enumerate(values)]
                return jax.tree.map(jnp.add, sums, pull(cotangent)[0])

            return jax.lax.fori_loop(0, seeds.shape[1], add, optax.tree.zeros_like(params))

        return [information(task) for task in range(len(values))], [jnp.sum(weight) for weight in weights]

    means = [_divide(part, count) for part, count in zip(*_sum(batch_sums, batches), strict=True)]
    return jax.tree.map(lambda *tasks: sum(tasks[1:], start=tasks[0]), *means)


def _answers(outputs: dict, batch: Batch) -> list[tuple[jax.Array, Any]]:
    """The logits for a batch and the batch; of several tasks, those of each."""
    tasks = {name: part for name, part in outputs.items() if isinstance(part, dict)}
    if not tasks:
        return [(outputs["logits"], batch)]
    return [pair for name, part in tasks.items() for pair in _answers(part, batch.get(name, batch))]


def _sum(function: Callable[[jax.Array, Batch], Tree], batches: Tree) -> Tree:
    """The sum over batches of ``function(number, batch)``; no more than two of its trees are in memory."""
    numbered = jnp.arange(rows(batches)), batches
    shapes = jax.eval_shape(function, *jax.tree.map(lambda leaf: leaf[0], numbered))
    add = lambda sums, x: (jax.tree.map(jnp.add, sums, function(*x)), None)
    return jax.lax.scan(add, optax.tree.zeros_like(shapes), numbered)[0]


def _divide(tree: Tree, count: jax.Array) -> Tree:
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1e-30).astype(leaf.dtype), tree)
