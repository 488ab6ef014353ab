"""Continual learning on scikit-learn's handwritten digits: two digits after two, and what each method remembers.

Paper:     none; each method's is named where it is defined.
Protocol:  1,797 images 8x8, a fixed stratified split into training, validation and test; digits 0 and 1, then 2 and 3, ...;
           10 epochs a task, batch 16; an MLP 64-64-64; SGD of rate 0.1, iCaRL 0.3; memories of 200 examples. The loss is
           over all ten classes and the answer among those seen so far. Penalties as strong as training bears, by
           validation. Accuracy on all tasks after the last, and every 20 updates for the curves; interval over seeds.
Command:   python -m experiments continual.digits
Hardware:  2 CPU cores, about a minute.
Published: none.
"""

import dataclasses
import pathlib
import typing
from typing import Any, Literal

import paradigms as pd
from experiments.continual.learner import learn, method, scores, show
from experiments.runner import require
from paradigms import continual, data, nn

PROTOCOL = "2 digits a task, 10 epochs, MLP 64-64-64, memories of 200; last accuracy among all classes, interval over seeds"
GRIDS = {
    "what is remembered": r"(?P<row>\w+)/(accuracy/)?(?P<column>(task )?accuracy|forgetting|anytime accuracy|stability gap)"
}
SETTINGS = {
    "joint": {},
    "cumulative": {},
    "sgd": {},
    "oewc": {"weight": 100.0},
    "si": {"weight": 0.1, "damping": 0.1},
    "mas": {"weight": 0.01},
    "rwalk": {"weight": 0.1},
    "lwf": {"weight": 1.0},
    "er": {"buffer": 200},
    "er_ace": {"buffer": 200},
    "agem": {"buffer": 200},
    "gem": {"buffer": 200, "weight": 0.5},
    "mir": {"buffer": 200},
    "gss": {"buffer": 200},
    "gdumb": {"buffer": 200},
    "icarl": {"buffer": 200, "rate": 0.3},
    "fdr": {"buffer": 200, "alpha": 0.5},
    "der": {"buffer": 200, "alpha": 0.5},
    "derpp": {"buffer": 200, "alpha": 0.2, "beta": 0.5},
}
Method = Literal[
    "joint",
    "cumulative",
    "sgd",
    "oewc",
    "si",
    "mas",
    "rwalk",
    "lwf",
    "er",
    "er_ace",
    "agem",
    "gem",
    "mir",
    "gss",
    "gdumb",
    "icarl",
    "fdr",
    "der",
    "derpp",
]


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[Method, ...] = typing.get_args(Method)
    """Which methods, one after the other."""
    seeds: int = 3
    """Runs of each, trained together."""
    epochs: int = 10
    """Of each task."""
    key: int = 0

    def __post_init__(self):
        require(self, seeds=1, epochs=1)


def run(config: Config, folder: pathlib.Path) -> dict:
    digits, results = data.load("digits"), {}
    for name in config.methods:
        numbers = learned(name, digits, folder / name, config)
        show(numbers)
        results |= numbers
    return results


def learned(name: str, digits: data.Data, folder: pathlib.Path, config: Config) -> dict:
    """The scores of one method."""
    tasks = data.split_classes(digits, per_task=2)
    network = pd.from_nnx(lambda rngs: nn.MLP(64, (64, 64), 10, mean=digits.mean, std=digits.std, rngs=rngs))
    scenario = continual.class_incremental(tasks.table, continual.every(tasks.table))
    chosen = {"rate": 0.1, "replay": 16, **SETTINGS[name]}
    learner = method(name, network=network, table=tasks.table, scenario=scenario, **chosen)
    how: Any = {"seeds": config.seeds, "epochs": config.epochs, "evaluate_every": 20, "key": config.key}
    return scores(name, learn(learner, tasks, scenario, folder, batch_size=16, **how))
