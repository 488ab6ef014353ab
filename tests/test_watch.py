"""Watching a run from outside: logs that reach every fit, estimates before training, debugging, running again."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paradigms as pd
from experiments import __main__ as command
from experiments import catalog, machine, watching
from experiments.printing import amount
from paradigms import data, estimate, logging, nn, watch
from paradigms.nn.conv import conv2d

EXPERIMENT = '''
    """Toy training."""

    import dataclasses
    import pathlib

    import jax.numpy as jnp
    import optax

    import paradigms as pd
    from paradigms import data, nn


    @dataclasses.dataclass(frozen=True)
    class Config:
        seeds: int = 2
        wrong: bool = False
        where: pathlib.Path = pathlib.Path("x")


    def loss(logits, y):
        return -jnp.log(logits[:, 0] - logits.max(-1))  # of a negative number or 0


    def run(config, folder):
        digits = data.load("digits")
        source = data.resident({name: leaf[:64] for name, leaf in digits.train.items()}, 16)
        model = pd.from_nnx(lambda rngs: nn.MLP(64, (8,), 10, rngs=rngs))
        objective = pd.supervised(model, loss) if config.wrong else pd.supervised(model)
        trainer = pd.vectorize(lambda: pd.Trainer(objective, optax.sgd(0.1)), seeds=config.seeds)
        for part in ("first", "second"):
            done = pd.fit(trainer, source, 4, chunk=2, folder=folder / part)
        return {"loss": done.history[-1]["train/loss"]}
'''


@pytest.fixture
def root(tmp_path, monkeypatch):
    package = tmp_path / f"fake{abs(hash(str(tmp_path)))}"
    (package / "toy").mkdir(parents=True)
    (package / "toy/digits.py").write_text(textwrap.dedent(EXPERIMENT))
    (package / "toy/nothing.py").write_text(textwrap.dedent(EXPERIMENT).split("    digits =")[0] + "    return {'a': 1}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return package


def only(folder):
    (found,) = folder.iterdir()
    return found


def toy(seeds=None, hidden=(8,)):
    """A trainer of digits and its source."""
    source = data.resident({name: leaf[:64] for name, leaf in data.load("digits").train.items()}, 16)
    model = pd.from_nnx(lambda rngs: nn.MLP(64, hidden, 10, rngs=rngs))
    make = lambda: pd.Trainer(pd.supervised(model), optax.adam(0.1))
    return (pd.vectorize(make, seeds=seeds) if seeds else make()), source


# --- what fit also writes to ----------------------------------------------------------------------------------------


def test_every_fit_inside_writes_to_the_writers_too(tmp_path):
    trainer, source = toy()
    seen = []

    def opener(folder):
        seen.append(("open", folder))
        return logging.Writer(lambda step, row: seen.append((step, sorted(row))), lambda: seen.append("close"))

    with watch.also(opener):
        pd.fit(trainer, source, 2, chunk=1, folder=tmp_path / "a", log=logging.several())
        pd.fit(trainer, source, 1, chunk=1, log=logging.several())
    pd.fit(trainer, source, 1, chunk=1, log=logging.several())
    keys = ["train/accuracy", "train/loss", "train/supervised"]
    assert seen == [("open", tmp_path / "a"), (1, keys), (2, keys), "close", ("open", None), (1, keys), "close"]


def test_progress_shows_examples_and_rates_without_compilation(capsys, monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(logging.time, "monotonic", lambda: next(clock))
    spent = iter([0.0, 5.0])
    logging.progress(100, examples=2, compiled=lambda: next(spent)).write(50, {})
    assert capsys.readouterr().err.split("  ") == ["50/100", "10 steps/s", "20 examples/s", "0:05 left\n"]
    monkeypatch.undo()
    trainer, source = toy()
    pd.fit(trainer, source, 1, chunk=1)
    assert "examples/s" in capsys.readouterr().err


def events(folder):
    """{tag: {step: value}} of the event files in `folder` itself, as TensorBoard reads them."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = event_accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return {tag: {one.step: one.value for one in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX is not installed")
