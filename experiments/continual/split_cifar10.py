"""Split CIFAR-10: 5 tasks of two classes, class-incremental and with the task's label in the test (GPU tier).

Paper:     Buzzega et al. (2020), table 2, "Dark experience for general continual learning".
Protocol:  "paper": ResNet-18 from scratch, 50 epochs a task, batch 32 and 32 replayed, crop and flip of stream and memory
           alike, plain SGD, the rates and weights that the authors chose. "short": a ResNet-18 of a quarter of the width, one
           epoch a task, for CPUs. The loss is over all ten classes; "accuracy" is among the classes seen so far, "task
           accuracy" among the two of the task. Interval over seeds. Differences: as in ``continual.split_mnist``;
           weights begin as He's, theirs as PyTorch's default; iCaRL has no weight decay, theirs 1e-5.
Command:   python -m experiments continual.split_cifar10 --tier paper
Hardware:  paper: a GPU; short: one CPU core, three seeds of fine-tuning 9 minutes, ER 18, DER++ 30.
Published: DER++ with 500 examples 0.7270 / 0.9388; see PUBLISHED. HAL, GSS, FDR, GEM and PNN are left out.
"""

import dataclasses
import pathlib
from typing import Any, Literal

import jax.numpy as jnp

import paradigms as pd
from experiments.continual import der
from paradigms import continual, data, nn

