"""A real run that is killed again and again, and one of two processes that is."""

import random
import signal
import socket
import time

import jax
import numpy as np
import optax
import pytest

import paradigms as pd
from paradigms import data, logging, mesh, nn
from tests import worker
from tests.test_fit import TRAIN, VALIDATION
from tests.worker import start

CHUNK = 100


@pytest.fixture(scope="module")
def end(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    process = start(worker.digits, folder)
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
    """Kills after a random time, or as soon as a checkpoint is half written; whether it was, and whether the run had ended."""
    until = time.monotonic() + (60 if during_save else chance.uniform(0.2, 1.1) * seconds)
    while process.is_alive() and time.monotonic() < until:
        if during_save and any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp")):
            break
        time.sleep(0.002)
    half = any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))
    process.kill()
    process.join()
    return half, process.exitcode == 0


def survive(end, folder, kills):
    chance, halves = random.Random(0), 0
    for number in range(kills):
        half, ended = kill(start(worker.digits, folder), folder, chance, end[1], during_save=number % 3 == 2)
        halves += half
        if ended:  # from the start, elsewhere
            assert equal(folder, end[0])
            folder = folder.with_name(f"{folder.name}-{number}")
    process = start(worker.digits, folder)
    process.join()
    assert process.exitcode == 0
    assert equal(folder, end[0])
    return halves


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(end, tmp_path):
    assert survive(end, tmp_path / "run", 5) > 0


@pytest.mark.slow
def test_a_run_killed_thirty_times_ends_with_the_same_bits(end, tmp_path):
    assert survive(end, tmp_path / "run", 30) >= 5


def test_a_run_told_to_stop_loses_no_chunk(end, tmp_path):
    chance, codes = random.Random(1), []
    for _ in range(4):
        process = start(worker.digits, tmp_path)
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
    process = start(worker.digits, tmp_path)
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
        first, second = (start(worker.together, tmp_path, port, 2, number, step, signum) for number in (0, 1))
        try:
            second.join(120)
            if second.exitcode is None or second.exitcode >= 0:
                first.join(60)
            return first.exitcode, second.exitcode
        finally:
            first.kill()  # it waits for the other, where that is no more
            second.kill()
            first.join()

    assert run(0, signal.SIGTERM) == (143, 143), "one is told to stop: both save the same step and leave"
    assert saved(tmp_path) == 10
    assert run(30, signal.SIGKILL)[1] == -signal.SIGKILL
    assert saved(tmp_path) in (20, 30)
    assert run() == (0, 0)
    found = np.load(tmp_path / "end.npz")
    for one, other in zip(found.values(), jax.tree.leaves(alone.state.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert [row["step"] for row in logging.read(tmp_path / "metrics.jsonl")] == [10, 20, 30, 40]
