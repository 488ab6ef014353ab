"""The run: chunks of compiled steps, evaluation, the best model by validation, early stopping, checkpoints, resume."""

import contextlib
import logging as messages
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paradigms import logging, metrics, watch
from paradigms.checkpoint import LATEST, Checkpoints, Keep
from paradigms.evaluation import evaluate
from paradigms.interrupt import Request, Stopped, stopping
from paradigms.nonfinite import RAISE, Monitor, Nonfinite
from paradigms.objective import Batch, Tree, check, copy
from paradigms.trainer import Trainer, TrainState

logger = messages.getLogger("paradigms")


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
        if value < 1:
            raise ValueError(f"{name}={value}: must be 1 or more")
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
    track = _Track(state, trainer.runs, select, patience)
    bad = Monitor(nonfinite, trainer, source, state)

    with contextlib.ExitStack() as stack:
        compiled = stack.enter_context(watch.compile_seconds())
        request = Request() if home is None else stack.enter_context(stopping())
        saves = None if home is None else stack.enter_context(Checkpoints(home / "checkpoints", keep))
        history: list[dict] = []
        done, half = 0, None  # half: a step whose evaluation is still to come

        def leave(step, row=None):
            if saves is not None and step:
                save(step, row)
                saves.finish()
            signum, place = request.agreed() or 0, f" in {home}" if step else "; it had not begun"
            raise Stopped(signum, f"stopped at step {step} of {steps}{place}; resume=True goes on")

        def save(step, row=None):
            bad.sound(state, step)
            notes = {"row": None if row is None else logging.plain(row, finite=False), "nonfinite": bad.notes()}
            saves.save(step, (state, track.tree, bad.tree), notes, float(np.mean(track.tree["value"])))

        def validate(row=None):
            try:
                return evaluate(_Stoppable(trainer, request), state, validation, measure)
            except _Asked:
                leave(done, row)

        restored = saves.restore((state, track.tree, bad.tree)) if resume and saves is not None else None
        if restored is not None:
            if restored.step > steps:
                raise ValueError(
                    f"steps={steps}: the run in {str(home)!r} has made {restored.step} already; give as many or more"
                )
            done, (state, track.tree, bad.tree), half = restored.step, restored.tree, restored.notes["row"]
            bad.load(restored.notes["nonfinite"])
            rows = logging.read(home / "metrics.jsonl") if (home / "metrics.jsonl").exists() else []
            history = [row for row in rows if row["step"] < done + (half is None)]
        elif validation is not None:
            track.named(validate())  # what is wrong with them shows before training
        writer = _writer(home, steps, done + (half is None), trainer, source, log, compiled)
        stack.callback(writer.close)

        while half is not None or (done < steps and not track.finished()):
            if half is None:
                n = min(chunk - done % chunk, steps - done)
                state, values = trainer.scan(state, source, n)
                done, values = done + n, jax.device_get(values)
                state = bad.check(state, values, done)
                row = {f"train/{name}": np.mean(value, -1) for name, value in values.items()}
                row = {k: v for k, v in row.items() if np.ndim(v) == (trainer.runs is not None)}
            else:
                row, half = {name: np.asarray(value) for name, value in half.items()}, None
            if validation is not None and (done % evaluate_every == 0 or done == steps):
                found = validate(row)
                track.update(state, found, done)
                found = {f"validation/{name}": value for name, value in found.items()}
                row |= {k: v for k, v in found.items() if np.ndim(v) == (trainer.runs is not None)}
            row = {k: np.asarray(v, np.float64)[()] for k, v in row.items()}
            history.append({"step": done, **row})
            writer.write(done, row)
            last = done == steps or track.finished()
            if (request.agreed() is not None) and not last:
                leave(done)
            if saves is not None and (last or (checkpoint_every and done % checkpoint_every == 0)):
                save(done)
    return track.result(state, history, validated=validation is not None)


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


class _Track:
    """The best and the stopped states of each run, as one tree of arrays that a checkpoint can hold."""

    def __init__(self, state: TrainState, runs: int | None, select: str, patience: int | None):
        shape = () if runs is None else (runs,)
        kept = copy((state.params, state.state))
        self.tree = {
            "best": kept,
            "value": jnp.full(shape, -jnp.inf),
            "step": jnp.zeros(shape, jnp.int32),
            "stale": jnp.zeros(shape, jnp.int32),
            "stopped": copy(kept) if patience else (),
        }
        self.sign, self.name = (-1, select[1:]) if select.startswith("-") else (1, select)
        self.patience = patience

    def _running(self):
        return self.tree["stale"] < self.patience if self.patience else jnp.ones_like(self.tree["stale"], bool)

    def named(self, found: dict) -> np.ndarray:
        if self.name not in found:
            raise ValueError(f'select="{self.name}": the evaluation has {sorted(found)}; name one of them')
        return self.sign * np.asarray(found[self.name])

    def update(self, state: TrainState, found: dict, step: int) -> None:
        tree, now = self.tree, (state.params, state.state)
        running = self._running()
        value = jnp.asarray(self.named(found), jnp.float32)
        better = running & (value > tree["value"]) & np.isfinite(found.get("loss", 0.0))
        stale = jnp.where(better, 0, tree["stale"] + running)
        if self.patience:
            tree["stopped"] = _where(running, now, tree["stopped"])
        self.tree = tree | {
            "best": _where(better, now, tree["best"]),
            "value": jnp.where(better, value, tree["value"]),
            "step": jnp.where(better, step, tree["step"]),
            "stale": stale,
        }

    def finished(self) -> bool:
        return not bool(np.any(self._running()))

    def result(self, state: TrainState, history: list[dict], validated: bool) -> Run:
        if not validated:
            return Run(state, state, np.asarray(state.step), history)
        if self.patience:
            params, carried = _where(self._running(), (state.params, state.state), self.tree["stopped"])
            state = state._replace(params=params, state=carried)
        if not np.all(np.isfinite(self.tree["value"])):
            logger.warning("no evaluation was finite in some run: its best weights are the initial ones, at step 0")
        params, carried = self.tree["best"]
        return Run(state, state._replace(params=params, state=carried), np.asarray(self.tree["step"]), history)


@jax.jit
def _where(mask: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b), new, old)


def _example(source) -> Batch:
    chunk = source.chunk(0, 1)
    return jax.jit(lambda chunk, key: chunk.batch(key, 0))(chunk, jax.random.key(0))


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