@pytest.mark.filterwarnings("ignore")  # of tensorboard's own
def test_tensorboard_reads_what_was_written_also_after_a_resume(root, tmp_path):
    assert command.main(["toy.digits", "--log", "tensorboard"], root) == 0
    folder = only(tmp_path / "runs/toy.digits")
    for part in ("first", "second"):
        rows = logging.read(folder / part / "metrics.jsonl")
        for run in range(2):
            written = events(folder / "tensorboard" / part / f"run{run}")["train/loss"]
            assert written == {row["step"]: pytest.approx(row["train/loss"][run]) for row in rows}
        mean = events(folder / "tensorboard" / part)["train/loss"]
        assert mean == {row["step"]: pytest.approx(row["train/loss"].mean()) for row in rows}

    for rows in ({1: 1.0, 2: 2.0, 3: 3.0}, {2: 20.0, 3: 30.0}):
        writer = logging.tensorboard(tmp_path / "again")
        for step, value in rows.items():
            writer.write(step, {"a": value})
        writer.close()
    assert events(tmp_path / "again")["a"] == {1: 1.0, 2: 20.0, 3: 30.0}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.slow
def test_wandb_writes_offline(root, tmp_path):
    code = "import pathlib, sys; from experiments.__main__ import main; sys.exit(main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
    path = os.pathsep.join([str(catalog.HERE.parent), str(tmp_path)])
    words = [sys.executable, "-c", code, str(root), "toy.digits", "--log", "wandb"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(words, capture_output=True, text=True, env={**environment, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    folder = only(tmp_path / "runs/toy.digits")
    written = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(written) == 2
    assert all(b"train/loss/run1" in file.read_bytes() for file in written)


@pytest.mark.parametrize("extra", watching.EXTRAS)
def test_a_log_whose_extra_is_missing_is_named_before_the_run(root, tmp_path, capsys, monkeypatch, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in watching.EXTRAS.values() else find(name))
    assert command.main(["toy.digits", "--log", extra], root) == 2
    assert f'pip install "paradigms[{extra}]"' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# --- before training ------------------------------------------------------------------------------------------------


def test_estimates_of_a_network_known_by_hand():
    trainer, source = toy(seeds=3)
    batch = source.batch(jax.random.key(0), 0)
    found = estimate.estimate(trainer, batch, source)
    assert {row.path: (row.shape, row.count) for row in found.parameters} == {
        "model/encoder/linear1/bias": ("8", 8),
        "model/encoder/linear1/kernel": ("64x8", 512),
        "model/head/bias": ("10", 10),
        "model/head/kernel": ("8x10", 80),
    }
    assert found.memory["parameters"] == 3 * 4 * 610
    assert found.memory["optimizer"] == 2 * found.memory["parameters"] + 3 * 4  # Adam's two moments and its count
    assert found.memory["data"] == 64 * (64 + 4)
    assert found.memory["batch"] == 16 * (64 + 1) * 4
    assert found.memory["activations"] > 0
    # forwards, and back to both operands, but not to the inputs of the network
    assert found.flops == 3 * 2 * 16 * (3 * (64 * 8 + 8 * 10) - 64 * 8)


def test_flops_count_loops_branches_and_every_derivative_of_a_convolution():
    x, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5))
    numbers = ("NHWC", "HWIO", "NHWC")
    ours = lambda x, k: conv2d(x, k, (1, 1), "VALID", dimension_numbers=numbers)
    theirs = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=numbers)
    count = lambda f, *args: estimate.flops(jax.make_jaxpr(f)(*args).jaxpr)
    once = 2 * 2 * 4 * 4 * 3 * 3 * 3 * 5
    assert count(ours, x, kernel) == count(theirs, x, kernel) == once
    assert count(jax.grad(lambda x, k: (ours(x, k) ** 2).sum(), (0, 1)), x, kernel) == 3 * once
    tasks = jnp.ones((7, *kernel.shape))
    assert count(jax.vmap(ours, (None, 0)), x, tasks) == 7 * once
    assert count(jax.vmap(ours), jnp.ones((7, *x.shape)), tasks) == 7 * once
    a = jnp.ones((4, 4))
    assert count(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=5)[0], a) == 5 * 2 * 4**3
    assert count(lambda a: jax.lax.cond(a.sum() > 0, lambda a: a @ a @ a, lambda a: a @ a, a), a) == 2 * 2 * 4**3
    assert count(jax.jit(jax.checkpoint(lambda a: a @ a)), a) == 2 * 4**3


