"""Watching runs from outside: what they also write to, what they compile, and how they would train.

An experiment calls `fit` somewhere inside. Who starts it reaches every `fit` below by a ``with`` around it, so that no
experiment passes writers or switches on.
"""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from paradigms.logging import Writer

Open = Callable[["pathlib.Path | None"], Writer]

COMPILE = ("backend_compile_duration", "jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")

_openers: ContextVar[tuple[Open, ...]] = ContextVar("openers", default=())
_about: ContextVar[dict] = ContextVar("about", default={})  # noqa: B039 (never changed in place)
_dry: ContextVar[bool] = ContextVar("dry", default=False)


class DryRun(Exception):
    """Raised in place of training inside `dry`.

    Attributes:
      trainer: the trainer that was to be initialised.
      batch: its first batch.
      source: where the batches come from, or None where that is not known.
    """

    def __init__(self, trainer: Any, batch: Any, source: Any = None):
        super().__init__("dry run: stopped before training")
        self.trainer, self.batch, self.source = trainer, batch, source


@contextlib.contextmanager
def also(*openers: Open):
    """Inside, every `fit` writes its rows to these writers too.

    Args:
      *openers: ``(folder) -> Writer``, called once a `fit` with its folder, or None where it has none. `fit` closes what
        they return.
    """
    token = _openers.set((*_openers.get(), *openers))
    try:
        yield
    finally:
        _openers.reset(token)


def opened(folder: "pathlib.Path | None") -> list[Writer]:
    """A new writer of every opener of `also` around this call, for a `fit` in `folder`."""
    return [opener(folder) for opener in _openers.get()]


@contextlib.contextmanager
def described(about: dict):
    """Inside, every checkpoint of `fit` has these facts in its notes, such as the run's configuration (JSON)."""
    token = _about.set({**_about.get(), **about})
    try:
        yield
    finally:
        _about.reset(token)


def about() -> dict:
    """The facts of `described` around this call."""
    return dict(_about.get())


@contextlib.contextmanager
def dry():
    """Inside, nothing is trained: the first trainer that is to be initialised raises `DryRun` and is in it."""
    token = _dry.set(True)
    try:
        yield
    finally:
        _dry.reset(token)


def look(trainer: Any, batch: Any, source: Any = None) -> None:
    """Called by whoever is about to initialise `trainer`; raises `DryRun` inside `dry`, and does nothing elsewhere.

    Args:
      trainer: a `paradigms.Trainer`.
      batch: concrete arrays, the example axis first.
      source: where further batches come from, if known.

    Raises:
      DryRun: inside `dry`.
    """
    if _dry.get():
        raise DryRun(trainer, batch, source)


@contextlib.contextmanager
def compile_seconds():
    """Yields a function: the seconds that jax has traced, lowered and compiled so far.

    Tracing one function inside another reports both, so what is added up is the time covered, not the durations.
    """
    import jax

    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event.rpartition("/")[2] in COMPILE:
            end = time.monotonic()
            spans.append((end - duration_secs, end))

    def covered():
        total, reach = 0.0, -math.inf
        for start, end in sorted(spans):
            total, reach = total + max(0.0, end - max(start, reach)), max(reach, end)
        return total

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield covered
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
