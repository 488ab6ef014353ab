"""The runner's switches: further logs, a profile, debugging, determinism."""

import contextlib
import importlib.util
import itertools
import linecache
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

EXTRAS = {"tensorboard": "tensorboardX", "wandb": "wandb"}
FLAG = "--xla_gpu_deterministic_ops=true"
HIDDEN = ("jax", "jaxlib", "flax", "optax", "contextlib", "functools")


def ready(log: Sequence[str] = (), deterministic: bool = False) -> None:
    """Checks and sets what must be before jax starts and before a folder is made.

    Raises:
      ValueError: an extra is not installed, or jax has started without what determinism needs.
    """
    for extra in log:
        if importlib.util.find_spec(EXTRAS[extra]) is None:
            raise ValueError(f'--log {extra}: needs {EXTRAS[extra]}; pip install "paradigms[{extra}]"')
    if deterministic:
        _deterministic()


def _deterministic() -> None:
    """Lets XLA take kernels alone that give the same bits each time; on CPUs and TPUs all do."""
    if FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    import jax
    from jax._src import xla_bridge  # jax has no public way to ask whether it has started

    if xla_bridge.backends_are_initialized() and jax.default_backend() not in ("cpu", "tpu"):
        raise ValueError(f'--deterministic: jax has started already; set XLA_FLAGS="{FLAG}" before this process starts')
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()


@contextlib.contextmanager
def watched(
    folder: pathlib.Path, name: str, settings: dict, log: Sequence[str] = (), profile: bool = False, debug: bool = False
):
    """The run of an experiment inside goes to these logs too, is traced, or stops at the first NaN.

    Args:
      folder: of the run; the logs are in ``tensorboard`` and ``wandb``, the trace in ``profile``.
      name: of the experiment.
      settings: for the logs that keep them.
      log: of "tensorboard" and "wandb".
      profile: trace what happens between the first and the second row of metrics: one chunk, compiled already.
      debug: run without jit; a NaN raises a ValueError that says where it arose.
    """
    from paradigms import watch

    label = _labels(folder)

    def open_(home: pathlib.Path | None):
        part = label(home)
        return _several([_open(one, folder, name, part, settings) for one in log])

    with contextlib.ExitStack() as stack:
        if profile:
            stack.enter_context(_traced(folder / "profile"))
        if log:
            stack.enter_context(watch.also(open_))
        if debug:
            stack.enter_context(debugging())
        yield


def _several(writers: list) -> Any:
    from paradigms import logging

    return logging.several(*writers)


def _labels(folder: pathlib.Path):
    """A name for each `fit`: its folder's within the run's, or its number where it has none."""
    number = itertools.count(1)

    def label(home: pathlib.Path | None) -> str:
        count = next(number)
        if home is None:
            return f"fit{count}"
        home, top = home.resolve(), folder.resolve()
        return home.relative_to(top).as_posix().removeprefix(".") if home.is_relative_to(top) else home.name

    return label


def _open(log: str, folder: pathlib.Path, name: str, part: str, settings: dict) -> Any:
    from paradigms import logging

    if log == "tensorboard":
        return logging.tensorboard(folder / "tensorboard" / part)
    # A run of theirs for each training: their steps must not go back. They synchronise later: `wandb sync FOLDER/wandb`.
    return logging.wandb_writer(
        project="paradigms",
        group=f"{name}/{folder.name}",
        name=part or folder.name,
        config=settings,
        dir=str(folder),
        mode=os.environ.get("WANDB_MODE", "offline"),
        reinit="finish_previous",
        settings={"silent": True, "console": "off", "disable_git": True, "x_disable_stats": True},
    )


@contextlib.contextmanager
def _traced(folder: pathlib.Path):
    """Traces from the first row of metrics that any `fit` writes to the second: one chunk, without its compilation."""
    import jax

    from paradigms import logging, watch

    rows = itertools.count()

    def write(step, row):
        del step, row
        match next(rows):
            case 0:
                jax.profiler.start_trace(str(folder))
            case 1:
                jax.profiler.stop_trace()

    try:
        with watch.also(lambda home: logging.Writer(write)):
            yield
    finally:
        seen = next(rows)
        if seen == 1:
            jax.profiler.stop_trace()
        if seen < 2:
            print("--profile: no second row of metrics; the trace has no steps. Train in chunks", file=sys.stderr)


@contextlib.contextmanager
def debugging():
    """Inside, nothing is compiled, and the first NaN raises a ValueError with the line that made it."""
    import jax

    with jax.disable_jit(), jax.debug_nans(True):
        try:
            yield
        except FloatingPointError as error:
            raise ValueError(f"{error}, {where(error)}") from error


def where(error: BaseException) -> str:
    """The innermost line of the traceback that is not inside jax: ``at FILE:LINE in FUNCTION: SOURCE``."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [pair for pair in frames if pair[0].f_globals.get("__name__", "").partition(".")[0] not in HIDDEN]
    frame, line = (own or frames)[-1]
    code = frame.f_code
    source = linecache.getline(code.co_filename, line).strip()
    return f"at {code.co_filename}:{line} in {code.co_name}: {source}"
