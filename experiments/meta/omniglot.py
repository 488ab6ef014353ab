"""Omniglot, few-shot: MAML and its kin, Reptile and prototypical networks on a four-layer convolutional network.

Paper:     Finn et al. (2017), table 1; Raghu et al. (2020) for ANIL; Li et al. (2017) for Meta-SGD; Rajeswaran et al. (2019)
           for iMAML; Nichol et al. (2018) for Reptile; Snell et al. (2017) for prototypical networks.
Protocol:  1623 characters in 28x28, 1100 / 100 / 423 for training / validation / test by a fixed file; a task's characters
           are turned by a random quarter. 600 test tasks with as many queries as shots, answered together (transductive,
           as published for MAML) and one by one (inductive); last weights; interval over tasks. "paper" has the papers'
           meta-batches, numbers of updates and rates; "short" is what two CPU cores do in under 15 minutes a method:
           4 tasks and 16,000 updates (iMAML 4,000, not timed) under a falling rate, an inner rate of 1.0 of the mean loss
           (half of MAML's at 5 ways), 2,000 updates of Reptile, prototypical networks with 20 ways and strides. Unlike
           MAML's code, normalisation has a scale, and scale and bias adapt; unlike that of prototypical networks, turned
           characters are not classes of their own.
Command:   python -m experiments meta.omniglot; python -m experiments meta.omniglot --tier paper --methods maml first_order ...
Hardware:  short: 2 CPU cores; paper: a GPU.
Published: 5-way 1-shot MAML 0.987, prototypical networks 0.988; see PUBLISHED for the rest (copied from the papers, some
           through other publications).
"""

import dataclasses
import json
import pathlib
from typing import Any, Literal

import optax

import paradigms as pd
from experiments.meta.learner import Learner, learn, pooled
from experiments.runner import require
from paradigms import data, meta, nn

PROTOCOL = "1100 / 100 / 423 characters by a fixed file, quarter turns; 600 test tasks; last weights; interval over tasks"
CHOICES = ("tier", "methods", "ways", "shots")
PUBLISHED = {
    "maml/5-way 1-shot/transductive": {"mean": 0.987, "source": "Finn et al. 2017, ± 0.4 %"},
    "maml/5-way 5-shot/transductive": {"mean": 0.999, "source": "Finn et al. 2017, ± 0.1 %"},
    "maml/20-way 1-shot/transductive": {"mean": 0.958, "source": "Finn et al. 2017, ± 0.3 %"},
    "maml/20-way 5-shot/transductive": {"mean": 0.989, "source": "Finn et al. 2017, ± 0.2 %"},
    "first_order/5-way 1-shot/transductive": {"mean": 0.983, "source": "Nichol et al. 2018, first-order MAML"},
    "first_order/20-way 1-shot/transductive": {"mean": 0.894, "source": "Nichol et al. 2018, first-order MAML"},
    "anil/20-way 1-shot/transductive": {"mean": 0.962, "source": "Raghu et al. 2020 (unverified)"},
    "meta_sgd/5-way 1-shot/transductive": {"mean": 0.9953, "source": "Li et al. 2017 (unverified)"},
    "imaml/5-way 1-shot/transductive": {"mean": 0.9916, "source": "Rajeswaran et al. 2019, gradient descent"},
    "reptile/5-way 1-shot/transductive": {"mean": 0.9768, "source": "Nichol et al. 2018"},
    "reptile/5-way 1-shot/inductive": {"mean": 0.9539, "source": "Nichol et al. 2018"},
    "protonet/5-way 1-shot/inductive": {"mean": 0.988, "source": "Snell et al. 2017"},
    "protonet/5-way 5-shot/inductive": {"mean": 0.997, "source": "Snell et al. 2017"},
    "protonet/20-way 1-shot/inductive": {"mean": 0.960, "source": "Snell et al. 2017"},
    "protonet/20-way 5-shot/inductive": {"mean": 0.989, "source": "Snell et al. 2017"},
    "short/maml/5-way 1-shot/transductive": {"mean": 0.987, "source": "Finn et al. 2017: 60,000 updates of 32 tasks"},
    "short/first_order/5-way 1-shot/transductive": {"mean": 0.983, "source": "Nichol et al. 2018: 60,000 updates of 32 tasks"},
    "short/meta_sgd/5-way 1-shot/transductive": {"mean": 0.9953, "source": "Li et al. 2017 (unverified)"},
    "short/imaml/5-way 1-shot/transductive": {"mean": 0.9916, "source": "Rajeswaran et al. 2019: 20,000 updates of 32 tasks"},
    "short/reptile/5-way 1-shot/transductive": {"mean": 0.9768, "source": "Nichol et al. 2018: 100,000 updates"},
    "short/reptile/5-way 1-shot/inductive": {"mean": 0.9539, "source": "Nichol et al. 2018: with settings of its own"},
    "short/protonet/5-way 1-shot/inductive": {"mean": 0.988, "source": "Snell et al. 2017: 60 ways"},
}
Method = Literal["maml", "first_order", "anil", "meta_sgd", "imaml", "reptile", "protonet"]


@dataclasses.dataclass(frozen=True)
class Config:
    tier: Literal["short", "paper"] = "short"
    """How much training: what a CPU does in minutes, or the published amount."""
    methods: tuple[Method, ...] = ("maml", "protonet")
    """Which learners, one after the other."""
    classes: Literal["omniglot", "omniglot_vinyals"] = "omniglot"
    """The file of the split: MAML's sizes, or that of matching and prototypical networks (1028 / 172 / 423)."""
    ways: int = 5
    """Characters of a test task."""
    shots: int = 1
    """Examples of each in the support set."""
    seeds: int = 1
    """Runs of each, trained together; with several the interval is over them."""
    key: int = 0

    def __post_init__(self):
        require(self, ways=2, shots=1, seeds=1)
        if not self.methods:
            raise ValueError("--methods: names no method; give maml or another")
        only = {"reptile", "imaml"} & set(self.methods)
        if self.tier == "paper" and only and (self.ways, self.shots) != (5, 1):
            raise ValueError(f"--methods {' '.join(sorted(only))}: has its published settings for 5 ways and 1 shot alone")


