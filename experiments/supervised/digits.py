"""Handwritten digits of scikit-learn, stratified 10-fold: an MLP against a support vector machine.

Paper:     none; the data set is the optical recognition of handwritten digits (Alpaydin and Kaynak, 1998), 1,797 images 8x8.
Protocol:  stratified 10-fold cross-validation, shuffled by a fixed seed; nothing is selected, the last weights count.
           The mean over folds is one value a seed; the interval is over seeds.
Command:   python -m experiments supervised.digits
Hardware:  2 CPU cores, about a minute.
Published: SVC (RBF, gamma 0.001) 0.9905 and MLP 256-256 0.9805, measured with scikit-learn on the same protocol.
"""

import dataclasses
import pathlib

import numpy as np
import optax

import paradigms as pd
from experiments.runner import require
from paradigms import data, fit, logging, nn
from paradigms.evaluation import evaluate
from paradigms.metrics import classification

PROTOCOL = "stratified 10-fold, shuffled with seed 0, inputs scaled alike; last weights; mean over folds, interval over seeds"
PUBLISHED = {
    "svc/accuracy": {"mean": 0.9905, "source": "scikit-learn SVC(gamma=0.001), 10-fold"},
    "mlp/accuracy": {"mean": 0.9805, "source": "scikit-learn MLPClassifier 256-256, 10-fold"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 5
    """Networks a fold, trained together."""
    folds: int = 10
    """Parts of the cross-validation."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    smoothing: float = 0.1
    """Label smoothing."""
    dropout: float = 0.2

    def __post_init__(self):
        require(self, seeds=1, folds=2, epochs=1, batch_size=1, learning_rate=0, weight_decay=0)


def run(config: Config, folder: pathlib.Path) -> dict:
    from sklearn.model_selection import StratifiedKFold
    from sklearn.svm import SVC

    digits = data.load("digits")
    x, y = (np.concatenate([split[leaf] for split in (digits.train, digits.validation, digits.test)]) for leaf in "xy")
    steps = max(1, config.epochs * len(x) * (config.folds - 1) // config.folds // config.batch_size)
    trainer = pd.vectorize(lambda: make(config, digits, steps), seeds=config.seeds)
    found = []
    splits = StratifiedKFold(config.folds, shuffle=True, random_state=0).split(x.reshape(len(x), -1), y)
    for fold, (train, test) in enumerate(splits):
        source = data.resident({"x": x[train], "y": y[train]}, config.batch_size)
        run = fit(trainer, source, steps, key=fold, chunk=steps, log=logging.several())
        values = evaluate(trainer, run.state, {"x": x[test], "y": y[test]}, classification())
        machine = SVC(gamma=0.001)  # pyright: ignore[reportArgumentType]
        machine.fit(x[train].reshape(len(train), -1) * (16 / 255), y[train])
        svc = machine.score(x[test].reshape(len(test), -1) * (16 / 255), y[test])
        print(f"fold {fold}: MLP {np.mean(values['accuracy']):.4f}, SVC {svc:.4f}", flush=True)
        if fold == 0:  # one of them goes into use
            pd.save_model(folder, trainer, run.state, x, classes=digits.class_names)
        found.append({"mlp/accuracy": values["accuracy"], "mlp/loss": values["loss"], "svc/accuracy": svc})
    return {name: np.mean([row[name] for row in found], 0) for name in found[0]}


def training(config: Config) -> dict:
    """What a sweep trains: one split instead of the folds. --apart dropout: its rate cannot be traced."""
    digits = data.load("digits")
    source = data.resident(digits.train, config.batch_size)
    steps = config.epochs * source.steps_per_epoch
    found = {"make": lambda config: make(config, digits, steps), "source": source, "steps": steps}
    return {**found, "validation": digits.validation, "chunk": source.steps_per_epoch}


def make(config: Config, digits: data.Data, steps: int) -> pd.Trainer:
    model = pd.from_nnx(
        lambda rngs: nn.MLP(
            64, config.hidden, digits.classes, dropout=config.dropout, mean=digits.mean, std=digits.std, rngs=rngs
        )
    )
    schedule = optax.schedules.cosine_onecycle_schedule(steps, config.learning_rate)
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    return pd.Trainer(pd.supervised(model, pd.cross_entropy(config.smoothing)), optimizer)
