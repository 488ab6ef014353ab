"""Random search: settings drawn from distributions, as columns like those of `paradigms.grid`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Distribution = Callable[[np.random.Generator], Any]


def random_search(n: int, key: int = 0, /, **distributions: Distribution) -> dict[str, list]:
    """Columns of `n` random settings: ``random_search(20, 0, learning_rate=log_uniform(1e-4, 1e-1), width=choice([64, 128]))``.

    Each setting has a stream of its own: a shorter search is the beginning of a longer one, and another setting beside
    it leaves its values as they are.

    Args:
      n: number of settings.
      key: seed of the draw.
      **distributions: one for each argument of `make`: `uniform`, `log_uniform`, `choice`, or any function of a NumPy
        generator.

    Raises:
      ValueError: `n` below 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: must be 1 or more")
    columns = {}
    for name, draw in distributions.items():
        generator = np.random.default_rng([key, *name.encode()])
        columns[name] = [draw(generator) for _ in range(n)]
    return columns


def uniform(low: float, high: float) -> Distribution:
    """Floats between `low` and `high`, each as likely."""
    if not low < high:
        raise ValueError(f"low={low}, high={high}: low must be below high")
    return lambda generator: float(generator.uniform(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Floats between `low` and `high` whose logarithm is uniform: for rates, decays and other scales."""
    if not 0 < low < high:
        raise ValueError(f"low={low}, high={high}: must be positive, low below high")
    return lambda generator: float(np.clip(np.exp(generator.uniform(np.log(low), np.log(high))), low, high))


def choice(values: Sequence[Any]) -> Distribution:
    """One of `values`, each as likely: widths, names, tuples."""
    if not len(values):
        raise ValueError("values: is empty; give at least one")
    return lambda generator: values[int(generator.integers(len(values)))]
