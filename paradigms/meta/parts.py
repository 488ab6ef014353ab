"""What adapts: the part of the params that inner steps change."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paradigms.objective import Tree


class Part(NamedTuple):
    """A choice of params.

    Attributes:
      chosen: path of names -> whether the array adapts; the path of ``params["model"]["head"]["bias"]`` is
        ``("model", "head", "bias")``.
      reset: each task starts them at zero, and not at what was meta-learned.
    """

    chosen: Callable[[tuple[str, ...]], bool]
    reset: bool = False


def everything() -> Part:
    """All params (MAML; Finn et al., 2017)."""
    return Part(lambda path: True)


def only(*names: str) -> Part:
    """The params below one of `names`, wherever it stands in the path: ``only("head")`` is ANIL (Raghu et al., 2020)."""
    return Part(lambda path: any(name in path for name in names))


def without(*names: str) -> Part:
    """All params but those below one of `names`: ``without("head")`` is BOIL (Oh et al., 2021)."""
    return Part(lambda path: not any(name in path for name in names))


def reset(part: Part) -> Part:
    """`part`, starting from zeros in every task: CAVIA's context parameters (Zintgraf et al., 2019, eq. 6).

    The outer loop leaves these params where they are: their meta-gradient is zero.
    """
    return part._replace(reset=True)


def select(params: Tree, part: Part) -> Tree:
    """The arrays that adapt, as nested dicts of what is chosen alone; ``taps`` never do.

    Raises:
      ValueError: nothing is chosen.
    """

    fast = pick({name: slot for name, slot in params.items() if name != "taps"}, lambda path, leaf: part.chosen(path))
    if not fast and jax.tree.leaves(params):
        paths = sorted({"/".join(key.key for key in path[:2]) for path, _ in jax.tree.leaves_with_path(params)})
        raise ValueError(f"adapts: chooses none of the params, which begin with {paths}; name a part of these paths")
    return jax.tree.map(jnp.zeros_like, fast) if part.reset else fast


def pick(tree: Tree, wanted: Callable[[tuple[str, ...], jax.Array], bool], path: tuple[str, ...] = ()) -> Tree:
    """The arrays of nested dicts for which ``wanted(path, array)``, without the dicts that are left empty."""
    found = {name: pick(leaf, wanted, (*path, name)) if isinstance(leaf, dict) else leaf for name, leaf in tree.items()}
    return {name: leaf for name, leaf in found.items() if (leaf if isinstance(leaf, dict) else wanted((*path, name), leaf))}


def overlay(params: Tree, fast: Tree) -> Tree:
    """`params` with the arrays of `fast`, a part of it, in their places."""
    return {
        name: (overlay(leaf, fast[name]) if isinstance(leaf, dict) else fast[name]) if name in fast else leaf
        for name, leaf in params.items()
    }
