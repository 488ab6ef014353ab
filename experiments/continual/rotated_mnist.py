"""Rotated MNIST: 20 tasks of one epoch, domain-incremental; rehearsal, distillation and regularisation.

Paper:     Buzzega et al. (2020), table 3, "Dark experience for general continual learning".
Protocol:  20 angles uniform in [0, 180) degrees, another 20 for each seed, by the nearest pixel; else as
           ``continual.permuted_mnist``, with the rates and weights that the authors chose for this stream.
Command:   python -m experiments continual.rotated_mnist
Hardware:  2 CPU cores: two to three minutes for ten seeds of most methods at one buffer, GEM eight to twenty-two.
Published: DER++ with 500 examples 0.9277; see PUBLISHED. HAL and GSS are left out.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.continual import der
from paradigms import data

PROTOCOL = "20 rotations, one epoch each, batch 128, 784-100-100-10, SGD; last accuracy on all tasks; interval over seeds"
CHOICES = ("methods", "buffers")
GRIDS = {"accuracy by size of the memory": r"(?P<row>[a-z_]+)(/(?P<column>\d+))?/accuracy"}
PUBLISHED = {
    "joint/accuracy": {"mean": 0.9576, "std": 0.0004, "source": "Buzzega et al. 2020"},
    "sgd/accuracy": {"mean": 0.6766, "std": 0.0853, "source": "Buzzega et al. 2020"},
    "oewc/accuracy": {"mean": 0.7735, "std": 0.0577, "source": "Buzzega et al. 2020"},
    "si/accuracy": {"mean": 0.7191, "std": 0.0583, "source": "Buzzega et al. 2020"},
    "er/200/accuracy": {"mean": 0.8501, "std": 0.0190, "source": "Buzzega et al. 2020"},
    "er/500/accuracy": {"mean": 0.8891, "std": 0.0144, "source": "Buzzega et al. 2020"},
    "er/5120/accuracy": {"mean": 0.9345, "std": 0.0056, "source": "Buzzega et al. 2020"},
    "gem/200/accuracy": {"mean": 0.8080, "std": 0.0115, "source": "Buzzega et al. 2020"},
    "gem/500/accuracy": {"mean": 0.8115, "std": 0.0198, "source": "Buzzega et al. 2020"},
    "gem/5120/accuracy": {"mean": 0.8857, "std": 0.0040, "source": "Buzzega et al. 2020"},
    "agem/200/accuracy": {"mean": 0.8191, "std": 0.0076, "source": "Buzzega et al. 2020"},
    "agem/500/accuracy": {"mean": 0.8031, "std": 0.0629, "source": "Buzzega et al. 2020"},
    "agem/5120/accuracy": {"mean": 0.8018, "std": 0.0552, "source": "Buzzega et al. 2020"},
    "der/200/accuracy": {"mean": 0.9004, "std": 0.0261, "source": "Buzzega et al. 2020"},
    "der/500/accuracy": {"mean": 0.9224, "std": 0.0112, "source": "Buzzega et al. 2020"},
    "der/5120/accuracy": {"mean": 0.9414, "std": 0.0031, "source": "Buzzega et al. 2020"},
    "derpp/200/accuracy": {"mean": 0.9043, "std": 0.0187, "source": "Buzzega et al. 2020"},
    "derpp/500/accuracy": {"mean": 0.9277, "std": 0.0105, "source": "Buzzega et al. 2020"},
    "derpp/5120/accuracy": {"mean": 0.9465, "std": 0.0033, "source": "Buzzega et al. 2020"},
}
# by buffer 200, 500, 5120, or one for all
SETTINGS = {
    "joint": {"rate": 0.2},
    "sgd": {"rate": 0.2},
    "oewc": {"rate": 0.1, "weight": 0.7},
    "si": {"rate": 0.1, "weight": 1.0, "damping": 1.0},
    "er": {"rate": 0.2},
    "gem": {"rate": 0.01, "weight": 0.5},
    "agem": {"rate": (0.1, 0.3, 0.3)},
    "fdr": {"rate": 0.2, "alpha": 1.0},  # the authors' code has no factor, whatever it is told
    "der": {"rate": 0.2, "alpha": (1.0, 0.5, 0.5)},
    "derpp": {"rate": (0.1, 0.2, 0.2), "alpha": (1.0, 0.5, 0.5), "beta": (0.5, 1.0, 0.5)},
}
Method = Literal["joint", "sgd", "oewc", "si", "er", "gem", "agem", "fdr", "der", "derpp"]


@dataclasses.dataclass(frozen=True)
class Config(der.Views):
    methods: tuple[Method, ...] = ("joint", "sgd", "oewc", "si", "er", "gem", "agem", "fdr", "der", "derpp")


def run(config: Config, folder: pathlib.Path) -> dict:
    return der.views(config, data.rotated(der.whole("mnist"), config.tasks), folder, SETTINGS)
