"""Every network: documented sizes, shapes and dtypes, what training may change, what it may see."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paradigms.nn as nn

IMAGE, COLOUR = (
    jnp.linspace(0, 1, 2 * 28 * 28).reshape(2, 28, 28, 1),
    jnp.linspace(0, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3),
)
TOKENS = jnp.arange(14).reshape(2, 7) % 11
DEFAULTS = [nn.MLP, nn.SmallCNN, nn.LeNet, nn.WongCNN, nn.TradesCNN, nn.MadryCNN, nn.Conv4, nn.ResNet, nn.PreActResNet]
DEFAULTS += [nn.WideResNet, nn.Transformer, nn.TokenRNN, nn.RowRNN]
# name: (factory of a small one, a batch, shape of features, shape of logits)
SMALL = {
    "mlp": (lambda **k: nn.MLP(64, (16, 8), norm=nn.batch_norm, **k), IMAGE[:, :8, :8], (2, 8), (2, 10)),
    "small_cnn": (lambda **k: nn.SmallCNN(channels=(4, 8), hidden=16, **k), IMAGE, (2, 16), (2, 10)),
    "lenet": (nn.LeNet, IMAGE, (2, 84), (2, 10)),
    "wong": (nn.WongCNN, IMAGE, (2, 100), (2, 10)),
    "trades": (nn.TradesCNN, IMAGE, (2, 200), (2, 10)),
    "madry": (lambda **k: nn.MadryCNN((8, 8, 1), **k), IMAGE[:, :8, :8], (2, 1024), (2, 10)),
    "conv4": (lambda **k: nn.Conv4(channels=8, **k), IMAGE, (2, 8), (2, 5)),
    "conv4_pool": (lambda **k: nn.Conv4(channels=8, pool=True, norm=nn.group_norm, **k), IMAGE, (2, 8), (2, 5)),
    "resnet18": (lambda **k: nn.ResNet(width=4, **k), COLOUR, (2, 32), (2, 10)),
    "resnet50": (
        lambda **k: nn.ResNet(50, width=4, stem="imagenet", **k),
        jnp.tile(COLOUR, (1, 4, 4, 1)),
        (2, 128),
        (2, 10),
    ),
    "preact": (lambda **k: nn.PreActResNet(width=4, **k), COLOUR, (2, 32), (2, 10)),
    "wide": (lambda **k: nn.WideResNet(10, 1, dropout=0.1, **k), COLOUR, (2, 64), (2, 10)),
    "causal": (lambda **k: nn.Transformer(11, 7, layers=2, heads=2, width=8, **k), TOKENS, (2, 7, 8), (2, 7, 11)),
    "masked": (lambda **k: nn.Transformer(11, 9, 3, heads=2, width=8, causal=False, **k), TOKENS, (2, 7, 8), (2, 7, 3)),
    "lstm": (lambda **k: nn.TokenRNN(11, hidden=8, **k), TOKENS, (2, 7, 8), (2, 7, 11)),
    "gru": (lambda **k: nn.TokenRNN(11, hidden=8, cell=nnx.GRUCell, layers=1, **k), TOKENS, (2, 7, 8), (2, 7, 11)),
    "rows": (lambda **k: nn.RowRNN(hidden=8, **k), IMAGE, (2, 8), (2, 10)),
    "rows_lstm": (lambda **k: nn.RowRNN(hidden=8, cell=nnx.LSTMCell, **k), IMAGE, (2, 8), (2, 10)),
}
DEEP = ["resnet50", "wide", "resnet18", "preact"]  # slow to compile: one dtype each
WITH_STATE = {"mlp", "small_cnn", "resnet18", "resnet50", "preact", "wide"}


def pure(factory):
    """A network as two functions over dicts of arrays."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: factory(rngs=nnx.Rngs(0))))

    def init(key):
        _, params, state = nnx.split(factory(rngs=nnx.Rngs(params=key)), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(params, state, x, train, key=None):
        module = nnx.merge(graph, params, state)
        module.train() if train else module.eval()
        out = module(x, rngs=None if key is None else nnx.Rngs(dropout=key))
        return out, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))

    return init, jax.jit(apply, static_argnums=3)


