"""Fashion-MNIST: an MLP, and a small CNN with augmentation.

Paper:     Xiao, Rasul and Vollgraf (2017), Fashion-MNIST; the table of benchmarks in its repository.
Protocol:  55,000 training and 5,000 validation images (fixed, stratified), 10,000 test images. Weights are an exponential
           average; the evaluation that is best on validation is the one tested, once. Interval over seeds.
Command:   python -m experiments supervised.fashion_mnist
Hardware:  2 CPU cores with nothing else to do: 9 minutes a seed of the CNN, half a minute a seed of the MLP.
Published: two convolutions with < 100,000 parameters 0.925; MLP 256-128-64 0.900; human 0.835 (unverified submissions).
"""

import dataclasses
import pathlib
from typing import Any, Literal

import numpy as np
import optax

import paradigms as pd
from experiments.runner import require
from paradigms import data, fit, nn
from paradigms.evaluation import evaluate
from paradigms.metrics import classification

PROTOCOL = "55,000 / 5,000 / 10,000; averaged weights, best validation accuracy, tested once; interval over seeds"
PUBLISHED = {
    "cnn/accuracy": {"mean": 0.925, "source": "Fashion-MNIST repository: 2 conv, < 100K parameters"},
    "mlp/accuracy": {"mean": 0.900, "source": "Fashion-MNIST repository: MLP 256-128-64"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    networks: tuple[Literal["mlp", "cnn"], ...] = ("mlp", "cnn")
    """Which networks to train, one after the other."""
    seeds: int = 5
    """Runs of each network, trained together."""
    mlp_epochs: int = 20
    cnn_epochs: int = 11
    batch_size: int = 128
    learning_rate: float = 2e-3
    """Highest rate of a one-cycle schedule with AdamW."""
    weight_decay: float = 5e-2
    smoothing: float = 0.05
    """Label smoothing."""
    decay: float = 0.998
    """Of the average of the weights."""
    key: int = 0

    def __post_init__(self):
        require(self, seeds=1, mlp_epochs=1, cnn_epochs=1, batch_size=1, learning_rate=0, weight_decay=0)
        if not self.networks:
            raise ValueError("--networks: names no network; give mlp, cnn or both")


def run(config: Config, folder: pathlib.Path) -> dict:
    fashion = data.load("fashion_mnist", validation=5000)
    results = {}
    for network in config.networks:
        source, steps = stream(config, fashion, network)
        trainer = pd.vectorize(lambda network=network, steps=steps: make(config, fashion, network, steps), seeds=config.seeds)
        epoch = source.steps_per_epoch
        done = fit(
            trainer,
            source,
            steps,
            key=config.key,
            chunk=epoch,
            validation=fashion.validation,
            folder=folder / network,
            checkpoint_every=epoch,
            resume=True,
        )
        best = np.argmax(np.max([row["validation/accuracy"] for row in done.history], 0))
        pd.save_model(folder / network, trainer, done.best, fashion.test["x"], classes=fashion.class_names, run=int(best))
        values = evaluate(trainer, done.best, fashion.test, classification())
        results |= {f"{network}/{name}": value for name, value in values.items()}
    return results


def training(config: Config) -> dict:
    """What a sweep trains: the first of the networks."""
    fashion, network = data.load("fashion_mnist", validation=5000), config.networks[0]
    source, steps = stream(config, fashion, network)
    found = {"make": lambda config: make(config, fashion, network, steps), "source": source, "steps": steps}
    return {**found, "validation": fashion.validation, "chunk": source.steps_per_epoch, "key": config.key}


def stream(config: Config, fashion: data.Data, network: str) -> tuple[data.Source, int]:
    """Batches of the training split and the number of steps; the CNN sees flipped and shifted images."""
    augment = {"mlp": data.augment(data.flip()), "cnn": data.augment(data.flip(), data.translate(1))}[network]
    source = data.resident(fashion.train, config.batch_size, transform=augment)
    return source, source.steps_per_epoch * {"mlp": config.mlp_epochs, "cnn": config.cnn_epochs}[network]


def make(config: Config, fashion: data.Data, network: str, steps: int) -> pd.Trainer:
    inputs: dict[str, Any] = {"mean": fashion.mean, "std": fashion.std}
    networks = {
        "mlp": lambda rngs: nn.MLP(784, (256, 256), dropout=0.1, **inputs, rngs=rngs),
        "cnn": lambda rngs: nn.SmallCNN(channels=(32, 64, 128), dropout=0.2, **inputs, rngs=rngs),
    }
    objective = pd.averaged(pd.supervised(pd.from_nnx(networks[network]), pd.cross_entropy(config.smoothing)), config.decay)
    schedule = optax.schedules.cosine_onecycle_schedule(steps, config.learning_rate, pct_start=0.2)
    return pd.Trainer(objective, optax.adamw(schedule, weight_decay=config.weight_decay))
