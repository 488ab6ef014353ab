"""What makes the difference to published numbers: single changes to permuted MNIST and to the three scenarios.

Paper:     Buzzega et al. (2020), van de Ven and Tolias (2019).
Protocol:  that of ``continual.permuted_mnist`` and ``continual.three_scenarios``, with one change each:
           penalty: online EWC of permuted MNIST with eight times the weight;
           uniform: van de Ven's initialisation, U(-1, 1) / sqrt(inputs) for the weights, XdG;
           terms: LwF among classes with both terms at weight 1, as in the authors' later code, where theirs of 2019 has 1/t
           and 1 - 1/t;
           exemplars: iCaRL whose exemplars together count as much as the stream, not each as one example of the union.
Command:   python -m experiments continual.differences
Hardware:  2 CPU cores, ten minutes.
Published: see PUBLISHED: the number that the unchanged benchmark is beside.
"""

import dataclasses
import pathlib
import typing
from typing import Literal

from flax import nnx

import paradigms as pd
from experiments.continual import der, permuted_mnist, three_scenarios
from experiments.continual.learner import show
from experiments.runner import require
from paradigms import continual, data, nn

PROTOCOL = "the benchmarks' own with one change each; last accuracy on all tasks, interval over seeds"
CHOICES = ("cases",)
PUBLISHED = {
    "penalty/oewc/accuracy": {"mean": 0.7579, "std": 0.0225, "source": "Buzzega et al. 2020"},
    "uniform/xdg/accuracy": {"mean": 0.9910, "std": 0.0036, "source": "van de Ven and Tolias 2019, SEM 0.08 of 20"},
    "terms/lwf/accuracy": {"mean": 0.2385, "std": 0.0197, "source": "van de Ven and Tolias 2019, SEM 0.44 of 20"},
    "exemplars/icarl/accuracy": {"mean": 0.9457, "std": 0.0049, "source": "van de Ven and Tolias 2019, 2,000 in all"},
}
GRIDS = {"one change each": r"(?P<row>[a-z]+/[a-z]+)/(?P<column>accuracy)"}
Case = Literal["penalty", "uniform", "terms", "exemplars"]


@dataclasses.dataclass(frozen=True)
class Config:
    cases: tuple[Case, ...] = typing.get_args(Case)
    """Which changes, one after the other."""
    seeds: int = 5
    """Runs of each, trained together."""
    tasks: int = 20
    """Tasks of permuted MNIST."""
    steps: int = 2000
    """Updates a task of the three scenarios."""
    key: int = 0

    def __post_init__(self):
        require(self, seeds=1, tasks=1, steps=1)
        if not self.cases:
            raise ValueError("--cases: names none; give penalty or another")


def run(config: Config, folder: pathlib.Path) -> dict:
    mnist, results = der.whole("mnist"), {}
    for case in config.cases:
        results |= changed(case, config, mnist, folder)
    return results


def changed(case: Case, config: Config, mnist: data.Data, folder: pathlib.Path) -> dict:
    """The scores of the methods that a case is about."""
    match case:
        case "penalty":
            settings = permuted_mnist.SETTINGS["oewc"]
            stronger = {"oewc": {**settings, "weight": 8 * settings["weight"]}}
            chosen = permuted_mnist.Config(methods=("oewc",), seeds=config.seeds, key=config.key)
            return der.views(chosen, data.permuted(mnist, config.tasks), folder, stronger, f"{case}/")
        case "uniform":
            uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            network = pd.from_nnx(lambda rngs: nn.MLP(784, (400, 400), kernel_init=uniform, rngs=rngs))
            return scenario(case, "xdg", "task", config, mnist, folder, network=network)
        case "terms":
            return scenario(case, "lwf", "class", config, mnist, folder, mix=continual.plain)
        case "exemplars":
            return scenario(case, "icarl", "class", config, mnist, folder, task_size=None)


def scenario(case, name, kind, config, mnist, folder, **changes) -> dict:
    """A method of the three scenarios."""
    tasks = three_scenarios.stream(mnist, kind)
    made = three_scenarios.learner(name, kind, tasks, **changes)
    numbers = three_scenarios.measured(made, kind, tasks, folder, f"{case}/{name}", config)
    show(numbers)
    return numbers
