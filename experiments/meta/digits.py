"""Few-shot learning on scikit-learn's handwritten digits: four digits never seen in training, from a few examples each.

Paper:     none; each method's is named where it is defined.
Protocol:  meta-training on the digits 0 to 5, each in four quarter turns, which count as classes of their own; test tasks
           tell three of the digits 6 to 9 apart from five examples each, queries answered one by one. An MLP 64-64-64 for
           all. The baselines "fine-tuned" and "nearest centroid" learn to tell the 24 classes apart and then meet the
           tasks; "pixels" is the nearest mean of the images themselves, which six digits to learn from do not suffice to
           beat. Matching networks have the paper's cosines, which no factor sharpens: they hardly carry over to new digits.
           600 test tasks; last weights; interval over seeds.
Command:   python -m experiments meta.digits
Hardware:  2 CPU cores, about a minute.
Published: none.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import optax

import paradigms as pd
from experiments.meta.learner import Learner, learn, nearest_pixels, pooled
from experiments.runner import require
from paradigms import data, meta, nn

PROTOCOL = "digits 0 to 5 in four turns to learn from; 3-way 5-shot tasks of the digits 6 to 9; 600 tasks, interval over seeds"
SEEN, UNSEEN = range(6), range(6, 10)
SHAPE: dict[str, Any] = {"ways": 3, "shots": 5, "queries": 10}


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    """Runs of each method, trained together."""
    updates: int = 400
    """Of each meta-learner."""
    key: int = 0

    def __post_init__(self):
        require(self, seeds=1, updates=1)


def run(config: Config, folder: pathlib.Path) -> dict:
    digits, results = data.load("digits"), {}
    for name, learner in learners(config, digits).items():
        results[name] = score(learner, digits, folder / name.replace(" ", "-"), config.seeds, config.key)
    return results | {"pixels": nearest_pixels(_of(digits, UNSEEN), **SHAPE)}


def score(learner: Learner, digits: data.Data, folder: pathlib.Path, seeds: int, key: int = 0) -> Any:
    """The accuracy of a learner on tasks of the digits it has not seen."""
    test = data.episodes(_of(digits, UNSEEN), **SHAPE, tasks=100)
    return learn(learner, test, folder, seeds=seeds, key=key)["inductive"]


def learners(config: Config, digits: data.Data) -> dict[str, Learner]:
    """Every method by its name."""
    seen = _of(digits, SEEN)
    episodes = data.episodes(seen, **SHAPE, tasks=16, classes=data.turned_apart())
    turned = {"x": np.concatenate([np.rot90(seen["x"], turn, (1, 2)) for turn in range(4)])}
    turned["y"] = np.concatenate([seen["y"] + 6 * turn for turn in range(4)]).astype(np.int32)
    plain = data.resident(turned, 64)
    model = lambda classes: pd.from_nnx(lambda rngs: nn.MLP(64, (64, 64), classes, mean=digits.mean, std=digits.std, rngs=rngs))
    child, inner, outer = pd.supervised(model(3)), optax.sgd(0.1), optax.adam(2e-3)
    classifier = pd.supervised(model(24))

    def inner_loop(**kin):
        at = lambda steps: pd.maml(child, inner, steps, **kin)
        return Learner(at(3), outer, episodes, config.updates, at, (3,))

    def head(chosen):
        objective = pd.episodic(model(0), chosen)
        return Learner(objective, outer, episodes, config.updates, objective)

    def baseline(objective):
        return Learner(objective, outer, plain, 10 * plain.steps_per_epoch, objective)

    reptile = lambda steps: pd.reptile(child, inner, steps)
    falling = optax.sgd(optax.schedules.linear_schedule(1.0, 0.0, config.updates))
    return {
        "maml": inner_loop(),
        "first-order maml": inner_loop(hypergradient=meta.first_order()),
        "reptile": Learner(reptile(5), falling, pooled(episodes), config.updates, reptile, (5,)),
        "prototypical": head(pd.prototypes(3)),
        "matching": head(pd.attention(3)),
        "ridge": head(pd.ridge(3)),
        "nearest centroid": baseline(pd.few_shot(classifier, pd.prototypes(3))),
        "fine-tuned": baseline(pd.fine_tuned(classifier, optax.sgd(0.1), 100, 3)),
    }


def _of(digits: data.Data, classes: range) -> dict:
    """The examples of some of the digits, of all splits, labels from 0."""
    whole = {k: np.concatenate([split[k] for split in (digits.train, digits.validation, digits.test)]) for k in ("x", "y")}
    rows = np.isin(whole["y"], classes)
    return {"x": whole["x"][rows], "y": whole["y"][rows] - classes.start}
