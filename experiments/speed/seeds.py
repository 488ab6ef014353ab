"""Sixteen seeds in one program against sixteen runs: cold with compilation, and warm one after the other.

    python -m experiments.speed.seeds [--seeds 16]

Cold: one process that trains all seeds through ``vectorize``, against one fresh process a seed, the same number of steps
each, no compilation cache; interpreter start and imports are left out of both. Warm: seconds of the compiled call.
"""

import argparse
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import optax

import paradigms as pd
from experiments.speed import measure
from paradigms import data, nn

SIZES = {"64-64-10": (64, 64, 10), "784-256-256-10": (784, 256, 256, 10)}
STEPS = {"64-64-10": 2000, "784-256-256-10": 300}
BATCH = {"64-64-10": 32, "784-256-256-10": 128}


def setting(name):
    sizes = SIZES[name]
    model = pd.from_nnx(lambda rngs: nn.MLP(sizes[0], sizes[1:-1], sizes[-1], rngs=rngs))
    rng = np.random.default_rng(0)
    split = {"x": rng.random((6400, sizes[0]), np.float32), "y": rng.integers(0, 10, 6400).astype(np.int32)}
    make = lambda: pd.Trainer(pd.supervised(model), optax.adam(1e-3))
    return make, data.resident(split, BATCH[name]), {k: v[: BATCH[name]] for k, v in split.items()}


def cold(name, seeds):
    """Seconds from nothing compiled to the end of training, in this process; `seeds` 1 is a plain trainer."""
    start = time.perf_counter()
    make, source, batch = setting(name)
    trainer = make() if seeds == 1 else pd.vectorize(make, seeds=seeds)
    state, metrics = trainer.scan(trainer.init(0, batch), source, STEPS[name])
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start


def fresh(name, seeds):
    """`cold` in a process of its own."""
    code = f"from experiments.speed.seeds import cold; print(cold({name!r}, {seeds}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def warm(name, seeds, repeats):
    make, source, batch = setting(name)
    steps = STEPS[name] // 4
    runs = {
        f"vectorize, {over.__name__}": pd.vectorize(make, seeds=seeds, over=over) for over in (pd.one_by_one, pd.side_by_side)
    }
    single = make()
    box = {row: trainer.init(0, batch) for row, trainer in runs.items()}
    states = [single.init(seed, batch) for seed in range(seeds)]

    def together(row):
        box[row], metrics = runs[row].scan(box[row], source, steps)
        jax.block_until_ready((box[row], metrics))

    def apart():
        for i, state in enumerate(states):
            states[i], metrics = single.scan(state, source, steps)
            jax.block_until_ready((states[i], metrics))

    calls = {row: lambda row=row: together(row) for row in runs} | {f"{seeds} runs, one after the other": apart}
    return steps, measure.paired(calls, repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    for name in SIZES:
        steps, seconds = warm(name, options.seeds, options.repeats)
        apart = f"{options.seeds} runs, one after the other"
        rows = [
            (
                row,
                statistics.median(times),
                statistics.median(times) / steps / options.seeds * 1e3,
                measure.ratio(seconds, apart, row),
            )
            for row, times in seconds.items()
        ]
        measure.table(f"{name}, warm, {steps} steps", ("", "s", "ms a step and seed", "times faster than apart"), rows)
        together, alone = fresh(name, options.seeds), [fresh(name, 1) for _ in range(3)]
        total = statistics.median(alone) * options.seeds
        rows = [
            (f"vectorize, {options.seeds} seeds", together, 1.0),
            (f"{options.seeds} fresh runs (3 measured)", total, total / together),
        ]
        measure.table(f"{name}, cold, {STEPS[name]} steps", ("", "s", "time / vectorize"), rows)


if __name__ == "__main__":
    main()
