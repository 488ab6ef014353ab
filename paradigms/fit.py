"""The run: chunks of compiled steps, evaluation, the best model by validation, early stopping, checkpoints, resume."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from paradigms import logging, metrics, watch
from paradigms.checkpoint import LATEST, Checkpoints, Keep
from paradigms.evaluation import evaluate
from paradigms.interrupt import Request, Stopped, stopping
from paradigms.nonfinite import RAISE, Monitor, Nonfinite
from paradigms.objective import Batch, check
from paradigms.pure import TrainState
from paradigms.selection import Selection
from paradigms.trainer import Trainer


class Run(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: the last state (of a run that stopped early: where it stopped).
      best: the state with the params of the best validation; equal to ``state`` without validation.
      best_step: the step it was found at; an array over runs in a vectorized run.
      history: one dict an evaluation, {"step", "train/...", "validation/..."}; values are floats, or arrays over runs.
    """

    state: TrainState
    best: TrainState
    best_step: Any
    history: list[dict]


def fit(
    trainer: Trainer,
    source: Any,
    steps: int,
    *,
    key: "jax.Array | int" = 0,
    chunk: int = 100,
    validation: Batch | None = None,
    measure: Callable | None = None,
    select: str = "accuracy",
    patience: int | None = None,
    evaluate_every: int | None = None,
    folder: "pathlib.Path | str | None" = None,
    checkpoint_every: int | None = None,
    keep: Keep = LATEST,
    resume: bool = False,
    nonfinite: Nonfinite = RAISE,
    log: "logging.Writer | None" = None,
) -> Run:
    """Trains for `steps` updates.

    The host is asked nothing inside a chunk; after each it reads the chunk's metrics. The same key gives the same bits,
    whether or not the run was stopped and resumed, as long as `chunk` is the same.

    With a folder, SIGTERM and the first Ctrl-C end the run after the chunk (`paradigms.interrupt.stopping`): it saves and
    raises `Stopped`. The position in the data is the number of the step, so nothing else is needed to go on.

    Args:
      trainer: of one run, or of many (`vectorize`).
      source: batches (`paradigms.data.resident`, `stream`, `windows`).
      steps: updates in all, 1 or more.
      key: typed PRNG key or seed of the run.
      chunk: updates a compiled call; the last chunk may be shorter (it compiles once more).
      validation: a split, evaluated whole. Selection and early stopping use it and nothing else.
      measure: ``(outputs, split) -> {name: value}``; default `paradigms.metrics.classification`.
      select: the validation metric that says which params are best; "-name" where smaller is better ("-loss").
      patience: stop a run after this many evaluations without a new best. Each vectorized run stops on its own.
      evaluate_every: steps between evaluations, a multiple of `chunk`. Default: `chunk`.
      folder: where ``metrics.jsonl`` and ``checkpoints/`` go; None writes nothing. A used one is refused without `resume`.
      checkpoint_every: steps between checkpoints, a multiple of `chunk`. Default: at the end only.
      keep: which checkpoints stay (`paradigms.checkpoint.Keep`).
      resume: go on from the folder's latest whole checkpoint, if there is one.
      nonfinite: what is done about steps whose loss or gradient is not finite: `RAISE`, `SKIP` or `rollback`.
      log: a writer of rows (`paradigms.logging`). Default: a progress bar, or lines where there is no terminal.

    Returns:
      a `Run`.

    Raises:
      ValueError: arguments out of range, or data that does not fit the objective, before anything is compiled; a `select`
        that `measure` does not give, before training. Diverged: by `nonfinite`. Stopped: a signal asked.
    """
    evaluate_every = evaluate_every or chunk
    for name, value in (("steps", steps), ("chunk", chunk)):
        if not 1 <= value < 2**31:
            raise ValueError(f"{name}={value}: must be 1 or more, and below 2**31")
    for name, value in (("evaluate_every", evaluate_every), ("checkpoint_every", checkpoint_every or chunk)):
        if value < 1 or value % chunk:
            raise ValueError(f"{name}={value}: must be a multiple of chunk={chunk}")
    if patience is not None and (validation is None or patience < 1):
        raise ValueError(f"patience={patience}: counts evaluations, 1 or more, of a validation split; pass validation as well")
    if folder is None and (resume or checkpoint_every):
        raise ValueError(f"resume={resume}, checkpoint_every={checkpoint_every}: need a folder; pass the run's")
    home = None if folder is None else pathlib.Path(folder)
    if home is not None and not resume and any((home / "checkpoints").glob("*")):
        raise ValueError(f"folder={str(home)!r}: holds another run; pass a new one, or resume=True to go on with it")
    measure = metrics.classification() if measure is None else measure

    batch = _example(source)
    _check_whole(trainer, source, batch)
    watch.look(trainer, batch, source)
    state = trainer.init(key, batch)
    best = Selection(state, trainer.runs, select, patience)
    bad = Monitor(nonfinite, trainer, source, state)

    with contextlib.ExitStack() as stack:
        compiled = stack.enter_context(watch.compile_seconds())
        request = Request() if home is None else stack.enter_context(stopping())
        disk = None if home is None else stack.enter_context(_Disk(home, keep, best, bad))
        state, done, half, history = (disk and resume and disk.restore(state, steps)) or (state, 0, None, [])

        def leave(row=None) -> NoReturn:
            if disk is not None and done:
                disk.save(done, state, row)
            place = f" in {home}" if done else "; it had not begun"
            raise Stopped(request.agreed() or 0, f"stopped at step {done} of {steps}{place}; to go on, resume")

        def validate(split, row=None):
            try:
                return evaluate(_Stoppable(trainer, request), state, split, measure)
            except _Asked:
                leave(row)

        if validation is not None and not done:
            best.named(validate(validation))  # what is wrong with them shows before training
        writer = _writer(home, steps, done + (half is None), trainer, source, log, compiled)
        stack.callback(writer.close)

        while half is not None or (done < steps and not best.finished()):
            if half is None:
                n = min(chunk - done % chunk, steps - done)
                state, values = trainer.scan(state, source, n)
                done, values = done + n, jax.device_get(values)
                state = bad.check(state, values, done, best.running())
                row = _row("train", {name: np.mean(value, -1) for name, value in values.items()}, trainer)
            else:
                row, half = half, None
            if validation is not None and (done % evaluate_every == 0 or done == steps):
                found = validate(validation, row)
                best.update(state, found, done)
                row |= _row("validation", found, trainer)
            history.append({"step": done, **row})
            writer.write(done, row)
            last = done == steps or best.finished()
            if request.agreed() is not None and not last:
                leave()
            if disk is not None and (last or (checkpoint_every and done % checkpoint_every == 0)):
                disk.save(done, state)
    if validation is None:
        return Run(state, state, np.asarray(state.step), history)
    return Run(*best.result(state), history)


