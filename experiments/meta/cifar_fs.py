"""CIFAR-FS, 5-way: MAML, ANIL, prototypical networks and ridge regression on classes of CIFAR-100 never seen in training.

Paper:     Bertinetto et al. (2019), Meta-learning with differentiable closed-form solvers, table 1, and its class lists.
Protocol:  64 / 16 / 20 classes of CIFAR-100; Conv-4 with 64 filters (32 for MAML) and max-pooling on 32x32 images; 600 test
           tasks of 15 queries a class, answered together (transductive) and one by one (inductive); last weights; interval
           over tasks.
Command:   python -m experiments meta.cifar_fs
Hardware:  a GPU.
Published: 1 / 5 shots: MAML 0.589 / 0.715, prototypical networks 0.555 / 0.720;
           R2D2, with a larger network, 0.653 / 0.794.
"""

import dataclasses
import json
import pathlib
from typing import Literal

import optax

import paradigms as pd
from experiments.meta.learner import Learner, learn
from experiments.runner import require
from paradigms import data, meta, nn

PROTOCOL = "64 / 16 / 20 classes; Conv-4; 600 test tasks of 15 queries a class; last weights; interval over tasks"
CHOICES = ("methods", "shots")
PUBLISHED = {
    "maml/5-way 1-shot/transductive": {"mean": 0.589, "source": "Bertinetto et al. 2019, ± 1.9 %"},
    "maml/5-way 5-shot/transductive": {"mean": 0.715, "source": "Bertinetto et al. 2019, ± 1.0 %"},
    "protonet/5-way 1-shot/inductive": {"mean": 0.555, "source": "Bertinetto et al. 2019, ± 0.7 %"},
    "protonet/5-way 5-shot/inductive": {"mean": 0.720, "source": "Bertinetto et al. 2019, ± 0.6 %"},
}
WAYS = 5


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[Literal["maml", "anil", "protonet", "ridge"], ...] = ("maml", "protonet")
    """Which learners, one after the other."""
    shots: int = 1
    """Examples of each class in the support set."""
    updates: int = 60_000
    seeds: int = 1
    """Runs of each, trained together; with several the interval is over them."""
    key: int = 0

    def __post_init__(self):
        require(self, shots=1, updates=1, seeds=1)
        if not self.methods:
            raise ValueError("--methods: names no method; give maml or another")


def run(config: Config, folder: pathlib.Path) -> dict:
    classes = json.loads((pathlib.Path(__file__).parent / "classes" / "cifar_fs.json").read_text(encoding="utf-8"))
    images = data.by_class(data.load("cifar100"), classes)
    # four at a time: each of their 300 queries, answered alone, has its support set beside it
    test = data.episodes(images.test, ways=WAYS, shots=config.shots, queries=15, tasks=4)
    results = {}
    for method in config.methods:
        name = f"{method}/{WAYS}-way {config.shots}-shot"
        found = learn(learner(config, images, method), test, folder / method, seeds=config.seeds, key=config.key)
        results |= {f"{name}/{key}": value for key, value in found.items()}
    return results


def learner(config: Config, images: data.Data, method: str) -> Learner:
    def network(**options):
        inputs = {"image": (32, 32, 3), "pool": True, "mean": images.mean, "std": images.std}
        return pd.from_nnx(lambda rngs: nn.Conv4(**inputs, **options, rngs=rngs))

    def source(ways, tasks):
        return data.episodes(images.train, ways=ways, shots=config.shots, queries=15, tasks=tasks)

    if method in ("protonet", "ridge"):
        ways = 20 if method == "protonet" else WAYS
        model = network(classes=0, norm=nn.batch_norm)
        head = {"protonet": pd.prototypes, "ridge": pd.ridge}[method]
        trained, tested = (pd.episodic(model, head(n)) for n in (ways, WAYS))
        return Learner(trained, optax.adam(1e-3), source(ways, 1 if method == "protonet" else 4), config.updates, tested)
    # 0.01 of the summed loss in the paper of MAML, 0.05 of the mean over five classes
    kin = {"maml": {}, "anil": {"adapts": meta.only("head")}}[method]
    child, inner = pd.supervised(network(classes=WAYS, channels=32)), optax.sgd(0.05)
    at = lambda steps: pd.maml(child, inner, steps, **kin)
    return Learner(at(5), optax.adam(1e-3), source(WAYS, 4), config.updates, at, (10, 0, 1, 5))
