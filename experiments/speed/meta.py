"""One MAML training step: ``Trainer.scan``, a hand-written jitted JAX step, PyTorch, learn2learn and TorchOpt.

    python -m experiments.speed.meta [16x1 16x5 32x1 32x5 memory] [--repeats 7]

A case is meta-batch x inner steps. All train the same network with the same arithmetic: Conv-4 (four 3x3 convolutions of
64 channels and stride 2, each with bias, normalisation by the batch at hand and ReLU, the mean over positions, a linear
head) on 28x28x1 images, 5-way 1-shot, second order, inner SGD of rate 0.4 on the mean cross-entropy, Adam outside. A task
has 5 queries, 1 a class: as many as shots, as in MAML's Omniglot protocol. Pixels are random. ``Trainer.scan`` also samples
its episodes, inside the step, from a split that lies on the device; the other rows are handed ready episodes. Times are
per step, warm, the median of paired runs.

FLOPs are counted from the shapes, the matrix products and convolutions alone (multiply and add). With f of a layer's
forward pass, a training step without second order takes 3f: the output, the gradient of the kernel and that of the input,
each a product of two of the three. In an inner step each of the three is differentiated to both its factors, which is 6f
more: 9f. The first layer has no gradient of its input: 2f, and 2f more, 4f. So a task takes 4 f_1 + 9 f_rest an inner step on
its support rows, and 2 f_1 + 3 f_rest on its query rows. What a program computes again to save memory is not counted.

``memory`` is the size of the temporaries of the compiled step, 5-way 5-shot, meta-batch 8, at 1, 5 and 20 inner steps; it
runs nothing.

Peers are timed where they are installed. PyTorch (``pip install torch``) with fused Adam and all cores. TorchOpt:
``pip install torchopt``. learn2learn does not install on Python 3.11 and later, but its MAML needs its pure-Python part
alone, so unpack it and put it on the path (an installed learn2learn serves as well):

    pip download learn2learn==0.2.0 --no-deps && tar xzf learn2learn-0.2.0.tar.gz
    PYTHONPATH=learn2learn-0.2.0 python -m experiments.speed.meta
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import paradigms as pd
from experiments.speed import measure, meta_peers
from experiments.speed.meta_peers import CHANNELS, INNER, OUTER, WAYS
from paradigms import data, nn
from paradigms.meta import unrolled

SIDE = 28


def flops(tasks, steps, shots=1, queries=1):
    """Of a training step; see above."""
    sizes = [-(-SIDE // 2**i) for i in range(1, 5)]
    first = 2 * WAYS * sizes[0] ** 2 * 9 * CHANNELS
    rest = sum(2 * WAYS * size**2 * 9 * CHANNELS**2 for size in sizes[1:]) + 2 * WAYS * CHANNELS * WAYS
    return tasks * (steps * shots * (4 * first + 9 * rest) + queries * (2 * first + 3 * rest))


def random_split():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (200 * 20, SIDE, SIDE, 1), np.uint8)
    return {"x": x, "y": np.repeat(np.arange(200, dtype=np.int32), 20)}


def episodes(tasks, shots=1):
    """A source of episodes and a batch of it."""
    source = data.episodes(random_split(), ways=WAYS, shots=shots, queries=shots, tasks=tasks)
    return source, source.batch(jax.random.key(0), 0)


def trainer(steps, hypergradient=None):
    model = pd.from_nnx(lambda rngs: nn.Conv4((SIDE, SIDE, 1), WAYS, channels=CHANNELS, rngs=rngs))
    return pd.Trainer(pd.maml(pd.supervised(model), optax.sgd(INNER), steps, hypergradient=hypergradient), optax.adam(OUTER))


def scanned(trainer, source, batch, calls):
    """Some steps in one call."""
    box = {"state": trainer.init(0, batch)}

    def run():
        box["state"], metrics = trainer.scan(box["state"], source, calls)
        jax.block_until_ready(metrics)

    return run


def library(source, batch, steps, calls):
    """Some steps in one call, the same steps one call each, and where inner steps are recomputed, the same without."""
    ours = trainer(steps)
    box = {"state": ours.init(0, batch)}

    def step():
        for _ in range(calls):
            box["state"], metrics = ours.step(box["state"], batch)
        jax.block_until_ready(metrics)

    rows = {"Trainer.scan": scanned(ours, source, batch, calls), "Trainer.step, one call a step": step}
    if steps > 1:
        kept = trainer(steps, unrolled(checkpoint=False))
        rows["Trainer.scan, nothing recomputed"] = scanned(kept, source, batch, calls)
    return rows


# --- JAX by hand ----------------------------------------------------------------------------------------------------


def patches(x, w):
    """A 3x3 convolution of stride 2 as shifted slices side by side and one matrix product; padded as "SAME"."""
    examples, size, _, channels = x.shape
    out = -(-size // 2)
    pad = (out - 1) * 2 + 3 - size
    x = jnp.pad(x, ((0, 0), (pad // 2, pad - pad // 2), (pad // 2, pad - pad // 2), (0, 0)))
    slices = [x[:, i : i + 2 * out - 1 : 2, j : j + 2 * out - 1 : 2] for i in range(3) for j in range(3)]
    product = jnp.concatenate(slices, -1).reshape(-1, 9 * channels) @ w.reshape(9 * channels, -1)
    return product.reshape(examples, out, out, -1)


def plain(x, w):
    return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def init(key):
    keys = jax.random.split(key, 5)
    params = []
    for key, depth in zip(keys[:4], (1, CHANNELS, CHANNELS, CHANNELS), strict=True):
        kernel = jax.random.normal(key, (3, 3, depth, CHANNELS)) * (2 / (9 * CHANNELS)) ** 0.5
        params.append((kernel, jnp.zeros(CHANNELS), jnp.ones(CHANNELS), jnp.zeros(CHANNELS)))
    return [*params, (jax.random.normal(keys[4], (CHANNELS, WAYS)) * CHANNELS**-0.5, jnp.zeros(WAYS))]


def meta_loss(params, batch, convolution, steps):
    """The mean query loss over tasks after some inner steps, unrolled, and the accuracy."""

    def loss(params, part):
        x = part["x"]
        for kernel, bias, scale, shift in params[:4]:
            x = convolution(x, kernel) + bias
            x = (x - x.mean((0, 1, 2))) * jax.lax.rsqrt(x.var((0, 1, 2)) + 1e-5) * scale + shift
            x = jax.nn.relu(x)
        logits = x.mean((1, 2)) @ params[4][0] + params[4][1]
        hits = jnp.mean(jnp.argmax(logits, -1) == part["y"])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, part["y"]).mean(), hits

    def task(episode):
        fast = params
        for _ in range(steps):
            grads, _ = jax.grad(loss, has_aux=True)(fast, episode["support"])
            fast = jax.tree.map(lambda p, g: p - INNER * g, fast, grads)
        return loss(fast, episode["query"])

    losses, hits = jax.vmap(task)(batch)
    return losses.mean(), hits.mean()


def hand_step(convolution, steps):
    """A jitted step and what it carries."""
    optimizer = optax.adam(OUTER)

    def step(carry, batch):
        params, opt_state = carry
        (value, hits), grads = jax.value_and_grad(meta_loss, has_aux=True)(params, batch, convolution, steps)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (value, hits)

    params = init(jax.random.key(0))
    return jax.jit(step, donate_argnums=0), (params, optimizer.init(params))


def by_hand(batch, convolution, steps, calls):
    step, carry = hand_step(convolution, steps)
    box = {"carry": carry}

    def run():
        for _ in range(calls):
            box["carry"], values = step(box["carry"], batch)
        jax.block_until_ready(values)

    return run


# --- tables ---------------------------------------------------------------------------------------------------------


def speed(tasks, steps, repeats):
    calls = 4 if steps == 1 else 2  # steps a call
    source, batch = episodes(tasks)
    peak, scan, naive = "float32 matmul, 2048 x 2048", "Trainer.scan", "JAX by hand, vmap of lax.conv"
    product, product_flops = measure.matmul()
    rows = {peak: product, **library(source, batch, steps, calls)}
    rows |= {"JAX by hand, patches": by_hand(batch, patches, steps, calls), **meta_peers.peers(batch, steps, calls)}
    runs = {row: calls for row in rows} | {naive: 1}
    seconds = measure.paired(rows, repeats)
    if (tasks, steps) == (16, 1):  # takes seconds a step
        few = measure.paired({scan: rows[scan], peak: product, naive: by_hand(batch, plain, steps, 1)}, min(repeats, 2))
    else:
        few = {}
    lines = []
    for row in (*rows, *([naive] if few else [])):
        timed = few if row == naive else seconds
        if row == peak:
            count, work = 1, product_flops
        else:
            count, work = runs[row], flops(tasks, steps)
        median = statistics.median(timed[row]) / count
        of_peak = work * count / product_flops / measure.ratio(timed, row, under=peak)
        ours = "" if row == peak else measure.ratio(timed, row, under=scan) * calls / count
        lines.append((row, median * 1e3, work / median / 1e9, of_peak, ours))
    plural = "" if steps == 1 else "s"
    title = f"MAML, Conv-4, 28x28, 5-way 1-shot, 1 query a class, meta-batch {tasks}, {steps} inner step{plural}"
    measure.table(title, ("", "ms/step", "GFLOP/s", "of peak", "time / Trainer.scan"), lines)


def memory(repeats):
    """Temporaries of the compiled step."""
    del repeats  # nothing is timed
    _, batch = episodes(tasks=8, shots=5)

    def library_step(steps):
        ours = trainer(steps)
        return jax.jit(ours.pure.step, donate_argnums=0), jax.eval_shape(lambda: ours.init(0, batch))

    makers = {"Trainer.step": library_step, "JAX by hand, unrolled": lambda steps: hand_step(patches, steps)}
    lines = []
    for row, make in makers.items():
        one = None
        for steps in (1, 5, 20):
            step, carry = make(steps)
            size = step.lower(carry, batch).compile().memory_analysis().temp_size_in_bytes
            one = one or size
            lines.append((row, steps, size / 2**20, size / one))
    title = "MAML, Conv-4, 28x28, 5-way 5-shot, meta-batch 8: temporaries of a step"
    measure.table(title, ("", "inner steps", "MiB", "/ 1 step"), lines)


if __name__ == "__main__":
    cases = {f"{tasks}x{steps}": functools.partial(speed, tasks, steps) for tasks in (16, 32) for steps in (1, 5)}
    measure.main(__doc__, {**cases, "memory": memory}, repeats=7)
