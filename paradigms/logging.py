"""Where rows of metrics go while a run is on its way: a file, the terminal, TensorBoard, Weights & Biases.

A writer is two functions, ``write(step, row)`` and ``close()``; `row` is a dict of numbers, or of arrays (runs,) where
several runs are trained together. `several` joins writers, and anything with these two functions is one.
"""

import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

logger = logging.getLogger("paradigms")

Row = Mapping[str, Any]


class Writer(NamedTuple):
    """Attributes: ``write: (step, row) -> None`` and ``close: () -> None``."""

    write: Callable[[int, Row], None]
    close: Callable[[], None] = lambda: None


def several(*writers: Any) -> Writer:
    """All of `writers` as one. ``close`` closes each of them, also where one fails, and raises the first failure."""

    def write(step, row):
        for writer in writers:
            writer.write(step, row)

    def close():
        failures = []
        for writer in writers:
            try:
                writer.close()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    return Writer(write, close)


def plain(row: Row, finite: bool = True) -> dict[str, Any]:
    """`row` for JSON: numbers, and lists (runs,) of them; None where not finite, if asked. Anything else is left out."""

    def number(value):
        return value if np.isfinite(value) or not finite else None

    values = {name: np.asarray(value) for name, value in row.items()}
    nothing = np.frompyfunc(lambda one: float("nan") if one is None else one, 1, 1)  # None of an earlier `plain`
    values = {name: np.asarray(nothing(v), np.float64) if v.dtype.kind == "O" else v for name, v in values.items()}
    return {
        name: number(value.item()) if value.ndim == 0 else [number(one) for one in value.tolist()]
        for name, value in values.items()
        if value.ndim < 2 and value.dtype.kind not in "USMm"
    }


def jsonl(path: str | os.PathLike, from_step: int | None = None) -> Writer:
    """One JSON object a line: ``step``, then the numbers and lists (runs,) of the row; null where not finite.

    Args:
      path: appended to; folders are made. A last line cut short by a kill is dropped.
      from_step: the first step that a resumed run may write again: rows at or after it are dropped first. 0 starts
        anew; None keeps all rows.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        rows = [row for row in _lines(path) if from_step is None or row["step"] < from_step]
        part = path.with_name(path.name + ".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(part, path)
    file, waiting, good = path.open("ab", buffering=0), [], [path.stat().st_size]

    def write(step, row):
        waiting.append(json.dumps({"step": int(step), **plain(row)}).encode() + b"\n")
        text = b"".join(waiting)
        try:
            file.truncate(good[0])  # what a failed write left of a row
            if file.write(text) < len(text):
                raise OSError("not all of it was written; is the disk full?")
        except OSError as error:  # the run is worth more than its log
            logger.error("%s could not be written (%s): %d rows wait for the next time", path, error, len(waiting))
            return
        good[0] += len(text)
        waiting.clear()

    return Writer(write, file.close)


def _lines(path: pathlib.Path) -> list[dict]:
    rows, lines = [], path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no row")
            rows.append(row)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(f'{path}: line {number} is not JSON with a "step"; repair or remove it') from None
    return rows


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows that `jsonl` wrote, NaN where it wrote null: floats, or float64 arrays (runs,).

    Raises:
      FileNotFoundError: no such file. ValueError: a line other than the last is not JSON.
    """
    return [
        {name: value if name == "step" else _number(value) for name, value in row.items()} for row in _lines(pathlib.Path(path))
    ]


def _number(value: Any) -> Any:
    return np.asarray(value, np.float64) if isinstance(value, list) else float("nan") if value is None else value


