"""One supervised training step: ``Trainer.scan``, a hand-written jitted JAX loop of the same step, and PyTorch.

    python -m experiments.speed.supervised [mlp small cnn] [--repeats 15]

All train with Adam on random data that lies on the device, and gather each batch by a random order. Times are per step,
warm, the median of paired runs. FLOPs are counted from the shapes (multiply and add; backward twice the forward).
PyTorch (``pip install torch``) is timed where it is installed, in its fastest form here: fused Adam, all cores,
channels-last for convolutions, eager and compiled, whichever is faster.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import paradigms as pd
from experiments.speed import measure
from paradigms import data, nn

N = 12_800


def dense_flops(sizes, batch):
    """Forward and backward of a multi-layer perceptron; the first layer needs no gradient of its input."""
    products = [2 * batch * a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    return 3 * sum(products) - products[0]


def mlp_case(sizes, batch, steps):
    model = pd.from_nnx(lambda rngs: nn.MLP(sizes[0], sizes[1:-1], sizes[-1], rngs=rngs))

    def init(key):
        keys = jax.random.split(key, len(sizes))
        return [
            (jax.random.normal(k, (a, b)) * a**-0.5, jnp.zeros(b)) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=False)
        ]

    def apply(params, x):
        for i, (w, b) in enumerate(params):
            x = x @ w + b
            x = jax.nn.relu(x) if i < len(params) - 1 else x
        return x

    def torch_net(torch):
        layers = []
        for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            layers += [torch.nn.Linear(a, b)] + ([torch.nn.ReLU()] if i < len(sizes) - 2 else [])
        return torch.nn.Sequential(*layers)

    return dict(
        shape=(sizes[0],),
        batch=batch,
        steps=steps,
        model=model,
        init=init,
        apply=apply,
        torch=torch_net,
        flops=dense_flops(sizes, batch),
    )


def cnn_case(batch, steps):
    """Two 3x3 convolutions of 32 and 64 channels, each with ReLU and 2x2 max pooling, and a dense layer of 128."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(1, 32, (3, 3), conv_general_dilated=nn.conv2d, rngs=rngs)
            self.second = nnx.Conv(32, 64, (3, 3), conv_general_dilated=nn.conv2d, rngs=rngs)
            self.hidden = nnx.Linear(7 * 7 * 64, 128, rngs=rngs)
            self.head = nnx.Linear(128, 10, rngs=rngs)

        def __call__(self, x):
            x = nn.max_pool(nnx.relu(self.first(x)))
            x = nn.max_pool(nnx.relu(self.second(x)))
            return self.head(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))

    def init(key):
        shapes = [(3, 3, 1, 32), (3, 3, 32, 64), (3136, 128), (128, 10)]
        keys = jax.random.split(key, 4)
        return [
            (jax.random.normal(k, s) * np.prod(s[:-1]) ** -0.5, jnp.zeros(s[-1])) for k, s in zip(keys, shapes, strict=True)
        ]

    def apply(params, x):
        for w, b in params[:2]:
            x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + b
            x = jax.nn.relu(x)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params[2][0] + params[2][1])
        return x @ params[3][0] + params[3][1]

    def torch_net(torch):
        layer = torch.nn
        net = layer.Sequential(
            *(layer.Conv2d(1, 32, 3, padding=1), layer.ReLU(), layer.MaxPool2d(2)),
            *(layer.Conv2d(32, 64, 3, padding=1), layer.ReLU(), layer.MaxPool2d(2)),
            *(layer.Flatten(), layer.Linear(3136, 128), layer.ReLU(), layer.Linear(128, 10)),
        )
        return net.to(memory_format=torch.channels_last)

    conv = [2 * batch * 28 * 28 * 9 * 32, 2 * batch * 14 * 14 * 9 * 32 * 64]
    flops = 3 * sum(conv) - conv[0] + dense_flops((3136, 128, 10), batch) + 2 * batch * 3136 * 128
    return dict(
        shape=(28, 28, 1),
        batch=batch,
        steps=steps,
        model=pd.from_nnx(lambda rngs: Net(rngs)),
        init=init,
        apply=apply,
        torch=torch_net,
        flops=flops,
    )


CASES = {
    "mlp": ("MLP 784-256-256-10, batch 128", lambda: mlp_case((784, 256, 256, 10), 128, steps=100)),
    "small": ("MLP 64-64-10, batch 32", lambda: mlp_case((64, 64, 10), 32, steps=400)),
    "cnn": ("CNN 32-64-128, 28x28, batch 128", lambda: cnn_case(128, steps=5)),
}


