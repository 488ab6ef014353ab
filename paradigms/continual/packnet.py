"""PackNet: every task is pruned to a part of the weights, which no later task changes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from paradigms.continual.masks import check_task, named, replaced, task_of
from paradigms.continual.specific import outside_head
from paradigms.gradients import descent, split_taps
from paradigms.objective import Objective, concrete, hide, own

FREE = -1  # pruned by the present task, and 0 until the next begins


def packnet(
    child: Objective,
    tasks: int,
    share: "float | Callable",
    retrain: tuple[optax.GradientTransformation, int] | None = None,
    shared: Callable[[tuple[str, ...]], bool] = outside_head,
    name: str = "packnet",
) -> Objective:
    """Packs tasks into one network by magnitude pruning (Mallya and Lazebnik, 2018, sec. 3).

    A task trains the weights that no task before it owns. Then, in each kernel, it keeps the `share` of them that is largest
    in magnitude; the others become 0, and are the next task's, which starts them from there. Pruned at the event "prune"
    (``trainer.boundary(state, None, "prune")``, say in the middle of the task), what was kept trains on alone until the end;
    else at "end". Biases and normalisation are learned in the first task. A task is answered with the weights of its own
    and of those before, so its answer stays the same to the last bit: `after` puts back whatever an optimizer did.

    The number of the task is the leaf "task" (rows,) of every batch, in training and in the test; all rows of a batch are of
    one task, and a mixed batch gives NaN. Tasks come in the order of their numbers: task t is trained while ``ctx.task`` is t.
    The optimizer's moments go on from task to task; the paper starts it anew.

    Order: ``packnet(task_specific(x, tasks), ...)``, where each task has its head and its batch statistics, which are not
    pruned. Without it the outputs of old tasks move with the optimizer's momentum and with those that tasks share.

    Args:
      child: any objective with ``params["model"]``.
      tasks: their number, 126 at most.
      share: in (0, 1], or a function of the task's number such as ``lambda t: 1 / (tasks - t)``, which is the same number of
        weights a task. 1 leaves later tasks none.
      retrain: (optimizer, steps): the kept weights train that long at "end", on the batches of the boundary. None: not.
      shared: path below ``params["model"]`` -> whether it is packed (two or more axes) or frozen after the first task
        (others). Default: all but the head.
      name: the slot of ``state``: {path: int8 like the kernel, the number of the task that owns the weight}.

    Raises:
      ValueError: settings out of range; (at init) batches without their task, or a network without kernels.
    """
    if not callable(share) and concrete(share) and not 0 < share <= 1:
        raise ValueError(f"share={share}: must be in (0, 1]; it is the part of the free weights that a task keeps")
    if tasks > 126:
        raise ValueError(f"tasks={tasks}: must be 126 or less")
    if retrain is not None and retrain[1] < 0:
        raise ValueError(f"retrain: {retrain[1]} steps; must be 0 or more")
    inner = hide(child, name)

    def common(model):
        return {path: leaf for path, leaf in named(model).items() if shared(tuple(path.split("/")))}

    def init(key, batch):
        check_task(batch, tasks, name)
        params, state = child.init(key, batch)
        owner = {path: jnp.zeros(w.shape, jnp.int8) for path, w in common(params["model"]).items() if w.ndim > 1}
        if not owner:
            raise ValueError(f'shared: holds of no array of two axes in params["model"]: {sorted(named(params["model"]))}')
        return params, own(state, name, owner)

    def seen(params, state, batch):
        task = task_of(batch, tasks, name)
        weights, other = named(params["model"]), jnp.where(task < tasks, 0.0, jnp.nan)

        def of(path, owner):
            mine = (owner > FREE) & (owner <= task.astype(owner.dtype)) & (task < tasks)
            return jnp.where(mine, weights[path], other.astype(weights[path].dtype))

        return {**params, "model": replaced(params["model"], {p: of(p, owner) for p, owner in state[name].items()})}

    def losses(params, state, batch, ctx):
        return inner.losses(seen(params, state, batch), state, batch, ctx)

    def predict(params, state, batch, ctx):
        return inner.predict(seen(params, state, batch), state, batch, ctx)

    def after(params, state, update, ctx):
        params, state = inner.after(params, state, update, ctx)
        old, first = named(update.old["model"]), ctx.task == 0
        trains = {path: state[name][path] == ctx.task.astype(jnp.int8) if path in state[name] else first for path in old}
        kept = {path: jnp.where(trains[path], new, old[path]) for path, new in common(params["model"]).items()}
        return {**params, "model": replaced(params["model"], kept)}, state

    def pruned(params, state, ctx):
        weights, part = named(params["model"]), share(ctx.task) if callable(share) else share

        def divide(path, owner):
            mine = owner == ctx.task.astype(owner.dtype)
            size = jnp.where(mine, jnp.abs(weights[path]), -1).ravel()
            place = jnp.argsort(jnp.argsort(-size)).reshape(owner.shape)  # 0 is the largest
            keep = jnp.maximum(jnp.round(part * jnp.sum(mine)), 1)  # a layer of no weights would answer nothing
            lost = mine & (place >= keep) & ~jnp.any(owner == FREE)  # pruned once a task
            return jnp.where(lost, jnp.asarray(FREE, owner.dtype), owner)

        owners = {path: divide(path, owner) for path, owner in state[name].items()}
        zeroed = {p: jnp.where(o == FREE, jnp.zeros((), weights[p].dtype), weights[p]) for p, o in owners.items()}
        return {**params, "model": replaced(params["model"], zeroed)}, {**state, name: owners}

    def trained(params, state, batches, ctx, optimizer, steps):
        if batches is None:
            raise ValueError(f'batches=None: {name} retrains at "end"; pass the task\'s batches, or leave retrain out')

        update = descent(inner._replace(losses=losses, after=after), optimizer)

        def step(carry, number):
            batch = jax.tree.map(lambda leaf: leaf[number % len(leaf)], batches)
            return update(*carry, batch, dataclasses.replace(ctx.fold(name).fold(number), train=True)), None

        start = params, state, optimizer.init(split_taps(params)[0])
        return jax.lax.scan(step, start, jnp.arange(steps))[0][:2]

    def boundary(params, state, batches, ctx, event):
        if event in ("prune", "end"):
            params, state = pruned(params, state, ctx)
        if event == "end" and retrain is not None:
            params, state = trained(params, state, batches, ctx, *retrain)
        params, state = inner.boundary(params, state, batches, ctx, event)
        if event == "end":
            following = (ctx.task + 1).astype(jnp.int8)
            state = {**state, name: {p: jnp.where(o == FREE, following, o) for p, o in state[name].items()}}
        return params, state

    return inner._replace(init=init, losses=losses, predict=predict, after=after, boundary=boundary)
