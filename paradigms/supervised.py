"""Supervised training: one leaf, and the transforms that any objective takes (penalties, SAM, averaged weights)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paradigms.batch import rows, weighted_mean
from paradigms.model import Model
from paradigms.objective import Batch, Context, Objective, concrete, context, copy, fold, hide, own, total

CLOSED = -1e4  # the logit of an output that does not compete: no probability, and still finite in float16
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> Loss:
    """Softmax cross-entropy in nats, for integer labels (...,) or soft labels (..., classes).

    Args:
      smoothing: label smoothing in [0, 1): targets (1 - s) y + s / classes (Szegedy et al., 2016).
      class_weights: one factor a class, on the loss of its examples; factors of mean 1 keep the scale.

    Returns:
      a loss ``(logits (..., classes), y) -> (...,)``.
    """
    if concrete(smoothing) and not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing}: must be in [0, 1)")

    def loss(logits, y):
        classes = logits.shape[-1]
        soft = jax.nn.one_hot(y, classes, dtype=logits.dtype) if jnp.issubdtype(y.dtype, jnp.integer) else y
        if soft.shape != logits.shape:
            raise ValueError(
                f"cross_entropy: targets of shape {y.shape} and type {y.dtype} do not fit logits of shape "
                f"{logits.shape}; soft and multi-hot targets must be floats"
            )
        value = optax.losses.softmax_cross_entropy(logits, optax.losses.smooth_labels(soft, smoothing))
        if class_weights is None:
            return value
        if len(class_weights) != classes:
            raise ValueError(f"class_weights: {len(class_weights)} factors for {classes} classes; give one a class")
        return value * (soft @ jnp.asarray(class_weights, logits.dtype))

    return loss


Active = Callable[[Batch, Context], jax.Array]


def supervised(
    model: Model, loss: Loss | None = None, output: str = "logits", target: str = "y", active: Active | None = None
) -> Objective:
    """Learning from labelled examples: the mean of ``loss(outputs[output], batch[target])``.

    Args:
      model: the network.
      loss: ``(outputs, targets) -> values`` with the example axis first; further axes (labels, tokens, output
        dimensions) are averaged. Any elementwise loss of ``optax.losses`` fits as it is: ``sigmoid_binary_cross_entropy``
        and ``sigmoid_focal_loss`` for multi-label targets, ``squared_error`` and ``huber_loss`` for regression.
        Default: `cross_entropy`.
      output: which output of the model, for networks with several heads.
      target: which leaf of the batch.
      active: ``(batch, ctx) -> (rows or 1, classes) bool``, the outputs that compete, in the loss where ``ctx.train`` and
        else in the answer (`paradigms.continual` has those of the continual scenarios). The others are `CLOSED`. None: all.

    Returns:
      an objective with one loss, "supervised"; examples, or tokens, count by ``batch["weight"]``. Its ``aux`` is the
      accuracy where targets are classes.

    Raises:
      ValueError: (at init, on concrete data) inputs, targets or weights that are not finite, labels outside the classes,
        outputs that do not fit targets.
    """
    loss = cross_entropy() if loss is None else loss

    def init(key, batch):
        _require(batch, "x", target)
        params, state = model.init(fold(key, "model"), batch["x"])
        _check_data(batch, target, _shape_of(model, params, state, batch["x"], output))
        if active is not None:
            active(batch, context(train=True))  # which looks at values while they are concrete
        return {"model": params}, {"model": state}

    def losses(params, state, batch, ctx):
        outputs, new = apply(params, state, batch, ctx)
        answer, y = outputs["logits"], batch[target]
        _fits(answer.shape, y, target)
        values = loss(answer, y)
        if values.shape[:1] != (rows(batch),):
            raise ValueError(f"loss: returned shape {values.shape} for {rows(batch)} examples; return one value an example")
        per_example = jnp.mean(values.reshape(values.shape[0], -1), -1)
        aux = {"per_example": per_example}
        if answer.ndim == y.ndim + 1:
            hits = (jnp.argmax(answer, -1) == y).astype(per_example.dtype)
            aux["accuracy"] = weighted_mean(hits, batch)
        return {"supervised": weighted_mean(values, batch)}, ({**state, "model": new}, aux)

    def predict(params, state, batch, ctx):
        outputs, _ = apply(params, state, batch, ctx)
        return outputs, state

    def apply(params, state, batch, ctx):
        outputs, new = model.apply(params["model"], state["model"], batch["x"], train=ctx.train, key=ctx.fold("model").key)
        answer = outputs[output]
        if active is not None:
            answer = jnp.where(active(batch, ctx), answer, jnp.asarray(CLOSED, answer.dtype))
        return {**outputs, "logits": answer}, new

    return Objective(init, losses, predict)


def _require(batch, *names):
    for name in names:
        if name not in batch:
            raise ValueError(f'batch: has no leaf "{name}" (leaves: {sorted(batch)})')


def _shape_of(model, params, state, x, output):
    outputs, _ = jax.eval_shape(lambda p, s, x: model.apply(p, s, x), params, state, x)
    if output not in outputs:
        raise ValueError(f'output="{output}": the model has outputs {sorted(outputs)}; name one of them')
    return outputs[output].shape


def _check_data(batch, target, shape):
    """What can only be seen in the values, while they are concrete."""
    x, y = batch["x"], batch[target]
    if len(x) != len(y):
        raise ValueError(f"batch: x has {len(x)} rows and {target} has {len(y)}; they must agree")
    for name in {"x", target, "weight"} & batch.keys():
        values = batch[name]
        if concrete(values) and jnp.issubdtype(values.dtype, jnp.floating) and not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(np.asarray(values)).reshape(len(values), -1).all(-1))
            raise ValueError(f"batch: {name} is not finite in {len(bad)} rows, the first is row {bad[0]}; clean the data")
    if "weight" in batch and concrete(batch["weight"]) and (low := np.min(np.asarray(batch["weight"]), initial=0)) < 0:
        raise ValueError(f"batch: weight goes down to {low}; weights are 0 (padding) or more")
    _fits(shape, y, target)
    if concrete(y) and np.size(y) and len(shape) == y.ndim + 1:
        low, high = np.asarray(y).min(), np.asarray(y).max()
        if not 0 <= low <= high < shape[-1]:
            raise ValueError(
                f"batch: {target} holds labels from {low} to {high}, but the model has {shape[-1]} outputs, for "
                f"labels 0 to {shape[-1] - 1}"
            )


def _fits(shape, y, target):
    labels = jnp.issubdtype(y.dtype, jnp.integer)
    if tuple(shape) == tuple(y.shape) and not (labels and len(shape) == 1):
        return
    if not (labels and tuple(shape[:-1]) == tuple(y.shape)):
        kind = "class labels" if labels else "targets"
        raise ValueError(
            f"model: outputs of shape {tuple(shape)} do not fit {kind} {target} of shape {tuple(y.shape)}: integer labels "
            "need outputs with one more axis, of classes; real targets need outputs of their own shape"
        )


def penalised(child: Objective, l1: float = 0.0, l2: float = 0.0, name: str = "penalty") -> Objective:
    """Adds l1 |w|_1 + l2/2 |w|_2^2 over the network's weights with two or more axes (not biases, not scales).

    0 is the child. ``name`` is that of the added loss.
    """

    def losses(params, state, batch, ctx):
        values, rest = child.losses(params, state, batch, ctx)
        weights = [w for w in jax.tree.leaves(params["model"]) if w.ndim > 1]
        return own(values, name, sum(l1 * jnp.abs(w).sum() + l2 / 2 * (w**2).sum() for w in weights)), rest

    return child._replace(losses=losses)


def augmented(child: Objective, transform: Callable[[jax.Array, Batch], Batch]) -> Objective:
    """The child on transformed batches in training, on the batches as they are else.

    What a source does with the same `transform` is done inside, so that a memory around it keeps plain rows and every
    replay is augmented anew: ``rehearsal(augmented(x, augment(crop(), flip())), memory)``, with a source that does not
    augment. Within a step the losses and an answer in training mode see one and the same view.

    Args:
      child: any objective.
      transform: ``(key, batch) -> batch`` of as many rows, such as `paradigms.data.augment`.
    """

    def seen(batch, ctx):
        return transform(ctx.fold("augment").key, batch) if ctx.train else batch

    return child._replace(
        losses=lambda params, state, batch, ctx: child.losses(params, state, seen(batch, ctx), ctx),
        predict=lambda params, state, batch, ctx: child.predict(params, state, seen(batch, ctx), ctx),
    )


def sharpness(child: Objective, rho: float) -> Objective:
    """Sharpness-aware minimisation: the child's losses at w + rho g / |g|, g their gradient at w (Foret et al., 2021, eq. 2).

    The ascent is not differentiated, and the child's state is the one of the clean point. Two backward passes a step.

    Args:
      rho: radius in the norm of all params together, 0 or more; 0 is the child.
    """
    if concrete(rho) and rho < 0:
        raise ValueError(f"rho={rho}: must be 0 or more")

    def losses(params, state, batch, ctx):
        def clean(params):
            values, rest = child.losses(params, state, batch, ctx)
            return total(values), rest

        grad, (new_state, aux) = jax.grad(clean, has_aux=True)(jax.lax.stop_gradient(params))
        grad = {name: slot for name, slot in grad.items() if name != "taps"}
        scale = rho / jnp.maximum(optax.tree.norm(grad), 1e-12)
        moved = {name: jax.tree.map(lambda w, g: w + scale * g, params[name], grad[name]) for name in grad}
        values, _ = child.losses({**params, **moved}, state, batch, ctx)
        return values, (new_state, aux)

    return child._replace(losses=losses)


def averaged(child: Objective, decay: "float | Callable" = 0.999, name: str = "average") -> Objective:
    """Predicts with an exponential moving average of the params; training does not see it (Polyak and Juditsky, 1992).

    Order: it stands outside what adapts weights of its own. ``averaged(maml(x))`` adapts the average; ``maml(averaged(x))``
    would answer with the average and not with the adapted weights.

    Args:
      decay: weight of the past in [0, 1), or a function of the step; 0 predicts as the child does. Batch statistics are
        the child's own.
      name: the slot of ``state`` that holds the average.
    """
    if not callable(decay) and concrete(decay) and not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: must be in [0, 1)")
    inner = hide(child, name)

    def init(key, batch):
        params, state = child.init(key, batch)
        return params, own(state, name, copy(params))

    def after(params, state, update, ctx):
        params, state = inner.after(params, state, update, ctx)
        rate = decay(ctx.step) if callable(decay) else decay
        average = jax.tree.map(lambda a, p: (rate * a + (1 - rate) * p).astype(p.dtype), state[name], params)
        return params, {**state, name: average}

    def predict(params, state, batch, ctx):
        # the value is the average; the derivative is that of params, which a Fisher information asks for
        average = jax.tree.map(lambda a, p: a + (p - jax.lax.stop_gradient(p)), state[name], params)
        return inner.predict(average, state, batch, ctx)

    def boundary(params, state, batches, ctx, event):
        new, state = inner.boundary(params, state, batches, ctx, event)
        same = jax.tree.structure(new) == jax.tree.structure(params) and jax.tree.map(jnp.shape, new) == jax.tree.map(
            jnp.shape, params
        )
        return new, state if same else {**state, name: copy(new)}

    return inner._replace(init=init, after=after, predict=predict, boundary=boundary)
