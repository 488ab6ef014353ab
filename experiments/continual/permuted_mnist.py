"""Permuted MNIST: 20 tasks of one epoch, domain-incremental; rehearsal, distillation and regularisation.

Paper:     Buzzega et al. (2020), table 3, "Dark experience for general continual learning".
Protocol:  20 permutations of the pixels, another 20 for each seed; 60,000 images a task once, batch 128; 784-100-100-10;
           plain SGD, the rates and weights that the authors chose; accuracy on all tasks after the last, interval over
           seeds. Memories hold uint8 images. Replay is drawn with replacement, and batches cross the end of the epoch: 469
           full ones. SI takes the task's gradient, theirs is clipped and has the penalty.
Command:   python -m experiments continual.permuted_mnist
Hardware:  2 CPU cores: two to three minutes for ten seeds of most methods at one buffer, GEM eight to twenty-two.
Published: DER++ with 500 examples 0.8821; see PUBLISHED. HAL and GSS are left out.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.continual import der
from paradigms import data

PROTOCOL = "20 permutations, one epoch each, batch 128, 784-100-100-10, SGD; last accuracy on all tasks; interval over seeds"
CHOICES = ("methods", "buffers")
GRIDS = {"accuracy by size of the memory": r"(?P<row>[a-z_]+)(/(?P<column>\d+))?/accuracy"}
PUBLISHED = {
    "joint/accuracy": {"mean": 0.9433, "std": 0.0017, "source": "Buzzega et al. 2020"},
    "sgd/accuracy": {"mean": 0.4070, "std": 0.0233, "source": "Buzzega et al. 2020"},
    "oewc/accuracy": {"mean": 0.7579, "std": 0.0225, "source": "Buzzega et al. 2020"},
    "si/accuracy": {"mean": 0.6586, "std": 0.0157, "source": "Buzzega et al. 2020"},
    "er/200/accuracy": {"mean": 0.7237, "std": 0.0087, "source": "Buzzega et al. 2020"},
    "er/500/accuracy": {"mean": 0.8060, "std": 0.0086, "source": "Buzzega et al. 2020"},
    "er/5120/accuracy": {"mean": 0.8990, "std": 0.0013, "source": "Buzzega et al. 2020"},
    "gem/200/accuracy": {"mean": 0.6693, "std": 0.0125, "source": "Buzzega et al. 2020"},
    "gem/500/accuracy": {"mean": 0.7688, "std": 0.0052, "source": "Buzzega et al. 2020"},
    "gem/5120/accuracy": {"mean": 0.8742, "std": 0.0095, "source": "Buzzega et al. 2020"},
    "agem/200/accuracy": {"mean": 0.6642, "std": 0.0400, "source": "Buzzega et al. 2020"},
    "agem/500/accuracy": {"mean": 0.6756, "std": 0.0128, "source": "Buzzega et al. 2020"},
    "agem/5120/accuracy": {"mean": 0.7332, "std": 0.0112, "source": "Buzzega et al. 2020"},
    "der/200/accuracy": {"mean": 0.8174, "std": 0.0107, "source": "Buzzega et al. 2020"},
    "der/500/accuracy": {"mean": 0.8729, "std": 0.0046, "source": "Buzzega et al. 2020"},
    "der/5120/accuracy": {"mean": 0.9166, "std": 0.0011, "source": "Buzzega et al. 2020"},
    "derpp/200/accuracy": {"mean": 0.8358, "std": 0.0059, "source": "Buzzega et al. 2020"},
    "derpp/500/accuracy": {"mean": 0.8821, "std": 0.0039, "source": "Buzzega et al. 2020"},
    "derpp/5120/accuracy": {"mean": 0.9226, "std": 0.0017, "source": "Buzzega et al. 2020"},
}
# by buffer 200, 500, 5120, or one for all
SETTINGS = {
    "joint": {"rate": 0.2},
    "sgd": {"rate": 0.2},
    "oewc": {"rate": 0.1, "weight": 0.7},
    "si": {"rate": 0.1, "weight": 0.5, "damping": 1.0},
    "er": {"rate": 0.2},
    "gem": {"rate": 0.1, "weight": 0.5},
    "agem": {"rate": 0.1},
    "fdr": {"rate": 0.1, "alpha": 1.0},  # the authors' code has no factor, whatever it is told
    "der": {"rate": 0.2, "alpha": (1.0, 1.0, 0.5)},
    "derpp": {"rate": (0.1, 0.2, 0.2), "alpha": (1.0, 1.0, 0.5), "beta": (1.0, 0.5, 1.0)},
}
Method = Literal["joint", "sgd", "oewc", "si", "er", "gem", "agem", "fdr", "der", "derpp"]


@dataclasses.dataclass(frozen=True)
class Config(der.Views):
    methods: tuple[Method, ...] = ("joint", "sgd", "oewc", "si", "er", "gem", "agem", "fdr", "der", "derpp")


def run(config: Config, folder: pathlib.Path) -> dict:
    return der.views(config, data.permuted(der.whole("mnist"), config.tasks), folder, SETTINGS)
