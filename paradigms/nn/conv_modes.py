"""How each mode of `paradigms.nn.conv2d`'s primitive is computed: by JAX's own convolution, or on a CPU by what is fastest."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

NHWC = ("NHWC", "HWIO", "NHWC")

# The axes of each mode's two operands and of its result; p, q are the output's positions, i, j the kernel's.
AXES = {
    "output": ("nhwc", "ijco", "npqo"),
    "input": ("npqo", "ijco", "nhwc"),
    "kernel": ("nhwc", "npqo", "ijco"),
}


def output_positions(size, window, stride, padding, dilation):
    """Output positions along each spatial axis."""
    spans = zip(size, window, stride, padding, dilation, strict=True)
    return tuple((n + low + high - (k - 1) * d - 1) // s + 1 for n, k, s, (low, high), d in spans)


def reference(a, b, *, mode, tasks, size, window, stride, padding, dilation, precision):
    """What JAX itself would compute: ``lax.conv_general_dilated``, its transposes, and ``vmap`` over tasks."""

    def convolve(x, w):
        return lax.conv_general_dilated(
            x, w, stride, padding, rhs_dilation=dilation, dimension_numbers=NHWC, precision=precision
        )

    def single(a, b):
        if mode == "output":
            return convolve(a, b)
        if mode == "input":
            x = jax.ShapeDtypeStruct((a.shape[0], *size, b.shape[2]), a.dtype)
            return jax.linear_transpose(lambda x: convolve(x, b), x)(a)[0]
        w = jax.ShapeDtypeStruct((*window, a.shape[3], b.shape[3]), a.dtype)
        return jax.linear_transpose(lambda w: convolve(a, w), w)(b)[0]

    return jax.vmap(single)(a, b) if tasks else single(a, b)


def _plain(a, b, *, mode, size, window, stride, padding, dilation, precision):
    """ "output", or "input" with stride 1, as a convolution in the plain order of axes."""
    pads = padding
    if mode == "input":  # the kernel turned round, its input and output channels exchanged
        lows = [d * (k - 1) - low for k, d, (low, _) in zip(window, dilation, padding, strict=True)]
        spans = zip(size, a.shape[1:3], window, dilation, lows, strict=True)
        pads = [(low, n - p + d * (k - 1) - low) for n, p, k, d, low in spans]
        b = jnp.flip(b, (0, 1)).transpose(0, 1, 3, 2)
    if any(pad < 0 for pair in pads for pad in pair):  # the fast form can pad but not crop
        crop = [(min(low, 0), min(high, 0), 0) for low, high in pads]
        a = lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *crop, (0, 0, 0)])
        pads = [(max(low, 0), max(high, 0)) for low, high in pads]
    return lax.conv_general_dilated(a, b, stride, pads, rhs_dilation=dilation, dimension_numbers=NHWC, precision=precision)


def _patches(x, *, size, window, stride, padding, dilation):
    """(T, N, H, W, C) to (T, N*P*Q, h*w*C): what each output position sees, as shifted slices side by side."""
    tasks, examples, _, _, channels = x.shape
    rows, columns = output_positions(size, window, stride, padding, dilation)
    pads = [(0, 0, 0), (0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), pads)
    slices = []
    for i in range(window[0]):
        for j in range(window[1]):
            top, left = i * dilation[0], j * dilation[1]
            bottom, right = top + (rows - 1) * stride[0] + 1, left + (columns - 1) * stride[1] + 1
            slices.append(x[:, :, top : bottom : stride[0], left : right : stride[1]])
    return jnp.concatenate(slices, axis=-1).reshape(tasks, examples * rows * columns, len(slices) * channels)


def _matmul(a, b, *, mode, precision, **geometry):
    """Every mode, with a task axis, as patches and one batched matrix product."""
    window, positions = geometry["window"], output_positions(**geometry)
    patches = functools.partial(_patches, **geometry)
    if mode == "output":
        w = b.reshape(b.shape[0], -1, b.shape[4])
        out = jnp.einsum("tmk,tko->tmo", patches(a), w, precision=precision)
        return out.reshape(*a.shape[:2], *positions, b.shape[4])
    if mode == "kernel":
        g = b.reshape(b.shape[0], -1, b.shape[4])
        out = jnp.einsum("tmk,tmo->tko", patches(a), g, precision=precision)
        return out.reshape(a.shape[0], *window, a.shape[4], b.shape[4])
    g, w = a.reshape(a.shape[0], -1, a.shape[4]), b.reshape(b.shape[0], -1, b.shape[4])
    seen = jnp.einsum("tmo,tko->tmk", g, w, precision=precision)
    x = jax.ShapeDtypeStruct((*a.shape[:2], *geometry["size"], b.shape[3]), a.dtype)
    return jax.linear_transpose(patches, x)(seen)[0]


# Patches are written and read again, so they pay while they stay in the cache (measured: 2**17 to 2**20 are alike).
_CACHE = 2**18


def _chunked(a, b, *, mode, **params):
    """ "input" or "kernel" without a task axis, over groups of examples whose patches stay in the cache."""
    examples, channels = a.shape[0], b.shape[2] if mode == "input" else a.shape[3]
    geometry = {name: value for name, value in params.items() if name != "precision"}
    each = math.prod(output_positions(**geometry)) * math.prod(params["window"]) * channels
    groups = -(-examples // max(1, _CACHE // each))
    if groups == 1:
        return _matmul(a[None], b[None], mode=mode, **params)[0]
    rest = -examples % groups

    def split(array):  # groups on the second axis: the first one, perhaps sharded over devices, stays where it is
        if rest:
            array = lax.pad(array, jnp.zeros((), array.dtype), [(0, rest, 0), *[(0, 0, 0)] * 3])
        return array.reshape(-1, groups, *array.shape[1:])

    def group(array, index):
        return lax.dynamic_index_in_dim(array, index, 1, keepdims=False)[None]

    a = split(a)
    if mode == "input":
        out = lax.map(lambda i: _matmul(group(a, i), b[None], mode=mode, **params)[0], jnp.arange(groups))
        return jnp.swapaxes(out, 0, 1).reshape(-1, *out.shape[2:])[:examples]
    b = split(b)

    def add(total, index):
        return total + _matmul(group(a, index), group(b, index), mode=mode, **params)[0], None

    wide = jnp.promote_types(a.dtype, jnp.float32)  # many small sums: bfloat16 would lose them
    zero = jnp.zeros((*params["window"], channels, b.shape[-1]), wide)
    return lax.scan(add, zero, jnp.arange(groups))[0].astype(a.dtype)


def cpu(a, b, *, mode, tasks, **params):
    """The fastest of the above, by measurement: shapes of small and CIFAR-sized networks, 2 cores."""
    symbolic = not all(isinstance(size, int) for size in (*a.shape, *b.shape))  # of `jax.export`: no size to choose by
    if tasks:
        images, positions = a.shape[:2], output_positions(**{k: v for k, v in params.items() if k != "precision"})
        channels = b.shape[3] if mode == "input" else a.shape[4]
        if not symbolic and math.prod((*images, *positions, *params["window"], channels)) <= 8 * _CACHE:
            return _matmul(a, b, mode=mode, **params)
        return lax.map(lambda pair: cpu(*pair, mode=mode, tasks=False, **params), (a, b))
    if symbolic:
        return reference(a, b, mode=mode, tasks=False, **params)
    if mode == "kernel" or (mode == "input" and params["stride"] != (1, 1)):
        return _chunked(a, b, mode=mode, **params)
    return _plain(a, b, mode=mode, **params)
