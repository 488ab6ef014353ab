"""Every objective, transform and aggregator in one table: a new method gets the whole battery by adding one line."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import paradigms as pd
from paradigms import continual, meta, nn
from paradigms.data import Source


class Net(nnx.Module):
    """6 -> 8 -> 3 with batch normalisation and dropout: the smallest network with all that a state can hold."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        features = nnx.relu(self.dropout(self.norm(self.encoder(x)), rngs=rngs))
        return {"features": features, "logits": self.head(features)}


class Head(nnx.Module):
    def __init__(self, width, rngs):
        self.hidden = nnx.Linear(width, 5, rngs=rngs)
        self.out = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


NET = pd.from_nnx(lambda rngs: Net(rngs))
PROJECTOR, PREDICTOR = pd.from_nnx(lambda rngs: Head(8, rngs)), pd.from_nnx(lambda rngs: Head(4, rngs))


def noise(key, x):
    return x + 0.1 * jax.random.normal(key, x.shape, x.dtype)


TABLE = np.array([[1, 1, 0], [0, 0, 1]], bool)  # two tasks
VAE = continual.vae(
    pd.from_nnx(lambda rngs: nn.GaussianEncoder(6, (4,), 2, rngs=rngs)),
    pd.from_nnx(lambda rngs: nn.BernoulliDecoder((6,), (4,), 2, rngs=rngs)),
    2,
)
SILENT = continual.Generator(
    lambda key, x: ({}, {}), lambda p, s, x, key: (jnp.zeros(len(x)), s), lambda p, s, key, n: jnp.zeros((n, 6))
)


def supervised():
    return pd.supervised(NET)


def byol(momentum=0.9):
    return pd.byol(NET, noise, PROJECTOR, PREDICTOR, momentum)


LEAVES: dict[str, Callable[[], pd.Objective]] = {
    "supervised": supervised,
    "byol": byol,
    "episodic": lambda: pd.episodic(NET, pd.prototypes(3)),
    "ridge": lambda: pd.episodic(NET, pd.ridge(3)),
    "matching": lambda: pd.episodic(NET, meta.attention(3)),
    "icarl": lambda: continual.icarl(NET, TABLE, 12),
    "er_ace": lambda: continual.er_ace(NET, pd.reservoir(12), TABLE),
}
EPISODIC = {"episodic", "ridge", "matching"}  # their batches are episodes
STILL = {"gdumb"}  # learn at boundaries alone


class Transform(NamedTuple):
    """``wrap: child -> objective``; ``degenerate: child -> objective`` that equals the child, or None where no setting does;
    whether it eats episodes."""

    wrap: Callable[[pd.Objective], pd.Objective]
    degenerate: Callable[[pd.Objective], pd.Objective] | None
    episodes: bool = False


def _first_order(child, steps):
    rates, hypergradient = meta.per_parameter(), meta.first_order()
    return pd.maml(child, optax.sgd(1.0), steps, rates=rates, hypergradient=hypergradient)


def _body(child, steps):
    hypergradient = meta.annealed(2, then=meta.truncated(1))
    return pd.maml(child, optax.sgd(0.1), steps, hypergradient=hypergradient, adapts=meta.without("head"))


