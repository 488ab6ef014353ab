"""A real run that is killed again and again, and one of two processes that is."""

import multiprocessing
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

import paradigms as pd
from paradigms import data, logging, mesh, nn
from tests import worker
from tests.test_fit import TRAIN, VALIDATION

CHUNK, STEPS = 100, 1500


@pytest.fixture(scope="module")
def start():
    """Starts `worker.digits` in a process forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["paradigms", "tests.worker", "orbax.checkpoint.experimental.v1", "flax.nnx", "sklearn.datasets"]
    )

    def begin(folder):
        process = context.Process(target=worker.digits, args=(str(folder),))
        process.start()
        return process

    return begin


@pytest.fixture(scope="module")
def end(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return dict(np.load(folder / "end.npz")), time.monotonic() - begun


def saved(folder):
    """The last step with a finished checkpoint, or 0."""
    return max([0, *(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())])


def equal(folder, end):
    found = np.load(folder / "end.npz")
    return set(found) == set(end) and all(np.array_equal(found[name], end[name]) for name in end)


def kill(process, folder, chance, seconds, during_save):
    """Kills after a random time, or as soon as a checkpoint is half written."""
    until = time.monotonic() + (60 if during_save else chance.uniform(0.2, 1.1) * seconds)
    while process.is_alive() and time.monotonic() < until:
        if during_save and any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp")):
            break
        time.sleep(0.002)
    half = any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))
    process.kill()
    process.join()
    return half


def survive(start, end, folder, kills):
    chance, halves, done = random.Random(0), 0, 0
    for number in range(kills):
        if saved(folder) == STEPS:  # it had ended before it was killed: from the start, elsewhere
            assert equal(folder, end[0])
            folder, done = folder.with_name(f"{folder.name}-{number}"), done + 1
        halves += kill(start(folder), folder, chance, end[1], during_save=number % 3 == 2)
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    assert equal(folder, end[0])
    return halves


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(start, end, tmp_path):
    assert survive(start, end, tmp_path / "run", 5) > 0


@pytest.mark.slow
def test_a_run_killed_thirty_times_ends_with_the_same_bits(start, end, tmp_path):
    assert survive(start, end, tmp_path / "run", 30) >= 5


def test_a_run_told_to_stop_loses_no_chunk(start, end, tmp_path):
    chance, codes = random.Random(1), []
    for _ in range(4):
        process = start(tmp_path)
        while process.is_alive() and not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0.5, 1) * end[1] * 0.5)
        process.terminate()
        process.join()
        codes.append(process.exitcode)
        if process.exitcode == 0:
            break
        if process.exitcode == 128 + signal.SIGTERM:
            rows = logging.read(tmp_path / "metrics.jsonl")
            assert saved(tmp_path) - rows[-1]["step"] in (0, CHUNK), "all that was trained is saved"
    assert set(codes) <= {0, 128 + signal.SIGTERM, -signal.SIGTERM}  # the last, where it was still starting
    assert 128 + signal.SIGTERM in codes
    process = start(tmp_path)
    process.join()
    assert process.exitcode == 0
    assert equal(tmp_path, end[0])


def test_two_processes_are_one_and_go_on_after_one_was_stopped_or_killed(tmp_path):
    net = pd.from_nnx(lambda rngs: nn.MLP(6, (64,), 3, rngs=rngs))
    trainer = pd.Trainer(pd.supervised(net), optax.adam(1e-2), mesh=mesh.make_mesh(data=4, model=2))
    alone = pd.fit(trainer, data.resident(TRAIN, 40), 40, chunk=10, validation=VALIDATION, log=logging.several())

    def run(step=-1, signum=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "tests.worker", str(tmp_path), str(port), "2"]
        root = pathlib.Path(__file__).parent.parent
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "cwd": root}
        first, second = (subprocess.Popen([*command, str(number), str(step), str(int(signum))], **quiet) for number in (0, 1))
        try:
            code = second.wait(120)
            if code >= 0:
                return first.wait(60), code
            first.kill()  # it waits for the other, which is no more
            return first.wait(), code
        finally:
            first.kill()
            second.kill()

    assert run(0, signal.SIGTERM) == (143, 143), "one is told to stop: both save the same step and leave"
    assert saved(tmp_path) == 10
    assert run(30, signal.SIGKILL)[1] == -signal.SIGKILL
    assert saved(tmp_path) in (20, 30)
    assert run() == (0, 0)
    found = np.load(tmp_path / "end.npz")
    for one, other in zip(found.values(), jax.tree.leaves(alone.state.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert [row["step"] for row in logging.read(tmp_path / "metrics.jsonl")] == [10, 20, 30, 40]
