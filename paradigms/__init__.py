"""Training paradigms as composable, jit-compiled JAX objectives."""

from paradigms.adversarial import adversarial, fgsm, l2, linf, pgd
from paradigms.checkpoint import Keep
from paradigms.continual import ewc, exact_fisher, rehearsal, reservoir
from paradigms.experience import Experience, experience, hits
from paradigms.export import artefact, save_model
from paradigms.fit import Run, fit
from paradigms.interrupt import Stopped, stopping
from paradigms.mesh import make_mesh
from paradigms.meta import (
    adapt,
    attention,
    episodic,
    evaluate_episodes,
    few_shot,
    fine_tuned,
    maml,
    prototypes,
    reptile,
    ridge,
)
from paradigms.model import Model, from_functions, from_linen, from_nnx
from paradigms.multitask import multitask, pcgrad
from paradigms.network import Network, load_run
from paradigms.nonfinite import RAISE, SKIP, Diverged, Nonfinite, rollback
from paradigms.objective import Aggregator, Context, Objective, Update, context
from paradigms.pure import Pure, TrainState
from paradigms.selfsup import byol
from paradigms.supervised import augmented, averaged, cross_entropy, penalised, sharpness, supervised
from paradigms.sweep import Sweep, choice, log_uniform, optuna_search, random_search, sweep, uniform
from paradigms.trainer import Trainer
from paradigms.vectorize import grid, one_by_one, side_by_side, vectorize

__all__ = [
    "RAISE",
    "SKIP",
    "Aggregator",
    "Context",
    "Diverged",
    "Experience",
    "Keep",
    "Model",
    "Network",
    "Nonfinite",
    "Objective",
    "Pure",
    "Run",
    "Stopped",
    "Sweep",
    "TrainState",
    "Trainer",
    "Update",
    "adapt",
    "adversarial",
    "artefact",
    "attention",
    "augmented",
    "averaged",
    "byol",
    "choice",
    "context",
    "cross_entropy",
    "episodic",
    "evaluate_episodes",
    "ewc",
    "exact_fisher",
    "experience",
    "few_shot",
    "fgsm",
    "fine_tuned",
    "fit",
    "from_functions",
    "from_linen",
    "from_nnx",
    "grid",
    "hits",
    "l2",
    "linf",
    "load_run",
    "log_uniform",
    "make_mesh",
    "maml",
    "multitask",
    "one_by_one",
    "optuna_search",
    "pcgrad",
    "penalised",
    "pgd",
    "prototypes",
    "random_search",
    "rehearsal",
    "reptile",
    "reservoir",
    "ridge",
    "rollback",
    "save_model",
    "sharpness",
    "side_by_side",
    "stopping",
    "supervised",
    "sweep",
    "uniform",
    "vectorize",
]