def progress(
    total_steps: int,
    runs: int | None = None,
    examples: int | None = None,
    from_step: int = 0,
    file: Any = None,
    compiled: Callable[[], float] = lambda: 0.0,
) -> Writer:
    """Progress on the terminal: a live bar, or one line a row where the output is no terminal.

    Shows steps/s since the last row (of all runs together: one step is one step of each), the time left and the mean
    over runs of every number in the row.

    Args:
      total_steps: where the run ends.
      runs: how many runs are trained together, for the label; None is one.
      examples: examples a step and run, to show examples/s.
      from_step: the step a resumed run goes on from.
      file: a text stream; default: standard error, so that results alone are on standard output.
      compiled: seconds spent on compilation so far (`paradigms.watch.compile_seconds`), which are no part of the rate.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress
    from rich.text import Text

    console = Console(file=file or sys.stderr)
    label = f"{runs} runs" if runs else "run"
    last = {"step": from_step, "time": time.monotonic() - compiled(), "rate": 0.0}

    def speed(step):
        now = time.monotonic() - compiled()
        if step > last["step"]:
            last.update(rate=(step - last["step"]) / max(now - last["time"], 1e-9), step=step, time=now)
        if not last["rate"]:
            return ""
        per_second = [f"{_short(last['rate'])} steps/s"]
        if examples:
            per_second.append(f"{_short(last['rate'] * examples * (runs or 1))} examples/s")
        return "  ".join([*per_second, f"{_clock((total_steps - step) / last['rate'])} left"])

    if not console.is_terminal:

        def line(step, row):
            print("  ".join(filter(None, [f"{step}/{total_steps}", speed(step), _shown(row)])), file=console.file)
            console.file.flush()

        return Writer(line)

    bar, numbers = Progress("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[speed]}"), Text()
    task = bar.add_task(label, total=total_steps, completed=from_step, speed="")
    live, seen = Live(Group(bar, numbers), console=console, refresh_per_second=4), {}
    live.start()

    def write(step, row):
        seen.update(row)  # evaluation rows are rarer than training rows: their numbers stay on show
        bar.update(task, completed=step, speed=speed(step))
        numbers.plain = _shown(seen)

    return Writer(write, live.stop)


def _shown(row: Row) -> str:
    def mean(values):
        return _short(float(np.mean(np.asarray(values, np.float64))))

    return "  ".join(f"{name} {mean(value)}" for name, value in plain(row).items() if np.size(value))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _per_run(row: Row) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The mean over runs of every number, and the values (runs,) of those that have several."""
    arrays = {name: np.asarray(value, np.float64) for name, value in plain(row).items()}
    return (
        {name: float(value.mean()) for name, value in arrays.items() if value.size},
        {name: value for name, value in arrays.items() if value.ndim == 1},
    )


def tensorboard(folder: str | os.PathLike) -> Writer:
    """TensorBoard event files in `folder`; where there are runs, the mean, and each run in ``folder/run<i>``.

    A resumed run replaces the rows that it writes again: those of an earlier file from its first step on.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('tensorboard() needs tensorboardX: pip install "paradigms[tensorboard]"') from error
    folder, events = pathlib.Path(folder), {}

    def add(place, name, value, step):
        if place not in events:
            # their files are named by the second: the suffix keeps a run that is resumed at once from its own file
            suffix = f".{time.time_ns()}"
            events[place] = SummaryWriter(str(folder / place), purge_step=step, filename_suffix=suffix)
        events[place].add_scalar(name, value, step)

    def write(step, row):
        means, runs = _per_run(row)
        for name, value in means.items():
            add("", name, value, int(step))
        for name, values in runs.items():
            for run, value in enumerate(values):
                add(f"run{run}", name, float(value), int(step))

    def close():
        for event in events.values():
            event.close()

    return Writer(write, close)


def wandb_writer(run: Any = None, **settings: Any) -> Writer:
    """Weights & Biases: the mean over runs under a metric's name, and each run under ``name/run<i>``.

    Args:
      run: a run that exists already, left open by ``close``; None starts one.
      **settings: of ``wandb.init``, such as ``project="..."`` and ``config={...}``.

    Raises:
      ImportError: wandb is not installed.
    """
    own = run is None
    if own:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError('wandb_writer() needs wandb: pip install "paradigms[wandb]"') from error
        run = wandb.init(**settings)

    def write(step, row):
        means, runs = _per_run(row)
        each = {f"{name}/run{i}": float(value) for name, values in runs.items() for i, value in enumerate(values)}
        run.log({**means, **each}, step=int(step))

    return Writer(write, run.finish if own else lambda: None)
