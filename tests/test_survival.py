"""What a run survives: damaged checkpoints, full disks, signals, steps that are not finite, other devices."""

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paradigms as pd
from paradigms import data
from paradigms import logging as rows_of
from paradigms.checkpoint import Checkpoints, Keep
from paradigms.interrupt import Stopped, stopping
from paradigms.nonfinite import SKIP, Diverged, Nonfinite, rollback
from tests.contracts import NET
from tests.test_fit import SINGLE, SOURCE, TRAIN, VALIDATION, equal

SILENT = rows_of.several()
OPTIONS = {"chunk": 10, "validation": VALIDATION, "checkpoint_every": 10, "log": SILENT, "key": 3}
GUARDED = pd.Trainer(pd.supervised(NET), optax.adam(1e-2), guard=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return pd.fit(SINGLE, SOURCE, 40, folder=tmp_path_factory.mktemp("whole"), **OPTIONS)


# --- checkpoints -----------------------------------------------------------------------------------------------------

TREE = {"a": jnp.arange(2000.0), "k": jax.random.key(1), "b": jnp.ones((3, 2), bool), "h": jnp.ones(5, jnp.bfloat16)}


def truncate(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove(folder):
    max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size).unlink()


def flip(folder):
    """One bit of every large file."""
    for file in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1000]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))


def forget(folder):
    for file in folder.rglob("_CHECKPOINT_METADATA"):
        file.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's threads, which still read
@pytest.mark.parametrize("damage", [truncate, remove, flip, forget])
def test_a_damaged_checkpoint_falls_back_and_the_run_ends_the_same(damage, whole, tmp_path, caplog):
    pd.fit(SINGLE, SOURCE, 30, folder=tmp_path, **OPTIONS)
    damage(tmp_path / "checkpoints" / "30")
    again = pd.fit(SINGLE, SOURCE, 40, folder=tmp_path, resume=True, **OPTIONS)
    assert "step 30 is damaged" in caplog.text
    assert "falls back to step 20" in caplog.text
    assert equal(whole.state.params, again.state.params)
    assert equal(whole.state.opt_state, again.state.opt_state)
    assert [row["step"] for row in rows_of.read(tmp_path / "metrics.jsonl")] == [10, 20, 30, 40]
    assert list((tmp_path / "damaged").iterdir())


def test_a_changed_number_is_found_where_the_file_format_does_not_see_it(tmp_path, monkeypatch):
    from paradigms import checkpoint

    with Checkpoints(tmp_path) as saves:
        saves.save(1, TREE)
        saves.finish()
        assert equal(saves.restore(TREE).tree["a"], TREE["a"])
        bent = {**TREE, "a": TREE["a"].at[1999].multiply(1.0000001)}
        real = checkpoint._fingerprint
        monkeypatch.setattr(checkpoint, "_fingerprint", lambda tree: real(bent))
        with pytest.raises(ValueError, match=r"no checkpoint is whole.*not those that were saved"):
            saves.restore(TREE)


def test_every_bit_counts_in_a_fingerprint():
    from paradigms.checkpoint import _fingerprint

    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.int8, np.uint16, np.int32, bool, jnp.bfloat16):
        leaf = jnp.asarray(rng.integers(0, 2, (7, 5))).astype(dtype)
        sums = {int(_fingerprint([leaf])[0])}
        for place in np.ndindex(leaf.shape):
            changed = (1 - leaf[place].astype(jnp.int32)).astype(dtype)
            sums.add(int(_fingerprint([leaf.at[place].set(changed)])[0]))
        assert len(sums) == 1 + leaf.size
        assert int(_fingerprint([leaf.T])[0]) not in sums


def test_the_latest_every_kth_and_the_best_stay(tmp_path):
    with Checkpoints(tmp_path, Keep(last=2, every=4, best=1)) as saves:
        for step, value in enumerate([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7, float("nan")], 1):
            saves.save(step, {"a": jnp.zeros(3)}, value=value)
        saves.finish()
        assert saves.steps() == [3, 4, 8, 9]
    with pytest.raises(ValueError, match="last"):
        Checkpoints(tmp_path, Keep(last=0))