def library(case, split):
    """Some steps in one call, and the same steps one call each."""
    trainer = pd.Trainer(pd.supervised(case["model"]), optax.adam(1e-3))
    source = data.resident(split, case["batch"])
    batch = source.batch(jax.random.key(0), 0)
    box = {"scan": trainer.init(0, batch), "step": trainer.init(0, batch)}

    def scan():
        box["scan"], metrics = trainer.scan(box["scan"], source, case["steps"])
        jax.block_until_ready(metrics)

    def step():
        for _ in range(case["steps"]):
            box["step"], metrics = trainer.step(box["step"], batch)
        jax.block_until_ready(metrics)

    return {"Trainer.scan": scan, "Trainer.step, one call a step": step}


def by_hand(case, split, loop):
    """The same step as a researcher writes it: a scan over gathered batches, or one jitted call a step."""
    optimizer = optax.adam(1e-3)
    x, y = jnp.asarray(split["x"]), jnp.asarray(split["y"])
    order = jnp.asarray(np.random.default_rng(0).permutation(N).reshape(-1, case["batch"])[: case["steps"]])

    def step(carry, rows, x, y):
        params, opt_state = carry

        def loss(params):
            logits = case["apply"](params, x[rows])
            hits = jnp.mean(jnp.argmax(logits, -1) == y[rows])
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean(), hits

        (value, hits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (value, hits)

    scan = jax.jit(lambda carry, x, y: jax.lax.scan(lambda c, r: step(c, r, x, y), carry, order), donate_argnums=0)
    one = jax.jit(step, donate_argnums=0)
    params = case["init"](jax.random.key(0))
    box = {"carry": (params, optimizer.init(params))}

    def run_scan():
        box["carry"], values = scan(box["carry"], x, y)
        jax.block_until_ready(values)

    def run_loop():
        for rows in order:
            box["carry"], values = one(box["carry"], rows, x, y)
        jax.block_until_ready(values)

    return run_loop if loop else run_scan


def peer(case, split, compiled):
    """The same step in PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(torch.get_num_threads())
    net = case["torch"](torch)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    x, y = torch.from_numpy(split["x"]), torch.from_numpy(split["y"]).long()
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    order = torch.randperm(N).reshape(-1, case["batch"])[: case["steps"]]
    criterion = torch.nn.CrossEntropyLoss()

    def forward(x, y):
        logits = net(x)
        return criterion(logits, y), (logits.detach().argmax(-1) == y).float().mean()

    forward = torch.compile(forward) if compiled else forward

    def run():
        for rows in order:
            optimizer.zero_grad(set_to_none=True)
            loss, _ = forward(x[rows], y[rows])
            loss.backward()
            optimizer.step()

    return run


def speed(title, make, repeats):
    peak = "float32 matmul, 2048 x 2048"
    case = make()
    rng = np.random.default_rng(0)
    split = {"x": rng.random((N, *case["shape"]), np.float32), "y": rng.integers(0, 10, N).astype(np.int32)}
    product, product_flops = measure.matmul()
    calls = {peak: product, **library(case, split)} | {
        "JAX by hand, in a scan": by_hand(case, split, loop=False),
        "JAX by hand, one call a step": by_hand(case, split, loop=True),
    }
    try:
        calls |= {
            "PyTorch, eager": peer(case, split, compiled=False),
            "PyTorch, compiled": peer(case, split, compiled=True),
        }
    except ImportError:
        print("PyTorch is not installed: its rows are left out (pip install torch)")
    seconds = measure.paired(calls, repeats)
    ours = functools.partial(measure.ratio, seconds, under="Trainer.scan")
    rows = []
    for row, times in seconds.items():
        steps, flops = (1, product_flops) if row == peak else (case["steps"], case["flops"])
        median = statistics.median(times) / steps
        of_peak = flops * steps / product_flops / measure.ratio(seconds, row, under=peak)
        rows.append((row, median * 1e3, flops / median / 1e9, of_peak, "" if row == peak else ours(row)))
    measure.table(title, ("", "ms/step", "GFLOP/s", "of peak", "time / Trainer.scan"), rows)


if __name__ == "__main__":
    measure.main(__doc__, {name: functools.partial(speed, *case) for name, case in CASES.items()}, repeats=15)
