"""A partial application that compares equal when built alike."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Bound:
    """`fn` with its last arguments fixed.

    `functools.partial` objects and closures compare by identity. Static parts of a jitted program built a second time
    would compile it a second time; two `Bound` with the same function and equal settings are the same to `jax.jit`.
    The settings must be hashable: numbers, strings, tuples, other `Bound`.
    """

    fn: Callable
    settings: tuple

    def __call__(self, *args):
        """`fn(*args, *settings)`."""
        return self.fn(*args, *self.settings)


def bind(fn: Callable, *settings) -> Bound:
    """`fn(*args, *settings)` as a function of `args`, equal to any other bound alike.

    Args:
      fn: takes the settings last.
      *settings: hashable: numbers, strings, tuples, functions.

    Returns:
      The function of `args`.

    Raises:
      TypeError: where a setting is not hashable (a list, an array): pass a tuple or a float.
    """
    try:
        hash(settings)
    except TypeError:
        raise TypeError(
            f"settings {settings} of {fn.__name__} must be hashable: pass tuples and Python numbers, not lists or arrays"
        ) from None
    return Bound(fn, settings)