def test_a_long_table_is_grouped_by_where_its_arrays_are():
    rows = [estimate.Parameter(f"model/block{i}/{leaf}", "2x3", "float32", 6) for i in range(20) for leaf in "abc"]
    few = estimate.grouped(rows)
    assert len(few) == 20
    assert few[3] == estimate.Parameter("model/block3/…", "3 arrays", "float32", 18)
    assert estimate.grouped(rows, 5) == [estimate.Parameter("model/…", "60 arrays", "float32", 360)]
    assert estimate.grouped(rows[:3]) == rows[:3]


def test_a_dry_run_trains_nothing_and_leaves_nothing(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pd.Trainer, "scan", None)
    assert command.main(["toy.digits", "--dry-run", "--seeds", "3"], root) == 0
    shown = capsys.readouterr().out
    for part in ("model/head/kernel", "8x10", "610", "memory of 3 runs", "16 examples", "FLOP a step of 3 runs"):
        assert part in shown
    assert not (tmp_path / "runs").exists()
    assert command.main(["toy.nothing", "--dry-run"], root) == 2
    assert "trains nothing" in capsys.readouterr().err


def test_a_dry_run_also_stops_a_loop_of_ones_own():
    trainer, source = toy()
    with watch.dry(), pytest.raises(watch.DryRun) as stopped:
        trainer.init(0, source.batch(jax.random.key(0), 0))
    assert stopped.value.trainer is trainer
    trainer.init(0, source.batch(jax.random.key(0), 0))


def test_amounts():
    assert [amount(number, "FLOP") for number in (0, 999, 1500, 2e6, 3e18)] == [
        "0 FLOP",
        "999 FLOP",
        "1.5 kFLOP",
        "2 MFLOP",
        "3000 PFLOP",
    ]
    assert amount(1536, "B", 1024) == "1.5 KiB"


# --- profile, memory, determinism, debugging ------------------------------------------------------------------------