class _Disk:
    """A run's checkpoints: its state, its best, and the last good state where one is kept."""

    def __init__(self, home: pathlib.Path, keep: Keep, best: Selection, bad: Monitor):
        self.home, self.best, self.bad = home, best, bad
        self.saves = Checkpoints(home / "checkpoints", keep)

    def save(self, step: int, state: TrainState, row: "dict | None" = None) -> None:
        """Starts writing; `row` is that of a step whose evaluation is still to come."""
        self.bad.sound(state, step)
        half = None if row is None else logging.plain(row, finite=False)
        notes = {"about": watch.about(), "row": half, "nonfinite": self.bad.notes()}
        self.saves.save(step, (state, self.best.tree, self.bad.tree), notes, float(np.mean(self.best.tree["value"])))

    def restore(self, state: TrainState, steps: int) -> "tuple | None":
        """State, step, row to complete and rows before it of the latest whole checkpoint, or None."""
        found = self.saves.restore((state, self.best.tree, self.bad.tree))
        if found is None:
            return None
        if found.step > steps:
            raise ValueError(f"steps={steps}: the run in {str(self.home)!r} has made {found.step}; give as many or more")
        state, self.best.tree, self.bad.tree = found.tree
        self.bad.load(found.notes["nonfinite"])
        half = found.notes["row"]
        half = half and {name: np.asarray(value, np.float64)[()] for name, value in half.items()}
        log = self.home / "metrics.jsonl"
        rows = logging.read(log) if log.exists() else []
        return state, found.step, half, [row for row in rows if row["step"] < found.step + (half is None)]

    def __enter__(self) -> "_Disk":
        return self

    def __exit__(self, *exception) -> None:
        self.saves.__exit__(*exception)


def _row(split: str, values: dict, trainer: Trainer) -> dict:
    """The numbers, one a run, of what was measured; larger arrays are not for the log."""
    depth = 0 if trainer.runs is None else 1
    return {f"{split}/{name}": np.asarray(v, np.float64)[()] for name, v in values.items() if np.ndim(v) == depth}


class _Asked(Exception):
    """A signal came during an evaluation."""


class _Stoppable:
    """A trainer that predicts until a signal comes. Several processes must stop together, so there it only predicts."""

    def __init__(self, trainer: Trainer, request: Request):
        self._trainer, self._request, self.runs = trainer, request, trainer.runs

    def predict(self, state: TrainState, batch: Batch) -> dict:
        if self._request.signum is not None and jax.process_count() == 1:
            raise _Asked
        return self._trainer.predict(state, batch)


def _writer(home, steps: int, from_step: int, trainer: Trainer, source, log, compiled) -> logging.Writer:
    """The progress, the rows on the disk and what is watched besides; of several processes the first alone writes."""
    if jax.process_index():
        return logging.several()
    size = getattr(source, "batch_size", None)
    if log is None:
        log = logging.progress(steps, trainer.runs, size, from_step=from_step - 1, compiled=compiled)
    rows = [] if home is None else [logging.jsonl(home / "metrics.jsonl", from_step=from_step)]
    return logging.several(log, *rows, *watch.opened(home))


def _example(source) -> Batch:
    return source.chunk(0, 1).batch(jax.random.key(0), 0)


def _check_whole(trainer: Trainer, source, batch: Batch) -> None:
    """Checks the labels of the whole data set where the source holds it and its transform left the labels alone."""
    arrays = getattr(source, "arrays", None)
    if not (isinstance(arrays, dict) and isinstance(batch, dict) and arrays.keys() == batch.keys() and "x" in arrays):
        return
    if any(arrays[k].dtype != batch[k].dtype or arrays[k].shape[1:] != batch[k].shape[1:] for k in arrays if k != "x"):
        return
    # the inputs were checked when the source was made; only their shape matters here
    count = len(arrays["x"])
    check(trainer.objective, {**arrays, "x": np.broadcast_to(np.zeros((), batch["x"].dtype), (count, *batch["x"].shape[1:]))})