def made_up(shapes):
    """Small positive values for a tree of shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0, 0.1, leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("network", DEFAULTS, ids=lambda f: f.__name__)
def test_parameter_counts_of_the_docstrings(network):
    def count(**options):
        module = nnx.eval_shape(lambda: network(rngs=nnx.Rngs(0), **options))
        return nn.count_parameters(nnx.to_pure_dict(nnx.state(module, nnx.Param)))

    documented = re.search(r"Parameters by default: ([\d,]+)", network.__doc__).group(1)
    assert count() == int(documented.replace(",", ""))
    if network is nn.ResNet:
        words = " ".join(network.__doc__.split())
        sizes = re.search(r"classes=1000``: ([\d,]+) at depth 18 and ([\d,]+) at 50", words).groups()
        sizes = [int(size.replace(",", "")) for size in sizes]
        assert [count(depth=depth, stem="imagenet", classes=1000) for depth in (18, 50)] == sizes


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.bfloat16) for name in SMALL if name not in DEEP[:2]] + [(name, None) for name in SMALL if name not in DEEP[2:]],
)
def test_shapes_dtypes_and_state(name, dtype):
    factory, x, features, logits = SMALL[name]
    init, apply = pure(lambda rngs: factory(dtype=dtype, rngs=rngs))
    # random numbers are compiled for every shape of kernel by itself: longer than the networks take otherwise
    params, state = made_up(jax.eval_shape(init, jax.random.key(0)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, state)))  # so no keys either
    assert bool(state) == (name in WITH_STATE)
    still, same = apply(params, state, x, False)
    moved, new = apply(params, state, x, True, jax.random.key(1))
    for out in (still, moved):
        assert out["features"].shape == features
        assert out["logits"].shape == logits
        assert all(value.dtype == jnp.float32 and bool(jnp.isfinite(value).all()) for value in out.values())
    jax.tree.map(np.testing.assert_array_equal, state, same)
    assert jax.tree.structure(state) == jax.tree.structure(new)
    changed = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)]
    assert all(changed)
    assert all("mean" in path or "var" in path for path in map(jax.tree_util.keystr, dict(jax.tree.leaves_with_path(state))))


@pytest.mark.parametrize("name", ["small_cnn", "conv4", "causal", "wide"])
def test_vmap_over_weights_equals_one_by_one(name):
    factory, x, *_ = SMALL[name]
    init, apply = pure(factory)
    each = [init(key) for key in jax.random.split(jax.random.key(0), 3)]
    params, state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def loss(params, state, x):
        out, _ = apply(params, state, x, True, jax.random.key(1))
        return jnp.mean(jnp.sin(out["logits"]))

    together = jax.jit(jax.vmap(jax.grad(loss), (0, 0, None)))(params, state, x)
    alone = jax.jit(jax.grad(loss))(*jax.tree.map(lambda leaf: leaf[1], (params, state)), x)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
def test_the_weights_of_an_mlp_begin_as_asked(given):
    options = {"kernel_init": nnx.initializers.glorot_uniform()} if given else {}
    module = nn.MLP(300, (200, 100), 50, rngs=nnx.Rngs(0), **options)
    layers = [module.encoder.linear1, module.encoder.linear2, module.head]
    for layer, (fan_in, fan_out) in zip(layers, [(300, 200), (200, 100), (100, 50)], strict=True):
        variance = 2 / (fan_in + fan_out) if given else (1 if fan_out == 50 else 2) / fan_in
        kernel = np.asarray(layer.kernel[...])
        np.testing.assert_allclose(kernel.var(), variance, rtol=0.1)
        assert not np.asarray(layer.bias[...]).any()


def test_without_a_head_and_uint8_images():
    init, apply = pure(lambda rngs: nn.SmallCNN(classes=0, channels=(4, 8), mean=(0.3,), std=(0.4,), rngs=rngs))
    params, state = init(jax.random.key(0))
    assert set(params) == {"encoder"}
    images = jnp.arange(2 * 28 * 28, dtype=jnp.uint8).reshape(2, 28, 28, 1)
    byte, _ = apply(params, state, images, False)
    unit, _ = apply(params, state, images.astype(jnp.float32) / 255, False)
    assert set(byte) == {"features"}
    np.testing.assert_allclose(byte["features"], unit["features"], rtol=1e-4, atol=1e-6)


def test_normalize_is_in_pixel_units():
    x = jnp.linspace(0, 1, 24).reshape(2, 2, 2, 3)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    np.testing.assert_allclose(nn.Normalize(mean, std)(x), (np.asarray(x) - mean) / std, rtol=1e-5)


@pytest.mark.parametrize("name", ["causal", "lstm", "gru", "masked"])
def test_who_sees_the_future(name):
    factory, x, *_ = SMALL[name]
    init, apply = pure(factory)
    params, state = init(jax.random.key(0))
    before, _ = apply(params, state, x, False)
    after, _ = apply(params, state, x.at[:, 4].set(10), False)
    same = np.isclose(before["features"], after["features"], atol=1e-6).all((0, 2))
    assert not same[4:].all()
    assert same[:4].all() == (name != "masked")


@pytest.mark.parametrize(
    "factory",
    [
        lambda rngs: nn.MLP(64, (32,), dropout=0.5, rngs=rngs),
        lambda rngs: nn.RowRNN((8, 8, 1), hidden=16, dropout=0.5, rngs=rngs),
        lambda rngs: nn.SmallCNN((8, 8, 1), channels=(4, 4), hidden=16, dropout=0.5, rngs=rngs),
    ],
)
def test_dropout_masks_differ_between_mapped_keys(factory):
    init, apply = pure(factory)
    params, state = init(jax.random.key(0))
    x, keys = IMAGE[:, :8, :8], jax.random.split(jax.random.key(1), 3)
    out = jax.vmap(lambda key: apply(params, state, x, True, key)[0]["features"])(keys)
    assert bool((out[0] != out[1]).any())
    assert bool((out[1] != out[2]).any())
    again = apply(params, state, x, True, keys[0])[0]["features"]
    np.testing.assert_allclose(out[0], again, rtol=1e-5, atol=1e-6)


def test_max_pool_equals_reduce_window_in_two_orders():
    x = jax.random.normal(jax.random.key(0), (2, 7, 9, 3))

    def orders(pool):
        first = jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))
        second = jax.grad(lambda x: jnp.sum(jnp.cos(first(x))))
        return [f(x) for f in (pool, first, second)]

    for a, b in zip(orders(nn.max_pool), orders(lambda x: nnx.max_pool(x, (2, 2), (2, 2))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_current_batch_norm_is_batch_norm_without_state():
    x = jax.random.normal(jax.random.key(0), (4, 3, 3, 2)) * 3 + 1
    ours = nn.CurrentBatchNorm(2)(x)
    theirs = nn.batch_norm(2, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("network", [nn.MLP, nn.SmallCNN, nn.TradesCNN, nn.WideResNet, nn.Transformer, nn.TokenRNN, nn.RowRNN])
def test_dropout_is_in_0_to_1(network, rate):
    with pytest.raises(ValueError, match=f"dropout={rate}"):
        nnx.eval_shape(lambda: network(dropout=rate, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.bool_])
def test_images_are_floats_or_uint8(dtype):
    with pytest.raises(ValueError, match=f"x is {jnp.dtype(dtype)}"):
        jax.eval_shape(nn.Normalize(0.5, 0.5), jax.ShapeDtypeStruct((2, 8, 8, 1), dtype))


@pytest.mark.parametrize(
    ("network", "expected"),
    [(f, "image=(28, 28, 1)") for f in (nn.SmallCNN, nn.LeNet, nn.WongCNN, nn.TradesCNN, nn.MadryCNN, nn.RowRNN)]
    + [(lambda rngs: nn.Conv4(pool=True, rngs=rngs), "image=(28, 28, 1)"), (nn.MLP, "784 values")],
)
def test_images_of_another_size_are_named(network, expected):
    def call(x):
        return network(rngs=nnx.Rngs(0))(x, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=re.escape("x of shape (2, 32, 32, 1)") + ".*" + re.escape(expected)):
        nnx.eval_shape(call, jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda rngs: nn.ResNet(19, rngs=rngs), "depth=19"),
        (lambda rngs: nn.ResNet(stem="tiny", rngs=rngs), "stem='tiny'"),
        (lambda rngs: nn.PreActResNet(50, rngs=rngs), "depth=50"),
        (lambda rngs: nn.WideResNet(20, rngs=rngs), "depth=20"),
        (lambda rngs: nn.Transformer(width=10, heads=4, rngs=rngs), "heads=4"),
        (lambda rngs: nn.TokenRNN(cell=nnx.Linear, rngs=rngs), "cell="),
        (lambda rngs: nn.MLP(hidden=(), rngs=rngs), "hidden="),
        (lambda rngs: nn.MLP(classes=-1, rngs=rngs), "classes=-1"),
        (lambda rngs: nn.LeNet((8, 8, 1), rngs=rngs), "image="),
        (lambda rngs: nn.Normalize(0.0, 0.0), "std=0.0"),
        (lambda rngs: nn.group_norm(10, rngs=rngs), "groups=8"),
        (lambda rngs: nn.RowRNN((28, 28), rngs=rngs), "must be \\(height, width, channels\\)"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(nnx.Rngs(0)))
