"""One step of experience replay and of DER++, whole runs, and ten seeds in one program, against PyTorch and Avalanche.

    python -m experiments.speed.continual [er derpp run seeds] [--repeats 9]

``er`` and ``derpp``: 784-400-400-10, SGD, batches of 32 and 32 replayed rows (DER++: two draws of 32) from a reservoir of
500 images in uint8; batches are drawn from a split in memory, inside the step. Times are per step, warm, the median of
paired runs of many steps. FLOPs are those of the matrix products: forward, gradient of the weights, and of the inputs but
the first layer's.

``run``: the whole of permuted MNIST (20 tasks, one epoch of 60,000 images, batch 128, 784-100-100-10) with DER++ and a
memory of 500, training alone, and with data, boundaries and the test on all tasks after each; PyTorch trains alike.

``seeds``: ten seeds of DER++ in one program against ten runs one after the other, warm.

Peers are timed where they are installed: PyTorch with fused SGD (``pip install torch``), Avalanche (``pip install
avalanche-lib``), whose rows of a step are one experience of its own loop without evaluation. mammoth is no package; a row
fills the memory in a Python loop over examples, as it does.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import paradigms as pd
from experiments.speed import continual_peers, measure
from experiments.speed.continual_peers import ALPHA, BATCH, BETA, CAPACITY, RATE, REPLAY, WIDTHS
from paradigms import continual, data, nn
from paradigms.experience import experience


def split(rows=10_000):
    rng = np.random.default_rng(0)
    return {"x": rng.integers(0, 256, (rows, 28, 28, 1), np.uint8), "y": rng.integers(0, 10, rows).astype(np.int32)}


def trainer(dark, widths=WIDTHS, replay=REPLAY):
    plain = pd.supervised(pd.from_nnx(lambda rngs: nn.MLP(widths[0], widths[1:-1], widths[-1], rngs=rngs)))
    memory = continual.as_uint8(pd.reservoir(CAPACITY))
    objective = continual.der(plain, memory, ALPHA, BETA, replay) if dark else pd.rehearsal(plain, memory, replay)
    return pd.Trainer(objective, optax.sgd(RATE))


def library(source, dark, calls):
    ours = trainer(dark)
    box = {"state": ours.init(0, source.batch(jax.random.key(0), 0))}

    def run():
        box["state"], metrics = ours.scan(box["state"], source, calls)
        jax.block_until_ready(metrics)

    return run


# --- JAX by hand ----------------------------------------------------------------------------------------------------


def by_hand(split, dark, calls):
    arrays = {"x": jnp.asarray(split["x"].reshape(-1, 784)), "y": jnp.asarray(split["y"])}
    count = len(arrays["y"])

    def logits(params, x):
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        return x @ params[-1][0] + params[-1][1]

    def entropy(params, x, y):
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    def pixels(x):
        return x.astype(jnp.float32) * (1 / 255)

    def step(carry, number):
        params, memory, seen = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), number), 4)
        rows = jax.random.randint(keys[0], (BATCH,), 0, count)
        raw, y = arrays["x"][rows], arrays["y"][rows]
        draw = lambda key: {k: v[jax.random.randint(key, (REPLAY,), 0, jnp.minimum(seen, CAPACITY))] for k, v in memory.items()}
        first, second = draw(keys[1]), draw(keys[2])

        def loss(params):
            if not dark:
                x, label = jnp.concatenate([raw, first["x"]]), jnp.concatenate([y, first["y"]])
                return entropy(params, pixels(x), label), jnp.zeros((BATCH, WIDTHS[-1]))
            answer = logits(params, pixels(raw))
            value = optax.losses.softmax_cross_entropy_with_integer_labels(answer, y).mean()
            value += ALPHA * jnp.mean((logits(params, pixels(first["x"])) - first["z"]) ** 2)
            return value + BETA * entropy(params, pixels(second["x"]), second["y"]), answer

        (value, answer), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        place = seen + jnp.arange(BATCH)
        slot = jnp.where(place < CAPACITY, place, jax.random.randint(keys[3], (BATCH,), 0, place + 1))
        order = jnp.arange(BATCH)
        slot = jnp.minimum(slot, CAPACITY)
        last = jnp.full(CAPACITY + 1, -1).at[slot].max(order)
        slot = jnp.where(last[slot] == order, slot, CAPACITY)
        new = {"x": raw, "y": y} | ({"z": answer} if dark else {})
        memory = {k: memory[k].at[slot].set(new[k], mode="drop") for k in memory}
        return (params, memory, seen + BATCH), value

    @jax.jit
    def many(carry, start):
        return jax.lax.scan(step, carry, start + jnp.arange(calls))

    params = [
        (jax.random.normal(jax.random.key(i), (a, b)) * (2 / a) ** 0.5, jnp.zeros(b))
        for i, (a, b) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    ]
    memory = {"x": jnp.zeros((CAPACITY, 784), jnp.uint8), "y": jnp.zeros(CAPACITY, jnp.int32)}
    memory |= {"z": jnp.zeros((CAPACITY, WIDTHS[-1]))} if dark else {}
    box = {"carry": (params, memory, jnp.asarray(CAPACITY)), "start": 0}

    def run():
        box["carry"], values = many(box["carry"], box["start"])
        box["start"] += calls
        values.block_until_ready()

    return run


# --- tables ---------------------------------------------------------------------------------------------------------


def flops(dark):
    products = [a * b for a, b in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)]
    return 2 * (BATCH + REPLAY * (2 if dark else 1)) * (2 * products[0] + 3 * sum(products[1:]))


def steps(name, repeats):
    dark, calls, arrays = name == "derpp", 100, split()
    peak, ours = "float32 matmul, 2048 x 2048", "Trainer.scan"
    product, product_flops = measure.matmul()
    rows = {
        peak: product,
        ours: library(data.resident(arrays, BATCH), dark, calls),
        "JAX by hand": by_hand(arrays, dark, calls),
    }
    rows |= continual_peers.peers(arrays, dark, calls)
    seconds = measure.paired(rows, repeats)
    lines = []
    for row in rows:
        count, work = (1, product_flops) if row == peak else (calls, flops(dark))
        median = statistics.median(seconds[row]) / count
        of_peak = work * count / product_flops / measure.ratio(seconds, row, under=peak)
        ratio = "" if row == peak else measure.ratio(seconds, row, under=ours)
        lines.append((row, median * 1e3, work / median / 1e9, of_peak, ratio))
    title = f"{'DER++' if dark else 'ER'}, 784-400-400-10, {BATCH} + {REPLAY}{f' + {REPLAY}' if dark else ''} rows"
    measure.table(title, ("", "ms/step", "GFLOP/s", "of peak", "time / Trainer.scan"), lines)


def stream(tasks=20):
    """Permuted MNIST, or where it is not prepared the same of random pixels."""
    try:
        mnist = data.load("mnist", validation=100)
    except FileNotFoundError:
        rows = {"train": 60_000, "validation": 100, "test": 10_000}
        mnist = data.Data("random", **{k: split(n) for k, n in rows.items()}, classes=10, class_names=(), mean=(), std=())
    return data.permuted(mnist, tasks)


def run_whole(repeats):
    del repeats  # it takes minutes
    tasks, widths, batch = stream(), (784, 100, 100, 10), 128
    ours = trainer(True, widths, batch)
    experience(ours, tasks, batch_size=batch, steps=1, boundary=None)  # compiles
    state = ours.init(0, tasks.train(0, batch).opened(jax.random.key(0)).batch(jax.random.key(0), 0))
    start = time.perf_counter()
    for task in range(len(tasks)):
        state, values = ours.advance(state, tasks.train(task, batch, start=469 * task), 469)
    jax.block_until_ready(values)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    found = experience(ours, tasks, batch_size=batch, epochs=1)
    lines = [("Trainer.advance, training alone", alone), ("experience, all included", time.perf_counter() - start)]
    try:
        peer = continual_peers.torch_steps(split(), True, 469, widths=widths, batch=batch, replay=batch)
        start = time.perf_counter()
        for _ in range(2):
            peer()
        lines.append(("PyTorch, training alone (2 tasks, times 10)", 10 * (time.perf_counter() - start)))
    except ImportError:
        print("PyTorch: torch is not installed, the row is left out")
    measure.table(
        f"Permuted MNIST, DER++, 20 x 469 steps: accuracy {found.matrix['accuracy'][-1].mean():.3f}", ("", "s"), lines
    )


def seeds(repeats, count=10):
    tasks, widths, batch, calls = stream(2), (784, 100, 100, 10), 128, 100
    source = tasks.train(0, batch)
    example = source.opened(jax.random.key(0)).batch(jax.random.key(0), 0)
    one, many = trainer(True, widths, batch), pd.vectorize(lambda: trainer(True, widths, batch), seeds=count)
    box = {"one": one.init(0, example), "many": many.init(0, example)}

    def alone():
        for _ in range(count):
            box["one"], values = one.advance(box["one"], source, calls)
        jax.block_until_ready(values)

    def together():
        box["many"], values = many.advance(box["many"], source, calls)
        jax.block_until_ready(values)

    seconds = measure.paired({"one after the other": alone, "one program": together}, repeats)
    lines = [
        (row, statistics.median(found), measure.ratio(seconds, row, under="one program")) for row, found in seconds.items()
    ]
    measure.table(f"{count} seeds of DER++, {calls} steps each", ("", "s", "time / one program"), lines)


if __name__ == "__main__":
    cases = {"er": functools.partial(steps, "er"), "derpp": functools.partial(steps, "derpp"), "run": run_whole, "seeds": seeds}
    measure.main(__doc__, cases, repeats=9)
