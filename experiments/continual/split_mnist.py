"""Split MNIST: 5 tasks of two digits, one epoch each, class-incremental and with the task's label in the test.

Paper:     Buzzega et al. (2020), "Dark experience for general continual learning", supplementary material (S-MNIST).
Protocol:  digits 0 and 1, then 2 and 3, ...; one epoch, batch 10 (FDR and GSS: 128); 784-100-100-10; plain SGD, the rates and
           weights that the authors chose. The loss is over all ten classes; "accuracy" is among the classes seen so far,
           "task accuracy" among the two of the task. Interval over seeds. --dataset fashion_mnist is the same with clothes.
           Differences: an epoch of each task has as many steps as their mean; iCaRL's is of the stream alone, where theirs
           has the exemplars too. Replay is drawn with replacement. SI takes the task's gradient, theirs is clipped and
           includes the penalty. LwF's loss is over the classes seen so far, as theirs; their epoch for the new outputs
           alone is left out.
Command:   python -m experiments continual.split_mnist
Hardware:  2 CPU cores: a minute or less for ten seeds of most methods at one buffer, GEM with 5,120 eight.
Published: DER++ with 500 examples 0.9100; see PUBLISHED. HAL, MER and PNN are left out.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.continual import der
from paradigms import continual, data

PROTOCOL = "2 digits a task, one epoch, batch 10, 784-100-100-10, SGD; last accuracy on all tasks; interval over seeds"
CHOICES = ("methods", "buffers", "dataset")
GRIDS = {
    "accuracy by size of the memory": r"(?P<row>[a-z_]+)(/(?P<column>\d+))?/accuracy",
    "task accuracy": r"(?P<row>[a-z_]+)(/(?P<column>\d+))?/task accuracy",
    "Fashion-MNIST, memories of 500": r"fashion/(?P<row>[a-z_]+)(/500)?/(?P<column>accuracy|task accuracy)",
}
PUBLISHED = {
    "joint/accuracy": {"mean": 0.9557, "source": "Buzzega et al. 2020"},
    "joint/task accuracy": {"mean": 0.9951, "source": "Buzzega et al. 2020"},
    "sgd/accuracy": {"mean": 0.1960, "source": "Buzzega et al. 2020"},
    "sgd/task accuracy": {"mean": 0.9494, "source": "Buzzega et al. 2020"},
    "oewc/accuracy": {"mean": 0.2046, "source": "Buzzega et al. 2020"},
    "oewc/task accuracy": {"mean": 0.9839, "source": "Buzzega et al. 2020"},
    "si/accuracy": {"mean": 0.1927, "source": "Buzzega et al. 2020"},
    "si/task accuracy": {"mean": 0.9600, "source": "Buzzega et al. 2020"},
    "lwf/accuracy": {"mean": 0.1962, "source": "Buzzega et al. 2020"},
    "lwf/task accuracy": {"mean": 0.9411, "source": "Buzzega et al. 2020"},
    "er/200/accuracy": {"mean": 0.8043, "std": 0.0189, "source": "Buzzega et al. 2020"},
    "er/500/accuracy": {"mean": 0.8612, "std": 0.0189, "source": "Buzzega et al. 2020"},
    "er/5120/accuracy": {"mean": 0.9340, "std": 0.0129, "source": "Buzzega et al. 2020"},
    "gem/200/accuracy": {"mean": 0.8011, "source": "Buzzega et al. 2020"},
    "gem/500/accuracy": {"mean": 0.8599, "source": "Buzzega et al. 2020"},
    "gem/5120/accuracy": {"mean": 0.9511, "source": "Buzzega et al. 2020"},
    "agem/200/accuracy": {"mean": 0.4572, "std": 0.0426, "source": "Buzzega et al. 2020"},
    "agem/500/accuracy": {"mean": 0.4666, "std": 0.0585, "source": "Buzzega et al. 2020"},
    "agem/5120/accuracy": {"mean": 0.5424, "std": 0.0649, "source": "Buzzega et al. 2020"},
    "icarl/200/accuracy": {"mean": 0.7051, "source": "Buzzega et al. 2020"},
    "icarl/500/accuracy": {"mean": 0.7010, "source": "Buzzega et al. 2020"},
    "icarl/5120/accuracy": {"mean": 0.7060, "source": "Buzzega et al. 2020"},
    "der/200/accuracy": {"mean": 0.8455, "std": 0.0164, "source": "Buzzega et al. 2020"},
    "der/500/accuracy": {"mean": 0.9054, "std": 0.0118, "source": "Buzzega et al. 2020"},
    "der/5120/accuracy": {"mean": 0.9490, "std": 0.0057, "source": "Buzzega et al. 2020"},
    "derpp/200/accuracy": {"mean": 0.8561, "std": 0.0140, "source": "Buzzega et al. 2020"},
    "derpp/500/accuracy": {"mean": 0.9100, "std": 0.0149, "source": "Buzzega et al. 2020"},
    "derpp/5120/accuracy": {"mean": 0.9530, "std": 0.0120, "source": "Buzzega et al. 2020"},
}
# by buffer 200, 500, 5120, or one for all
SETTINGS = {
    "joint": {"rate": 0.03},
    "sgd": {"rate": 0.03},
    "oewc": {"rate": 0.03, "weight": 90.0},
    "si": {"rate": 0.1, "weight": 1.0, "damping": 0.9},
    "lwf": {"rate": 0.03, "weight": 1.0},
    "er": {"rate": (0.01, 0.1, 0.1), "replay": 10},
    "gem": {"rate": (0.01, 0.03, 0.1), "weight": (1.0, 0.5, 1.0)},
    "agem": {"rate": 0.1, "replay": 128},
    "icarl": {"rate": 0.1},
    "gss": {"rate": 0.1, "replay": (10, 10, 128), "batch_size": 128},
    "fdr": {"rate": (0.03, 0.1, 0.1), "alpha": 1.0, "replay": 128, "batch_size": 128},  # their code has no factor
    "der": {"rate": (0.03, 0.03, 0.1), "alpha": (0.2, 1.0, 0.5), "replay": (10, 128, 128)},
    "derpp": {
        "rate": (0.03, 0.03, 0.1),
        "alpha": (0.2, 1.0, 0.2),
        "beta": (1.0, 0.5, 0.5),
        "replay": (128, 10, 64),
    },
    # of no table of the authors: the rates of experience replay
    "er_ace": {"rate": (0.01, 0.1, 0.1)},
    "mir": {"rate": (0.01, 0.1, 0.1)},
    "cumulative": {"rate": 0.03},
}
Method = Literal[
    "joint", "sgd", "oewc", "si", "lwf", "er", "gem", "agem", "icarl", "fdr", "gss", "der", "derpp",
    "cumulative", "er_ace", "mir",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(der.Config):
    methods: tuple[Method, ...] = (
        "joint", "sgd", "oewc", "si", "lwf", "er", "gem", "agem", "icarl", "fdr", "gss", "der", "derpp"
    )  # fmt: skip
    dataset: Literal["mnist", "fashion_mnist"] = "mnist"
    """The set that is split."""


def run(config: Config, folder: pathlib.Path) -> dict:
    tasks = data.split_classes(der.whole(config.dataset), per_task=2)
    prefix = "" if config.dataset == "mnist" else "fashion/"
    return der.run(config, tasks, folder, SETTINGS, batch_size=10, replay=10, scenario=scenario, prefix=prefix)


def scenario(table) -> continual.Scenario:
    """The loss over all classes, as the authors have it."""
    return continual.class_incremental(table, continual.every(table))
