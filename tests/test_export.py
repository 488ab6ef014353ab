"""Saved models: what is loaded answers as the trainer did, with jax alone too; what is damaged or foreign is refused."""

import hashlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import paradigms as pd
from paradigms import data, nn

DIGITS = data.load("digits")
X = DIGITS.test["x"][:50]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def mlp(rngs, **options):
    return nn.MLP(64, (16,), 10, dropout=0.1, mean=DIGITS.mean, std=DIGITS.std, rngs=rngs, **options)


def small(model, examples=DIGITS.train):
    """A trainer of `model` and its first state."""
    trainer = pd.Trainer(pd.supervised(model), optax.sgd(0.1))
    return trainer, trainer.init(0, jax.tree.map(lambda leaf: jnp.asarray(leaf[:8]), examples))


@pytest.fixture(scope="module")
def trained():
    """Two seeds with averaged weights, batch statistics and a memory of training examples, and their states."""
    model = pd.from_nnx(lambda rngs: mlp(rngs, norm=nn.batch_norm))
    objective = pd.averaged(pd.rehearsal(pd.supervised(model), pd.reservoir(50)), 0.9)
    trainer = pd.vectorize(lambda: pd.Trainer(objective, optax.adam(1e-2)), seeds=2)
    source = data.resident(DIGITS.train, 64)
    state, _ = trainer.scan(trainer.init(0, source.batch(jax.random.key(0), 0)), source, 30)
    return trainer, state


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    """The folder of a run that saved the second of its seeds."""
    folder = tmp_path_factory.mktemp("run")
    trainer, state = trained
    pd.save_model(folder, trainer, state, DIGITS.test["x"], classes=DIGITS.class_names, run=1)
    return folder


@pytest.fixture(scope="module")
def network(saved):
    return pd.load_run(saved)


def test_a_loaded_network_answers_as_the_trainer_did(trained, network):
    trainer, state = trained
    expected = jax.device_get(trainer.predict(state, {"x": data.pixels(jnp.asarray(X))}))
    for x in (X, X / 255, (X / 255).astype(np.float16)):
        found = network.predict(x)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(found["logits"], expected["logits"][1], atol=2e-2 if x.dtype == np.float16 else 1e-5)
    assert np.abs(expected["logits"][0] - expected["logits"][1]).max() > 0.1  # the other seed is another network
    for size in (1, 50, 20):  # one by one, at once, and in parts of which the last is smaller
        close(network.predict(X, batch_size=size)["logits"], expected["logits"][1])
    assert network.predict(X[:1])["features"].shape == (1, 16)
    assert network.classes == tuple("0123456789")
    assert (network.shape, network.dtype, network.pixels) == ((8, 8, 1), np.float32, True)


def test_normalisation_weights_and_statistics_are_those_of_the_formula(network):
    """The network by hand, in float64 NumPy, from the weights that were loaded."""
    average, statistics = network.weights["state"]["average"]["model"], network.weights["state"]["model"]["encoder"]["norm1"]
    linear, norm, head = average["encoder"]["linear1"], average["encoder"]["norm1"], average["head"]
    x = ((X / 255 - DIGITS.mean[0]) / DIGITS.std[0]).reshape(len(X), -1) @ linear["kernel"].astype(float) + linear["bias"]
    x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(network.predict(X)["logits"], np.maximum(x, 0) @ head["kernel"] + head["bias"], atol=1e-4)


def test_weights_are_whole_networks_without_what_predict_does_not_read(trained, network):
    _, state = trained
    assert network.weights["state"].keys() == {"average", "model"}  # and no memory: no training example is written
    jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours, theirs[1]), network.weights["params"], state.params)
    fresh = pd.Trainer(pd.supervised(pd.from_nnx(lambda rngs: mlp(rngs, norm=nn.batch_norm))), optax.sgd(0.1))
    start = fresh.init(0, {"x": X / np.float32(255), "y": DIGITS.test["y"][:50]})
    begun = start._replace(params=network.weights["params"])
    assert jax.tree.structure(begun) == jax.tree.structure(start)  # what training goes on from


