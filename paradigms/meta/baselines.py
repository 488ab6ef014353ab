"""Baselines of few-shot learning: features that were trained on plain batches, and a classifier made at test time."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from paradigms.batch import rows, weighted_mean
from paradigms.data.checks import check_count
from paradigms.meta.heads import Head
from paradigms.meta.parts import Part, overlay, select
from paradigms.meta.tasks import each, features, flat, seen
from paradigms.objective import Objective, concrete, context
from paradigms.supervised import cross_entropy


def few_shot(child: Objective, head: Head) -> Objective:
    """Trains as `child` does, and answers episodes by `head` on the child's features.

    The nearest-centroid baseline is ``few_shot(supervised(model), prototypes(5))``. A head that learns is used as it starts:
    ``ridge(5, penalty)`` is a linear probe in closed form.

    ``predict`` of a batch with no "support" is the child's own, so plain validation data stays valid; that of an episode
    has one row a query, tasks and queries flattened.

    Args:
      child: an objective over plain batches whose ``predict`` gives "features", (B, ...), flattened to (B, width).
      head: what answers the queries.

    Raises:
      ValueError: (at init) a child without "features".
    """

    def answer(params, state, episode, ctx):
        support, (examples, asked) = episode["support"], seen(episode)
        found = _features(child, params, state, examples, ctx.fold("features"))
        shots, queries = found[: rows(support)], found[asked:]
        start = head.init(ctx.fold("head").key, found.shape[-1])
        logits = head.logits(start, shots, support["y"], queries, support.get("weight"))
        return {"logits": logits, "features": queries}

    return _answering(child, answer)


def fine_tuned(
    child: Objective, inner: optax.GradientTransformation, steps: Any, ways: int, adapts: Part | None = None
) -> Objective:
    """Trains as `child` does, and fits a new linear layer to the support set of an episode ("Baseline"; Chen et al., 2019).

    The layer starts from zeros and takes `steps` steps of `inner` on the cross-entropy of the whole support set, together
    with the params of the network that `adapts` chooses. The child is in evaluation mode meanwhile: batch statistics are
    those of training, and nothing is random. What was adapted is dropped after the queries are answered.

    ``predict`` of a batch with no "support" is the child's own, so plain validation data stays valid; that of an episode
    has one row a query, tasks and queries flattened. A child that predicts with weights other than ``params`` (`averaged`)
    goes outside: ``averaged(fine_tuned(x))``.

    Args:
      child: an objective over plain batches whose ``predict`` gives "features", (B, ...), flattened to (B, width).
      inner: the optimizer of the layer and of what adapts.
      steps: 0 or more; may be traced, and then ``predict`` has no gradient. 0 answers with uniform logits.
      ways: classes of a task, 1 or more.
      adapts: which of ``params["model"]`` are fitted too, such as `everything` or ``only("layer4")``. Default: none,
        the features are computed once.

    Raises:
      ValueError: steps or ways out of range; (at init) a child without "features".
    """
    if concrete(steps):
        check_count(steps=steps, least=0)
    check_count(ways=ways)
    inner = optax.with_extra_args_support(inner)

    def answer(params, state, episode, ctx):
        support, query, ctx = episode["support"], episode["query"], ctx.fold("features")

        def embed(fast, examples):
            return _features(child, {**params, **overlay({"model": params["model"]}, fast)}, state, examples, ctx)

        chosen = {} if adapts is None else select({"model": params["model"]}, adapts)
        start = embed({}, support)
        wide = jnp.promote_types(start.dtype, jnp.float32)
        layer = {"kernel": jnp.zeros((start.shape[-1], ways), wide), "bias": jnp.zeros(ways, wide)}

        def loss(fitted):
            shots = embed(fitted["adapted"], support) if chosen else start
            return weighted_mean(cross_entropy()(_linear(fitted["layer"], shots), support["y"]), support)

        def step(_, carry):
            fitted, opt_state = carry
            value, grads = jax.value_and_grad(loss)(fitted)
            updates, opt_state = inner.update(grads, opt_state, fitted, value=value, grad=grads, value_fn=loss)
            return optax.apply_updates(fitted, updates), opt_state

        fitted = {"adapted": chosen, "layer": layer}
        fitted, _ = jax.lax.fori_loop(0, steps, step, (fitted, inner.init(fitted)))
        queries = embed(fitted["adapted"], query)
        return {"logits": _linear(fitted["layer"], queries), "features": queries}

    return _answering(child, answer)


def _answering(child, answer):
    """`child` that answers an episode of one task by ``answer(params, state, episode, ctx)``."""

    def init(key, batch):
        params, state = child.init(key, batch)
        jax.eval_shape(lambda batch: _features(child, params, state, batch, context()), batch)
        return params, state

    def predict(params, state, batch, ctx):
        if "support" not in batch:
            return child.predict(params, state, batch, ctx)
        return flat(each(lambda ctx, episode: answer(params, state, episode, ctx), batch, ctx)), state

    return child._replace(init=init, predict=predict)


def _features(child, params, state, batch, ctx):
    return features("child", child.predict(params, state, batch, ctx)[0])


def _linear(layer, features):
    return features.astype(layer["kernel"].dtype) @ layer["kernel"] + layer["bias"][None]
