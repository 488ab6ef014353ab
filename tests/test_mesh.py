"""Devices: a run on several equals the run on one, and goes on where there are others; two processes equal one."""

import contextlib

import jax
import numpy as np
import optax
import pytest

import paradigms as pd
from paradigms import data, logging, mesh, nn
from paradigms.checkpoint import Checkpoints
from tests.test_fit import TRAIN, VALIDATION, equal

SILENT = logging.several()
NET = pd.from_nnx(lambda rngs: nn.MLP(6, (64,), 3, rngs=rngs))
SOURCE = data.resident(TRAIN, 40)
SHAPES = {"one": None, "data": {"data": 8}, "data and model": {"data": 4, "model": 2}, "model": {"data": 1, "model": 8}}


def trainer(shape):
    return pd.Trainer(pd.averaged(pd.supervised(NET), 0.9), optax.adam(1e-2), mesh=shape and mesh.make_mesh(**shape))


@pytest.fixture(scope="module")
def single():
    return pd.fit(trainer(None), SOURCE, 20, chunk=10, validation=VALIDATION, log=SILENT)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES.values() if shape], ids=[name for name in SHAPES if name != "one"])
def test_a_run_on_many_devices_is_the_run_on_one(shape, single, monkeypatch):
    monkeypatch.setattr(mesh, "SMALL", 64)
    run = pd.fit(trainer(shape), SOURCE, 20, chunk=10, validation=VALIDATION, log=SILENT)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, run.state.params, single.state.params)
    jax.tree.map(close, run.state.opt_state, single.state.opt_state)
    parts = shape.get("model", 1)
    kernel = max(jax.tree.leaves(run.state.params), key=np.size)
    assert kernel.addressable_shards[0].data.size == kernel.size // parts
    memory = max(jax.tree.leaves(run.state.opt_state), key=np.size)
    assert memory.addressable_shards[0].data.size == kernel.size // parts


def test_runs_trained_together_use_the_mesh_too():
    batch = {name: leaf[:40] for name, leaf in TRAIN.items()}
    make = lambda: pd.Trainer(pd.supervised(NET), optax.sgd(0.1))
    states = []
    for shape in (None, {"data": 4, "model": 2}):
        with contextlib.nullcontext() if shape is None else jax.set_mesh(mesh.make_mesh(**shape)):
            many = pd.vectorize(make, seeds=2)
            states.append(many.step(many.init(0, batch), batch)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), states[0].params, states[1].params)


def test_the_mesh_around_a_trainer_is_its_own():
    with jax.set_mesh(mesh.make_mesh(data=4, model=2)):
        inside = pd.Trainer(pd.supervised(NET), optax.adam(1e-2))
    batch = {name: leaf[:40] for name, leaf in TRAIN.items()}
    assert len(inside.init(0, batch).step.sharding.device_set) == 8
    with pytest.raises(ValueError, match="divide into 4"):
        inside.init(0, {name: leaf[:6] for name, leaf in TRAIN.items()})


@pytest.mark.parametrize("before", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("after", [None, {"data": 2, "model": 4}], ids=["one", "2 x 4"])
def test_a_checkpoint_restores_on_other_devices(before, after, tmp_path, monkeypatch):
    monkeypatch.setattr(mesh, "SMALL", 64)
    batch = {name: leaf[:40] for name, leaf in TRAIN.items()}
    state = trainer(before).init(0, batch)
    with Checkpoints(tmp_path) as saves:
        saves.save(7, state)
        saves.finish()
        like = trainer(after).init(1, batch)
        found = saves.restore(like)
    assert equal(state.params, found.tree.params)
    assert equal(state.opt_state, found.tree.opt_state)
    assert jax.tree.map(lambda leaf: leaf.sharding, found.tree.params) == jax.tree.map(lambda leaf: leaf.sharding, like.params)


def test_text_of_a_mesh():
    assert dict(mesh.parse_mesh("data=4,model=2").shape) == {"data": 4, "model": 2}
    assert dict(mesh.parse_mesh(" data = -1 , model = 2 ").shape) == {"data": 4, "model": 2}
    for text in ("", "data", "data=3", "data=4,data=2", "data=0,model=8", "data=-1,model=-1", "data=4;model=2", "8"):
        with pytest.raises(ValueError, match="mesh"):
            mesh.parse_mesh(text)
    made = mesh.make_mesh(data=4, model=2)
    assert mesh.spec((300, 64), made) == jax.sharding.PartitionSpec(("model",))
    assert mesh.spec((301, 64), made) == jax.sharding.PartitionSpec(None, ("model",))
    assert mesh.spec((301, 63), made) == mesh.spec((4, 4), made) == jax.sharding.PartitionSpec()
