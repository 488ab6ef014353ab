"""What training would take: parameters, memory and arithmetic of one step, without running it."""

import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from paradigms.objective import Batch, Tree


class Parameter(NamedTuple):
    """One array, or a group of them: its path, shape ("12 arrays" for a group), dtype and number of values."""

    path: str
    shape: str
    dtype: str
    count: int


class Estimate(NamedTuple):
    """Of a trainer, before it trains.

    Attributes:
      parameters: every array of ``params`` of one run.
      memory: bytes by what they are for, of all runs together.
      flops: multiplications and additions of the matrix products and convolutions of one step of all runs.
    """

    parameters: list[Parameter]
    memory: dict[str, int]
    flops: int


def estimate(trainer: Any, batch: Batch, source: Any = None) -> Estimate:
    """Parameters, memory and FLOPs of one step of `trainer`; the step is compiled, and nothing is run.

    ``memory`` holds what stays between steps ("parameters", "optimizer", "carried state", "data"), and what a step needs
    besides: "batch", and "activations", gradients and whatever else the compiler keeps meanwhile. `paradigms.fit` with a
    validation split holds one more copy of parameters and carried state, two with ``patience``.

    Args:
      trainer: of one run or many.
      batch: of the size that ``step`` will see.
      source: where batches come from; its arrays are the "data".

    Returns:
      an `Estimate`.
    """
    state = jax.eval_shape(trainer.pure.init, jax.random.key(0), batch)
    memory = {"parameters": size(state.params), "optimizer": size((state.opt_state, state.aggregate_state))}
    memory |= {"carried state": size(state.state), "data": size(getattr(source, "arrays", ())), "batch": size(batch)}
    compiled = jax.jit(trainer.pure.step, donate_argnums=0).lower(state, batch).compile()
    if (analysis := compiled.memory_analysis()) is not None:  # not every backend tells
        memory["activations"] = analysis.temp_size_in_bytes
    one = trainer.members[0].pure
    alone = jax.eval_shape(one.init, jax.random.key(0), batch)
    work = flops(jax.make_jaxpr(one.step)(alone, batch).jaxpr) * (trainer.runs or 1)
    return Estimate(parameters(alone.params), memory, work)


def size(tree: Tree) -> int:
    """Bytes of the arrays of `tree`, which may be abstract."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def parameters(params: Tree) -> list[Parameter]:
    """Every array of `params` (which may be abstract) as a `Parameter`."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(params):
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        found.append(Parameter(name, "x".join(map(str, leaf.shape)) or "scalar", str(leaf.dtype), math.prod(leaf.shape)))
    return found


def grouped(rows: list[Parameter], most: int = 30) -> list[Parameter]:
    """At most `most` rows: those whose paths begin alike are one, of as long a beginning as fits.

    Args:
      rows: as `parameters` gives.
      most: 1 or more.

    Returns:
      `rows` as they are where they are few enough.
    """
    depth = max((row.path.count("/") for row in rows), default=0) + 1
    while True:
        groups: dict[str, list[Parameter]] = {}
        for row in rows:
            groups.setdefault("/".join(row.path.split("/")[:depth]), []).append(row)
        if len(groups) <= most or depth == 1:
            return [members[0] if len(members) == 1 else _joined(path, members) for path, members in groups.items()]
        depth -= 1


def _joined(path: str, rows: list[Parameter]) -> Parameter:
    dtypes = sorted({row.dtype for row in rows})
    return Parameter(f"{path}/…", f"{len(rows)} arrays", ", ".join(dtypes), sum(row.count for row in rows))


def flops(jaxpr: Jaxpr) -> int:
    """Multiplications and additions of the matrix products and convolutions in `jaxpr`.

    A scan counts its body as often as it runs, a ``cond`` its dearest branch, a ``while``, whose length is not known,
    its body once. The compiler's own count is no use here: it takes every loop for one round.
    """
    total = 0
    for eqn in jaxpr.eqns:
        shapes: list[Any] = [getattr(variable.aval, "shape", ()) for variable in (*eqn.invars, *eqn.outvars)]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
            case "conv_general_dilated":
                features = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
                total += 2 * math.prod(shapes[-1]) * math.prod(shapes[1]) // features
            case "conv2d":  # of the three arrays of a convolution and its derivatives, the sum runs over all axes
                total += _conv2d(eqn.params, shapes)
            case "cond":
                total += max(flops(branch.jaxpr) for branch in eqn.params["branches"])
            case name:
                rounds = eqn.params["length"] if name == "scan" else 1
                total += rounds * sum(flops(inner) for inner in _inner(eqn.params))
    return total


def _conv2d(params: dict, shapes: list[tuple[int, ...]]) -> int:
    lead = math.prod(shapes[0][:1]) if params["tasks"] else 1
    named = dict(zip(("output", "input", "kernel"), ("nhwc ijco npqo", "npqo ijco nhwc", "nhwc npqo ijco"), strict=True))
    lengths = {}
    for axes, shape in zip(named[params["mode"]].split(), shapes, strict=True):
        lengths |= dict(zip(axes, shape[params["tasks"] :], strict=True))
    return 2 * lead * math.prod(lengths[axis] for axis in "npqijco")


def _inner(params: dict) -> list[Jaxpr]:
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, Jaxpr):
                found.append(one)
    return found
