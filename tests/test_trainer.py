"""The trainer: what the types must carry, what is compiled when, and how a run divides over time and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import paradigms as pd
from paradigms import data
from paradigms.evaluation import evaluate
from paradigms.objective import Objective, Update, fold, hide, own
from tests.contracts import NET, batch_for, build, source

BATCH = batch_for(("supervised",))


def linear(width=3):
    """A linear classifier without batch statistics or dropout, so that sums over parts are exact."""

    def init(key, x):
        return {"w": 0.1 * jax.random.normal(key, (x.shape[-1], width)), "b": jnp.zeros(width)}

    return pd.from_functions(init, lambda p, x: x @ p["w"] + p["b"][None])


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=atol), a, b)


def run(trainer, steps=3, batch=BATCH, key=0):
    state = trainer.init(key, batch)
    for _ in range(steps):
        state, metrics = trainer.step(state, batch)
    return state, metrics


def test_step_is_the_textbook_one():
    trainer = pd.Trainer(pd.supervised(linear()), optax.sgd(0.5))
    state = trainer.init(0, BATCH)
    w, b = (np.asarray(state.params["model"][name], np.float64) for name in "wb")
    x, y = BATCH["x"].astype(np.float64), BATCH["y"]
    logits = x @ w + b
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    error = (p - np.eye(3)[y]) / len(x)
    new, metrics = trainer.step(state, BATCH)
    np.testing.assert_allclose(new.params["model"]["w"], w - 0.5 * x.T @ error, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.params["model"]["b"], b - 0.5 * error.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], -np.log(p[np.arange(8), y]).mean(), rtol=1e-5)


def test_same_seed_same_bits():
    trainer = pd.Trainer(build(("byol",)), optax.adam(1e-2))
    (a, _), (b, _), (c, _) = run(trainer), run(trainer), run(trainer, key=1)
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a.params, b.params)), strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a.params, c.params)), strict=True))


def test_chunk_is_one_dispatch_without_host_transfer():
    trainer = pd.Trainer(build(("rehearsal", "adversarial", "supervised")), optax.adam(1e-2))
    batch = batch_for(("rehearsal", "adversarial", "supervised"))
    data = source(batch)
    state, _ = trainer.scan(trainer.init(0, batch), data, 4)
    with jax.transfer_guard("disallow"):
        state, _ = trainer.scan(state, data, 4)
    jaxpr = str(jax.make_jaxpr(trainer.pure.scan, static_argnums=2)(state, data, 4))
    assert "callback" not in jaxpr
    assert trainer._scan._cache_size() == 1


@pytest.mark.parametrize(("n", "width"), [(7, 4), (130, 4), (12, 2**18)], ids=["at once", "in blocks", "one by one"])
def test_scan_gives_every_step_its_own_batch(n, width):
    def losses(params, state, batch, ctx):
        return {"number": jnp.mean(batch["x"]) + params["w"]}, (state, {"step": ctx.step, "key": batch["key"][0]})

    objective = Objective(lambda key, batch: ({"w": jnp.zeros(())}, {}), losses, lambda params, state, batch, ctx: ({}, state))
    trainer, root = pd.Trainer(objective, optax.sgd(0.0)), jax.random.key(1)

    def get(arrays, key, step):
        return {"x": jnp.full((2, width), step, jnp.float32), "key": jax.random.bits(jax.random.fold_in(key, step), (2,))}

    numbers = data.Source({}, get, 2, 2)
    state, first = trainer.scan(trainer.init(root, numbers.batch(root, 0)), numbers, 2)
    keys = [numbers.batch(fold(state.key, "data"), step)["key"][0] for step in range(2 + n)]
    state, then = trainer.scan(state, numbers, n)
    found = jax.tree.map(lambda *parts: np.concatenate(parts), first, then)
    np.testing.assert_array_equal(found["number"], np.arange(2 + n))
    np.testing.assert_array_equal(found["step"], np.arange(2 + n))
    np.testing.assert_array_equal(found["key"], keys)


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_equal_the_whole_batch(parts):
    whole, parted = (pd.Trainer(pd.supervised(linear()), optax.adam(1e-2), microbatches=n) for n in (1, parts))
    (a, _), (b, _) = run(whole), run(parted)
    close(a.params, b.params, 1e-4, 1e-5)


def test_microbatches_count_by_their_weight():
    batch = {**BATCH, "weight": np.array([1, 1, 1, 0, 0.5, 0, 0, 0], np.float32)}
    whole, parted = (pd.Trainer(pd.supervised(linear()), optax.sgd(0.1), microbatches=n) for n in (1, 4))
    (a, first), (b, second) = run(whole, batch=batch), run(parted, batch=batch)
    close((a.params, first), (b.params, second))


def test_rows_that_do_not_divide_are_refused_at_init_and_in_a_scan():
    trainer = pd.Trainer(pd.supervised(linear()), optax.sgd(0.1), microbatches=3)
    with pytest.raises(ValueError, match="8 rows do not divide into 3"):
        trainer.init(0, BATCH)
    six = jax.tree.map(lambda leaf: leaf[:6], BATCH)
    with pytest.raises(ValueError, match="8 rows do not divide into 3"):
        trainer.scan(trainer.init(np.int64(0), six), source(BATCH), 2)


def test_microbatches_run_after_once():
    objective = pd.averaged(pd.supervised(linear()), decay=0.9)
    trainer = pd.Trainer(objective, optax.sgd(0.1), microbatches=4)
    start = trainer.init(0, BATCH)
    first = np.asarray(start.params["model"]["w"])
    state, _ = trainer.step(start, BATCH)
    expected = 0.9 * first + 0.1 * np.asarray(state.params["model"]["w"])
    np.testing.assert_allclose(state.state["average"]["model"]["w"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [optax.lbfgs(), optax.polyak_sgd(), optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())],
    ids=["lbfgs", "polyak", "plateau"],
)
def test_optimizers_that_need_the_loss(optimizer):
    trainer = pd.Trainer(pd.supervised(linear()), optimizer)
    state = trainer.init(0, BATCH)
    state, first = trainer.step(state, BATCH)
    for _ in range(10):
        state, last = trainer.step(state, BATCH)
    assert last["loss"] < first["loss"]


def test_devices_share_a_batch():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    # Not Adam: a bias before batch normalisation has gradient zero, and Adam makes a step of its rounding error.
    trainers = [pd.Trainer(pd.supervised(NET), optax.sgd(1e-1, 0.9), mesh=m) for m in (None, mesh)]
    results = []
    for trainer in trainers:
        state, _ = trainer.scan(trainer.init(0, BATCH), source(BATCH), 3)
        results.append(state)
    close(results[0].params, results[1].params, 1e-4, 1e-5)
    with pytest.raises(ValueError, match="6 rows"):
        trainers[1].step(results[1], jax.tree.map(lambda leaf: leaf[:6], BATCH))


# -- what later paradigms need of the types --------------------------------------------------------------------------


def frozen(child, names):
    """Freezing in `after`: the named parts of the network stay as they were."""

    def after(params, state, update, ctx):
        params, state = child.after(params, state, update, ctx)
        old = {name: update.old["model"][name] for name in names}
        return {**params, "model": {**params["model"], **old}}, state

    return child._replace(after=after)


def test_frozen_part_stays_bit_identical_under_adam():
    trainer = pd.Trainer(frozen(pd.supervised(NET), ["encoder"]), optax.adamw(1e-1))
    start = trainer.init(0, BATCH)
    before = jax.tree.map(np.asarray, start.params["model"])
    state, _ = trainer.scan(start, source(BATCH), 20)
    assert np.array_equal(before["encoder"]["kernel"], state.params["model"]["encoder"]["kernel"])
    assert not np.array_equal(before["head"]["kernel"], state.params["model"]["head"]["kernel"])


def growing(child):
    """A classifier that gets one more class at each boundary."""

    def boundary(params, state, batches, ctx, event):
        del batches, event
        w, b = params["model"]["w"], params["model"]["b"]
        new = 0.1 * jax.random.normal(ctx.key, (w.shape[0], 1))
        return {**params, "model": {**params["model"], "w": jnp.concatenate([w, new], 1), "b": jnp.append(b, 0.0)}}, state

    return child._replace(boundary=boundary)


def test_network_grows_and_the_optimizer_remembers_the_rest(caplog):
    def init(key, x):
        return {"v": jnp.eye(x.shape[-1]), "w": 0.1 * jax.random.normal(key, (x.shape[-1], 3)), "b": jnp.zeros(3)}

    model = pd.from_functions(init, lambda p, x: x @ p["v"] @ p["w"] + p["b"][None])
    trainer = pd.Trainer(growing(pd.supervised(model)), optax.adam(1e-2))
    state, _ = run(trainer)
    grown = trainer.boundary(state, None, "end")
    assert "compiles anew" in caplog.text
    assert grown.params["model"]["w"].shape == (6, 4)
    mu = lambda s: s.opt_state[0].mu["model"]
    np.testing.assert_array_equal(mu(grown)["v"], mu(state)["v"])
    np.testing.assert_array_equal(mu(grown)["w"], np.zeros((6, 4)))
    assert int(grown.opt_state[0].count) == 3
    new, _ = trainer.step(grown, {**BATCH, "y": np.full(8, 3, np.int32)})
    assert new.params["model"]["w"].shape == (6, 4)


def test_predict_uses_averaged_weights():
    trainer = pd.Trainer(pd.averaged(pd.supervised(linear()), 0.5), optax.sgd(1.0))
    state, _ = run(trainer)
    w, b = (state.state["average"]["model"][name] for name in "wb")
    np.testing.assert_allclose(trainer.predict(state, BATCH)["logits"], BATCH["x"] @ w + b[None], rtol=1e-5)
    assert not np.allclose(w, state.params["model"]["w"])


def test_predict_uses_adapted_weights():
    trainer = pd.Trainer(pd.maml(pd.supervised(linear()), optax.sgd(0.5), 1), optax.sgd(0.1))
    episodes = batch_for(("maml", "supervised"))
    state = trainer.init(0, episodes)
    one = jax.tree.map(lambda leaf: leaf[2], episodes)

    def loss(model):
        logits = one["support"]["x"] @ model["w"] + model["b"][None]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, one["support"]["y"]).mean()

    model = jax.tree.map(lambda p, g: p - 0.5 * g, state.params["model"], jax.grad(loss)(state.params["model"]))
    rows = trainer.predict(state, episodes)["logits"].reshape(8, 3, 3)
    np.testing.assert_allclose(rows[2], one["query"]["x"] @ model["w"] + model["b"][None], rtol=1e-4, atol=1e-5)


def tapped(child):
    """Records the gradient of the inputs from the one backward pass, as Free adversarial training needs it."""
    inner = hide(hide(child, "taps"), "seen")

    def init(key, batch):
        params, state = child.init(key, batch)
        return own(params, "taps", {"x": jnp.zeros_like(batch["x"])}), own(state, "seen", jnp.zeros_like(batch["x"]))

    def losses(params, state, batch, ctx):
        return inner.losses(params, state, {**batch, "x": batch["x"] + params["taps"]["x"]}, ctx)

    def after(params, state, update: Update, ctx):
        params, state = inner.after(params, state, update, ctx)
        return params, {**state, "seen": update.grads["taps"]["x"]}

    return Objective(init, losses, inner.predict, after, inner.boundary)


TRAINERS = {"plain": {}, "microbatches": {"microbatches": 2}, "pcgrad": {"aggregate": pd.pcgrad()}}


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
def test_taps_give_the_input_gradient_of_the_same_backward_pass(options):
    child = pd.supervised(linear())
    trainer = pd.Trainer(tapped(child), optax.sgd(0.1), **options)
    state = trainer.init(0, BATCH)
    w, b = (np.asarray(state.params["model"][name]) for name in "wb")
    logits = BATCH["x"] @ w + b
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    state, _ = trainer.step(state, BATCH)
    np.testing.assert_allclose(state.state["seen"], (p - np.eye(3)[BATCH["y"]]) @ w.T / 8, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(state.params["taps"]["x"], 0)


def test_twenty_losses_with_their_own_forwards_cost_twenty_gradients():
    model = linear(16)
    tasks = {f"t{i}": pd.supervised(model) for i in range(20)}
    rng = np.random.default_rng(0)
    batch = {name: {"x": rng.random((64, 64), np.float32), "y": rng.integers(0, 16, 64).astype(np.int32)} for name in tasks}

    def flops(aggregate):
        trainer = pd.Trainer(pd.multitask(tasks), optax.sgd(0.1), aggregate)
        state = jax.eval_shape(trainer.pure.init, jax.random.key(0), batch)
        return jax.jit(trainer.pure.step).lower(state, batch).compile().cost_analysis()["flops"]

    # one backward pass for each loss, through all twenty forwards, would be ten times this and more
    assert flops(pd.pcgrad()) < 2 * flops(None)


# -- many runs in one program ----------------------------------------------------------------------------------------


@functools.cache
def rate_trainer(over):
    make = lambda rate, decay: pd.Trainer(pd.penalised(pd.supervised(linear()), l2=decay), optax.adam(rate))
    return pd.vectorize(make, seeds=2, over=over, **pd.grid(rate=[0.1, 0.01], decay=[0.0, 0.1]))


@pytest.mark.parametrize("over", [pd.one_by_one, pd.side_by_side])
def test_settings_and_seeds_equal_single_runs(over):
    many = rate_trainer(over)
    assert many.runs == 8
    assert [run["seed"] for run in many.table] == [0, 1] * 4
    state, metrics = many.scan(many.init(jax.random.key(3), BATCH), source(BATCH), 4)
    assert metrics["loss"].shape == (8, 4)
    for i, row in enumerate(many.table):
        alone = pd.Trainer(pd.penalised(pd.supervised(linear()), l2=row["decay"]), optax.adam(row["rate"]))
        key = jax.random.fold_in(jax.random.key(3), row["seed"])
        expected, _ = alone.scan(alone.init(key, BATCH), source(BATCH), 4)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], state.params), expected.params)
    assert many.predict(state, BATCH)["logits"].shape == (8, 8, 3)


def test_boundary_of_many_runs():
    many = pd.vectorize(lambda weight: pd.Trainer(pd.ewc(pd.supervised(linear()), weight), optax.sgd(0.1)), weight=[0.0, 1.0])
    state, _ = many.step(many.init(0, BATCH), BATCH)
    state = many.boundary(state, jax.tree.map(lambda leaf: leaf[None], BATCH), "end")
    assert np.asarray(state.task).tolist() == [1, 1]
    assert (np.asarray(state.state["ewc"]["fisher"]["model"]["w"]) > 0).any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": [0.1, 0.2], "decay": [0.0]}, "same length"),
        ({"rate": [], "decay": []}, "empty"),
        ({"rate": [0.1], "decay": [0.0], "seeds": 0}, "seeds=0"),
    ],
)
def test_vectorize_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        pd.vectorize(lambda rate, decay: pd.Trainer(pd.supervised(linear()), optax.sgd(rate)), **settings)


def test_settings_are_checked_before_anything_is_compiled():
    make = lambda weight: pd.Trainer(pd.ewc(pd.supervised(linear()), weight), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"weight=-1\.0"):
        pd.vectorize(make, weight=[1.0, -1.0])


def test_trainer_refuses_no_microbatches():
    with pytest.raises(ValueError, match="microbatches=0"):
        pd.Trainer(pd.supervised(linear()), optax.sgd(0.1), microbatches=0)


def test_many_runs_read_one_stream():
    records = [{"x": x, "y": y} for x, y in zip(BATCH["x"], BATCH["y"], strict=True)]
    stream = data.stream(records, 4)
    many = pd.vectorize(lambda: pd.Trainer(pd.supervised(linear()), optax.sgd(0.1)), seeds=2)
    one = pd.Trainer(pd.supervised(linear()), optax.sgd(0.1))
    part = jax.tree.map(lambda leaf: leaf[:4], BATCH)
    root = jax.random.key(5)
    together, alone = many.init(root, part), one.init(jax.random.fold_in(root, 1), part)
    for _ in range(2):
        (together, _), (alone, _) = many.scan(together, stream, 2), one.scan(alone, stream, 2)
    close(jax.tree.map(lambda leaf: leaf[1], together.params), alone.params)


def test_evaluation_holds_every_query_of_an_episode():
    trainer = pd.Trainer(pd.maml(pd.supervised(linear()), optax.sgd(0.1)), optax.sgd(0.1))
    episodes = jax.tree.map(lambda leaf: leaf[:5], batch_for(("maml", "supervised")))
    state = trainer.init(0, episodes)
    found = evaluate(trainer, state, episodes, lambda outputs, split: {"logits": outputs["logits"]}, batch_size=8)
    np.testing.assert_allclose(found["logits"], trainer.predict(state, episodes)["logits"], rtol=1e-5, atol=1e-6)


def test_weights_of_tokens_and_of_other_shapes():
    rng = np.random.default_rng(0)
    x, y, weight = rng.random((4, 5, 6), np.float32), rng.integers(0, 3, (4, 5)), rng.random((4, 5)).astype(np.float32)
    child = pd.supervised(pd.from_functions(lambda key, x: {"w": jax.random.normal(key, (6, 3))}, lambda p, x: x @ p["w"]))
    params, state = child.init(jax.random.key(0), {"x": x, "y": y})
    logits = x @ np.asarray(params["model"]["w"])
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, y[..., None], -1)[..., 0]
    value, _ = child.losses(params, state, {"x": x, "y": y, "weight": weight}, pd.context(train=True))
    np.testing.assert_allclose(value["supervised"], (weight * losses).sum() / weight.sum(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 1\)"):
        child.losses(params, state, {"x": x, "y": y, "weight": weight[:, :1]}, pd.context(train=True))


def test_labels_of_every_task_are_checked():
    episodes = jax.tree.map(np.copy, batch_for(("maml", "supervised")))
    episodes["support"]["y"][3, 1] = 99
    with pytest.raises(ValueError, match="labels from 0 to 99"):
        pd.Trainer(pd.maml(pd.supervised(linear()), optax.sgd(0.1)), optax.sgd(0.1)).init(0, episodes)
