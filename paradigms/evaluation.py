"""What a trained state is worth on a whole split, and what several seeds say together."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from paradigms.batch import on_inputs
from paradigms.data.transforms import pixels

Measured = dict[str, Any]
Metrics = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], Measured]


def evaluate(
    trainer: Any,
    state: Any,
    split: dict[str, Any],
    metrics: Metrics,
    batch_size: int = 512,
    outputs: Sequence[str] | None = None,
) -> Measured:
    """`metrics` of ``trainer.predict`` over the whole of `split`, exact whatever the batch size.

    Every batch has the same shape, so one program is compiled: the last is filled with rows of the split under weight
    0, which are dropped again. All batches are dispatched before the host asks for any output, so all outputs of a
    split are on the device at once.

    Args:
      trainer: has ``predict(state, batch) -> {name: array, rows first}`` and ``runs``. Where ``runs`` is an int R,
        every output has a leading axis of R and `metrics` is called once a run.
      state: what ``predict`` takes.
      split: dict of arrays, examples first. Batches have its leaves and ``weight``, float32; inputs
        "x" of uint8 become float32 in [0, 1], as sources give them.
      metrics: ``(outputs, split) -> {name: float or array}`` for one run. Its optional attribute
        ``check(split, outputs)`` is called with ``outputs=None`` before any work, and with the first batch's outputs.
      batch_size: examples a batch; a smaller split makes a smaller batch.
      outputs: names of the outputs to hold, e.g. ``("logits",)`` where the features of a split are too many. None: all.

    Returns:
      What `metrics` returns; with R runs every value is an array (R, ...).

    Raises:
      ValueError: an empty split, leaves of different lengths, a batch size below 1, an output that is not predicted,
        and what ``metrics.check`` finds.
    """
    count = _count(split)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    check = getattr(metrics, "check", lambda split, outputs: None)
    check(split, None)

    # A small split need not fill a large batch, but a batch has to divide over the devices of a mesh.
    devices = jax.device_count()
    size = min(batch_size, -(-count // devices) * devices)
    kept = []
    for start in range(0, count, size):
        batch = on_inputs(pixels, jax.device_put(_batch(split, start, size, count)))
        predicted = trainer.predict(state, batch)
        if missing := sorted(set(outputs or ()) - set(predicted)):
            raise ValueError(f"outputs={list(outputs or ())}: {missing} not predicted; there are {sorted(predicted)}")
        if not kept:
            check(split, predicted)
        kept.append({name: predicted[name] for name in outputs or predicted})

    fetched = jax.device_get(kept)
    rows = 0 if trainer.runs is None else 1

    def joined(*parts):  # an example may have several rows: an episode has its queries'
        whole = np.concatenate(parts, rows)
        keep = whole.shape[rows] // (size * len(parts)) * count
        return whole[(slice(None),) * rows + (slice(keep),)]

    whole = jax.tree.map(joined, *fetched)
    split = jax.tree.map(np.asarray, split)
    if trainer.runs is None:
        return metrics(whole, split)
    measured = [metrics(jax.tree.map(lambda leaf: leaf[run], whole), split) for run in range(trainer.runs)]
    return {name: np.stack([np.asarray(one[name]) for one in measured]) for name in measured[0]}


def _count(split: dict[str, Any]) -> int:
    lengths = {jax.tree_util.keystr(path): len(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(split)}
    if not lengths or not any(lengths.values()):
        raise ValueError(f"split={lengths}: no examples; give a dict of arrays with the examples first")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"split={lengths}: leaves differ in length; give every leaf one row an example")
    return next(iter(lengths.values()))


def _batch(split: dict[str, Any], start: int, size: int, count: int) -> dict[str, Any]:
    full = start + size <= count
    rows = slice(start, start + size) if full else np.arange(start, start + size) % count
    weight = np.array(split["weight"][rows] if "weight" in split else np.ones(size))
    weight[count - start :] = 0
    return {**jax.tree.map(lambda leaf: leaf[rows], split), "weight": weight.astype(np.float32)}


def interval(values: Any) -> tuple[float, float | None]:
    """Mean and half-width of its 95% confidence interval (Student's t) over seeds or tasks.

    Args:
      values: (n,) numbers, or one number.

    Returns:
      ``(mean, half_width)``. The half-width is None for one value: nothing is known about the spread, and 0 would say
      that there is none. A value that is not finite, such as a diverged seed's, makes both not finite; none is dropped.

    Raises:
      ValueError: no values, or more than one axis.
    """
    values = np.atleast_1d(np.asarray(values, np.float64))
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values has shape {values.shape}: give one number a seed, (n,) with n at least 1")
    with np.errstate(invalid="ignore"):
        mean = float(values.mean())
    if values.size == 1:
        return mean, None
    if not np.isfinite(values).all():
        return mean, float("nan")
    from scipy.stats import t

    return mean, float(t.ppf(0.975, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size))