TRANSFORMS = {
    "adversarial": Transform(
        lambda o: pd.adversarial(o, pd.pgd(pd.linf(0.1), 2)), lambda o: pd.adversarial(o, pd.pgd(pd.linf(0.0), 2))
    ),
    "maml": Transform(lambda o: pd.maml(o, optax.sgd(0.1), 1), lambda o: pd.maml(o, optax.sgd(0.1), 0), episodes=True),
    "meta_sgd": Transform(lambda o: _first_order(o, 1), lambda o: _first_order(o, 0), episodes=True),
    "implicit": Transform(
        lambda o: pd.maml(o, optax.sgd(0.1), 2, hypergradient=meta.implicit(1.0), adapts=meta.only("head")), None, episodes=True
    ),
    "maml++": Transform(
        lambda o: pd.maml(
            o,
            optax.sgd(1.0),
            2,
            rates=meta.per_tensor_and_step(0.1, 2),
            step_losses=meta.multi_step(2, 4),
            normalisation=meta.per_step(2),
        ),
        None,
        episodes=True,
    ),
    "boil": Transform(lambda o: _body(o, 2), lambda o: _body(o, 0), episodes=True),
    "reset": Transform(
        lambda o: pd.maml(
            o,
            optax.sgd(0.1),
            2,
            hypergradient=meta.implicit(1.0, meta.neumann(3, 0.1)),
            adapts=meta.reset(meta.only("head")),
            normalisation=meta.support_statistics(),
        ),
        None,
        episodes=True,
    ),
    "reptile": Transform(lambda o: pd.reptile(o, optax.sgd(0.1), 2, batch_size=2), None, episodes=True),
    "few_shot": Transform(lambda o: pd.few_shot(o, pd.prototypes(3)), lambda o: pd.few_shot(o, pd.prototypes(3))),
    "fine_tuned": Transform(lambda o: pd.fine_tuned(o, optax.sgd(0.1), 2, 3), lambda o: pd.fine_tuned(o, optax.sgd(0.1), 2, 3)),
    "rehearsal": Transform(lambda o: pd.rehearsal(o, pd.reservoir(16)), lambda o: pd.rehearsal(o, pd.reservoir(16), size=0)),
    "ewc": Transform(lambda o: pd.ewc(o, 10.0), lambda o: pd.ewc(o, 0.0)),
    "multitask": Transform(lambda o: pd.multitask({"a": o, "b": o}), lambda o: pd.multitask({"a": o})),
    "online_ewc": Transform(
        lambda o: pd.ewc(o, 10.0, continual.batched_fisher, decay=0.9, anchor=continual.each),
        lambda o: pd.ewc(o, 0.0, decay=0.9, anchor=continual.each),
    ),
    "mas": Transform(lambda o: continual.mas(o, 1.0), lambda o: continual.mas(o, 0.0)),
    "si": Transform(lambda o: continual.si(o, 1.0), lambda o: continual.si(o, 0.0)),
    "rwalk": Transform(lambda o: continual.rwalk(o, 1.0), lambda o: continual.rwalk(o, 0.0)),
    "lwf": Transform(lambda o: continual.lwf(o, TABLE), lambda o: continual.lwf(o, TABLE, 0.0)),
    "generative_replay": Transform(
        lambda o: continual.generative_replay(o, VAE), lambda o: continual.generative_replay(o, SILENT)
    ),
    "look_ahead": Transform(lambda o: continual.look_ahead(pd.maml(o, optax.sgd(0.1), 1), o, 8), None),
    "xdg": Transform(lambda o: continual.xdg(o, 2, 0.5), lambda o: continual.xdg(o, 2, 0.0)),
    "task_specific": Transform(lambda o: continual.task_specific(o, 2), None),
    "packnet": Transform(lambda o: continual.packnet(o, 2, 0.5), lambda o: continual.packnet(o, 2, 1.0)),
    "hat": Transform(lambda o: continual.hat(o, 2, 3), None),
    "progressive": Transform(lambda o: continual.progressive(o, 2), lambda o: continual.progressive(o, 1)),
    "mir": Transform(
        lambda o: pd.rehearsal(o, continual.as_uint8(pd.reservoir(12)), 4, continual.interfered(6, 0.1)),
        lambda o: pd.rehearsal(o, continual.as_uint8(pd.reservoir(12)), 0, continual.interfered(6, 0.1)),
    ),
    "balanced": Transform(
        lambda o: pd.rehearsal(o, continual.class_balanced(12, 3), retrieve=continual.balanced(3)),
        lambda o: pd.rehearsal(o, continual.class_balanced(12, 3), 0, continual.balanced(3)),
    ),
    "gdumb": Transform(lambda o: continual.gdumb(o, continual.class_balanced(12, 3), optax.sgd(0.1), 2, 4), None),
    "gss": Transform(lambda o: continual.gss(o, 8, 4), lambda o: continual.gss(o, 8, 0)),
    "replay": Transform(lambda o: continual.replay(o, pd.reservoir(16)), lambda o: continual.replay(o, pd.reservoir(16), 0)),
    "derpp": Transform(
        lambda o: continual.der(o, pd.reservoir(16), 0.5, 0.5), lambda o: continual.der(o, pd.reservoir(16), 0.0)
    ),
    "fdr": Transform(lambda o: continual.fdr(o, pd.reservoir(16), 0.5), lambda o: continual.fdr(o, pd.reservoir(16), 0.0)),
    "episodic_memory": Transform(lambda o: continual.episodic_memory(o, continual.ring(4, 2), 2), None),
    "told": Transform(
        lambda o: continual.told(o, continual.task_free(TABLE)), lambda o: continual.told(o, continual.task_incremental(TABLE))
    ),
    "augmented": Transform(
        lambda o: pd.augmented(o, lambda key, batch: {**batch, "x": noise(key, batch["x"])}),
        lambda o: pd.augmented(o, lambda key, batch: batch),
    ),
    "penalised": Transform(lambda o: pd.penalised(o, l1=1e-3, l2=1e-2), lambda o: pd.penalised(o)),
    "sharpness": Transform(lambda o: pd.sharpness(o, 0.05), lambda o: pd.sharpness(o, 0.0)),
    "averaged": Transform(lambda o: pd.averaged(o, 0.9), lambda o: pd.averaged(o, 0.0)),
}
AGGREGATORS = {"sum": lambda: None, "pcgrad": pd.pcgrad, "agem": continual.agem, "gem": continual.gem}