@contextlib.contextmanager
def full(size):
    """No file of this process may grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_and_tried_again(tmp_path, caplog):
    tree = {"a": jnp.asarray(np.random.default_rng(0).random(20_000))}  # does not compress
    with Checkpoints(tmp_path, Keep(last=3)) as saves:
        saves.save(1, tree)
        assert saves.finish()
        with full(20_000):
            saves.save(2, tree)
            saves.save(3, tree)
            assert not saves.finish()
        assert saves.failed == 3
        assert "step 2 could not be written" in caplog.text
        assert "tries again" in caplog.text
        assert saves.steps() == [1]
        assert saves.finish(), "what failed is kept, and written when there is room"
        assert not list(tmp_path.glob("*tmp*")), "what was half written would fill the disk further"
        assert saves.restore(tree).step == 3


def test_a_run_whose_disk_is_full_ends_in_memory(tmp_path, whole, monkeypatch, caplog):
    def broken(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    from orbax.checkpoint.experimental import v1

    monkeypatch.setattr(v1.training.Checkpointer, "save_async", broken)
    run = pd.fit(SINGLE, SOURCE, 40, folder=tmp_path, **OPTIONS)
    assert equal(run.state.params, whole.state.params)
    assert "the run goes on in memory" in caplog.text


def test_rows_that_could_not_be_written_are_written_later(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    writer = rows_of.jsonl(path)
    writer.write(1, {"a": 1.0})
    size = path.stat().st_size
    with full(size + 5):  # room for a part of the row
        writer.write(2, {"a": 2.0})
    assert "1 rows wait" in caplog.text
    writer.write(3, {"a": 3.0})
    writer.close()
    assert [row["step"] for row in rows_of.read(path)] == [1, 2, 3]


# --- signals ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Calling:
    """`SOURCE` that sends a signal as a chunk begins."""

    at: int
    signum: int

    def __getattr__(self, name):
        return getattr(SOURCE, name)

    def chunk(self, step, n):
        if int(step) == self.at and n > 1:
            os.kill(os.getpid(), self.signum)
            time.sleep(0.2)  # the listener is a thread
        return SOURCE.chunk(step, n)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("validated", [True, False], ids=["during an evaluation", "between chunks"])
def test_a_signal_saves_at_the_end_of_the_chunk(signum, code, validated, whole, tmp_path, capfd):
    options = OPTIONS if validated else OPTIONS | {"validation": None}
    with pytest.raises(Stopped, match="step 30 of 40") as stopped:
        pd.fit(SINGLE, Calling(20, signum), 40, folder=tmp_path, **options)
    assert stopped.value.code == code
    assert "Ctrl-C again leaves at once" in capfd.readouterr().err
    with Checkpoints(tmp_path / "checkpoints") as saves:
        assert saves.steps() == [20, 30]
    again = pd.fit(SINGLE, SOURCE, 40, folder=tmp_path, resume=True, **options)
    assert equal(whole.state.params, again.state.params)
    rows = rows_of.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    if validated:
        assert equal(whole.best.params, again.best.params)
        assert equal(rows, [{**row} for row in whole.history])


def test_a_signal_before_the_first_step_saves_nothing(tmp_path):
    class Measure:
        def __call__(self, outputs, split):
            return {"accuracy": 0.5, "loss": 1.0}

        def check(self, split, outputs):
            if outputs is None:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)

    with pytest.raises(Stopped, match="had not begun"):
        pd.fit(SINGLE, SOURCE, 40, folder=tmp_path, measure=Measure(), **OPTIONS)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stopping() as outer, stopping() as inner:
        assert outer is inner
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


LEAVE = """
import os, signal, sys, time
from paradigms.interrupt import stopping
with stopping(grace=float(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
    sys.exit(7)
"""


def test_a_second_signal_and_the_end_of_the_grace_leave_at_once():
    def begin(grace):
        process = subprocess.Popen(
            [sys.executable, "-c", LEAVE, grace], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        return process

    twice, late = begin("600"), begin("0.3")
    start = time.monotonic()
    late.send_signal(signal.SIGTERM)
    twice.send_signal(signal.SIGINT)
    time.sleep(0.3)
    twice.send_signal(signal.SIGINT)
    said = twice.communicate(timeout=30)[1], late.communicate(timeout=30)[1]
    assert (twice.returncode, late.returncode) == (130, 143)
    assert time.monotonic() - start < 20
    assert "leaves at once" in said[0]
    assert "not stopped after 0.3 s" in said[1]


# --- numbers going bad -----------------------------------------------------------------------------------------------

BAD = {**TRAIN, "x": TRAIN["x"].copy()}
BAD["x"][17] = 3e38  # finite, so that it is let in; the network's sums are not


def test_the_error_names_step_loss_and_examples():
    source = data.resident(BAD, 20)
    for trainer in (SINGLE, GUARDED):
        with pytest.raises(Diverged) as failed:
            pd.fit(trainer, source, 40, chunk=10, log=SILENT, key=3)
        error = failed.value
        assert not np.isfinite(error.loss)
        assert 17 in error.rows
        assert f"step {error.step}" in str(error)
        assert len(error.rows) == 20


def test_skipped_steps_change_nothing_but_their_number():
    source = data.resident(BAD, 20)
    run = pd.fit(GUARDED, source, 20, chunk=10, log=SILENT, key=3, nonfinite=SKIP)
    assert run.state.step == 20
    assert sum(10 * row["train/skipped"] for row in run.history) == pytest.approx(2)  # once in each epoch of ten
    state = GUARDED.init(3, {name: leaf[:20] for name, leaf in TRAIN.items()})
    start = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = GUARDED.step(state, {name: leaf[:20] for name, leaf in BAD.items()})
    assert equal(start, (state.params, state.opt_state))
    assert (metrics["skipped"], state.step) == (1, 1)
    plain, _ = SINGLE.step(
        SINGLE.init(3, {name: leaf[:20] for name, leaf in TRAIN.items()}), {k: v[:20] for k, v in TRAIN.items()}
    )
    guarded, _ = GUARDED.step(GUARDED.init(3, {k: v[:20] for k, v in TRAIN.items()}), {k: v[:20] for k, v in TRAIN.items()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain.params, guarded.params)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is():
    model = pd.from_functions(lambda key, x: {"w": jnp.zeros(())}, lambda params, x: jnp.sqrt(params["w"]) * x)
    trainer = pd.Trainer(pd.supervised(model, optax.losses.squared_error), optax.sgd(0.1), guard=True)
    batch = {"x": np.ones((4, 1), np.float32), "y": np.ones((4, 1), np.float32)}
    state, metrics = trainer.step(trainer.init(0, batch), batch)
    assert metrics["loss"] == 1
    assert metrics["skipped"] == 1
    assert state.params["model"]["w"] == 0


def test_rollback_goes_back_to_the_last_good_state_and_gives_up_in_the_end(caplog):
    """A rate that grows without bound: the weights end where no step is finite any more."""
    schedule = lambda count: 10.0 ** (count - 12.0)
    trainer = pd.Trainer(pd.supervised(NET), optax.sgd(schedule), guard=True)
    with pytest.raises(Diverged):
        pd.fit(trainer, SOURCE, 2000, chunk=10, log=SILENT, nonfinite=rollback(after=5, times=2))
    assert caplog.text.count("back to the last good state") == 2


def test_rollback_of_one_run_leaves_the_others_alone():
    make = lambda rate: pd.Trainer(pd.supervised(NET), optax.sgd(lambda count: rate ** (count - 12.0)), guard=True)
    both = pd.vectorize(make, rate=[1.0, 10.0])
    alone = pd.vectorize(make, rate=[1.0])
    options = {"chunk": 10, "log": SILENT, "nonfinite": rollback(after=5, times=2)}
    run, single = pd.fit(both, SOURCE, 90, **options), pd.fit(alone, SOURCE, 90, **options)
    assert all(
        np.array_equal(a[0], b[0]) for a, b in zip(*map(jax.tree.leaves, (run.state.params, single.state.params)), strict=True)
    )
    assert np.isfinite(jax.tree.leaves(run.state.params)[0]).all()


def test_policies_are_checked():
    for policy, trainer, message in (
        (Nonfinite(0), GUARDED, "after"),
        (SKIP, SINGLE, "guard=True"),
        (rollback(), SINGLE, "guard=True"),
    ):
        with pytest.raises(ValueError, match=message):
            pd.fit(trainer, SOURCE, 10, chunk=10, log=SILENT, nonfinite=policy)


def test_a_poisoned_state_is_never_saved(tmp_path):
    """The last gradient of a chunk is the bad one: its losses are finite, its params are not."""
    model = pd.from_functions(lambda key, x: {"w": jnp.ones(())}, lambda params, x: jnp.sqrt(params["w"]) * x)
    exact = optax.sgd(lambda count: jnp.where(count == 8, 1.0, 0.0))
    trainer = pd.Trainer(pd.supervised(model, lambda output, y: output), exact)
    source = data.resident({"x": np.full((4, 1), 2.0, np.float32), "y": np.zeros((4, 1), np.float32)}, 4)
    with pytest.raises(Diverged, match=r"step 9.*gradient"):
        pd.fit(trainer, source, 20, chunk=10, log=SILENT, folder=tmp_path, checkpoint_every=10)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
