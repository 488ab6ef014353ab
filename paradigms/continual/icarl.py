"""iCaRL: a network learned with sigmoid outputs and distillation, answering by the nearest mean of exemplars."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paradigms.batch import rows, weigh, weighted_mean
from paradigms.continual.herding import herded, unit
from paradigms.continual.memory import check_unit, to_uint8
from paradigms.continual.scenario import past, seen
from paradigms.model import Model
from paradigms.objective import Objective, concrete, copy, own
from paradigms.supervised import CLOSED, supervised


def icarl(
    model: Model,
    table: Any,
    capacity: int,
    size: int | None = None,
    task_size: int | None = None,
    temperature: Any = 1.0,
    name: str = "icarl",
) -> Objective:
    """Incremental classifier and representation learning (Rebuffi et al., 2017, algorithms 1 to 5).

    Training, on the stream's batch joined with `size` exemplars in one forward: the sum over the outputs seen so far of
    the binary cross-entropy, the mean over rows. Targets of the present task's outputs are one-hot (the loss
    "classification"), those of the outputs before are the sigmoids of the teacher, the network at the last "end" in
    evaluation mode ("distillation"; algorithm 3). In the first task there is neither teacher nor exemplar.

    At "end", in this order: the boundary's rows of the task's classes come into the memory `herded`, which chooses their
    exemplars and cuts those of old classes (algorithms 4 and 5; among all of the task with ``experience(boundary=None)``); the
    class means of all exemplars are taken anew under the new features; the network becomes the teacher.

    ``predict`` answers with minus the squared distance of the unit features to the class means, unit vectors again
    (algorithm 1); classes without exemplars, those of the task in training among them, are `CLOSED`. It has the network's
    other outputs too.

    In the paper the exemplars are part of the training set, so that an exemplar is seen as often as an example of the
    task. `task_size` gives that ratio: a replayed row has weight exemplars x rows / (size x task_size), and the expected
    loss is the mean over the union.

    Args:
      model: has "features" (rows, ...) and "logits" (rows, outputs).
      table: (tasks, outputs) bool; every task has outputs of its own.
      capacity: K, exemplars of all classes together, at least one a class. Stored are x in [0, 1] as uint8, in K // outputs
        of the first task slots an output.
      size: exemplars replayed a step, drawn uniformly. Default: as many as the batch has; 0 replays none.
      task_size: examples of a task. Default: a replayed row counts as much as one of the stream.
      temperature: above 0, divides the teacher's logits; 1 in the paper, 2 in van de Ven and Tolias (2019).
      name: the slot of ``state``: {"kept": the memory, "means", "teacher"}.

    Raises:
      ValueError: arguments out of range, tasks that share outputs; (at init) a model without features or of other
        outputs, x outside [0, 1], and what `supervised` refuses; (at "end") no batches.
    """
    table = np.asarray(table, bool)
    if table.ndim != 2 or (table.sum(0) > 1).any() or not table[0].any():
        raise ValueError(
            "table: must be (tasks, outputs), every output of one task at most; iCaRL is for streams of new classes"
        )
    outputs, classes = table.shape[1], int(table.any(0).sum())
    if capacity < classes:
        raise ValueError(f"capacity={capacity}: must be at least {classes}, one exemplar a class")
    if size is not None and size < 0:
        raise ValueError(f"size={size}: must be 0 or more")
    if concrete(task_size) and task_size is not None and task_size < 1:
        raise ValueError(f"task_size={task_size}: must be 1 or more examples")
    if concrete(temperature) and not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    memory = herded(capacity, outputs, most=capacity // int(table[0].sum()), new=int(table.sum(1).max()))

    def init(key, batch):
        params, state = supervised(model).init(key, batch)
        x = batch["x"]
        found, _ = jax.eval_shape(lambda: model.apply(params["model"], state["model"], x, train=False))
        if "features" not in found or found["logits"].shape[-1] != outputs:
            raise ValueError(f'model: needs "features" and {outputs} logits, as table has, and gives {found}')
        check_unit(x)
        width = found["features"].size // len(x)
        kept = memory.init({"x": to_uint8(jnp.asarray(x)), "y": jnp.asarray(batch["y"])})
        means = jnp.zeros((outputs, width), found["features"].dtype)
        teacher = copy({"params": params["model"], "state": state["model"]})
        return params, own(state, name, {"kept": kept, "means": means, "teacher": teacher})

    def restored(x, dtype):
        return x.astype(dtype) * (1 / 255) if jnp.issubdtype(dtype, jnp.floating) else x

    def embed(params, state, x):
        found = model.apply(params["model"], state["model"], x, train=False)[0]["features"]
        return unit(found.reshape(len(x), -1))

    def join(batch, kept, key):
        """The rows of the stream and then the exemplars drawn; while there are none, rows of the stream at weight 0."""
        count = rows(batch)
        n = count if size is None else size
        drawn, some = memory.sample(kept, key, n)
        fill, stored = jnp.arange(n) % count, jnp.sum(kept["count"])
        weight = jnp.where(some, 1.0 if task_size is None else stored * count / (max(n, 1) * task_size), 0)
        x, y = jnp.asarray(batch["x"]), jnp.asarray(batch["y"])
        old = jnp.where(some.reshape(n, *[1] * (x.ndim - 1)), restored(drawn["x"], x.dtype), x[fill])
        return {
            "x": jnp.concatenate([x, old]),
            "y": jnp.concatenate([y, jnp.where(some, drawn["y"], y[fill])]),
            "weight": jnp.concatenate([batch.get("weight", jnp.ones(count)), weight.astype(jnp.float32)]),
        }

    def losses(params, state, batch, ctx):
        teacher = state[name]["teacher"]
        joint = join(batch, state[name]["kept"], ctx.fold(name).key)
        found, moved = model.apply(params["model"], state["model"], joint["x"], train=ctx.train, key=ctx.fold("model").key)
        logits = found["logits"]
        taught, _ = model.apply(teacher["params"], teacher["state"], joint["x"], train=False)
        before = past(table)(batch, ctx)
        present = seen(table)(batch, ctx) & ~before
        one_hot = jax.nn.one_hot(joint["y"], outputs, dtype=logits.dtype)
        soft = jax.nn.sigmoid(taught["logits"] / temperature)
        cross = optax.losses.sigmoid_binary_cross_entropy
        each = {
            "classification": jnp.sum(jnp.where(present, cross(logits, one_hot), 0), -1),
            "distillation": jnp.sum(jnp.where(before, cross(logits, soft), 0), -1),
        }
        hits = jnp.argmax(jnp.where(before | present, logits, CLOSED), -1) == joint["y"]
        aux = {
            "per_example": (each["classification"] + each["distillation"])[: rows(batch)],
            "accuracy": weighted_mean(hits.astype(logits.dtype), joint),
        }
        return {key: weighted_mean(value, joint) for key, value in each.items()}, ({**state, "model": moved}, aux)

    def predict(params, state, batch, ctx):
        found, _ = model.apply(params["model"], state["model"], batch["x"], train=ctx.train, key=ctx.fold("model").key)
        mine, phi = state[name], unit(found["features"].reshape(rows(batch), -1))
        distance = jnp.sum((phi[:, None] - mine["means"][None]) ** 2, -1)
        known = (mine["kept"]["count"] > 0)[None]
        return {**found, "logits": jnp.where(known, -distance, jnp.asarray(CLOSED, distance.dtype))}, state

    def boundary(params, state, batches, ctx, event):
        if event != "end":
            return params, state
        if batches is None:
            raise ValueError(f'batches=None: {name} chooses exemplars at "end"; pass the task\'s batches')
        phi = jax.lax.map(lambda x: embed(params, state, x), batches["x"])
        flat = jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, *leaf.shape[2:])), {**batches, "features": phi})
        present = jnp.asarray(table)[jnp.minimum(ctx.task, len(table) - 1)][flat["y"]]
        flat = weigh(flat, present.astype(jnp.float32))  # rows of classes before, as blurry tasks have them, choose nothing
        kept = memory.insert(state[name]["kept"], {**flat, "x": to_uint8(flat["x"])}, ctx.fold(name).key)

        def mean(one):
            x, valid = one
            phi = embed(params, state, restored(x, flat["x"].dtype))
            return unit(jnp.sum(jnp.where(valid[:, None], phi, 0), 0))

        by_class = jax.tree.map(lambda leaf: leaf.reshape(outputs, -1, *leaf.shape[1:]), memory.stored(kept))
        means = jax.lax.map(mean, (by_class[0]["x"], by_class[1])).astype(state[name]["means"].dtype)
        teacher = copy({"params": params["model"], "state": state["model"]})
        return params, {**state, name: {"kept": kept, "means": means, "teacher": teacher}}

    return Objective(init, losses, predict, boundary=boundary)
