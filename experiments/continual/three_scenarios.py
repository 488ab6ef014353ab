"""Split MNIST in the three scenarios: the same stream with the task's label in the test, without, and to be inferred.

Paper:     van de Ven and Tolias (2019), "Three scenarios for continual learning", tables 4 and 5.
Protocol:  5 tasks of two digits in an order of each seed's own; 2,000 updates a task, batch 128; 784-400-400, Adam of
           rate 1e-3, never reset. Task: a head a task. Domain: the two outputs are shared. Class: the loss is over the
           classes seen so far. Generated replay and distillation weigh the present 1/t and the past 1 - 1/t; experience
           replay and iCaRL count every example alike. Interval over seeds.
           Differences: EWC has the exact Fisher information, where the authors' code squares the gradients of the
           likeliest label; SI counts the task's own loss; weights begin as He's, theirs are uniform. Joint training is on
           all tasks so far, 2,000 updates each. Experience replay (1,000 examples) is of the authors' table of 2022.
Command:   python -m experiments continual.three_scenarios
Hardware:  2 CPU cores.
Published: see PUBLISHED (task / domain / class).
"""

import dataclasses
import pathlib
from typing import Any, Literal

import optax

import paradigms as pd
from experiments.continual import der
from experiments.continual.learner import Learner, learn, scores, show
from experiments.runner import require
from paradigms import continual, data, nn

PROTOCOL = "2 digits a task, 2,000 updates, batch 128, 784-400-400, Adam; last accuracy on all tasks; interval over seeds"
CHOICES = ("methods", "scenarios")
GRIDS = {"accuracy by scenario": r"(?P<column>task|domain|class)/(?P<row>[a-z_]+)/accuracy"}
PUBLISHED = {
    "task/none/accuracy": {"mean": 0.8719, "std": 0.0420, "source": "van de Ven and Tolias 2019, SEM 0.94 of 20"},
    "domain/none/accuracy": {"mean": 0.5921, "std": 0.0912, "source": "van de Ven and Tolias 2019, SEM 2.04 of 20"},
    "class/none/accuracy": {"mean": 0.1990, "std": 0.0009, "source": "van de Ven and Tolias 2019, SEM 0.02 of 20"},
    "task/joint/accuracy": {"mean": 0.9966, "std": 0.0009, "source": "van de Ven and Tolias 2019, SEM 0.02 of 20"},
    "domain/joint/accuracy": {"mean": 0.9842, "std": 0.0027, "source": "van de Ven and Tolias 2019, SEM 0.06 of 20"},
    "class/joint/accuracy": {"mean": 0.9794, "std": 0.0013, "source": "van de Ven and Tolias 2019, SEM 0.03 of 20"},
    "task/xdg/accuracy": {"mean": 0.9910, "std": 0.0036, "source": "van de Ven and Tolias 2019, SEM 0.08 of 20"},
    "task/ewc/accuracy": {"mean": 0.9864, "std": 0.0098, "source": "van de Ven and Tolias 2019, SEM 0.22 of 20"},
    "domain/ewc/accuracy": {"mean": 0.6395, "std": 0.0850, "source": "van de Ven and Tolias 2019, SEM 1.90 of 20"},
    "class/ewc/accuracy": {"mean": 0.2001, "std": 0.0027, "source": "van de Ven and Tolias 2019, SEM 0.06 of 20"},
    "task/oewc/accuracy": {"mean": 0.9912, "std": 0.0049, "source": "van de Ven and Tolias 2019, SEM 0.11 of 20"},
    "domain/oewc/accuracy": {"mean": 0.6432, "std": 0.0850, "source": "van de Ven and Tolias 2019, SEM 1.90 of 20"},
    "class/oewc/accuracy": {"mean": 0.1996, "std": 0.0031, "source": "van de Ven and Tolias 2019, SEM 0.07 of 20"},
    "task/si/accuracy": {"mean": 0.9909, "std": 0.0067, "source": "van de Ven and Tolias 2019, SEM 0.15 of 20"},
    "domain/si/accuracy": {"mean": 0.6536, "std": 0.0702, "source": "van de Ven and Tolias 2019, SEM 1.57 of 20"},
    "class/si/accuracy": {"mean": 0.1999, "std": 0.0027, "source": "van de Ven and Tolias 2019, SEM 0.06 of 20"},
    "task/lwf/accuracy": {"mean": 0.9957, "std": 0.0009, "source": "van de Ven and Tolias 2019, SEM 0.02 of 20"},
    "domain/lwf/accuracy": {"mean": 0.7150, "std": 0.0729, "source": "van de Ven and Tolias 2019, SEM 1.63 of 20"},
    "class/lwf/accuracy": {"mean": 0.2385, "std": 0.0197, "source": "van de Ven and Tolias 2019, SEM 0.44 of 20"},
    "task/dgr/accuracy": {"mean": 0.9950, "std": 0.0013, "source": "van de Ven and Tolias 2019, SEM 0.03 of 20"},
    "domain/dgr/accuracy": {"mean": 0.9572, "std": 0.0112, "source": "van de Ven and Tolias 2019, SEM 0.25 of 20"},
    "class/dgr/accuracy": {"mean": 0.9079, "std": 0.0183, "source": "van de Ven and Tolias 2019, SEM 0.41 of 20"},
    "task/dgr_distill/accuracy": {"mean": 0.9961, "std": 0.0009, "source": "van de Ven and Tolias 2019, SEM 0.02 of 20"},
    "domain/dgr_distill/accuracy": {"mean": 0.9683, "std": 0.0089, "source": "van de Ven and Tolias 2019, SEM 0.20 of 20"},
    "class/dgr_distill/accuracy": {"mean": 0.9179, "std": 0.0143, "source": "van de Ven and Tolias 2019, SEM 0.32 of 20"},
    "task/er/accuracy": {"mean": 0.9898, "source": "van de Ven et al. 2022, 100 a class"},
    "domain/er/accuracy": {"mean": 0.9375, "source": "van de Ven et al. 2022, 100 a class"},
    "class/er/accuracy": {"mean": 0.8879, "source": "van de Ven et al. 2022, 100 a class"},
    "class/icarl/accuracy": {"mean": 0.9457, "std": 0.0049, "source": "van de Ven and Tolias 2019, 2,000 in all"},
}
Method = Literal["joint", "none", "xdg", "ewc", "oewc", "si", "lwf", "dgr", "dgr_distill", "er", "icarl"]
ScenarioName = Literal["task", "domain", "class"]
RULES: dict[str, Any] = {
    "task": continual.task_incremental,
    "domain": continual.domain_incremental,
    "class": continual.class_incremental,
}
WEIGHTS = {  # of the penalties, in the three scenarios
    "ewc": {"task": 1e7, "domain": 1e6, "class": 1e8},
    "oewc": {"task": 1e8, "domain": 1e8, "class": 1e9},
    "si": {"task": 50.0, "domain": 500.0, "class": 0.5},
}
DECAY = {"task": 0.8, "domain": 0.7, "class": 0.8}  # of online EWC


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[Method, ...] = (
        "none", "joint", "xdg", "ewc", "oewc", "si", "lwf", "dgr", "dgr_distill", "er", "icarl"
    )  # fmt: skip
    """Which methods, one after the other; xdg only where tasks are known, icarl only among classes."""
    scenarios: tuple[ScenarioName, ...] = ("task", "domain", "class")
    """Which scenarios."""
    seeds: int = 5
    """Runs of each, trained together."""
    steps: int = 2000
    """Updates a task."""
    key: int = 0

    def __post_init__(self):
        require(self, seeds=1, steps=1)
        if not self.methods or not self.scenarios:
            raise ValueError("--methods, --scenarios: name nothing; give some of each")


