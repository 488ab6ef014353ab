"""Bootstrap your own latent."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from paradigms.batch import weighted_mean
from paradigms.model import Model
from paradigms.objective import Objective, concrete, copy, fold, own

Views = Callable[[jax.Array, jax.Array], jax.Array]


def byol(
    model: Model,
    views: Views,
    projector: Model,
    predictor: Model,
    momentum: "float | Callable" = 0.99,
    name: str = "target",
) -> Objective:
    """Predicts the projection of one view by a slow target network from another (Grill et al., 2020, eq. 2).

    The loss is the sum over both directions of the squared distance of unit vectors, 4 - 2 sum cos, in [0, 8]. After each
    update the target follows: xi <- m xi + (1 - m) theta, over params only; its batch statistics are its own.

    Args:
      model: the encoder, with the output "features" (examples, d).
      views: ``(key, x) -> x``, a random augmentation of a batch of inputs; called twice a step.
      projector: a head over features; its "logits" are the projection (examples, p).
      predictor: a head over projections, of the online network only.
      momentum: m in [0, 1], or a function of the step; 1 never moves the target, 0 is SimSiam's weight sharing.
      name: the slot of ``state`` that holds the target.

    Returns:
      an objective with one loss, "byol"; ``aux`` has "feature_std", the spread of the unit projections over the batch, which
      goes to 0 when they collapse.
      ``predict`` gives the encoder's outputs.
    """
    if not callable(momentum) and concrete(momentum) and not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum}: must be in [0, 1]")

    def project(params, state, x, key, train):
        keys = fold(key, "model"), fold(key, "projector")  # a key a network, or their dropout masks are alike
        outputs, encoder = model.apply(params["model"], state["model"], x, train=train, key=keys[0])
        features = outputs["features"]
        z, head = projector.apply(params["projector"], state["projector"], features, train=train, key=keys[1])
        return z["logits"], {"model": encoder, "projector": head}

    def init(key, batch):
        params, state = {}, {}
        params["model"], state["model"] = model.init(fold(key, "model"), batch["x"])
        outputs = jax.eval_shape(lambda: model.apply(params["model"], state["model"], batch["x"])[0])
        if "features" not in outputs:
            raise ValueError(f'model: byol needs an output "features" and got {sorted(outputs)}')
        features = jnp.zeros(outputs["features"].shape, outputs["features"].dtype)
        params["projector"], state["projector"] = projector.init(fold(key, "projector"), features)
        projection = jax.eval_shape(lambda: project(params, state, batch["x"], key, train=False)[0])
        params["predictor"], state["predictor"] = predictor.init(
            fold(key, "predictor"), jnp.zeros(projection.shape, projection.dtype)
        )
        online = {slot: params[slot] for slot in ("model", "projector")}
        statistics = {slot: state[slot] for slot in ("model", "projector")}
        return params, own(state, name, {"params": copy(online), "state": copy(statistics)})

    def losses(params, state, batch, ctx):
        first, second = (views(ctx.fold(f"view{i}").key, batch["x"]) for i in range(2))
        target = jax.lax.stop_gradient(state[name]["params"])
        online, slow = state, state[name]["state"]
        distance = spread = jnp.zeros(())
        for i, (here, there) in enumerate([(first, second), (second, first)]):
            key = ctx.fold(f"dropout{i}").key
            z, moved = project(params, online, here, key, ctx.train)
            online = {**online, **moved}
            head = online["predictor"]
            q, head = predictor.apply(params["predictor"], head, z, train=ctx.train, key=fold(key, "predictor"))
            online = {**online, "predictor": head}
            goal, slow = project(target, slow, there, fold(key, "target"), ctx.train)
            q, goal = _unit(q["logits"]), jax.lax.stop_gradient(_unit(goal))
            distance = distance + weighted_mean(jnp.sum((q - goal) ** 2, -1), batch)
            spread = spread + _spread(_unit(z), batch) / 2
        state = {**online, name: {"params": state[name]["params"], "state": slow}}
        return {"byol": distance}, (state, {"feature_std": spread})

    def predict(params, state, batch, ctx):
        return model.apply(params["model"], state["model"], batch["x"], train=False, key=ctx.fold("model").key)[0], state

    def after(params, state, update, ctx):
        del update
        m = momentum(ctx.step) if callable(momentum) else momentum
        slow = jax.tree.map(
            lambda old, new: (m * old + (1 - m) * new).astype(old.dtype),
            state[name]["params"],
            {slot: params[slot] for slot in state[name]["params"]},
        )
        return params, {**state, name: {**state[name], "params": slow}}

    return Objective(init, losses, predict, after)


def _spread(z, batch):
    """The mean over dimensions of the standard deviation over examples, by their weights."""
    mean = lambda values: jax.vmap(lambda v: weighted_mean(v, batch), 1)(values)
    return jnp.mean(jnp.sqrt(mean((z - mean(z)[None]) ** 2)))


def _unit(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 1e-12))
