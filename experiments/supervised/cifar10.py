"""CIFAR-10: the standard ResNet-18 recipe, and a short run in the spirit of airbench (GPU tier).

Paper:     He et al. (2016), residual networks; Jordan (2024), airbench, for the short run.
Protocol:  45,000 training, 5,000 validation and 10,000 test images. "standard": 200 epochs, SGD with Nesterov momentum,
           cosine, crop and flip. "fast": 16 epochs of a narrower network in bfloat16, one-cycle rate, label smoothing,
           averaged weights. The last weights are tested; no test-time augmentation.
Command:   python -m experiments supervised.cifar10 --recipe fast
Hardware:  one GPU: minutes for "fast", an hour or two for "standard". On a CPU use it to see that it runs (--steps 2).
Published: ResNet-18 0.960 in 200 epochs; airbench 0.9401 in 2.6 s of an A100 (its clock leaves compilation out).
"""

import dataclasses
import pathlib
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

import paradigms as pd
from experiments.runner import require
from paradigms import data, fit, nn
from paradigms.evaluation import evaluate
from paradigms.metrics import classification

PROTOCOL = "45,000 / 5,000 / 10,000; last weights, no test-time augmentation; interval over seeds"
CHOICES = ("recipe",)
PUBLISHED = {
    "standard/accuracy": {"mean": 0.960, "source": "airbench repository: ResNet-18, standard recipe"},
    "fast/accuracy": {"mean": 0.9401, "source": "airbench94, mean of about 200 runs"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    recipe: Literal["fast", "standard"] = "fast"
    seeds: int = 5
    """Runs, trained together."""
    steps: int | None = None
    """Updates; by default those of the recipe."""
    batch_size: int = 512
    key: int = 0

    def __post_init__(self):
        require(self, seeds=1, batch_size=1, **({} if self.steps is None else {"steps": 1}))


def run(config: Config, folder: pathlib.Path) -> dict:
    cifar = data.load("cifar10", validation=5000)
    augment = data.augment(data.flip(), data.crop(padding=4, mode="reflect"))
    source = data.resident(cifar.train, config.batch_size, transform=augment)
    epochs = {"fast": 16, "standard": 200}[config.recipe]
    steps = epochs * source.steps_per_epoch if config.steps is None else config.steps
    trainer = pd.vectorize(lambda: make(config, cifar, steps), seeds=config.seeds)
    chunk = min(source.steps_per_epoch, steps)
    done = fit(
        trainer,
        source,
        steps,
        key=config.key,
        chunk=chunk,
        validation=cifar.validation,
        folder=folder,
        checkpoint_every=chunk,
        resume=True,
    )
    best = int(np.argmax(done.history[-1]["validation/accuracy"]))
    pd.save_model(folder, trainer, done.state, cifar.test["x"], classes=cifar.class_names, run=best)
    values = evaluate(trainer, done.state, cifar.test, classification())
    return {f"{config.recipe}/{name}": value for name, value in values.items()}


def make(config: Config, cifar: data.Data, steps: int) -> pd.Trainer:
    inputs: dict[str, Any] = {"mean": cifar.mean, "std": cifar.std, "dtype": jnp.bfloat16}
    if config.recipe == "standard":
        model = pd.from_nnx(lambda rngs: nn.ResNet(18, **inputs, rngs=rngs))
        rate = optax.schedules.cosine_decay_schedule(0.1 * config.batch_size / 128, steps)
        optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9, nesterov=True))
        return pd.Trainer(pd.supervised(model), optimizer)
    model = pd.from_nnx(lambda rngs: nn.ResNet(18, width=32, **inputs, rngs=rngs))
    rate = optax.schedules.cosine_onecycle_schedule(steps, 2.0 * config.batch_size / 512, pct_start=0.25)
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9, nesterov=True))
    objective = pd.averaged(pd.supervised(model, pd.cross_entropy(smoothing=0.2)), decay=0.99)
    return pd.Trainer(objective, optimizer)
