"""Continual learning: what is told (scenarios), what is kept (memories), and the methods that remember."""

from paradigms.continual import metrics
from paradigms.continual.class_balance import balanced_reservoir, class_balanced
from paradigms.continual.dark import der, fdr
from paradigms.continual.distillation import by_tasks, extended, joint, lwf, plain, separate
from paradigms.continual.ewc import each, ewc, latest, mas
from paradigms.continual.gating import xdg
from paradigms.continual.gdumb import gdumb
from paradigms.continual.gem import agem, episodic_memory, gem
from paradigms.continual.generative import Generator, generative_replay, labels, soft_labels, vae
from paradigms.continual.gradient_selection import gss
from paradigms.continual.hat import hat
from paradigms.continual.herding import herded, herding
from paradigms.continual.icarl import icarl
from paradigms.continual.importance import (
    Importance,
    batched_fisher,
    empirical_fisher,
    exact_fisher,
    labelled_fisher,
    output_sensitivity,
    sampled_fisher,
)
from paradigms.continual.lookahead import asynchronous, look_ahead
from paradigms.continual.memory import Memory, as_uint8, by_label, by_task, bytes_of, of_rows, reservoir, ring
from paradigms.continual.packnet import packnet
from paradigms.continual.path import rwalk, si
from paradigms.continual.progressive import progressive
from paradigms.continual.rehearsal import rehearsal
from paradigms.continual.replay import all_rows, earlier, er_ace, replay
from paradigms.continual.retrieval import Ask, Retrieve, balanced, interfered, uniform
from paradigms.continual.scenario import (
    Known,
    Scenario,
    class_incremental,
    domain_incremental,
    every,
    of_task,
    past,
    present,
    seen,
    task_free,
    task_incremental,
    told,
)
from paradigms.continual.specific import task_specific

__all__ = [
    "all_rows",
    "Ask",
    "Generator",
    "Importance",
    "Known",
    "Memory",
    "Retrieve",
    "Scenario",
    "agem",
    "as_uint8",
    "asynchronous",
    "balanced",
    "balanced_reservoir",
    "batched_fisher",
    "by_label",
    "by_task",
    "by_tasks",
    "bytes_of",
    "class_balanced",
    "class_incremental",
    "der",
    "domain_incremental",
    "each",
    "earlier",
    "empirical_fisher",
    "episodic_memory",
    "er_ace",
    "every",
    "ewc",
    "exact_fisher",
    "extended",
    "fdr",
    "gdumb",
    "gem",
    "generative_replay",
    "gss",
    "hat",
    "herded",
    "herding",
    "icarl",
    "interfered",
    "joint",
    "labels",
    "latest",
    "labelled_fisher",
    "look_ahead",
    "lwf",
    "mas",
    "metrics",
    "of_rows",
    "of_task",
    "output_sensitivity",
    "packnet",
    "past",
    "plain",
    "present",
    "progressive",
    "rehearsal",
    "replay",
    "reservoir",
    "ring",
    "rwalk",
    "sampled_fisher",
    "seen",
    "separate",
    "si",
    "soft_labels",
    "task_free",
    "task_incremental",
    "task_specific",
    "told",
    "uniform",
    "vae",
    "xdg",
]