# Each of the five that must compose with everything, and others beside them; the whole product is marked slow. Some more are
# with the aggregators (tests/test_contracts.py).
COMPOSITIONS = [
    ("rehearsal", "adversarial", "supervised"),
    ("adversarial", "rehearsal", "supervised"),
    ("maml", "adversarial", "supervised"),
    ("adversarial", "maml", "supervised"),
    ("rehearsal", "ewc", "supervised"),
    ("ewc", "maml", "supervised"),
    ("maml", "ewc", "supervised"),
    ("rehearsal", "maml", "supervised"),
    ("maml", "rehearsal", "supervised"),
    ("ewc", "adversarial", "byol"),
    ("multitask", "rehearsal", "supervised"),
    ("rehearsal", "multitask", "byol"),
    ("maml", "multitask", "supervised"),
    ("multitask", "maml", "supervised"),
    ("maml", "byol"),
    ("averaged", "maml", "supervised"),
    ("sharpness", "rehearsal", "supervised"),
    ("ewc", "rehearsal", "adversarial", "supervised"),
    ("averaged", "multitask", "ewc", "supervised"),
    ("rehearsal", "episodic"),
    ("rehearsal", "reptile", "supervised"),
    ("derpp", "augmented", "supervised"),
    ("ewc", "derpp", "supervised"),
    ("si", "rehearsal", "supervised"),
    ("rehearsal", "lwf", "supervised"),
    ("online_ewc", "byol"),
    ("ewc", "generative_replay", "supervised"),
    ("rehearsal", "look_ahead", "supervised"),
    ("hat", "task_specific", "supervised"),
    ("adversarial", "progressive", "supervised"),
    ("told", "rehearsal", "supervised"),
]


def _fits(*path: str) -> bool:
    """Whether each part is given the batches it understands: episodes are eaten once, and by nothing that wants examples."""
    eaters = [name for name in path if name in EPISODIC or (name in TRANSFORMS and TRANSFORMS[name].episodes)]
    answers = [i for i, name in enumerate(path) if name in ("few_shot", "fine_tuned")]
    examples = any(
        name in ("look_ahead", "generative_replay", "icarl", "er_ace", "gdumb", "balanced", "derpp", "fdr", "episodic_memory")
        for name in path
    )  # which do not look into episodes
    return (
        not (eaters and examples)
        and len(eaters) <= 1
        and not any(name in eaters for i in answers for name in path[i:])
        and len(answers) <= 1
    )


ALONE = [(leaf,) for leaf in LEAVES] + [(name, "supervised") for name in TRANSFORMS]
_PAIRS = [(outer, leaf) for outer in TRANSFORMS for leaf in LEAVES]
_TRIPLES = [(outer, *pair) for outer in TRANSFORMS for pair in _PAIRS if outer != pair[0]]
PRODUCT = [path for path in _PAIRS + _TRIPLES if path not in ALONE + COMPOSITIONS and _fits(*path)]


def build(path: tuple[str, ...]) -> pd.Objective:
    """The objective ``path[0](path[1](...leaf))``."""
    objective = LEAVES[path[-1]]()
    for name in reversed(path[:-1]):
        objective = TRANSFORMS[name].wrap(objective)
    return objective


def batch_for(path: tuple[str, ...], size: int = 8, seed: int = 0) -> dict:
    """A batch of `size` rows: examples, or tasks of three examples where the path eats episodes."""
    rng = np.random.default_rng(seed)
    eats = [name in EPISODIC or (name in TRANSFORMS and TRANSFORMS[name].episodes) for name in path]
    lead = (size, 3) if any(eats) else (size,)

    def examples():
        return {
            "x": rng.random((*lead, 6), np.float32),
            "y": rng.integers(0, 3, lead).astype(np.int32),
            "task": np.zeros(lead, np.int32),
        }

    return examples() if len(lead) == 1 else {"support": examples(), "query": examples()}


def stacked(batch: dict, n: int = 2) -> dict:
    """`batch` as a boundary wants it: leaves (n, rows, ...)."""
    return jax.tree.map(lambda leaf: np.stack([leaf] * n), batch)


def repeat(arrays, key, step):
    """The batch of a source that always gives the same one."""
    del key, step
    return arrays


def source(batch: dict) -> Source:
    """A source of this one batch."""
    size = len(jax.tree.leaves(batch)[0])
    return Source(jax.tree.map(jax.numpy.asarray, batch), repeat, size, size)
