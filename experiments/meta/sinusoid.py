"""Sinusoid regression: MAML, its first-order form and Reptile adapt to a sine wave from five or ten points.

Paper:     Finn, Abbeel and Levine (2017), Model-agnostic meta-learning, section 5.1; Nichol et al. (2018) for Reptile.
Protocol:  y = A sin(x - phi), A in [0.1, 5], phi in [0, pi], x in [-5, 5]; an MLP 1-40-40-1 with ReLU; 70,000 updates of
           Adam (0.001) on 25 tasks with as many queries as shots; one inner step of SGD (0.01). Reptile trains on both
           parts of a task by five steps, under Adam too. Mean squared error on the queries of 600 fresh tasks after 1, 5
           and 10 steps; last weights; interval over tasks. Kernels start with a deviation of 0.01, as in the authors' code.
           More steps than were trained can diverge on single tasks, which the mean then shows.
Command:   python -m experiments meta.sinusoid
Hardware:  2 CPU cores with AVX-512: 103 s for all six runs, start and compilation included.
Published: curves only in the paper; CAVIA's table 1 gives MAML at ten shots after one step 0.33 ± 0.02 (unverified).
"""

import dataclasses
import functools
import pathlib
from typing import Literal

import optax
from flax import nnx

import paradigms as pd
from experiments.meta.learner import Learner, learn, pooled
from experiments.runner import require
from paradigms import data
from paradigms.meta import first_order

PROTOCOL = "600 fresh tasks, mean squared error on the queries after 1 inner step; last weights; interval over tasks"
CHOICES = ("methods", "shots")
PUBLISHED = {"maml/10 shots": {"mean": 0.33, "source": "CAVIA table 1, MAML (unverified)"}}
STEPS = (1, 0, 5, 10)


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[Literal["maml", "first_order", "reptile"], ...] = ("maml", "first_order", "reptile")
    """Which learners, one after the other."""
    shots: tuple[int, ...] = (5, 10)
    """Points of a task's support set."""
    seeds: int = 1
    """Runs of each, trained together; with several the interval is over them."""
    updates: int = 70_000
    tasks: int = 25
    """Tasks an update."""
    learning_rate: float = 1e-3
    inner_rate: float = 0.01
    key: int = 0

    def __post_init__(self):
        require(self, seeds=1, updates=1, tasks=1, learning_rate=0, inner_rate=0)
        if not self.methods or not self.shots:
            raise ValueError("--methods, --shots: name one or more")


def run(config: Config, folder: pathlib.Path) -> dict:
    results = {}
    for shots in config.shots:
        test = data.sinusoids(shots=shots, queries=shots, tasks=100)
        for method in config.methods:
            name = f"{method}/{shots} shots"
            found = learn(
                learner(config, method, shots), test, folder / name.replace("/", "-"), seeds=config.seeds, key=config.key
            )
            # without normalisation queries do not see each other: both ways of answering are the same
            found = {key.replace("transductive", name): value for key, value in found.items() if "inductive" not in key}
            results |= found
    return results


def network(rngs) -> nnx.Module:
    dense = functools.partial(nnx.Linear, kernel_init=nnx.initializers.truncated_normal(0.01), rngs=rngs)
    return nnx.Sequential(dense(1, 40), nnx.relu, dense(40, 40), nnx.relu, dense(40, 1))


def learner(config: Config, method: str, shots: int) -> Learner:
    child, inner = pd.supervised(pd.from_nnx(network), optax.losses.squared_error), optax.sgd(config.inner_rate)
    source = data.sinusoids(shots=shots, queries=shots, tasks=config.tasks)
    objective = {
        "maml": lambda: pd.maml(child, inner, 1),
        "first_order": lambda: pd.maml(child, inner, 1, hypergradient=first_order()),
        "reptile": lambda: pd.reptile(child, inner, 5),
    }[method]()
    if method == "reptile":
        source = pooled(source)
    answers = lambda steps: pd.maml(child, inner, steps)
    return Learner(objective, optax.adam(config.learning_rate), source, config.updates, answers, STEPS)
