"""Gated networks against NumPy, what a gate lets through backwards, and what the parameters' names say of the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import paradigms as pd
from paradigms import nn
from paradigms.continual.gating import xdg
from paradigms.continual.masks import hidden, incoming
from tests.continual.streams import batch, forward, gradient, jittered, learner, network

KEY = jax.random.key(3)
PLAIN = pd.supervised(network())


def made(objective, task=0):
    params, state = objective.init(KEY, batch(task))
    return jittered(params), state


def test_predictions_are_those_of_masked_activations():
    objective = xdg(PLAIN, 2, 0.5)
    params, state = made(objective)
    gates = jax.tree.map(np.asarray, state["xdg"])
    assert {name: gate.sum(1).tolist() for name, gate in gates.items()} == {
        "encoder/linear1": [3, 3],
        "encoder/linear2": [2, 2],
    }
    assert any((gate[0] != gate[1]).any() for gate in gates.values()), "each task has gates of its own"
    predict = jax.jit(objective.predict)
    for task in range(2):
        rows = batch(task)
        expected = forward(params["model"], rows["x"], [gate[task] for gate in gates.values()])
        answer = predict(params, state, rows, pd.context())[0]["logits"]
        np.testing.assert_allclose(answer, expected, rtol=2e-5, atol=2e-6)


def test_gradients_pass_open_units_alone():
    objective = xdg(PLAIN, 2, 0.5)
    params, state = made(objective)
    _, grads = gradient(objective, params, state, batch(1), pd.context(train=True))
    for layer in ("linear1", "linear2"):
        is_open = np.asarray(state["xdg"][f"encoder/{layer}"][1])
        grad = grads["model"]["encoder"][layer]
        assert not np.any(np.asarray(grad["kernel"])[:, ~is_open])
        assert not np.any(np.asarray(grad["bias"])[~is_open])
        assert np.any(np.asarray(grad["kernel"])[:, is_open])
    closed = ~np.asarray(state["xdg"]["encoder/linear2"][1])
    assert not np.any(np.asarray(grads["model"]["head"]["kernel"])[closed]), "closed units are silent"


def test_no_gates_are_the_child(x64):
    params, state = made(PLAIN)
    objective = xdg(PLAIN, 2, 0.0)
    wrapped = made(objective)
    jax.tree.map(np.testing.assert_array_equal, wrapped[0], params)
    value, grads = gradient(PLAIN, params, state, batch(0), pd.context(train=True))
    other, other_grads = gradient(objective, *wrapped, batch(0), pd.context(train=True))
    np.testing.assert_allclose(value, other, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), grads, other_grads)


def test_with_normalisation_gates_come_behind_it():
    objective = xdg(pd.supervised(network(norm=nn.batch_norm)), 2, 0.5)
    params, state = made(objective)
    state["model"] = jittered(state["model"], scale=0.05)
    x, w, s = batch(0)["x"], *(jax.tree.map(np.asarray, tree["model"]["encoder"]) for tree in (params, state))
    for i in "12":
        z = x @ w["linear" + i]["kernel"] + w["linear" + i]["bias"]
        norm, moments = w["norm" + i], s["norm" + i]
        z = (z - moments["mean"]) / np.sqrt(moments["var"] + 1e-5) * norm["scale"] + norm["bias"]
        x = np.maximum(z, 0) * np.asarray(state["xdg"]["encoder/linear" + i][0])
    answer = objective.predict(params, state, batch(0), pd.context())[0]["features"]
    np.testing.assert_allclose(answer, x, rtol=1e-4, atol=1e-5)


class Maps(nnx.Module):
    """A convolution, whose maps are flattened, and a dense layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 3, (2, 2), rngs=rngs)
        self.dense = nnx.Linear(12, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        return self.head(nnx.relu(self.dense(x.reshape(len(x), -1))))


def test_flattened_maps_enter_a_dense_layer_by_channel():
    rows = {**batch(0), "x": np.random.default_rng(0).random((8, 2, 2, 1), np.float32), "y": np.arange(8, dtype=np.int32) % 2}
    objective = xdg(pd.supervised(pd.from_nnx(lambda rngs: Maps(rngs))), 1, 0.4)
    params, state = objective.init(KEY, rows)
    params["model"]["conv"]["bias"] += 5  # every open unit is active somewhere
    params["model"]["dense"]["bias"] += 5
    _, grads = gradient(objective, params, state, rows, pd.context(train=True))
    layers = hidden(params["model"])
    assert [layer.name for layer in layers] == ["conv", "dense"]
    silent = incoming(state["xdg"]["conv"][0], layers[1], params["model"]["dense"]["kernel"])[:, 0]
    assert silent.sum() == 8, "two channels of three are open, at four positions"
    read = np.any(np.asarray(grads["model"]["dense"]["kernel"]) != 0, 1)
    np.testing.assert_array_equal(read, silent)


def test_layers_are_found_in_the_order_of_their_numbers():
    many = {f"linear{i}": {"kernel": np.ones((2, 2)), "bias": np.ones(2)} for i in (10, 2, 1)}
    many["norm2"] = {"scale": np.ones(2), "bias": np.ones(2)}
    found = hidden({"encoder": many, "head": {"kernel": np.ones((2, 3))}})
    assert [layer.name for layer in found] == ["encoder/linear1", "encoder/linear2", "encoder/linear10"]
    assert found[1].gated == ("encoder/norm2/scale", "encoder/norm2/bias")
    assert found[0].gated == ("encoder/linear1/kernel", "encoder/linear1/bias")
    chosen = hidden({"encoder": many}, layers=(("encoder/linear10", "encoder/norm2"), "encoder/linear1"))
    assert [layer.name for layer in chosen] == ["encoder/linear10", "encoder/linear1"]
    assert chosen[0].gated == found[1].gated


def test_layers_that_cannot_be_gated_are_named():
    linear = {"kernel": np.ones((2, 2)), "bias": np.ones(2)}
    for model, layers, words in [
        ({"fc": linear, "table": {"embedding": np.ones((3, 2))}}, None, '"table/embedding" belongs to no layer'),
        ({"fc": linear, "norm1": {"scale": np.ones(2)}}, None, '"norm1/scale" belongs to no layer'),
        ({"w": np.ones((2, 2))}, None, "no hidden layers|belongs to no layer"),
        ({"head": linear}, None, "are no hidden layers"),
        ({"fc": linear}, ("dense",), '"dense" has no kernel'),
        ({"fc": linear, "norm": {"scale": np.ones(3), "bias": np.ones(3)}}, None, '"norm/scale" is not there with shape'),
    ]:
        with pytest.raises(ValueError, match=words):
            hidden(model, layers)


def test_settings_and_batches_that_do_not_say_their_task():
    for call, words in [
        (lambda: xdg(PLAIN, 2, 1.0), "share=1.0"),
        (lambda: xdg(PLAIN, 2, -0.1), "share=-0.1"),
        (lambda: xdg(PLAIN, 0, 0.5).init(KEY, batch(0)), "tasks=0"),
        (lambda: xdg(xdg(PLAIN, 2, 0.5), 2, 0.5).init(KEY, batch(0)), 'name="xdg2"'),
        (lambda: xdg(PLAIN, 2, 0.5).init(KEY, {**batch(0), "task": np.arange(8) % 2}), '"task" goes from 0 to 1'),
        (lambda: xdg(PLAIN, 2, 0.5).init(KEY, batch(2)), '"task" goes from 2 to 2'),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    objective = xdg(PLAIN, 2, 0.5)
    params, state = made(objective)
    unlabelled = {name: leaf for name, leaf in batch(0).items() if name != "task"}
    for call in (objective.losses, objective.predict):
        with pytest.raises(ValueError, match=r'has no leaf "task".*xdg asks for'):
            call(params, state, unlabelled, pd.context())
    with pytest.raises(ValueError, match='has no leaf "task"'):
        pd.Trainer(objective, optax.sgd(0.1)).init(0, unlabelled)


def test_one_unit_of_a_layer_stays_open_at_least():
    _, state = made(xdg(PLAIN, 2, 0.99))
    for is_open in state["xdg"].values():
        np.testing.assert_array_equal(is_open.sum(-1), 1)


def test_a_mixed_batch_does_not_go_unnoticed():
    objective = xdg(PLAIN, 2, 0.5)
    params, state = made(objective)
    predict = jax.jit(objective.predict)
    for labels in (np.arange(8) % 2, np.full(8, 2), np.full(8, -1)):
        answer = predict(params, state, {**batch(0), "task": labels.astype(np.int32)}, pd.context())[0]["logits"]
        assert np.isnan(answer).all()


def test_seeds_and_shares_are_an_axis_of_one_program():
    trainer = pd.vectorize(lambda share: pd.Trainer(xdg(learner(), 2, share), optax.adam(1e-2)), seeds=2, share=[0.0, 0.5])
    state = trainer.init(0, jax.tree.map(jnp.asarray, batch(0)))
    open_units = np.asarray(state.state["xdg"]["encoder/linear1"])
    np.testing.assert_array_equal(open_units.sum(-1), [[6, 6], [6, 6], [3, 3], [3, 3]])
    assert (open_units[2] != open_units[3]).any()
    state, metrics = trainer.step(state, batch(1))
    assert np.isfinite(metrics["loss"]).all()
    assert jnp.unique(metrics["loss"]).size == 4
