"""The protocol of Buzzega et al. (2020): what its benchmarks share."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import paradigms as pd
from experiments.continual.learner import learn, method, scores, show
from experiments.runner import require
from paradigms import continual, data, nn

BUFFERS = (200, 500, 5120)  # those for which the authors chose settings
WITHOUT = ("joint", "cumulative", "sgd", "oewc", "si", "lwf")  # methods that keep no examples


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[Any, ...] = ()
    """Which methods, one after the other."""
    buffers: tuple[int, ...] = BUFFERS
    """Examples that memories hold."""
    seeds: int = 10
    """Runs of each, trained together."""
    key: int = 0

    def __post_init__(self):
        require(self, seeds=1)
        if not self.methods:
            raise ValueError("--methods: names no method; give er or another")
        if unknown := set(self.buffers) - set(BUFFERS):
            raise ValueError(f"--buffers: {sorted(unknown)} have no settings; give some of {BUFFERS}")


@dataclasses.dataclass(frozen=True)
class Views(Config):
    """Of a stream that shows the whole set through another view in every task."""

    tasks: int = 20
    """Tasks of the stream."""

    def __post_init__(self):
        super().__post_init__()
        require(self, tasks=1)


def whole(name: str) -> data.Data:
    """A set with all its images but the test's in the training split, as published: nothing is selected here."""
    found = data.load(name, validation=1000)
    train = jax.tree.map(lambda a, b: np.concatenate([a, b]), found.train, found.validation)
    return dataclasses.replace(found, train=train)


def perceptron() -> pd.Model:
    """The authors' network for MNIST, 784-100-100-10, initialised after Glorot and Bengio (2010)."""
    return pd.from_nnx(lambda rngs: nn.MLP(kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs))


def run(
    config: Any,
    tasks: data.Tasks,
    folder: pathlib.Path,
    settings: dict,
    *,
    batch_size: int,
    replay: int,
    scenario: Callable,
    network: pd.Model | None = None,
    wrap: Callable | None = None,
    epochs: float = 1,
    prefix: str = "",
) -> dict:
    """All methods of a benchmark with all buffers.

    Args:
      settings: {method: {argument of `method`, or "batch_size": a number, or one for each of `BUFFERS`}}.
      replay: examples replayed a step where the settings of a method do not say.
      scenario: ``table -> Scenario``.
      network: the authors' for MNIST by default.
      wrap: as in `method`.
      prefix: of the names of the results.
    """
    network = perceptron() if network is None else network
    results = {}
    for name in config.methods:
        for buffer in (0,) if name in WITHOUT else config.buffers:
            chosen = {"replay": replay, "buffer": buffer, **at(settings[name], buffer)}
            how = {"batch_size": chosen.pop("batch_size", batch_size), "epochs": epochs, "seeds": config.seeds}
            rules = scenario(tasks.table)
            learner = method(
                name, network=network, table=tasks.table, scenario=rules, task_size=tasks.sizes["train"], wrap=wrap, **chosen
            )
            label = prefix + (f"{name}/{buffer}" if buffer else name)
            found = learn(learner, tasks, rules, folder / label.replace("/", "-"), key=config.key, **how)
            numbers = scores(label, found)
            show(numbers)
            results |= numbers
    return results


def views(config: Any, tasks: data.Tasks, folder: pathlib.Path, settings: dict, prefix: str = "") -> dict:
    """All methods on a stream of `Views`: batches of 128 and 128 replayed, domain-incremental; arguments as in `run`."""
    how: Any = {"batch_size": 128, "replay": 128, "scenario": continual.domain_incremental, "prefix": prefix}
    return run(config, tasks, folder, settings, **how)


def at(settings: dict[str, Any], buffer: int) -> dict[str, Any]:
    """The settings of a method at one buffer, 0 for methods without."""
    place = BUFFERS.index(buffer) if buffer else 0
    return {name: value[place] if isinstance(value, tuple) else value for name, value in settings.items()}
