"""One few-shot learner, from training on episodes to its scores on those of new classes: what the benchmarks share."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import paradigms as pd
from paradigms import data, fit
from paradigms.meta import Scores, evaluate_episodes
from paradigms.objective import Objective


class Learner(NamedTuple):
    """A few-shot method as a benchmark trains and tests it.

    Attributes:
      objective: what is trained.
      optimizer: the outer one.
      source: the batches of training.
      updates: of the outer loop.
      answers: what is tested: an objective, or inner steps -> objective.
      steps: the numbers of inner steps to test, the reported one first; None where `answers` is an objective.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    source: data.Source
    updates: int
    answers: Objective | Callable[[Any], Objective]
    steps: Sequence[int] | None = None


def learn(learner: Learner, test: data.Source, folder: pathlib.Path, *, seeds: int = 1, tasks: int = 600, key: int = 0) -> dict:
    """Trains all seeds and scores them.

    Returns:
      ``{"transductive": number, "inductive": number}`` after the first of ``learner.steps``, and ``"transductive/after 3
      steps"`` and so on after the others. A number has its interval over tasks where one seed was trained, else it is one
      mean over tasks a seed.
    """
    trainer = pd.vectorize(lambda: pd.Trainer(learner.objective, learner.optimizer), seeds=seeds)
    chunk = max(1, learner.updates // 20)
    options = {"chunk": chunk, "checkpoint_every": chunk, "folder": folder, "resume": True}
    state = fit(trainer, learner.source, learner.updates, key=key, **options).state
    found = evaluate_episodes(learner.answers, state, test, steps=learner.steps, tasks=tasks, runs=trainer.runs, key=key + 1)
    if learner.steps is None:
        return {name: number(scores) for name, scores in found.items()}
    numbers = {}
    for i, step in enumerate(learner.steps):
        for name, scores in found.items():
            at = Scores(*(part[:, i] for part in scores))
            numbers[name if i == 0 else f"{name}/after {step} steps"] = number(at)
    return numbers


def number(scores: Scores) -> Any:
    """Scores (seeds, tasks) as an experiment returns them."""
    if len(scores.values) > 1:
        return scores.mean
    return {"mean": scores.mean[0], "interval95": scores.interval95[0], "tasks": scores.values.shape[-1]}


def pooled(source: data.Source) -> data.Source:
    """Episodes whose support set has the queries as well, for a learner that trains on all of a task."""
    return dataclasses.replace(source, get=data.bind(_pooled, source.get))


def _pooled(arrays, key, step, get):
    episodes = get(arrays, key, step)
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), episodes["support"], episodes["query"])
    return {"support": both, "query": episodes["query"]}


def nearest_pixels(split: dict, **shape: Any) -> Any:
    """The accuracy of the nearest class mean of the pixels, with nothing learned: where a benchmark starts."""
    model = pd.from_functions(lambda key, x: {}, lambda params, x: {"features": x, "logits": x})
    objective = pd.episodic(model, pd.prototypes(shape["ways"]))
    source = data.episodes(split, **shape, tasks=100)
    state = pd.Trainer(objective, optax.identity()).init(0, source.batch(jax.random.key(0), 0))
    scores = evaluate_episodes(objective, state, source)["inductive"]
    return number(Scores(*(np.asarray(part)[None] for part in scores)))