def run(config: Config, folder: pathlib.Path) -> dict:
    characters = load(config.classes)
    shape = {"ways": config.ways, "shots": config.shots, "queries": config.shots}
    test = data.episodes(characters.test, **shape, tasks=50, classes=data.turned())
    results = {}
    for method in config.methods:
        prefix = "" if config.tier == "paper" else "short/"
        name = f"{prefix}{method}/{config.ways}-way {config.shots}-shot"
        place = folder / name.replace("/", "-").replace(" ", "-")
        found = learn(learner(config, characters, method), test, place, seeds=config.seeds, key=config.key)
        results |= {f"{name}/{key}": value for key, value in found.items()}
    return results


def load(file: str) -> data.Data:
    """The characters as ink on nothing: the images of the set are dark on white."""
    classes = json.loads((pathlib.Path(__file__).parent / "classes" / f"{file}.json").read_text(encoding="utf-8"))
    found = data.by_class(data.load("omniglot", size=28), classes)
    inverted = {
        part: {**getattr(found, part), "x": 255 - getattr(found, part)["x"]} for part in ("train", "validation", "test")
    }
    return dataclasses.replace(found, **inverted)


def learner(config: Config, characters: data.Data, method: str) -> Learner:
    paper = config.tier == "paper"
    five = config.ways <= 5
    make = {"protonet": _protonet, "reptile": _reptile, "imaml": _imaml}.get(method)
    if make is not None:
        return make(config, characters)
    # the published rates are for the sum over the classes' losses, 0.4 (5 ways) and 0.1 (20 ways): 2.0 of the mean
    rate, steps, reported = (1.0 if not paper else 2.0, 1, 3) if five else (2.0, 5, 5)
    if method == "meta_sgd":  # is a method of one step
        steps = reported = 1
    kin = {
        "maml": {},
        "first_order": {"hypergradient": meta.first_order()},
        "anil": {"adapts": meta.only("head")},
        "meta_sgd": {"rates": meta.per_parameter(0.005, 0.1)},
    }[method]
    inner = optax.sgd(1.0 if method == "meta_sgd" else rate)
    child = pd.supervised(_network(config))
    at = lambda steps: pd.maml(child, inner, steps, **kin)
    tasks = (32 if five else 16) if paper else 4
    updates = 60_000 if paper else 16_000
    optimizer = optax.adam(1e-3) if paper else optax.adam(optax.schedules.cosine_decay_schedule(2e-3, updates))
    tested = (reported, *(k for k in (0, 1, 3, 5, 10) if k != reported))
    return Learner(at(steps), optimizer, _episodes(config, characters, tasks), updates, at, tested)


def _network(config: Config) -> pd.Model:
    return pd.from_nnx(lambda rngs: nn.Conv4(classes=config.ways, rngs=rngs))


def _episodes(config: Config, characters: data.Data, tasks: int, **shape: Any) -> data.Source:
    shape = {"ways": config.ways, "shots": config.shots, "queries": config.shots, **shape}
    return data.episodes(characters.train, **shape, tasks=tasks, classes=data.turned())


def _imaml(config: Config, characters: data.Data) -> Learner:
    """The rates and numbers of steps of the authors' code, tested without the pull, as there; the system is the paper's."""
    child, inner = pd.supervised(_network(config)), optax.sgd(0.1)
    objective = pd.maml(child, inner, 16, hypergradient=meta.implicit(2.0))
    tasks, updates = (32, 20_000) if config.tier == "paper" else (4, 4_000)
    optimizer = optax.adam(1e-3, eps=1e-3)
    answers = lambda steps: pd.maml(child, inner, steps)
    return Learner(objective, optimizer, _episodes(config, characters, tasks), updates, answers, (16, 0, 1, 5))


def _reptile(config: Config, characters: data.Data) -> Learner:
    """The transductive settings of the authors' code for 5 ways and 1 shot: 15 shots in training, 3 steps of 25 images.

    There Adam's second moments live on from task to task, and support and queries are answered together.
    """
    child, inner = pd.supervised(_network(config)), optax.adam(1e-3, b1=0.0)
    updates = 100_000 if config.tier == "paper" else 2_000
    source = pooled(_episodes(config, characters, 10, shots=10, queries=5))
    outer = optax.sgd(optax.schedules.linear_schedule(1.0, 0.0, updates))
    answers = lambda steps: pd.reptile(child, inner, steps, batch_size=25)
    return Learner(pd.reptile(child, inner, 3, batch_size=25), outer, source, updates, answers, (5, 0, 1, 10, 50))


def _protonet(config: Config, characters: data.Data) -> Learner:
    """Running statistics, more ways in training than in the test, and in the whole training pooling rather than strides."""
    paper = config.tier == "paper"
    model = pd.from_nnx(lambda rngs: nn.Conv4(classes=0, pool=paper, norm=nn.batch_norm, rngs=rngs))
    ways, updates = (60, 20_000) if paper else (20, 1_500)
    source = _episodes(config, characters, 1 if paper else 4, ways=ways, queries=5)
    schedule = optax.schedules.exponential_decay(1e-3, 2_000 if paper else updates // 4, 0.5, staircase=True)
    trained, tested = (pd.episodic(model, pd.prototypes(n)) for n in (ways, config.ways))
    return Learner(trained, optax.adam(schedule), source, updates, tested)
