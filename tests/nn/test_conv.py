"""conv2d against lax.conv_general_dilated in float64: two orders of derivative, mapped, in scan, forward."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from paradigms.nn import conv2d, convolution

LAYOUT = ("NHWC", "HWIO", "NHWC")
GEOMETRIES = [  # strides, padding, kernel dilation
    ((1, 1), "SAME", (1, 1)),
    ((2, 2), "SAME", (1, 1)),
    ((2, 1), "VALID", (1, 2)),
    ((3, 2), ((0, 1), (1, 0)), (2, 1)),
    ((2, 2), ((4, 3), (2, 4)), (1, 1)),  # more padding than kernel: derivatives crop
]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", params=["whole", "chunked"])
def cache(request):
    """Small arrays take the direct ways; a cache of a few values makes them take the loops as well."""
    if request.param == "whole":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["paradigms.nn.conv_modes"], "_CACHE", 300)
        jax.clear_caches()
        yield
    jax.clear_caches()


def arrays(*lead):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(*lead, 3, 9, 8, 2))), jnp.asarray(rng.normal(size=(*lead, 3, 2, 2, 4)))


def functions(convolve, geometry):
    """The value, the gradients, the gradients of a function of the gradients, and jvp of grad, of one convolution."""
    strides, padding, dilation = geometry

    def value(x, w):
        return jnp.sum(jnp.sin(convolve(x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=LAYOUT)))

    gradient = jax.grad(value, (0, 1))
    second = jax.grad(lambda x, w: sum(jnp.sum(jnp.cos(g)) for g in gradient(x, w)), (0, 1))
    forward = lambda x, w: jax.jvp(gradient, (x, w), (jnp.cos(x), jnp.sin(w)))[1]
    return value, gradient, second, forward


def both(transform, geometry, *args):
    """All four functions of each convolution, transformed, in one program each."""
    for convolve in (conv2d, lax.conv_general_dilated):
        fs = functions(convolve, geometry)
        yield jax.jit(lambda *a, fs=fs: [transform(f)(*a) for f in fs])(*args)


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_two_orders_equal_lax(geometry, cache):
    assert_close(*both(lambda f: f, geometry, *arrays()))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["inputs", "kernels", "both"])
@pytest.mark.parametrize("geometry", GEOMETRIES[1:4:2])
def test_vmap_equals_lax(geometry, axes, cache):
    x, w = arrays(4)
    args = (x if axes[0] == 0 else x[0], w if axes[1] == 0 else w[0])
    assert_close(*both(lambda f: jax.vmap(f, axes), geometry, *args))


def test_gradient_through_vmap_and_nested_vmap():
    x, w = arrays(4)
    x = jnp.stack([x, 2 * x], 2)  # tasks, examples, (second mapped axis), ...

    def through(f):
        mapped = jax.vmap(jax.vmap(f, (1, None)), (0, 0))
        return jax.grad(lambda x, w: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(mapped(x, w))), (0, 1))

    assert_close(*both(through, GEOMETRIES[1], x, w))
    assert_close(*both(lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None)), GEOMETRIES[1], x[:, :, 0], w))


def test_maml_in_scan_equals_lax():
    """Second-order gradients of inner steps in a scan, mapped over tasks."""
    x, w = arrays(4)
    results = []
    for convolve in (conv2d, lax.conv_general_dilated):
        _, gradient, *_ = functions(convolve, GEOMETRIES[1])
        value = functions(convolve, GEOMETRIES[1])[0]

        def adapted(w, x, gradient=gradient, value=value):
            w, _ = lax.scan(lambda w, _: (w - 0.1 * gradient(x, w)[1], None), w, None, length=3)
            return value(x, w)

        results.append(jax.jit(jax.grad(lambda w, x, f=adapted: jax.vmap(f, (None, 0))(w, x).sum()))(w[0], x))
    assert_close(*results)


def test_eager_half_precision_and_fallbacks():
    x, w = arrays()
    np.testing.assert_allclose(
        conv2d(x, w, dimension_numbers=LAYOUT),
        lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT),
        atol=1e-12,
    )
    half = jax.grad(lambda w: conv2d(x.astype(jnp.bfloat16), w, dimension_numbers=LAYOUT).sum())(w.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    grouped = dict(dimension_numbers=LAYOUT, feature_group_count=2)
    np.testing.assert_array_equal(
        conv2d(x, w[:, :, :1], (1, 1), "SAME", **grouped),
        lax.conv_general_dilated(x, w[:, :, :1], (1, 1), "SAME", **grouped),
    )


def lowerings(module, x, w, g, shape):
    for mode, a, b in (("output", x, w), ("input", g, w), ("kernel", x, g)):
        yield (
            module.reference(a, b, mode=mode, tasks=True, **shape),
            module.reference(a[0], b[0], mode=mode, tasks=False, **shape),
            module.cpu(a, b, mode=mode, tasks=True, **shape),
        )


def test_the_reference_lowering_of_other_platforms():
    """What is lowered elsewhere than on CPU, computed here: the three modes, with and without a task axis."""
    module = sys.modules["paradigms.nn.conv_modes"]
    x, w = arrays(4)
    for strides, padding, dilation in GEOMETRIES:
        pads = padding
        if isinstance(padding, str):
            reach = tuple((k - 1) * d + 1 for k, d in zip((3, 2), dilation, strict=True))
            pads = tuple(lax.padtype_to_pads((9, 8), reach, strides, padding))
        shape = dict(size=(9, 8), window=(3, 2), stride=strides, padding=pads, dilation=dilation, precision=None)
        g = jnp.cos(jnp.ones((4, 3, *module.output_positions(**{k: v for k, v in shape.items() if k != "precision"}), 4)))
        results = jax.jit(lambda x, w, g, shape=shape: list(lowerings(module, x, w, g, shape)))(x, w, g)
        for theirs, one, ours in results:
            assert_close(theirs, ours)
            assert_close(one, ours[0])


def test_sharded_equals_unsharded():
    devices = jax.devices()
    x, w = jnp.ones((8, 6, 6, 2)) * jnp.arange(8.0)[:, None, None, None], arrays()[1]
    f = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(conv2d(x, w, dimension_numbers=LAYOUT)))))
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    assert_close(f(jax.device_put(w, jax.NamedSharding(mesh, jax.P())), sharded), f(w, x))


def test_channel_mismatch_says_so():
    x, w = arrays()
    with pytest.raises(ValueError, match="takes 2 channels"):
        conv2d(x[..., :1], w, dimension_numbers=LAYOUT)
    assert convolution.__doc__


def test_any_number_of_examples_in_an_exported_program():
    """The derivatives choose by size how they compute, and an exported program has none to choose by."""
    x, kernel = np.random.default_rng(0).normal(size=(5, 8, 8, 2)), np.random.default_rng(1).normal(size=(2, 3, 3, 2, 4))

    def derivatives(x, kernel):
        total = lambda x, w: (conv2d(x, w, (2, 2), dimension_numbers=LAYOUT) ** 2).sum()
        return jax.grad(total, (0, 1))(x, kernel[0]), jax.vmap(jax.grad(total, (0, 1)))(jnp.stack([x, 2 * x]), kernel)

    some = jax.ShapeDtypeStruct((*export.symbolic_shape("n"), 8, 8, 2), x.dtype)
    program = export.export(jax.jit(derivatives), platforms=("cpu", "cuda", "tpu"))(some, kernel)
    for found, expected in zip(jax.tree.leaves(program.call(x, kernel)), jax.tree.leaves(derivatives(x, kernel)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
