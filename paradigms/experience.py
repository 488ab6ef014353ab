"""A whole stream of tasks: training on one after the other, boundaries between, and accuracy on those so far after each."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paradigms import logging
from paradigms.checkpoint import Checkpoints
from paradigms.data.tasks import Tasks
from paradigms.interrupt import Request, Stopped, stopping
from paradigms.objective import Batch
from paradigms.pure import TrainState
from paradigms.trainer import Trainer

Score = Callable[[dict, Batch], dict[str, Any]]


class Experience(NamedTuple):
    """What `experience` returns; with runs every array has them as its first axis.

    Attributes:
      state: the last state.
      matrix: {name: (T, T)}: row i is after task i, column j is the test on task j (`paradigms.continual.metrics`); NaN
        where there was none.
      start: {name: (T,)}, before any training.
      curve: {name: (n, T)}, the same at every evaluation, those between the boundaries included; ``curve_tasks`` (n,) is
        the task trained on at each, ``curve_steps`` (n,) the updates made.
    """

    state: TrainState
    matrix: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    curve: dict[str, np.ndarray]
    curve_tasks: np.ndarray
    curve_steps: np.ndarray


def hits(table: Any = None) -> Score:
    """Accuracy, and where a table (tasks, outputs) is given also "task accuracy", among the outputs of each example's task."""
    table = None if table is None else np.asarray(table, bool)

    def score(outputs, batch):
        weight, logits = batch["weight"], outputs["logits"]
        right = lambda logits: jnp.sum(weight * (jnp.argmax(logits, -1) == batch["y"]))
        sums = {"accuracy": right(logits), "weight": jnp.sum(weight)}
        if table is not None:
            own = jnp.asarray(table)[batch["task"]]
            sums["task accuracy"] = right(jnp.where(own, logits, -jnp.inf))
        return sums

    return score


