"""Small real runs in processes of their own, for tests that kill them."""

import multiprocessing
import os
import time

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["paradigms", "tests.worker", "orbax.checkpoint.experimental.v1", "flax.nnx", "sklearn.datasets"]
)


def start(target, *args):
    """`target` in a process forked from one that has imported everything and computed nothing."""
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


class Deadly:
    """A source whose process is sent a signal as the chunk at step `at` begins."""

    def __init__(self, source, at, signum):
        self._source, self._at, self._signum = source, at, signum

    def __getattr__(self, name):
        return getattr(self._source, name)

    def chunk(self, step, n):
        if int(step) == self._at:
            os.kill(os.getpid(), self._signum)
            time.sleep(0.2)
        return self._source.chunk(step, n)


def digits(folder, steps=1500):
    """Trains an MLP on the handwritten digits, goes on where the folder's checkpoints end, and keeps the params."""
    import jax
    import numpy as np
    import optax

    import paradigms as pd
    from paradigms import data, logging, nn

    split = data.load("digits")
    model = pd.from_nnx(lambda rngs: nn.MLP(64, (32,), 10, dropout=0.1, mean=split.mean, std=split.std, rngs=rngs))
    trainer = pd.Trainer(pd.averaged(pd.supervised(model), 0.99), optax.adam(1e-3))
    source = data.resident(split.train, 32)
    options = {"chunk": 100, "checkpoint_every": 100, "validation": split.validation, "log": logging.several()}
    run = pd.fit(trainer, source, steps, folder=folder, resume=True, **options)
    leaves = jax.tree.leaves((run.state.params, run.state.state, run.state.opt_state, run.best.params))
    np.savez(f"{folder}/end.npz", *[np.asarray(leaf) for leaf in leaves])


def together(folder, port, count, number, step, signum):
    """One of `count` processes that train together; process 1 is sent `signum` at `step`."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    import numpy as np
    import optax
    from jax.experimental import multihost_utils

    import paradigms as pd
    from paradigms import data, logging, mesh, nn
    from tests.test_fit import TRAIN, VALIDATION

    mesh.SMALL = 64
    net = pd.from_nnx(lambda rngs: nn.MLP(6, (64,), 3, rngs=rngs))
    try:
        with jax.set_mesh(mesh.make_mesh(data=4, model=2)):
            trainer = pd.Trainer(pd.supervised(net), optax.adam(1e-2))
            source = Deadly(data.resident(TRAIN, 40), step if number == 1 else -1, signum)
            options = {"chunk": 10, "checkpoint_every": 10, "validation": VALIDATION, "log": logging.several()}
            run = pd.fit(trainer, source, 40, folder=folder, resume=True, **options)
            params = multihost_utils.process_allgather(run.state.params, tiled=True)
        if number == 0:
            np.savez(f"{folder}/end.npz", *[np.asarray(leaf) for leaf in jax.tree.leaves(params)])
    finally:
        jax.distributed.shutdown()  # no process leaves before the other is done: a forked one runs no exit handlers