PROTOCOL = "2 classes a task, ResNet-18, batch 32, crop and flip, SGD; last accuracy on all tasks; interval over seeds"
CHOICES = ("tier", "methods", "buffers")
GRIDS = {
    "accuracy by size of the memory": r"(?P<row>[a-z_]+)(/(?P<column>\d+))?/accuracy",
    "task accuracy": r"(?P<row>[a-z_]+)(/(?P<column>\d+))?/task accuracy",
    "a quarter of the width, one epoch, memories of 500": r"short/(?P<row>[a-z_]+)(/500)?/(?P<column>accuracy|task accuracy)",
}
PUBLISHED = {
    "joint/accuracy": {"mean": 0.9220, "std": 0.0015, "source": "Buzzega et al. 2020"},
    "joint/task accuracy": {"mean": 0.9831, "std": 0.0012, "source": "Buzzega et al. 2020"},
    "sgd/accuracy": {"mean": 0.1962, "std": 0.0005, "source": "Buzzega et al. 2020"},
    "sgd/task accuracy": {"mean": 0.6102, "std": 0.0333, "source": "Buzzega et al. 2020"},
    "oewc/accuracy": {"mean": 0.1949, "std": 0.0012, "source": "Buzzega et al. 2020"},
    "oewc/task accuracy": {"mean": 0.6829, "std": 0.0392, "source": "Buzzega et al. 2020"},
    "si/accuracy": {"mean": 0.1948, "std": 0.0017, "source": "Buzzega et al. 2020"},
    "si/task accuracy": {"mean": 0.6805, "std": 0.0591, "source": "Buzzega et al. 2020"},
    "lwf/accuracy": {"mean": 0.1961, "std": 0.0005, "source": "Buzzega et al. 2020"},
    "lwf/task accuracy": {"mean": 0.6329, "std": 0.0235, "source": "Buzzega et al. 2020"},
    "er/200/accuracy": {"mean": 0.4479, "std": 0.0186, "source": "Buzzega et al. 2020"},
    "er/200/task accuracy": {"mean": 0.9119, "std": 0.0094, "source": "Buzzega et al. 2020"},
    "er/500/accuracy": {"mean": 0.5774, "std": 0.0027, "source": "Buzzega et al. 2020"},
    "er/500/task accuracy": {"mean": 0.9361, "std": 0.0027, "source": "Buzzega et al. 2020"},
    "er/5120/accuracy": {"mean": 0.8247, "std": 0.0052, "source": "Buzzega et al. 2020"},
    "er/5120/task accuracy": {"mean": 0.9698, "std": 0.0017, "source": "Buzzega et al. 2020"},
    "agem/200/accuracy": {"mean": 0.2004, "std": 0.0034, "source": "Buzzega et al. 2020"},
    "agem/200/task accuracy": {"mean": 0.8388, "std": 0.0149, "source": "Buzzega et al. 2020"},
    "agem/500/accuracy": {"mean": 0.2267, "std": 0.0057, "source": "Buzzega et al. 2020"},
    "agem/500/task accuracy": {"mean": 0.8948, "std": 0.0145, "source": "Buzzega et al. 2020"},
    "agem/5120/accuracy": {"mean": 0.2199, "std": 0.0229, "source": "Buzzega et al. 2020"},
    "agem/5120/task accuracy": {"mean": 0.9010, "std": 0.0209, "source": "Buzzega et al. 2020"},
    "icarl/200/accuracy": {"mean": 0.4902, "std": 0.0320, "source": "Buzzega et al. 2020"},
    "icarl/200/task accuracy": {"mean": 0.8899, "std": 0.0213, "source": "Buzzega et al. 2020"},
    "icarl/500/accuracy": {"mean": 0.4755, "std": 0.0395, "source": "Buzzega et al. 2020"},
    "icarl/500/task accuracy": {"mean": 0.8822, "std": 0.0262, "source": "Buzzega et al. 2020"},
    "icarl/5120/accuracy": {"mean": 0.5507, "std": 0.0155, "source": "Buzzega et al. 2020"},
    "icarl/5120/task accuracy": {"mean": 0.9223, "std": 0.0084, "source": "Buzzega et al. 2020"},
    "der/200/accuracy": {"mean": 0.6193, "std": 0.0179, "source": "Buzzega et al. 2020"},
    "der/200/task accuracy": {"mean": 0.9140, "std": 0.0092, "source": "Buzzega et al. 2020"},
    "der/500/accuracy": {"mean": 0.7051, "std": 0.0167, "source": "Buzzega et al. 2020"},
    "der/500/task accuracy": {"mean": 0.9340, "std": 0.0039, "source": "Buzzega et al. 2020"},
    "der/5120/accuracy": {"mean": 0.8381, "std": 0.0033, "source": "Buzzega et al. 2020"},
    "der/5120/task accuracy": {"mean": 0.9543, "std": 0.0033, "source": "Buzzega et al. 2020"},
    "derpp/200/accuracy": {"mean": 0.6488, "std": 0.0117, "source": "Buzzega et al. 2020"},
    "derpp/200/task accuracy": {"mean": 0.9192, "std": 0.0060, "source": "Buzzega et al. 2020"},
    "derpp/500/accuracy": {"mean": 0.7270, "std": 0.0136, "source": "Buzzega et al. 2020"},
    "derpp/500/task accuracy": {"mean": 0.9388, "std": 0.0050, "source": "Buzzega et al. 2020"},
    "derpp/5120/accuracy": {"mean": 0.8524, "std": 0.0049, "source": "Buzzega et al. 2020"},
    "derpp/5120/task accuracy": {"mean": 0.9612, "std": 0.0021, "source": "Buzzega et al. 2020"},
}
# by buffer 200, 500, 5120, or one for all
SETTINGS = {
    "joint": {"rate": 0.1},
    "sgd": {"rate": 0.1},
    "oewc": {"rate": 0.03, "weight": 10.0},
    "si": {"rate": 0.03, "weight": 0.5, "damping": 1.0},
    "lwf": {"rate": 0.01, "weight": 3.0},
    "er": {"rate": 0.1},
    "agem": {"rate": 0.03},
    "icarl": {"rate": (0.1, 0.1, 0.03)},
    "der": {"rate": 0.03, "alpha": 0.3},
    "derpp": {"rate": 0.03, "alpha": (0.1, 0.2, 0.1), "beta": (0.5, 0.5, 1.0)},
}
Method = Literal["joint", "sgd", "oewc", "si", "lwf", "er", "agem", "icarl", "der", "derpp"]


@dataclasses.dataclass(frozen=True)
class Config(der.Config):
    tier: Literal["short", "paper"] = "short"
    """How much training: what a CPU does, or the published amount."""
    methods: tuple[Method, ...] = ("sgd", "er", "derpp")
    buffers: tuple[int, ...] = (500,)
    seeds: int = 3
    epochs: float | None = None
    """Of each task; by default those of the tier."""


def run(config: Config, folder: pathlib.Path) -> dict:
    cifar = der.whole("cifar10")
    tasks = data.split_classes(cifar, per_task=2)
    paper = config.tier == "paper"
    settings = {"width": 64, "dtype": jnp.bfloat16} if paper else {"width": 16}
    inputs: dict[str, Any] = {"mean": cifar.mean, "std": cifar.std, **settings}
    network = pd.from_nnx(lambda rngs: nn.ResNet(18, **inputs, rngs=rngs))
    augment = data.augment(data.crop(padding=4), data.flip())
    return der.run(
        config,
        tasks,
        folder,
        SETTINGS,
        network=network,
        batch_size=32,
        replay=32,
        scenario=lambda table: continual.class_incremental(table, continual.every(table)),
        wrap=lambda objective: pd.augmented(objective, augment),
        epochs=config.epochs or (50 if paper else 1),
        prefix="" if paper else "short/",
    )
