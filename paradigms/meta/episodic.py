"""Learning features from episodes, under a head that needs no training of its own on a task."""

import jax
import jax.numpy as jnp
import numpy as np

from paradigms.batch import rows, weighted_mean
from paradigms.meta.heads import Head
from paradigms.meta.tasks import each, features, flat, mean_over_tasks, require, seen
from paradigms.meta.tasks import init as init_on_tasks
from paradigms.model import Model
from paradigms.objective import Objective, concrete, fold, own
from paradigms.supervised import cross_entropy, supervised


def episodic(model: Model, head: Head, name: str = "head") -> Objective:
    """A network whose features are good for `head`: cross-entropy of a task's queries, given its support.

    Prototypical Networks are ``episodic(model, prototypes(5))`` (Snell et al., 2017), Matching Networks are
    ``episodic(model, attention(5))`` (Vinyals et al., 2016), R2D2 is ``episodic(model, ridge(5))`` (Bertinetto et al., 2019).

    The number of ways is the head's alone: what was trained under ``prototypes(60)`` is tested, with the same params,
    under ``episodic(model, prototypes(5))``.

    Support and queries of a task pass through the network together, so with batch normalisation they share statistics in
    training, as in the original code of Prototypical Networks; running statistics are averaged over tasks. Tasks are
    independent of each other. ``predict`` answers the queries, tasks and queries flattened into rows.

    Args:
      model: its outputs have "features", (B, ...), flattened here to (B, width); its logits, if any, are not used.
      head: what answers the queries.
      name: the slot of ``params`` that holds what the head learns; absent where it learns nothing.

    Returns:
      an objective over episodes with one loss, "episodic", a mean over tasks of means over queries, under their weights.
      Its ``aux`` is the accuracy.

    Raises:
      ValueError: (at init) a batch that is no episode, a model without "features", and on concrete data: labels that are
        not in [0, ways), and whatever `paradigms.supervised` refuses.
    """

    def embed(params, state, x, *, train=False, key=None):
        outputs, state = model.apply(params, state, x, train=train, key=key)
        found = features("model", outputs)
        return {"features": found, "logits": jnp.zeros((len(found), head.ways), found.dtype)}, state

    # as a classifier of `ways` classes: what that refuses of data is refused here
    classifier = supervised(Model(model.init, embed))

    def init(key, batch):
        require("episodic", batch)
        for part in ("support", "query"):
            _check_labels(part, batch[part], head.ways)
        params, state = init_on_tasks("episodic", classifier, key, batch)
        x = jax.tree.map(lambda leaf: leaf[0], batch["query"]["x"])
        outputs, _ = jax.eval_shape(embed, params["model"], state["model"], x)
        learned = head.init(fold(key, name), outputs["features"].shape[-1])
        return own(params, name, learned) if learned else params, state

    def answer(params, state, episode, ctx, train):
        support, (examples, asked) = episode["support"], seen(episode)
        outputs, new = embed(params["model"], state["model"], examples["x"], train=train, key=ctx.fold("model").key)
        shots, queries = outputs["features"][: rows(support)], outputs["features"][asked:]
        logits = head.logits(params.get(name, {}), shots, support["y"], queries, support.get("weight"))
        return {"logits": logits, "features": queries}, {"model": new}

    def losses(params, state, batch, ctx):
        def one(ctx, episode):
            (outputs, new), query = answer(params, state, episode, ctx, ctx.train), episode["query"]
            values = cross_entropy()(outputs["logits"], query["y"])
            hits = (jnp.argmax(outputs["logits"], -1) == query["y"]).astype(values.dtype)
            return {"episodic": weighted_mean(values, query)}, new, {"accuracy": weighted_mean(hits, query)}

        return mean_over_tasks(each(one, batch, ctx), state, batch)

    def predict(params, state, batch, ctx):
        outputs = each(lambda ctx, episode: answer(params, state, episode, ctx, False)[0], batch, ctx)
        return flat(outputs), state

    return Objective(init, losses, predict)


def _check_labels(part, examples, ways):
    y = examples.get("y", np.zeros(0, int))  # without it the classifier raises
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"batch: y of the {part} has type {y.dtype}; give integer labels")
    if not concrete(y) or not np.size(y):
        return
    low, high = np.asarray(y).min(), np.asarray(y).max()
    if not 0 <= low <= high < ways:
        raise ValueError(
            f"batch: labels of the {part} go from {low} to {high}, but the head has ways={ways}, for labels 0 to {ways - 1}; "
            "give the head as many ways as a task has classes"
        )
