"""What it costs to survive: a checkpoint every chunk, and finding steps that are not finite inside the compiled step.

    python -m experiments.speed.survival [checkpoints guard replay] [--repeats 11]

checkpoints: `fit` of the CNN of supervised.fashion_mnist, 2 chunks of 25 steps, with a checkpoint after each and with none
but the last. guard: the same network's ``Trainer.scan`` with ``guard=True`` and without. replay: the same of rehearsal from
5,120 rows of 3,072 numbers, and how many copies of that memory the compiled steps hold. Times are medians of paired runs.
"""

import functools
import pathlib
import re
import statistics
import tempfile

import jax
import numpy as np
import optax

import paradigms as pd
from experiments.speed import measure
from paradigms import data, fit, logging, nn

SILENT = logging.several()


def images():
    rng = np.random.default_rng(0)
    return {"x": rng.integers(0, 256, (6400, 28, 28, 1), np.uint8), "y": rng.integers(0, 10, 6400).astype(np.int32)}


def network(**options):
    """The objective of the experiment, on random images."""
    model = pd.from_nnx(lambda rngs: nn.SmallCNN(dropout=0.3, rngs=rngs))
    objective = pd.averaged(pd.supervised(model, pd.cross_entropy(0.05)), 0.998)
    trainer = pd.Trainer(objective, optax.adamw(1e-3, weight_decay=0.05), **options)
    return trainer, data.resident(images(), 128, transform=data.augment(data.flip(), data.translate(1)))


def checkpoints():
    trainer, source = network()

    def train(every):
        with tempfile.TemporaryDirectory() as folder:
            options = {"chunk": 25, "folder": pathlib.Path(folder) / "run", "log": SILENT}
            fit(trainer, source, 50, checkpoint_every=every, **options)

    calls = {"one checkpoint, at the end": lambda: train(None), "one a chunk": lambda: train(25)}
    return "CNN, 2 chunks of 25 steps", calls


def scans(make, source, steps):
    """`steps` updates in one call, plain and guarded."""
    batch = source.batch(jax.random.key(0), 0)
    trainers = {"plain": make(guard=False), "guarded": make(guard=True)}
    box = {name: trainer.init(0, batch) for name, trainer in trainers.items()}

    def run(name):
        box[name], metrics = trainers[name].scan(box[name], source, steps)
        jax.block_until_ready((box[name], metrics))

    return trainers, {name: lambda name=name: run(name) for name in trainers}, box


def guard():
    _, source = network()
    _, calls, _ = scans(lambda **options: network(**options)[0], source, 10)
    return "CNN, 10 steps of 128", calls


def replay():
    rng = np.random.default_rng(0)
    split = {"x": rng.random((6400, 3072), np.float32), "y": rng.integers(0, 10, 6400).astype(np.int32)}
    source = data.resident(split, 32)
    model = pd.from_nnx(lambda rngs: nn.MLP(3072, (256,), 10, rngs=rngs))
    objective = pd.rehearsal(pd.supervised(model), pd.reservoir(5120))
    trainers, calls, box = scans(lambda **options: pd.Trainer(objective, optax.sgd(0.01), **options), source, 100)
    for name, trainer in trainers.items():
        text = (
            jax.jit(trainer.pure.scan, donate_argnums=0, static_argnums=2).lower(box[name], source, 100).compile().as_text()
            or ""
        )
        print(f"{name}: {len(re.findall(r'= f32.5120,3072.[^ ]* copy', text))} copies of the memory in the compiled steps")
    return "MLP 3072-256-10, 32 of the stream and 32 replayed, 100 steps", calls


def speed(make, repeats):
    title, calls = make()
    seconds = measure.paired(calls, repeats)
    first = next(iter(calls))
    rows = [(row, statistics.median(times), measure.ratio(seconds, row, first)) for row, times in seconds.items()]
    measure.table(title, ("", "s", f"time / {first}"), rows)


if __name__ == "__main__":
    cases = {"checkpoints": checkpoints, "guard": guard, "replay": replay}
    measure.main(__doc__, {name: functools.partial(speed, make) for name, make in cases.items()}, repeats=9)
