"""One continual learner, from its first task to its scores: what the benchmarks share, and the methods by name."""

import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import paradigms as pd
from paradigms import continual, data
from paradigms.continual import metrics
from paradigms.experience import Experience, experience, hits
from paradigms.objective import Aggregator, Objective

OF_MATRICES = ("forgetting", "backward_transfer", "learning_accuracy", "average_incremental_accuracy")
OF_CURVES = ("anytime_accuracy", "stability_gap")


class Learner(NamedTuple):
    """A continual method as a benchmark trains it.

    Attributes:
      objective, optimizer, aggregate: the trainer's.
      draws: where a task's examples are from: the task alone, all so far (cumulative training), or all (joint training,
        which is one task, the last).
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    aggregate: Aggregator | None = None
    draws: Literal["task", "so far", "all"] = "task"


def learn(
    learner: Learner,
    tasks: data.Tasks,
    scenario: continual.Scenario,
    folder: pathlib.Path,
    *,
    batch_size: int,
    seeds: int,
    key: int = 0,
    epochs: float | None = None,
    steps: int | None = None,
    boundary: int | None = None,
    transform: Callable | None = None,
    evaluate_every: int | None = None,
) -> Experience:
    """Trains all seeds in one program, told what the scenario says; joint training for as long as all tasks together."""
    objective, last = continual.told(learner.objective, scenario), len(tasks) - 1
    trainer = pd.vectorize(lambda: pd.Trainer(objective, learner.optimizer, learner.aggregate), seeds=seeds)
    how: dict[str, Any] = {"epochs": epochs, "steps": steps}
    if learner.draws != "task":
        how |= {"span": lambda task: 0}
    if learner.draws == "all":
        how |= {"steps": steps and steps * len(tasks), "only": range(last, last + 1)}
    options = {"batch_size": batch_size, "key": key, "folder": folder, "boundary": boundary, "transform": transform}
    score = hits(None if tasks.table.all() else tasks.table)  # shared outputs have one accuracy alone
    return experience(trainer, tasks, score=score, evaluate_every=evaluate_every, **options, **how)


def scores(name: str, found: Experience) -> dict[str, Any]:
    """The metrics of one method, one value a seed; and where tasks came one after the other, the mean of their matrix."""
    results = {}
    for kind, matrix in found.matrix.items():
        results[f"{name}/{kind}"] = matrix[:, -1].mean(-1)
        if not matrix.shape[-2] == matrix.shape[-1] > 1:
            continue
        more = {metric: getattr(metrics, metric)(matrix) for metric in OF_MATRICES}
        more["forward_transfer"] = metrics.forward_transfer(matrix, found.start[kind])
        if len(found.curve_tasks) > matrix.shape[-1]:  # there are evaluations inside of tasks
            more |= {metric: getattr(metrics, metric)(found.curve[kind], found.curve_tasks) for metric in OF_CURVES}
        results |= {f"{name}/{kind}/{metric.replace('_', ' ')}": value for metric, value in more.items()}
        results[f"{name}/{kind}/matrix"] = matrix.mean(0)
    runs, slots = len(found.state.step), found.state.state.values()
    memories = [slot["kept"] for slot in slots if isinstance(slot, dict) and "kept" in slot]
    if memories:
        results[f"{name}/memory bytes"] = np.full(runs, sum(map(continual.bytes_of, memories)) // runs)
    return results


def show(results: dict[str, Any]) -> None:
    """One line for the terminal."""
    means = {name: np.mean(value) for name, value in results.items() if name.endswith(("/accuracy", "/task accuracy"))}
    print("  ".join(f"{name} {mean:.4f}" for name, mean in means.items()), flush=True)


def method(
    name: str,
    *,
    network: pd.Model,
    table: np.ndarray,
    scenario: continual.Scenario,
    rate: float,
    buffer: int = 0,
    replay: int = 0,
    weight: float = 1.0,
    alpha: float = 0.0,
    beta: float = 0.0,
    damping: float = 1.0,
    task_size: int | None = None,
    wrap: Callable[[Objective], Objective] | None = None,
) -> Learner:
    """A method of Buzzega et al. (2020) with stochastic gradient descent.

    Args:
      name: of the method.
      table, scenario: of the stream.
      rate: of the descent.
      buffer, replay: examples the memory holds, and replays a step.
      weight: of a penalty, or the margin of GEM. alpha, beta: of DER's two terms, or of FDR's. damping: of SI.
      task_size: examples of a task, for iCaRL.
      wrap: around the supervised objective, inside all else, such as `augmented`.
    """
    plain = pd.supervised(network, active=scenario)
    plain = plain if wrap is None else wrap(plain)
    memory = continual.as_uint8(pd.reservoir(max(1, buffer)))
    optimizer = optax.sgd(rate)
    tasks = len(table)
    match name:
        case "sgd":
            return Learner(plain, optimizer)
        case "cumulative":
            return Learner(plain, optimizer, draws="so far")
        case "joint":
            return Learner(plain, optimizer, draws="all")
        case "oewc":  # the authors' code has the gradient 2 weight F (theta - anchor)
            return Learner(pd.ewc(plain, 2 * weight, continual.labelled_fisher), optimizer)
        case "si":
            return Learner(continual.si(plain, weight, damping), optimizer)
        case "mas":
            return Learner(continual.mas(plain, weight), optimizer)
        case "rwalk":
            return Learner(continual.rwalk(plain, weight), optimizer)
        case "lwf":  # the authors' loss is over the classes seen so far, and their distillation lacks the factor T^2
            seen = pd.supervised(network, active=continual.class_incremental(table))
            decayed = optax.chain(optax.add_decayed_weights(5e-4), optimizer)
            return Learner(continual.lwf(seen if wrap is None else wrap(seen), table, weight / 4, 2.0), decayed)
        case "er":
            return Learner(pd.rehearsal(plain, memory, replay), optimizer)
        case "er_ace":
            return Learner(continual.er_ace(network, memory, table, replay), optimizer)
        case "der" | "derpp":
            return Learner(continual.der(plain, memory, alpha, beta, replay), optimizer)
        case "fdr":
            return Learner(continual.fdr(plain, memory, alpha, replay), optimizer)
        case "agem":
            kept = continual.as_uint8(continual.ring(max(1, buffer // tasks), tasks))
            return Learner(continual.replay(plain, kept, replay, counts=continual.earlier), optimizer, continual.agem())
        case "gem":
            kept = continual.as_uint8(continual.ring(max(1, buffer // tasks), tasks))
            return Learner(continual.episodic_memory(plain, kept, tasks), optimizer, continual.gem(weight))
        case "gss":
            return Learner(continual.gss(plain, buffer, replay), optimizer)
        case "mir":
            retrieve = continual.interfered(5 * replay, rate)
            return Learner(pd.rehearsal(plain, memory, replay, retrieve), optimizer)
        case "gdumb":
            kept = continual.as_uint8(continual.class_balanced(buffer, table.shape[1]))
            return Learner(continual.gdumb(plain, kept, optimizer, 30 * max(1, buffer // replay), replay), optimizer)
        case "icarl":  # the authors' loss is the mean over the outputs seen so far
            return Learner(_mean_of_outputs(continual.icarl(network, table, buffer, task_size=task_size), table), optimizer)
    raise ValueError(f"--methods: {name} is not one of these")


def _mean_of_outputs(objective: Objective, table: np.ndarray) -> Objective:
    """The losses divided by the number of outputs seen so far."""
    seen = continual.seen(table)

    def losses(params, state, batch, ctx):
        found, rest = objective.losses(params, state, batch, ctx)
        return {name: loss / jnp.sum(seen(batch, ctx)) for name, loss in found.items()}, rest

    return objective._replace(losses=losses)