def test_a_profile_is_of_one_chunk_and_readable(root, tmp_path):
    assert command.main(["toy.digits", "--profile"], root) == 0
    (trace,) = only(tmp_path / "runs/toy.digits").glob("profile/**/*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(trace))
    assert any(event.name for plane in profile.planes for line in plane.lines for event in line.events)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_memory_is_what_the_kernel_says():
    peak = machine.peak_memory()
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert peak["host"] == pytest.approx(1024 * int(line.split()[1]), rel=0.05)
    assert "device" not in peak or peak["device"] > 0


def test_deterministic_sets_xla_s_switch_before_it_starts_and_is_recorded(root, tmp_path):
    code = """
import os, pathlib, sys
from experiments.__main__ import main
code = main(["toy.nothing", "--deterministic"], pathlib.Path(sys.argv[1]))
assert "--xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"], os.environ
sys.exit(code)
"""
    path = os.pathsep.join([str(catalog.HERE.parent), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"compiled [\d.]+ s, ran [\d.]+ s, host memory [\d.]+ [MG]iB", last)
    folder = only(tmp_path / "runs/toy.nothing")
    for name in ("config.json", "result.json"):
        assert json.loads((folder / name).read_text())["deterministic"] is True


def test_deterministic_after_the_start_is_refused_where_it_would_not_hold(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    jax.devices()
    watching.ready(deterministic=True)  # a CPU needs nothing
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="jax has started already"):
        watching.ready(deterministic=True)


def test_debug_says_where_a_nan_arose(root, capsys):
    assert command.main(["toy.digits", "--seeds", "1", "--wrong", "--debug"], root) == 2
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert "Traceback" in said
    assert "invalid value (nan) encountered in log" in last
    assert "toy/digits.py:22 in loss: return -jnp.log(logits[:, 0] - logits.max(-1))" in last


@pytest.mark.parametrize("over", [pd.one_by_one, pd.side_by_side])
def test_debugging_loops_over_runs_and_the_derivatives_of_a_convolution(over):
    x, kernels = jnp.ones((2, 4, 4, 1)), jnp.ones((2, 3, 3, 1, 1))

    def loss(kernel, shift):
        y = conv2d(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.log(y.mean() - shift)

    grads = jax.jit(lambda shift: over(lambda kernel: jax.grad(loss)(kernel, shift), kernels))
    with watching.debugging():
        debugged = grads(0.0)
    np.testing.assert_allclose(debugged, grads(0.0), rtol=1e-5)
    line = r"nan.* encountered in log, at .*test_watch.py:\d+ in loss: return jnp.log"
    with pytest.raises(ValueError, match=line), watching.debugging():
        grads(100.0)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_nan_in_a_convolution_is_found_without_end(jitted):
    x, kernel = jnp.full((1, 3, 3, 1), jnp.nan), jnp.ones((2, 2, 1, 1))
    with jax.debug_nans(True), jax.disable_jit(not jitted), pytest.raises(FloatingPointError, match="nan"):
        conv2d(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.slow
def test_a_sound_vectorized_network_trains_under_debug():
    source = data.resident({name: leaf[:8] for name, leaf in data.load("digits").train.items()}, 4)
    model = pd.from_nnx(lambda rngs: nn.SmallCNN(image=(8, 8, 1), channels=(2, 2), hidden=4, rngs=rngs))
    trainer = pd.vectorize(lambda: pd.Trainer(pd.supervised(model), optax.sgd(0.1)), seeds=2)
    with watching.debugging():
        found = pd.fit(trainer, source, 2, chunk=1, log=logging.several())
    compiled = pd.fit(trainer, source, 2, chunk=1, log=logging.several())
    np.testing.assert_allclose(found.history[-1]["train/loss"], compiled.history[-1]["train/loss"], rtol=1e-4)


# --- running again --------------------------------------------------------------------------------------------------


def test_a_run_is_repeated_from_its_configuration_alone(root, tmp_path, capsys):
    assert command.main(["toy.digits", "--seeds", "1", "--where", "some/place"], root) == 0
    first = only(tmp_path / "runs/toy.digits")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/config.json").write_bytes((first / "config.json").read_bytes())
    assert command.main(["rerun", "alone", "--out", "again"], root) == 0
    again = only(tmp_path / "again/toy.digits")
    assert (again / "config.json").read_bytes() == (first / "config.json").read_bytes()
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (first, again))
    assert one["metrics"] == two["metrics"]
    assert "metrics" not in capsys.readouterr().err  # nothing to compare with


def test_a_rerun_says_in_what_it_differs(root, tmp_path, capsys):
    assert command.main(["toy.nothing"], root) == 0
    first = only(tmp_path / "runs/toy.nothing")
    assert command.main(["rerun", str(first)], root) == 0
    assert "all 1 metrics equal those of" in capsys.readouterr().err
    result = json.loads((first / "result.json").read_text())
    result["metrics"]["a"]["values"] = [1.0000001]
    (first / "result.json").write_text(json.dumps(result))
    assert command.main(["rerun", str(first)], root) == 1
    assert "a: [1], was [1.0000001]\n1 of 1 metrics differ from those of" in capsys.readouterr().err
