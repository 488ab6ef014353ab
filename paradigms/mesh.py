"""Devices: which ones a run uses, and how its arrays lie on them.

A mesh is a grid of devices with named axes. The batch is split over the first axis (data parallelism). Over the others
every large array of the state is split along its longest axis that divides, so that no device holds all of the params
and the optimizer's memory (fully sharded data parallelism; Rajbhandari et al., 2020). Losses are written over the whole
batch, so the compiler finds the communication, and the numbers are those of one device.

Virtual CPU devices share few threads: before jax starts, set ``jax.config.update("jax_cpu_enable_async_dispatch", False)``,
or programs that are in flight at once may wait for each other for ever.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from paradigms.objective import Tree

SMALL = 1024  # values: below this an array is kept whole on every device


def make_mesh(**axes: int) -> Mesh:
    """A mesh of all devices (of all processes): ``make_mesh(data=4, model=2)``; use it by ``with jax.set_mesh(mesh)``.

    Args:
      **axes: devices along each axis, the batch's first; one of them may be -1 for all that are left.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    count, left = jax.device_count(), [name for name, size in axes.items() if size == -1]
    if len(left) == 1:
        known = math.prod(size for size in axes.values() if size != -1)
        axes = {**axes, left[0]: count // known if known > 0 else 0}
    if not axes or min(axes.values()) < 1 or math.prod(axes.values()) != count:
        raise ValueError(f"mesh {axes}: the sizes must multiply to the {count} devices that there are")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def parse_mesh(text: str) -> Mesh:
    """The mesh of ``data=4,model=2``, as command lines write it.

    Raises:
      ValueError: not of this form, or see `make_mesh`.
    """
    parts = [re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(-?\d+)\s*", part) for part in text.split(",")]
    names = [part[1] for part in parts if part]
    if not all(parts) or len(set(names)) < len(names):
        raise ValueError(f"mesh {text!r}: write name=size, separated by commas, the batch's axis first: data=4,model=2")
    return make_mesh(**{part[1]: int(part[2]) for part in parts if part})


def whole(tree: Tree, mesh: Mesh | None) -> Tree:
    """`tree`, inside a compiled function, with a copy on every device."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec())) if mesh else tree


def split_rows(tree: Tree, mesh: Mesh | None) -> Tree:
    """`tree`, inside a compiled function, split along its first axis over the first axis of the mesh."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))) if mesh else tree


def split_arrays(tree: Tree, mesh: Mesh | None) -> Tree:
    """`tree`, inside a compiled function, with its large arrays split over the mesh's axes after the first."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec(leaf.shape, mesh))), tree)


def spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How `split_arrays` splits an array of this shape."""
    names = mesh.axis_names[1:]
    parts = math.prod(mesh.shape[name] for name in names)
    if parts > 1 and math.prod(shape) >= SMALL:
        for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
            if shape[axis] % parts == 0:
                return PartitionSpec(*[None] * axis, names)
    return PartitionSpec()


def current(mesh: Mesh | None) -> Mesh | None:
    """`mesh`, or the one of ``jax.set_mesh`` around the call, or None."""
    if mesh is not None:
        return mesh
    try:
        found: Any = jax.sharding.get_mesh()
    except ValueError:  # inside jit, where `vectorize` makes trainers, jax tells the shape of the mesh alone
        found = jax.sharding.get_abstract_mesh()
    return None if found.empty else found
