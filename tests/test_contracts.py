"""The battery that every entry of the contract table passes, alone and composed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import paradigms as pd
from paradigms.checkpoint import Checkpoints
from tests.contracts import (
    AGGREGATORS,
    ALONE,
    COMPOSITIONS,
    LEAVES,
    PRODUCT,
    STILL,
    TRANSFORMS,
    batch_for,
    build,
    source,
    stacked,
)

OPTIMIZER = optax.sgd(0.05, momentum=0.9)  # it has a memory, and no quotient that enlarges a difference in the last bit


def name(path):
    return "-".join(path)


def grouped(paths):
    """One test parameter an entry; where tests run in several processes, those of one entry share theirs (`trained`)."""
    return [pytest.param(path, id=name(path), marks=pytest.mark.xdist_group(name(path))) for path in paths]


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_close(a, b, rtol=2e-5, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=atol), a, b)


class Counted:
    """An objective that counts how often its losses are traced."""

    def __init__(self, objective):
        self.traces = 0

        def losses(*args):
            self.traces += 1
            return objective.losses(*args)

        self.objective = objective._replace(losses=losses)


@functools.cache  # a default would be another key than the same value given
def trained(path, aggregate):
    """Shared by the tests of one entry: its trainer, and its states after a scan of three steps and after a boundary."""
    batch = batch_for(path)
    counted = Counted(build(path))
    trainer = pd.Trainer(counted.objective, OPTIMIZER, AGGREGATORS[aggregate]())
    start = trainer.init(0, batch) if path in ALONE else jax.jit(trainer.pure.init)(jax.random.key(0), batch)  # unchecked
    before = shapes(start)
    kept = jax.tree.map(jnp.copy, start)
    scanned, metrics = trainer.scan(start, source(batch), 3)
    traces = counted.traces
    done = trainer.boundary(scanned, stacked(batch), "end")
    return trainer, batch, kept, before, scanned, metrics, done, traces


def check_run(path, aggregate="sum"):
    trainer, batch, start, before, scanned, metrics, done, _ = trained(path, aggregate)
    assert shapes(scanned) == before, "the state changed its structure in scan"
    assert shapes(done) == before, "the state changed its structure at a boundary"
    assert int(scanned.step) == 3
    assert int(done.task) == 1
    for leaf in jax.tree.leaves((scanned.params, metrics)):
        assert np.isfinite(np.asarray(leaf)).all()
    later = done if STILL & set(path) else scanned
    moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (start.params, later.params)), strict=True)]
    assert any(moved), "no parameter moved in three steps, or at the boundary of what learns there alone"
    outputs = trainer.predict(done, batch)
    assert np.isfinite(np.asarray(outputs["logits"])).all()


@pytest.mark.parametrize("path", grouped(ALONE))
class TestAlone:
    def test_runs(self, path):
        check_run(path)

    def test_one_trace(self, path):
        # once to check the batch, once for the scan: never once a step
        trainer, batch, start, *_, traces = trained(path, "sum")
        assert traces <= 2
        trainer.scan(jax.tree.map(jnp.copy, start), source(batch), 3)
        assert trainer._scan._cache_size() == 1

    def test_steps_on_eight_devices_equal_a_scan_on_one(self, path):
        _, batch, _, _, scanned, *_ = trained(path, "sum")
        counted = Counted(build(path))
        trainer = pd.Trainer(counted.objective, OPTIMIZER, mesh=Mesh(np.array(jax.devices()), ("data",)))
        state = jax.jit(trainer.pure.init)(jax.random.key(0), batch)  # `trained` has checked the batch
        for _ in range(3):
            state, _ = trainer.step(state, batch)
        assert counted.traces == 1
        assert len(state.params["model"]["encoder"]["kernel"].sharding.device_set) == 8
        assert_close(state.params, scanned.params, 2e-5, 1e-5)

    def test_dtypes_are_kept(self, path):
        trainer, batch, start, *_ = trained(path, "sum")

        def halved(tree):
            cast = lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
            return jax.tree.map(cast, tree)

        # batch statistics stay in float32: flax computes them so
        half = start._replace(params=halved(start.params), opt_state=halved(start.opt_state))
        new, _ = jax.eval_shape(trainer.pure.step, half, batch)
        assert shapes(new.params) == shapes(half.params)

    def test_checkpoint_is_exact(self, path, tmp_path):
        *_, scanned, _, done, _ = trained(path, "sum")
        with Checkpoints(tmp_path) as saves:
            saves.save(3, done)
        with Checkpoints(tmp_path) as saves:
            loaded = saves.restore(scanned).tree
        assert_equal(loaded, done)

    def test_degenerate_equals_child(self, path):
        if path[0] in LEAVES:
            pytest.skip("a leaf has no child")
        transform = TRANSFORMS[path[0]]
        if transform.degenerate is None:
            pytest.skip("no setting equals the child")
        child = build(path[1:])
        batch = batch_for(path)
        params, state = child.init(jax.random.key(0), batch["query"] if transform.episodes else batch)
        wrapped = transform.degenerate(child)
        wrapped_params, wrapped_state = wrapped.init(jax.random.key(0), batch)
        ctx = pd.context(train=True)

        def grads(objective, params, state, batch, ctx):
            return jax.value_and_grad(lambda p: sum(objective.losses(p, state, batch, ctx)[0].values()))(params)

        grads = jax.jit(grads, static_argnums=0)
        value, grad = grads(wrapped, wrapped_params, wrapped_state, batch, ctx)
        if transform.episodes:  # with no inner step: the mean over tasks of the child on each query set
            tasks = [jax.tree.map(lambda leaf, i=i: leaf[i], batch["query"]) for i in range(8)]
            params, state = child.init(jax.random.key(0), tasks[0])
            folded = [ctx.fold(i).fold("query") for i in range(8)]
            each = [grads(child, params, state, task, c) for task, c in zip(tasks, folded, strict=True)]
            expected = jax.tree.map(lambda *leaves: sum(leaves) / 8, *each)
        else:
            inner = ctx.fold("a") if path[0] == "multitask" else ctx
            expected = grads(child, params, state, batch, inner)
        assert_close((value, grad["model"]), (expected[0], expected[1]["model"]), 1e-5, 1e-5)


@pytest.mark.parametrize("path", [("byol",), *((name, "supervised") for name in ("ewc", "rehearsal", "maml"))], ids=name)
def test_runs_side_by_side_equal_single_runs(path):
    batch = batch_for(path)
    objective = build(path)
    single = pd.Trainer(objective, optax.sgd(0.1))
    many = pd.vectorize(lambda: pd.Trainer(objective, optax.sgd(0.1)), seeds=2, over=pd.side_by_side)
    together, _ = many.scan(many.init(jax.random.key(7), batch), source(batch), 2)
    for seed in range(2):
        alone, _ = single.scan(single.init(jax.random.fold_in(jax.random.key(7), seed), batch), source(batch), 2)
        assert_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], together.params), alone.params)


@pytest.mark.parametrize("path", grouped(COMPOSITIONS))
def test_compositions_run(path):
    check_run(path)


@pytest.mark.parametrize(
    ("aggregator", "path"),
    [
        ("pcgrad", ("multitask", "adversarial", "supervised")),
        ("pcgrad", ("ewc", "rehearsal", "supervised")),
        ("agem", ("replay", "adversarial", "supervised")),
        ("gem", ("episodic_memory", "ewc", "supervised")),
    ],
)
def test_aggregators_run(aggregator, path):
    check_run(path, aggregator)


@pytest.mark.slow
@pytest.mark.parametrize("path", grouped(PRODUCT))
def test_product_runs(path):
    check_run(path)


def test_slot_clash_says_how_to_rename():
    with pytest.raises(ValueError, match='name="ewc2"'):
        pd.ewc(build(("ewc", "supervised")), 1.0).init(jax.random.key(0), batch_for(("supervised",)))
    twice = pd.ewc(build(("ewc", "supervised")), 1.0, name="ewc2")
    assert {"ewc", "ewc2"} <= twice.init(jax.random.key(0), batch_for(("supervised",)))[1].keys()