def experience(
    trainer: Trainer,
    tasks: Tasks,
    *,
    batch_size: int,
    epochs: float | None = None,
    steps: int | None = None,
    key: "jax.Array | int" = 0,
    span: Callable[[int], int] | None = None,
    only: "range | None" = None,
    transform: Callable | None = None,
    boundary: int | None = 2000,
    boundary_rows: int = 500,
    score: Score | None = None,
    part: str = "test",
    ahead: int = 1,
    evaluate_every: int | None = None,
    folder: "pathlib.Path | str | None" = None,
) -> Experience:
    """Trains on all tasks in their order, all runs in one program, and tests on those so far after each.

    A task is: ``boundary("start")``, `steps` updates in one compiled call (or in pieces of `evaluate_every`), the test,
    and ``boundary("end")``, after which methods that answer from what they keep (prototypes, pruned weights) are tested,
    so the test of a row of the matrix comes after it. The number of updates is an argument of the program, so tasks of
    different sizes share it.

    Args:
      trainer: of one run, or of many (`vectorize`).
      tasks: the stream.
      batch_size: examples an update.
      epochs, steps: how long each task is trained, one of the two; an epoch is the mean size of the tasks, times the tasks
        that the training spans.
      key: typed PRNG key or seed of the run.
      span: ``task -> first task`` that its training draws from: ``lambda task: 0`` is cumulative training; default the task.
      only: the tasks that are trained on, of all that are tested; ``range(T - 1, T)`` with ``span`` 0 is joint training.
      transform: of training batches, ``(key, batch) -> batch``.
      boundary: examples of the task that its boundaries see, in batches of `boundary_rows`; None: all of them.
      score: ``(outputs, batch) -> {name: sum over rows, "weight": ...}``; default `hits`.
      part: the split that is tested, "test" or, for the choice of settings, "validation".
      ahead: how many tasks beyond the present one are tested as well; 1 is what forward transfer takes.
      evaluate_every: steps between evaluations inside a task, for curves; None: at the ends of tasks alone.
      folder: where ``metrics.jsonl`` and a checkpoint a task go; a run found there goes on after its last whole task.

    Raises:
      ValueError: not exactly one of epochs and steps, or settings out of range.
      Stopped: with a folder, a signal asked; what the tasks before have taught is saved.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs={epochs}, steps={steps}: give one of the two")
    counts = np.asarray(tasks.parts["train"]["count"])
    first_of = (lambda task: task) if span is None else span
    groups = jax.eval_shape(tasks.plan, jax.random.key(0))["groups"].shape[1]

    def length(task):
        """The updates of a task."""
        if steps is not None:
            return steps
        return round(epochs * counts.mean() * groups * (task - first_of(task) + 1) / batch_size)

    trained = range(len(tasks)) if only is None else only
    if not trained or not 0 <= min(trained) <= max(trained) < len(tasks):
        raise ValueError(f"only={only}: must be some of the {len(tasks)} tasks, such as range(1, {len(tasks)})")
    if wrong := [task for task in trained if not 0 <= first_of(task) <= task]:
        raise ValueError(f"span: gives {first_of(wrong[0])} for task {wrong[0]}; must be a task from 0 to the task itself")
    shortest = min(map(length, trained))
    if shortest < 1 or (evaluate_every is not None and evaluate_every < 1) or ahead < 0:
        raise ValueError(f"steps={shortest}, evaluate_every={evaluate_every}, ahead={ahead}: must be >= 1, ahead >= 0")
    score = hits() if score is None else score
    home = None if folder is None else pathlib.Path(folder)

    example = tasks.train(0, batch_size, transform=transform)
    state = trainer.init(key, example.opened(jax.random.key(0)).batch(jax.random.key(0), 0))
    tests = [tasks.whole(part, task) for task in range(len(tasks))]

    def test(state, task, ahead=ahead):
        """Accuracies (..., T) on the tasks so far and some ahead, answered as of `task`."""
        state = state._replace(task=jnp.full_like(state.task, task))
        sums = jax.device_get([trainer.tally(state, source, score) for source in tests[: task + 1 + ahead]])
        names = [name for name in sums[0] if name != "weight"]
        return {name: _padded(np.stack([one[name] / one["weight"] for one in sums], -1), len(tasks)) for name in names}

    start = test(state, trained[0], len(tasks))
    rows: list[dict] = []  # one an evaluation: {"task", "step", "end", "scores"}
    with contextlib.ExitStack() as stack:
        request = Request() if home is None else stack.enter_context(stopping())
        disk = None if home is None else stack.enter_context(Checkpoints(home / "checkpoints"))
        if disk is not None and (found := disk.restore(state)) is not None:
            state, rows = found.tree, _from_notes(found.notes, len(tasks))
        made = 1 + max((row["step"] for row in rows), default=-1)
        writer = logging.several() if home is None else logging.jsonl(home / "metrics.jsonl", from_step=made)
        stack.callback(writer.close)
        done = 1 + max((row["task"] for row in rows), default=trained[0] - 1)
        for task in [task for task in trained if task >= done]:
            first = int(np.ravel(jax.device_get(state.step))[0])
            seen = tasks.whole("train", task, boundary_rows, most=boundary)
            state = state._replace(task=jnp.full_like(state.task, task))  # also where tasks before were left out
            state = trainer.boundary(state, seen, "start")
            source = tasks.train(task, batch_size, start=first, since=first_of(task), transform=transform)
            made, updates = 0, length(task)
            piece = evaluate_every or updates
            while made < updates:
                state, values = trainer.advance(state, source, min(piece, updates - made))
                made = min(made + piece, updates)
                if request.agreed() is not None and made < updates:
                    raise Stopped(request.agreed() or 0, f"stopped in task {task}; what came before it is saved")
                if made < updates:
                    rows.append({"task": task, "step": first + made, "end": False, "scores": test(state, task)})
                    _log(writer, task, first + made, values, rows[-1]["scores"])
            state = trainer.boundary(state, seen, "end")
            rows.append({"task": task, "step": first + updates, "end": True, "scores": test(state, task)})
            _log(writer, task, first + updates, values, rows[-1]["scores"])
            if disk is not None:
                disk.save(task, state, _to_notes(rows))
            if request.agreed() is not None and task != trained[-1]:
                raise Stopped(request.agreed() or 0, f"stopped after task {task}; to go on, give the same folder")
    names = list(start)
    stacked = lambda chosen: {name: np.stack([row["scores"][name] for row in chosen], -2) for name in names}
    where = {name: np.asarray([row[name] for row in rows]) for name in ("task", "step")}
    return Experience(state, stacked([row for row in rows if row["end"]]), start, stacked(rows), where["task"], where["step"])


def _padded(scores: np.ndarray, tasks: int) -> np.ndarray:
    """Scores (..., n) of the first tasks as (..., tasks), NaN for the others."""
    return np.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, tasks - scores.shape[-1])], constant_values=np.nan)


def _log(writer, task: int, step: int, values: dict, scores: dict) -> None:
    values = {f"train/{name}": np.asarray(value, np.float64)[()] for name, value in jax.device_get(values).items()}
    sofar = {f"so far/{name}": value[..., : task + 1].mean(-1)[()] for name, value in scores.items()}
    each = {f"task {i}/{name}": value[..., i] for name, value in scores.items() for i in range(task + 1)}
    writer.write(step, {**values, **sofar, **each})


def _to_notes(rows: list[dict]) -> dict:
    """As JSON, which has no NaN."""
    tested = lambda value: value[..., ~np.isnan(value).reshape(-1, value.shape[-1]).all(0)].tolist()
    return {"rows": [{**row, "scores": {name: tested(value) for name, value in row["scores"].items()}} for row in rows]}


def _from_notes(notes: dict, tasks: int) -> list[dict]:
    padded = lambda value: _padded(np.asarray(value, np.float64), tasks)
    return [{**row, "scores": {name: padded(value) for name, value in row["scores"].items()}} for row in notes["rows"]]
