"""Timing shared by the speed scripts: paired, warm, median of many; the machine's matmul peak."""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Call = Callable[[], Any]


def paired(calls: Mapping[str, Call], repeats: int = 15) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn so that a drift of the machine's speed meets all of them alike. Calls block.

    Each round has an order of its own, and before each call are a pause, in which the threads of another framework give
    up their core, and the same call untimed, which warms the caches.
    """
    for call in calls.values():
        call()
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    for _ in range(repeats):
        for name in shuffle.sample(list(calls), len(calls)):
            time.sleep(0.05)
            calls[name]()
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """The median of the paired ratios ``over / under``."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def matmul(size: int = 2048) -> tuple[Call, float]:
    """A float32 matrix product (size, size) x (size, size) and its FLOPs: timed with the rest, the machine's peak."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a).block_until_ready(), 2 * size**3


def table(title: str, head: tuple[str, ...], rows: list[tuple]) -> None:
    """Prints one table."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        grid.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120).print(grid)


def main(doc: str | None, cases: Mapping[str, Callable[[int], None]], repeats: int) -> None:
    """The command line of a script: which `cases`, each of which takes the number of repeats and prints its table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(cases), help=", ".join(cases))
    parser.add_argument("--repeats", type=int, default=repeats)
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in cases]:
        parser.error(f"cases: {', '.join(unknown)} not among {', '.join(cases)}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name in options.cases:
        cases[name](options.repeats)