NETWORKS = {
    "cnn": (lambda rngs: nn.SmallCNN((8, 8, 1), rngs=rngs), X),
    "rows": (lambda rngs: nn.RowRNN((8, 8, 1), hidden=8, rngs=rngs), X),
    "tokens": (lambda rngs: nn.Transformer(17, 8, layers=1, heads=2, width=8, rngs=rngs), X[:, :, 0, 0].astype(np.int32) // 16),
    "bfloat16": (lambda rngs: nn.MLP(8, (4,), dtype=jnp.bfloat16, rngs=rngs), X[:, :, 0, 0] / 255),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_bundled_networks_for_any_number_of_rows_and_every_platform(name, tmp_path):
    factory, x = NETWORKS[name]
    y = x if x.dtype == np.int32 else DIGITS.test["y"][:50]
    trainer, state = small(pd.from_nnx(factory), {"x": data.pixels(jnp.asarray(x)), "y": y})
    home = pd.save_model(tmp_path, trainer, state, x)
    assert export.deserialize(bytearray((home / "predict.bin").read_bytes())).platforms == ("cpu", "cuda", "tpu")
    loaded, expected = pd.load_run(tmp_path), trainer.predict(state, {"x": data.pixels(jnp.asarray(x))})
    close(loaded.predict(x)["logits"], expected["logits"])
    close(loaded.predict(x[:3])["logits"], expected["logits"][:3])
    assert loaded.classes == ()


def test_weights_of_types_that_numpy_cannot_store(tmp_path):
    def init(key, x):
        del x
        return {"w": jax.random.normal(key, (64, 10), jnp.bfloat16), "scale": jnp.asarray(2, jnp.bfloat16)}

    def apply(params, x):
        return params["scale"] * (x.reshape(x.shape[0], -1).astype(jnp.bfloat16) @ params["w"])

    trainer, state = small(pd.from_functions(init, apply), {**DIGITS.train, "x": DIGITS.train["x"] / np.float32(255)})
    pd.save_model(tmp_path, trainer, state, X)
    loaded = pd.load_run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.weights["params"], jax.device_get(state.params))
    assert loaded.weights["params"]["model"]["scale"].dtype == jnp.bfloat16
    assert loaded.predict(X)["logits"].dtype == jnp.bfloat16


def test_a_network_for_one_number_of_rows_alone_is_said(tmp_path):
    model = pd.from_functions(lambda key, x: {"w": jnp.ones((64, 10))}, lambda p, x: x.reshape(len(x), -1) @ p["w"])
    trainer, state = small(model)
    with pytest.raises(ValueError, match=r"write x.shape\[0\] for len\(x\)"):
        pd.save_model(tmp_path, trainer, state, X)


def test_an_objective_that_adapts_is_saved_with_what_it_adapts_to(tmp_path):
    """MAML answers for the support set it is given; its convolutions see per-task weights."""

    def init(key, x):
        return {"kernel": jax.random.normal(key, (3, 3, 1, 3))}

    def apply(params, x):
        return nn.conv2d(x, params["kernel"], dimension_numbers=("NHWC", "HWIO", "NHWC")).mean((1, 2))

    objective = pd.maml(pd.supervised(pd.from_functions(init, apply)), optax.sgd(0.1))
    trainer = pd.Trainer(objective, optax.sgd(0.1))
    episodes = data.episodes(DIGITS.train, ways=3, shots=2, queries=2, tasks=2).batch(jax.random.key(0), 0)
    state = trainer.init(0, episodes)
    support = jax.device_get(jax.tree.map(lambda leaf: leaf[:1], episodes["support"]))
    with pytest.raises(ValueError, match="needs 'support' besides x; pass batch="):
        pd.save_model(tmp_path, trainer, state, X)
    episode = lambda x: {"support": support, "query": {"x": x[None]}}
    pd.save_model(tmp_path, trainer, state, X, classes="abc", batch=episode)
    expected = trainer.predict(state, episode(data.pixels(jnp.asarray(X))))
    close(pd.load_run(tmp_path).predict(X)["logits"], expected["logits"])


def test_an_artefact_predicts_with_jax_alone(saved, network, tmp_path):
    (tmp_path / "model.jax").write_bytes(pd.artefact(saved))
    np.save(tmp_path / "x.npy", X / np.float32(255))
    code = """if True:
        import sys
        for name in ("paradigms", "flax", "optax", "orbax"):
            sys.modules[name] = None  # importing it is an error
        import jax, numpy as np
        from jax import export
        network = export.deserialize(bytearray(open("model.jax", "rb").read()))
        x = np.load("x.npy")
        parts = [jax.jit(network.call)(part)["logits"] for part in (x[:7], x[7:])]
        np.save("logits.npy", np.concatenate(parts))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    close(np.load(tmp_path / "logits.npy"), network.predict(X)["logits"])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], "has shape"),
        (X[:0], "n at least 1"),
        (X * 1.0, "divide by 255"),
        (X.astype(np.int64), "is int64"),
        (np.where(X > 250, np.nan, X / 255), "not finite in"),
        (np.full((2, 8, 8, 1), 1e300), "not finite in 2 rows"),
        (np.full((1, 8, 8, 1), "a"), "no array of numbers"),
        (None, "no array of numbers"),
    ],
    ids=str,
)
def test_what_is_no_input_of_the_network_is_said(network, x, message):
    with pytest.raises(ValueError, match=f"^x: .*{message}"):
        network.predict(x)


def test_tokens_and_tables_are_not_pixels(tmp_path):
    table = X.reshape(len(X), -1) / np.float32(255)
    trainer, state = small(pd.from_nnx(lambda rngs: nn.MLP(64, (4,), rngs=rngs)), {"x": table, "y": DIGITS.test["y"][:50]})
    pd.save_model(tmp_path, trainer, state, table)
    loaded = pd.load_run(tmp_path)
    with pytest.raises(ValueError, match="uint8, which is for pixels"):
        loaded.predict(X.reshape(len(X), -1))
    close(loaded.predict(np.ones((2, 64), int))["logits"], loaded.predict(np.ones((2, 64)))["logits"])
    loaded.predict(table * 100)  # no pixels, so no range of theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": 2}, "run=2: the trainer has 2"),
        ({"run": -1}, "run=-1"),
        ({"classes": ["a", "b"]}, "2 names, but the network has 10 logits"),
        ({"batch": lambda x: {"x": x[:1]}}, "not one row an example"),
    ],
)
def test_what_cannot_be_saved(trained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pd.save_model(tmp_path, *trained, X, **options)
    assert not list(tmp_path.iterdir())


def seal(home, name, content):
    """Puts `content` in place of a file of a model, under a checksum that fits."""
    (home / name).write_bytes(content)
    facts = json.loads((home / "model.json").read_text())
    facts["sha256"][name] = hashlib.sha256(content).hexdigest()
    (home / "model.json").write_text(json.dumps(facts))


def describe(home, **changes):
    (home / "model.json").write_text(json.dumps(json.loads((home / "model.json").read_text()) | changes))


class Harm:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return open, ("harm", "w")


def pickled(home):
    packed = io.BytesIO()
    names = [entry["path"] for entry in json.loads((home / "model.json").read_text())["weights"]]
    np.savez(packed, **{"/".join(path): np.array([Harm()], object) for path in names})
    assert b"open" in packed.getvalue()
    return packed.getvalue()


def calling_back(home):
    """The program with a call to a function that is not XLA's, as jax exports one when told to let it pass."""
    old = export.deserialize(bytearray((home / "predict.bin").read_bytes()))

    def call(leaves, x):
        x = jax.ffi.ffi_call("python_callback", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
        return {"logits": x.reshape(x.shape[0], -1)}

    *leaves, x = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in old.in_avals]
    let = [export.DisabledSafetyCheck.custom_call("python_callback")]
    return export.export(jax.jit(call, keep_unused=True), platforms=("cpu",), disabled_checks=let)(leaves, x).serialize()


DAMAGE = {
    "cut weights": (lambda home: (home / "weights.npz").write_bytes(b"PK"), "weights.npz does not have its checksum"),
    "no program": (lambda home: (home / "predict.bin").unlink(), "no file predict.bin"),
    "a folder": (lambda home: ((home / "predict.bin").unlink(), (home / "predict.bin").mkdir()), "no file predict.bin"),
    "no JSON": (lambda home: (home / "model.json").write_text("{"), "JSONDecodeError"),
    "a list": (lambda home: (home / "model.json").write_text("[]"), "TypeError"),
    "another format": (lambda home: describe(home, format=2), "format 2, this version reads 1"),
    "another shape": (lambda home: describe(home, shape=[28, 28, 1]), "does not describe"),
    "classes": (lambda home: describe(home, classes=[1]), "does not describe"),
    "no weights": (lambda home: describe(home, weights=[]), "takes other arrays"),
    "no program inside": (lambda home: seal(home, "predict.bin", b"no flatbuffer"), "no whole model"),
    "pickles": (lambda home: seal(home, "weights.npz", pickled(home)), "allow_pickle"),
    "a pickle": (lambda home: seal(home, "weights.npz", pickle.dumps(Harm())), "no whole model"),
    "callback": (lambda home: seal(home, "predict.bin", calling_back(home)), "only what XLA itself computes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_foreign_models_are_refused_in_one_line(saved, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "run")
    damage, message = DAMAGE[name]
    damage(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        pd.load_run("run")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("run/model: no whole model")
    assert not (tmp_path / "harm").exists()


def test_a_model_is_found_in_the_run_or_in_its_parts(saved, tmp_path):
    with pytest.raises(ValueError, match="holds no saved model"):
        pd.load_run(tmp_path / "nowhere")
    shutil.copytree(saved / "model", tmp_path / "run" / "cnn" / "model")
    assert pd.load_run(tmp_path / "run").classes
    shutil.copytree(saved / "model", tmp_path / "run" / "mlp" / "model")
    with pytest.raises(ValueError, match=r"None is none of those with a model; name one of \['cnn', 'mlp'\]"):
        pd.load_run(tmp_path / "run")
    assert pd.load_run(tmp_path / "run", "mlp").classes
    shutil.copytree(saved / "model", tmp_path / "model")
    with pytest.raises(ValueError, match=r"part '\.\./' is none"):
        pd.load_run(tmp_path / "run", "../")
