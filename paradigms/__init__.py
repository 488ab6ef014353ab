"""Training paradigms as composable, jit-compiled JAX objectives."""

from paradigms.adversarial import adversarial, fgsm, l2, linf, pgd
from paradigms.continual import ewc, exact_fisher, rehearsal, reservoir
from paradigms.fit import Run, fit
from paradigms.meta import maml
from paradigms.model import Model, from_functions, from_linen, from_nnx
from paradigms.multitask import multitask, pcgrad
from paradigms.objective import Aggregator, Context, Objective, Update, context
from paradigms.selfsup import byol
from paradigms.supervised import averaged, cross_entropy, penalised, sharpness, supervised
from paradigms.trainer import Pure, Trainer, TrainState
from paradigms.vectorize import grid, one_by_one, side_by_side, vectorize

__all__ = [
    "Aggregator",
    "Context",
    "Model",
    "Objective",
    "Pure",
    "Run",
    "TrainState",
    "Trainer",
    "Update",
    "adversarial",
    "averaged",
    "byol",
    "context",
    "cross_entropy",
    "ewc",
    "exact_fisher",
    "fgsm",
    "fit",
    "from_functions",
    "from_linen",
    "from_nnx",
    "grid",
    "l2",
    "linf",
    "maml",
    "multitask",
    "one_by_one",
    "pcgrad",
    "penalised",
    "pgd",
    "rehearsal",
    "reservoir",
    "sharpness",
    "side_by_side",
    "supervised",
    "vectorize",
]
