"""One two-dimensional convolution for every network: fast in loops, per-task weights and every order of derivative.

XLA's CPU backend turns a convolution into its fast form only where its axes are in the plain order (images NHWC,
kernels HWIO). The derivatives of ``lax.conv_general_dilated`` have theirs in another order, which the compiler
repairs in the entry computation of a program but not inside ``scan``, ``while`` or ``cond``: there they run as naive
loops, 30 times slower. ``vmap`` over kernels (MAML: every task has its own weights) makes a grouped convolution,
about as slow.

A convolution is bilinear, and with its two derivatives it is closed: contracted with a cotangent it is one trilinear
form of input, kernel and output,

    form(x, w, g) = sum x[t, n, p*stride + i*dilation - pad, c]  w[t, i, c, o]  g[t, n, p, o]

and fixing two of the three gives the third. So one primitive with three modes ("output" from x and w, "input" from g
and w, "kernel" from x and g) is its own derivative in every order, forward and reverse, and a mapped axis stays
inside it: an axis on one operand alone joins that operand's free axis (examples, input or output channels), an axis
on both becomes the task axis t. Each mode then says, for each platform, how it is best computed: on CPU as a plain
NHWC / HWIO convolution, or with a task axis as patches and a matrix product; elsewhere as
``lax.conv_general_dilated`` and what JAX derives from it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from paradigms.nn.conv_modes import AXES, NHWC, cpu, output_positions, reference


def conv2d(
    x,
    kernel,
    window_strides=(1, 1),
    padding="SAME",
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    batch_group_count=1,
    precision=None,
    preferred_element_type=None,
    **options,
):
    """Convolve images (N, H, W, C) with a kernel (h, w, C, O) to (N, P, Q, O); same dtype in and out.

    Takes the arguments of ``lax.conv_general_dilated``, so it goes to ``nnx.Conv(conv_general_dilated=conv2d)``. What
    it does not cover (grouped or transposed convolutions, other layouts, one or three spatial axes) goes to ``lax``
    unchanged.

    Args:
      x: (N, H, W, C).
      kernel: (h, w, C, O), of the dtype of x.
      window_strides: of rows and columns.
      padding: "SAME", "VALID" or ((top, bottom), (left, right)).
      lhs_dilation: of x; other than 1 goes to ``lax``.
      rhs_dilation: of the kernel.
      dimension_numbers: the layout; other than NHWC, HWIO, NHWC goes to ``lax``, as None, its NCHW, does.
      feature_group_count: groups; other than 1 goes to ``lax``, as with ``batch_group_count``.
      batch_group_count: see above.
      precision: of the products, as in ``lax``.
      preferred_element_type: of the result; other than the dtype of x goes to ``lax``.
      **options: any other argument of ``lax.conv_general_dilated``, which then computes.

    Raises:
      ValueError: x and kernel differ in channels.
    """
    arguments = (lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count, precision)
    plain = x.ndim == kernel.ndim == 4 and feature_group_count == batch_group_count == 1 and x.dtype == kernel.dtype
    plain &= lhs_dilation is None or tuple(lhs_dilation) == (1, 1)
    plain &= preferred_element_type is None or jnp.dtype(preferred_element_type) == x.dtype
    if plain:
        numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
        plain = numbers == lax.conv_dimension_numbers(x.shape, kernel.shape, NHWC)
    if not plain or any(value is not None for value in options.values()):
        return lax.conv_general_dilated(
            x, kernel, window_strides, padding, *arguments, preferred_element_type=preferred_element_type, **options
        )
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"kernel of shape {kernel.shape} takes {kernel.shape[2]} channels, x of shape {x.shape} has {x.shape[3]}; "
            "build the layer with in_features equal to the channels of its input"
        )
    size, window = x.shape[1:3], kernel.shape[:2]
    dilation = (1, 1) if rhs_dilation is None else tuple(rhs_dilation)
    if isinstance(padding, str):
        reach = tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
        padding = lax.padtype_to_pads(size, reach, window_strides, padding)
    geometry = dict(
        size=tuple(size),
        window=tuple(window),
        stride=tuple(window_strides),
        padding=tuple((int(low), int(high)) for low, high in padding),
        dilation=dilation,
        precision=lax.Precision(precision) if isinstance(precision, str) else precision,
    )
    return _conv_p.bind(x, kernel, mode="output", tasks=False, **geometry)


# --- the primitive ------------------------------------------------------------------------------------------------


def _abstract(a, b, *, mode, tasks, size, window, stride, padding, dilation, precision):
    lengths = dict(zip("hwijpq", (*size, *window, *output_positions(size, window, stride, padding, dilation)), strict=True))
    for array, axes in zip((a, b), AXES[mode], strict=False):
        lengths.update(zip(axes, array.shape[tasks:], strict=True))
    shape = (*a.shape[:tasks], *(lengths[axis] for axis in AXES[mode][2]))
    return a.update(shape=shape, weak_type=False)


def _transpose_first(g, a, b, *, mode, **params):
    if mode == "output":
        return _conv_p.bind(g, b, mode="input", **params)
    if mode == "input":
        return _conv_p.bind(g, b, mode="output", **params)
    return _conv_p.bind(b, g, mode="input", **params)  # the kernel's cotangent with g's cotangent


def _transpose_second(g, a, b, *, mode, **params):
    if mode == "output":
        return _conv_p.bind(a, g, mode="kernel", **params)
    if mode == "input":
        return _conv_p.bind(g, a, mode="kernel", **params)
    return _conv_p.bind(a, g, mode="output", **params)


def _batch(operands, dims, *, mode, tasks, **params):
    """Keep a mapped axis inside: in a free axis if one operand has it, else as (part of) the task axis."""
    axes, result = AXES[mode][:2], AXES[mode][2]
    mapped = [dim is not None for dim in dims]
    if all(mapped):
        a, b = (jnp.moveaxis(array, dim, 0) for array, dim in zip(operands, dims, strict=True))
        count = a.shape[0]
        if tasks:
            a, b = (array.reshape(-1, *array.shape[2:]) for array in (a, b))
        out = _conv_p.bind(a, b, mode=mode, tasks=True, **params)
        return (out.reshape(count, -1, *out.shape[1:]) if tasks else out), 0
    side = mapped.index(True)
    free = next(axis for axis in axes[side] if axis in "nco" and axis not in axes[1 - side])
    into, out_of = axes[side].index(free) + tasks, result.index(free) + tasks
    array = jnp.moveaxis(operands[side], dims[side], into)
    count, shape = array.shape[into], array.shape
    array = array.reshape(*shape[:into], -1, *shape[into + 2 :])
    pair = (array, operands[1]) if side == 0 else (operands[0], array)
    out = _conv_p.bind(*pair, mode=mode, tasks=tasks, **params)
    return out.reshape(*out.shape[:out_of], count, -1, *out.shape[out_of + 1 :]), out_of


@functools.cache
def _compiled(**params):
    return jax.jit(functools.partial(_conv_p.bind, **params))


def _eager(a, b, **params):
    # While debugging, jax runs what it would compile, or runs it again, operation by operation: compiled, this would
    # call itself for ever.
    config: Any = jax.config
    if config.jax_disable_jit or config.jax_debug_nans or config.jax_debug_infs:
        return (cpu if jax.default_backend() == "cpu" else reference)(a, b, **params)
    return _compiled(**params)(a, b)


_conv_p = Primitive("conv2d")
_conv_p.def_abstract_eval(_abstract)
_conv_p.def_impl(_eager)
ad.defbilinear(_conv_p, _transpose_first, _transpose_second)
batching.primitive_batchers[_conv_p] = _batch
mlir.register_lowering(_conv_p, mlir.lower_fun(reference, multiple_results=False))
mlir.register_lowering(_conv_p, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
