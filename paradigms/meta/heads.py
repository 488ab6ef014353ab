"""Few-shot classifiers: closed forms that answer queries from the labelled features of a support set."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paradigms.data.checks import check_count
from paradigms.objective import Tree, concrete


class Head(NamedTuple):
    """A classifier that is made anew from every support set.

    ``ways`` is a capacity: a class without support is never answered. Its logit is below every other's by the logarithm
    of the smallest float, so losses stay finite, and a head of many ways answers episodes of fewer.

    Attributes:
      ways: classes of a task at most; labels are 0 to ways - 1.
      init: ``(key, width) -> params``, for features of that width; {} where nothing is learned.
      logits: ``(params, support (S, width), y (S,) int32, queries (Q, width), weight (S,) or None) -> (Q, ways)`` in the
        type of the features. Support rows count by their weight, 0 is padding.
    """

    ways: int
    init: Callable[[jax.Array, int], Tree]
    logits: Callable[..., jax.Array]


def squared_euclidean(queries: jax.Array, centres: jax.Array) -> jax.Array:
    """|q - c|^2, (Q, width) and (K, width) to (Q, K)."""
    return jnp.sum((queries[:, None] - centres[None]) ** 2, -1)  # not by a product of matrices, which cancels


def prototypes(ways: int, distance: Callable[[jax.Array, jax.Array], jax.Array] = squared_euclidean) -> Head:
    """Softmax over minus the distances to the classes' means (Prototypical Networks; Snell et al., 2017, eq. 1 and 2).

    Args:
      ways: classes of a task at most, 1 or more.
      distance: ``(queries (Q, width), means (ways, width)) -> (Q, ways)``.
    """

    def logits(params, support, y, queries, weight=None):
        members = _members(y, ways, weight, support.dtype)
        mass = members.sum(0)
        means = members.T @ support / jnp.where(mass > 0, mass, 1)[:, None]
        return _with_support(-distance(queries, means), mass)

    return _head(ways, lambda key, width: {}, logits)


def attention(ways: int) -> Head:
    """Labels of the support, averaged by a softmax of cosines (Matching Networks; Vinyals et al., 2016, eq. 1).

    p(k) = sum_i a(q, s_i) [y_i = k], a the softmax over the support of cos(q, s_i); logits are log p(k), up to a constant
    a query. Without the full-context embeddings of the paper's section 2.1.2.

    Args:
      ways: classes of a task at most, 1 or more.
    """

    def logits(params, support, y, queries, weight=None):
        members = _members(y, ways, weight, support.dtype)
        votes = jnp.exp(_unit(queries) @ _unit(support).T) @ members  # a cosine's exponential cannot overflow
        return _with_support(jnp.log(jnp.where(votes > 0, votes, 1)), members.sum(0))

    return _head(ways, lambda key, width: {}, logits)


def ridge(ways: int, penalty: float = 1.0) -> Head:
    """Ridge regression onto one-hot labels (R2D2; Bertinetto et al., 2019, eq. 4 and 5), differentiated through the solve.

    W = (X'X + penalty I)^-1 X'Y, or X'(XX' + penalty I)^-1 Y where there are fewer rows than features; logits are
    scale q W + bias. Learned are the logarithm of the penalty, the scale and the bias, float32 scalars from
    log(penalty), 1 and 0. Weighted rows count in the squared error. Solved in float32 or wider.

    Args:
      ways: classes of a task at most, 1 or more.
      penalty: where the penalty starts, > 0.
    """
    if concrete(penalty) and not penalty > 0:
        raise ValueError(f"penalty={penalty}: must be > 0")

    def init(key, width):
        del key, width
        one = jnp.ones((), jnp.float32)
        return {"log_penalty": jnp.log(penalty * one), "scale": one, "bias": 0 * one}

    def logits(params, support, y, queries, weight=None):
        wide = jnp.promote_types(support.dtype, jnp.float32)
        params = {name: value.astype(wide) for name, value in params.items()}
        x, members = support.astype(wide), _members(y, ways, weight, wide)
        weight, (shots, width) = members.sum(1)[:, None], x.shape
        lifted = jnp.exp(params["log_penalty"]) * jnp.eye(min(shots, width), dtype=wide)
        if shots < width:
            weights = x.T @ _solved(weight * (x @ x.T) + lifted, members)
        else:
            weights = _solved(x.T @ (weight * x) + lifted, x.T @ members)
        scores = params["scale"] * (queries.astype(wide) @ weights) + params["bias"]
        return _with_support(scores, members.sum(0)).astype(support.dtype)

    return _head(ways, init, logits)


def _solved(matrix, right):
    """matrix^-1 right, by elimination without pivots: every leading minor of a ridge's matrix is positive.

    Not LAPACK's: on a CPU of two cores, two of its batched solves in one program wait for each other (jaxlib 0.10).
    """

    def eliminated(matrix, right):
        def step(k, both):
            row = both[k] / both[k, k]
            return (both - both[:, k][:, None] * row[None]).at[k].set(row)

        return jax.lax.fori_loop(0, len(matrix), step, jnp.concatenate([matrix, right], 1))[:, len(matrix) :]

    return jax.lax.custom_linear_solve(
        lambda x: matrix @ x,
        right,
        lambda _, right: eliminated(matrix, right),
        lambda _, right: eliminated(matrix.T, right),
    )


def _head(ways, init, logits):
    check_count(ways=ways)
    return Head(ways, init, logits)


def _members(y, ways, weight, dtype):
    """(S, ways): the weight of a row in the column of its class."""
    members = jax.nn.one_hot(y, ways, dtype=dtype)
    return members if weight is None else members * weight.astype(dtype)[:, None]


def _with_support(scores, mass):
    """Scores (Q, ways) where a class of no mass (ways,) comes last."""
    least = jnp.min(scores, -1, keepdims=True, where=mass[None] > 0, initial=0)
    return jnp.where(mass[None] > 0, scores, jax.lax.stop_gradient(least) + math.log(jnp.finfo(scores.dtype).tiny))


def _unit(x):
    """Rows of length 1; one of zeros stays, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), jnp.finfo(x.dtype).eps ** 2))
