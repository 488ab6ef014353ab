"""Few-shot learners at work: answers to a new task, and scores over many with their intervals."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paradigms.batch import rows, weighted_mean
from paradigms.data.checks import check_count
from paradigms.evaluation import interval
from paradigms.meta.tasks import together
from paradigms.objective import Batch, Context, Objective, fold


class Scores(NamedTuple):
    """Scores of many tasks.

    Attributes:
      values: (..., tasks), one a task; before them the axes of runs and of numbers of steps, where there are any.
      mean: (...), over tasks.
      interval95: (...), half-width of the 95% interval of the mean over tasks (Student's t).
    """

    values: np.ndarray
    mean: np.ndarray
    interval95: np.ndarray


def adapt(trainer: Any, state: Any, support: Batch) -> Callable[[Any], dict]:
    """What a trained few-shot learner answers after it has seen the support set of one new task.

    Args:
      trainer: of one run, over any objective that answers episodes: `maml`, `reptile`, `episodic`, `fine_tuned`, ...
      state: its `TrainState`.
      support: {"x": (rows, ...), "y": (rows,)}, one task, no task axis; "x" as the network takes it.

    Returns:
      ``x (queries, ...) -> outputs``, rows in the order of the queries. The learner sees the queries of a call together.

    Raises:
      ValueError: the trainer has several runs; a support set without "x" or "y", or of ragged rows; (the function) queries
        of another shape than the support set's, or labels of the support set that the learner cannot answer.
    """
    if trainer.runs is not None:
        raise ValueError(f"trainer: has {trainer.runs} runs; pass trainer.members[i] and the state of that run alone")
    if not isinstance(support, dict) or not {"x", "y"} <= set(support):
        found = sorted(support) if isinstance(support, dict) else type(support).__name__
        raise ValueError(f'support: {found}; give {{"x": (rows, ...), "y": (rows,)}}')
    shapes = {name: np.shape(leaf) for name, leaf in support.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1:
        raise ValueError(f"support: has shapes {shapes}; leaves must agree in rows")

    def lift(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)

    def answer(x):
        if np.shape(x)[1:] != shapes["x"][1:]:
            raise ValueError(f"x: has shape {np.shape(x)} for a support set of {shapes['x']}; give (queries, ...)")
        episode = {"support": lift(support), "query": lift({"x": x})}
        _answerable("support", support["y"], jax.eval_shape(trainer.predict, state, episode))
        return trainer.predict(state, episode)

    return answer


def score(outputs: dict, query: Batch) -> jax.Array:
    """Of one task: the accuracy where targets are classes, else the mean squared error. Scalar."""
    logits, y = outputs["logits"], query["y"]
    if jnp.issubdtype(y.dtype, jnp.integer):
        return weighted_mean((jnp.argmax(logits, -1) == y).astype(jnp.float32), query)
    return weighted_mean(optax.losses.squared_error(logits, y), query)


def evaluate_episodes(
    learner: "Objective | Callable[[Any], Objective]",
    state: Any,
    source: Any,
    *,
    steps: Sequence[int] | None = None,
    tasks: int = 600,
    runs: int | None = None,
    metric: Callable[[dict, Batch], jax.Array] = score,
    key: int = 0,
) -> dict[str, Scores]:
    """Scores of a few-shot learner on fresh tasks, queries answered together and one by one.

    "transductive": the queries of a task are answered together, so that normalisation by the batch at hand sees them all.
    "inductive": every query is answered with the support set beside it and no other query (Nichol et al., 2018, section
    6.1). The two are equal where examples do not see each other. Queries are never seen by the adaptation.

    Args:
      learner: the objective that was trained, or ``steps -> objective`` where `steps` are given, such as
        ``lambda k: maml(child, optax.sgd(0.4), k)``; it is called with a traced k, so that one program serves all.
      state: the `TrainState`; its params and state are used.
      source: of episodes, as `data.episodes` gives; its queries have "y".
      steps: numbers of inner steps to try, such as ``range(11)``.
      tasks: how many, >= 2.
      runs: None, or the number of runs in `state` (see `vectorize`).
      metric: ``(outputs, query) -> scalar`` of one task; default `score`.
      key: seed of the tasks; the same tasks for all runs and numbers of steps.

    Returns:
      ``{"transductive": Scores, "inductive": Scores}``.

    Every call compiles anew.

    Raises:
      ValueError: fewer than two tasks; `steps` and `learner`, or `runs` and `state`, do not fit together; the source gives no
        episodes, or tasks of more ways than the learner answers.
    """
    check_count(2, tasks=tasks)  # the interval is over them
    if (steps is None) != isinstance(learner, Objective):
        raise ValueError(f"steps={steps}: give them with a function steps -> objective, and none with an objective")
    if steps is not None:
        if not isinstance(steps, Sequence | np.ndarray) or not len(steps):
            raise ValueError(f"steps={steps}: give one or more numbers of inner steps, 0 or more")
        for number in steps:
            check_count(0, steps=number)
    if np.shape(state.step) != (() if runs is None else (runs,)):
        raise ValueError(f"runs={runs}: the state has {np.shape(state.step) or 'one'}; pass runs=trainer.runs with its state")
    root = jax.random.key(key)

    def measure(state, source, number):
        batch = source.batch(fold(root, "tasks"), number)
        ctx = Context(fold(fold(root, "answers"), number), state.step, state.task, train=False)

        def of(objective):
            return {name: answer(objective, state, batch, ctx, metric) for name, answer in ANSWERS.items()}

        if isinstance(learner, Objective):
            return of(learner)
        make: Callable[[Any], Objective] = learner
        return jax.lax.map(lambda k: of(make(k)), jnp.asarray(steps))

    first = source.batch(fold(root, "tasks"), 0)
    if not {"support", "query"} <= set(first):
        raise ValueError(f"source: gives batches of {sorted(first)}, which are no episodes; see data.episodes")

    def predicted(state):
        one = state if runs is None else jax.tree.map(lambda leaf: leaf[0], state)
        objective = learner if isinstance(learner, Objective) else learner(jnp.zeros((), jnp.int32))
        ctx = Context(root, one.step, one.task, train=False)
        return objective.predict(one.params, one.state, first, ctx)[0]

    _answerable("source", first["query"].get("y", ()), jax.eval_shape(predicted, state))
    every = measure if runs is None else lambda state, *rest: jax.lax.map(lambda one: measure(one, *rest), state)
    program = jax.jit(every)
    found = jax.device_get([program(state, source, number) for number in range(-(-tasks // source.batch_size))])
    return {name: _summary(np.concatenate([part[name] for part in found], -1)[..., :tasks]) for name in ANSWERS}


def transductive(objective: Objective, state: Any, batch: Batch, ctx: Context, metric: Callable) -> jax.Array:
    """(tasks,) scores of queries that are answered together."""
    outputs = objective.predict(state.params, state.state, batch, ctx)[0]
    return jax.vmap(metric)(_by_task(outputs, batch), batch["query"])


def inductive(objective: Objective, state: Any, batch: Batch, ctx: Context, metric: Callable) -> jax.Array:
    """(tasks,) scores of queries that are answered each with the support set beside it alone."""

    def single(i):
        query = jax.tree.map(lambda leaf: leaf[:, i][:, None], batch["query"])
        beside = jax.vmap(together)({"support": batch["support"], "query": query})
        beside = {**beside, "beside": jnp.ones_like(beside["y"], bool)}  # for learners that see the support set anyway
        outputs = objective.predict(state.params, state.state, {**batch, "query": beside}, ctx)[0]
        return jax.tree.map(lambda leaf: leaf[:, -1], _by_task(outputs, batch))

    queries = jnp.arange(jax.tree.leaves(batch["query"])[0].shape[1])
    return jax.vmap(metric)(jax.vmap(single, out_axes=1)(queries), batch["query"])  # adapts once: i is not in it


ANSWERS = {"transductive": transductive, "inductive": inductive}


def _answerable(name: str, y: Any, outputs: dict) -> None:
    """Raises for labels beyond the logits of a learner that tells classes apart."""
    y = np.asarray(y)
    if "logits" not in outputs or y.dtype.kind not in "iu" or not y.size:
        return
    ways = outputs["logits"].shape[-1]
    if not 0 <= y.min() <= y.max() < ways:
        raise ValueError(f"{name}: has labels from {y.min()} to {y.max()}, but the learner answers {ways} classes, from 0")


def _by_task(outputs: dict, batch: Batch) -> dict:
    return jax.tree.map(lambda leaf: leaf.reshape(rows(batch), -1, *leaf.shape[1:]), outputs)


def _summary(values: np.ndarray) -> Scores:
    flat = [interval(line) for line in values.reshape(-1, values.shape[-1])]
    mean, half = (np.asarray(column).reshape(values.shape[:-1]) for column in zip(*flat, strict=True))
    return Scores(values, mean, half)
