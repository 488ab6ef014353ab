"""Several objectives over one shared network."""

from collections.abc import Mapping
from typing import Any

import jax

from paradigms.objective import Objective

SHARED = ("model", "taps")
RESERVED = (*SHARED, "logits", "features", "x", "y", "task", "weight", "index", "support", "query")


def multitask(objectives: Mapping[str, Objective]) -> Objective:
    """Trains one network on several objectives; their losses stay apart, named "task/loss" (Caruana, 1997).

    All share ``params["model"]`` and ``state["model"]``, which the first initialises; what else an objective owns lies in
    a slot of the task's name. State threads through the tasks in order. Without an aggregator the trainer sums the losses;
    with one (`pcgrad`) it combines their gradients.

    A batch is ``{task: batch}``, or one batch that all tasks see. ``predict`` gives, likewise, the outputs of all tasks
    under their names, and those of the first task at the top.

    Args:
      objectives: task names and objectives; one alone equals that objective up to the names.

    Raises:
      ValueError: no objectives, a task named as a shared slot, or (at init) a network of another structure.
    """
    if not objectives:
        raise ValueError("objectives: is empty; give at least one")
    for task in objectives:
        if task in RESERVED or "/" in task:
            raise ValueError(f'objectives: "{task}" cannot name a task (reserved: {RESERVED} and names with "/")')
    first = next(iter(objectives))

    def part(batch: Any, task: str) -> Any:
        return batch[task] if batch is not None and task in batch else batch

    def view(slots, task):
        mine = {name: slots[name] for name in ("model",) if name in slots}
        taps = {"taps": slots["taps"][task]} if task in slots.get("taps", {}) else {}
        return {**mine, **slots.get(task, {}), **taps}

    def store(slots, task, mine):
        shared = {"model": mine["model"]} if "model" in mine else {}
        taps = {"taps": {**slots.get("taps", {}), task: mine["taps"]}} if "taps" in mine else {}
        return {**slots, **shared, **taps, task: {name: slot for name, slot in mine.items() if name not in SHARED}}

    def init(key, batch):
        params, state = {}, {}
        for i, (task, child) in enumerate(objectives.items()):
            p, s = child.init(key, part(batch, task))  # one key, so that what a child snapshots is the shared network
            if i and _shapes((p.get("model"), s.get("model"))) != _shapes((params.get("model"), state.get("model"))):
                raise ValueError(f'objectives: the network of "{task}" differs from that of "{first}"; share one model')
            params, state = store(params, task, p), store(state, task, s)
        return params, state

    def losses(params, state, batch, ctx):
        values, aux = {}, {}
        for task, child in objectives.items():
            mine, (new, more) = child.losses(view(params, task), view(state, task), part(batch, task), ctx.fold(task))
            state = store(state, task, new)
            values |= {f"{task}/{name}": value for name, value in mine.items()}
            aux |= {f"{task}/{name}": value for name, value in more.items() if name != "per_example"}
        return values, (state, aux)

    def predict(params, state, batch, ctx):
        answers = {}
        for task, child in objectives.items():
            answers[task], _ = child.predict(view(params, task), view(state, task), part(batch, task), ctx.fold(task))
        return {**answers[first], **answers}, state

    def after(params, state, update, ctx):
        for task, child in objectives.items():
            seen = type(update)(*(view(tree, task) for tree in update))
            p, s = child.after(view(params, task), view(state, task), seen, ctx.fold(task))
            params, state = store(params, task, p), store(state, task, s)
        return params, state

    def boundary(params, state, batches, ctx, event):
        for task, child in objectives.items():
            p, s = child.boundary(view(params, task), view(state, task), part(batches, task), ctx.fold(task), event)
            params, state = store(params, task, p), store(state, task, s)
        return params, state

    return Objective(init, losses, predict, after, boundary)


def _shapes(tree):
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