def run(config: Config, folder: pathlib.Path) -> dict:
    mnist, results = der.whole("mnist"), {}
    for scenario in config.scenarios:
        tasks = stream(mnist, scenario)
        for name in config.methods:
            if (name == "xdg" and scenario != "task") or (name == "icarl" and scenario != "class"):
                continue
            made = learner(name, scenario, tasks)
            numbers = measured(made, scenario, tasks, folder, f"{scenario}/{name}", config)
            results |= numbers
            show(numbers)
    return results


def stream(mnist: data.Data, scenario: str) -> data.Tasks:
    """Two digits a task, in an order of each run's own."""
    return data.split_classes(mnist, per_task=2, shuffled=True, shared=scenario == "domain")


def measured(made: Learner, scenario: str, tasks: data.Tasks, folder: pathlib.Path, label: str, config: Any) -> dict:
    """The scores of a learner after the protocol, by a label; `config` has its seeds, steps and key."""
    how: Any = {"batch_size": 128, "steps": config.steps, "seeds": config.seeds, "key": config.key}
    found = learn(made, tasks, RULES[scenario](tasks.table), folder / label.replace("/", "-"), **how)
    return {key: value for key, value in scores(label, found).items() if "task accuracy" not in key}


def learner(name: str, scenario: str, tasks: data.Tasks, *, network: pd.Model | None = None, **changed: Any) -> Learner:
    """A method with the authors' settings.

    Args:
      network: 784-400-400 by default.
      **changed: arguments of `lwf` or `icarl` that are to be others than the authors'.
    """
    if changed and name not in ("lwf", "icarl"):
        raise ValueError(f"{name}: takes no changes, and got {sorted(changed)}")
    table, adam = tasks.table, optax.adam(1e-3)
    outputs = table.shape[1]
    network = pd.from_nnx(lambda rngs: nn.MLP(784, (400, 400), outputs, rngs=rngs)) if network is None else network
    plain = pd.supervised(network, active=RULES[scenario](table))
    match name:
        case "none":
            return Learner(plain, adam)
        case "joint":
            return Learner(plain, adam, draws="so far")
        case "xdg":
            return Learner(continual.xdg(plain, len(tasks), 0.8), adam)
        case "ewc":
            return Learner(pd.ewc(plain, WEIGHTS["ewc"][scenario], anchor=continual.each), adam)
        case "oewc":
            decay = DECAY[scenario]  # which the authors multiply by once more in the loss
            return Learner(pd.ewc(plain, decay * WEIGHTS["oewc"][scenario], decay=decay), adam)
        case "si":
            return Learner(continual.si(plain, WEIGHTS["si"][scenario], 0.1), adam)
        case "lwf":
            heads = {"task": continual.separate, "domain": continual.joint, "class": continual.extended}[scenario]
            options = {"heads": heads, "mix": continual.by_tasks, "answers": pd.supervised(network), **changed}
            return Learner(continual.lwf(plain, table, **options), adam)
        case "dgr" | "dgr_distill":
            parts = (
                pd.from_nnx(lambda rngs: nn.GaussianEncoder(rngs=rngs)),
                pd.from_nnx(lambda rngs: nn.BernoulliDecoder(rngs=rngs)),
            )
            told = continual.soft_labels(2.0) if name == "dgr_distill" else continual.labels
            return Learner(continual.generative_replay(plain, continual.vae(*parts), replay=told), adam)
        case "er":
            return Learner(pd.rehearsal(plain, continual.as_uint8(pd.reservoir(1000)), 128), adam)
        case "icarl":
            options = {"task_size": tasks.sizes["train"], "temperature": 2.0, **changed}
            return Learner(continual.icarl(network, table, 2000, **options), adam)
    raise ValueError(f"--methods: {name} is not one of these")
