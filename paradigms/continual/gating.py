"""Context-dependent gating: in every task another part of the hidden units is silent."""

import jax
import jax.numpy as jnp

from paradigms.continual.masks import Layers, check_task, gated, hidden, row, task_of
from paradigms.objective import Objective, concrete, fold, hide, own


def xdg(child: Objective, tasks: int, share: float, layers: Layers | None = None, name: str = "xdg") -> Objective:
    """Gates off a fixed random `share` of the units of every hidden layer, others in each task (XdG; Masse et al., 2018).

    h_l <- f(W_l h_{l-1} + b_l) o g_l^(t) with g in {0, 1}, drawn at init; the output layer is not gated. Gated units are not
    trained by the task: the gradient of what enters them is 0. See `paradigms.continual.masks` for how gates act through
    the parameters; an optimizer with momentum or decay moves them still.

    The number of the task is the leaf "task" (rows,) of every batch, in training and in the test; all rows of a batch are of
    one task, and a mixed batch gives NaN.

    Order: ``ewc(xdg(x), weight)`` is the paper's combination with a penalty on the weights. Inside, ``xdg(ewc(x))`` would
    penalise gated weights for being 0. For outputs that tasks share (permuted) a head a task is `task_specific`.

    Args:
      child: any objective with ``params["model"]``.
      tasks: their number.
      share: of the units, in [0, 1), rounded to whole units in each layer, of which one stays open at least; 0 is the child.
        The paper's is 0.8.
      layers: the hidden layers, see `paradigms.continual.masks.hidden`. Default: all but the head.
      name: the slot of ``state``: {layer: (tasks, units) bool, the units that are open}.

    Raises:
      ValueError: settings out of range; (at init) batches without their task, or a network whose layers are not found.
    """
    if concrete(share) and not 0 <= share < 1:
        raise ValueError(f"share={share}: must be in [0, 1); it is the part of the units that is gated off")
    inner = hide(child, name)

    def init(key, batch):
        check_task(batch, tasks, name)
        params, state = child.init(key, batch)

        def draw(layer):
            keys = jax.random.split(fold(fold(key, name), layer.name), tasks)
            order = jax.vmap(lambda key: jax.random.permutation(key, layer.units))(keys)
            closed = jnp.round(jnp.asarray(share, jnp.float32) * layer.units)
            return order >= jnp.minimum(closed, layer.units - 1)

        return params, own(state, name, {layer.name: draw(layer) for layer in hidden(params["model"], layers)})

    def seen(params, state, batch):
        task = task_of(batch, tasks, name)
        gates = {layer: row(is_open.astype(jnp.float32), task) for layer, is_open in state[name].items()}
        return {**params, "model": gated(params["model"], hidden(params["model"], layers), gates)}

    def losses(params, state, batch, ctx):
        return inner.losses(seen(params, state, batch), state, batch, ctx)

    def predict(params, state, batch, ctx):
        return inner.predict(seen(params, state, batch), state, batch, ctx)

    return inner._replace(init=init, losses=losses, predict=predict)
