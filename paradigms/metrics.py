"""What a trained state is worth: `evaluate` runs ``trainer.predict`` over a whole split, metric functions read it.

A metric function is ``(outputs, split) -> {name: float or array}`` over the whole-split NumPy arrays of one run:
``outputs["logits"]`` (N, C) and ``split["y"]`` (N,), rows in the same order. `classification`, `multilabel` and
`regression` make such functions; any function of that form will do. Means are over examples, or over tokens where the
logits are (N, T, V) and ``y`` is (N, T). ``split["weight"]``, (N,) or the shape of ``y``, weighs them; 0 is left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

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

    Every batch has the same shape, so one program is compiled: the last one is filled with rows of the split under
    weight 0, and these rows are dropped again. All batches are dispatched before the host asks for any output, so all
    outputs of a split are on the device at once.

    Args:
      trainer: has ``predict(state, batch) -> {name: array, rows first}`` and ``runs``. Where ``runs`` is an int R,
        every output has a leading axis of R and `metrics` is called once a run.
      state: what ``predict`` takes.
      split: dict of arrays, examples first. Batches have its leaves and ``weight``, float32.
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
        predicted = trainer.predict(state, jax.device_put(_batch(split, start, size, count)))
        if missing := sorted(set(outputs or ()) - set(predicted)):
            raise ValueError(f"outputs={list(outputs or ())}: {missing} not predicted; there are {sorted(predicted)}")
        if not kept:
            check(split, predicted)
        kept.append({name: predicted[name] for name in outputs or predicted})

    fetched = jax.device_get(kept)
    rows = 0 if trainer.runs is None else 1
    whole = jax.tree.map(lambda *parts: np.concatenate(parts, rows)[(slice(None),) * rows + (slice(count),)], *fetched)
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
    if start + size <= count:
        rows = slice(start, start + size)
        weight = np.asarray(split.get("weight", np.ones(count)))[rows]
    else:
        rows = np.arange(start, start + size) % count
        weight = np.asarray(split.get("weight", np.ones(count)))[rows]
        weight = weight * (np.arange(size) < count - start).reshape(-1, *(1,) * (weight.ndim - 1))
    return {**jax.tree.map(lambda leaf: leaf[rows], split), "weight": weight.astype(np.float32)}


def scalars(measured: Measured, runs: int | None = None) -> Measured:
    """The values of `measured` that are one number (a run, where `runs` is an int): what goes into a learning curve."""
    shape = () if runs is None else (runs,)
    return {name: value for name, value in measured.items() if np.shape(value) == shape}


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
    mean = float(values.mean())
    if values.size == 1:
        return mean, None
    if not np.isfinite(values).all():
        return mean, float("nan")
    from scipy.stats import t

    return mean, float(t.ppf(0.975, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size))


def _rows(logits: Any, y: Any, weight: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Logits (M, C), integer (M,) or soft (M, C) labels and weights (M,) or None: tokens flat, weight 0 left out."""
    logits, y = np.asarray(logits).astype(np.float64), np.asarray(y)
    soft = y.dtype.kind not in "iub"
    if y.shape != (logits.shape if soft else logits.shape[:-1]):
        want = "the shape of the logits" if soft else "an integer for each row of logits"
        raise ValueError(f"y is {y.dtype} of shape {y.shape} for logits of shape {logits.shape}: give {want}")
    if weight is not None:
        weight = np.asarray(weight, np.float64)
        weight = weight.reshape(weight.shape + (1,) * (logits.ndim - 1 - weight.ndim))
        weight = np.broadcast_to(weight, logits.shape[:-1]).reshape(-1)
    logits = logits.reshape(-1, logits.shape[-1])
    y = y.reshape(logits.shape) if soft else y.reshape(-1)
    if weight is not None:
        seen = weight > 0
        if not seen.any():
            raise ValueError("weight is 0 for every example: give one example a positive weight")
        logits, y, weight = logits[seen], y[seen], weight[seen]
    _in_range(y, logits.shape[-1])
    return logits, y, weight


def _in_range(y: np.ndarray, classes: int) -> None:
    if np.issubdtype(y.dtype, np.integer) and y.size and (y.min() < 0 or y.max() >= classes):
        bad = int(y.min() if y.min() < 0 else y.max())
        raise ValueError(
            f"y has label {bad} for {classes} logits: give labels 0 to {classes - 1}, a model with more outputs, "
            "or weight 0 to what should not count"
        )


def _hard(y: np.ndarray) -> np.ndarray:
    return y if y.ndim == 1 else y.argmax(-1)


def cross_entropy(logits: Any, y: Any, weight: Any = None) -> float:
    """Mean cross-entropy in nats of logits (..., C) for labels, integer (...) or soft (..., C)."""
    from scipy.special import log_softmax

    logits, y, weight = _rows(logits, y, weight)
    logp = log_softmax(logits, -1)
    if y.ndim == 1:
        losses = -np.take_along_axis(logp, y[:, None].astype(np.int64), -1)[:, 0]
    else:  # a masked class has logit -inf, and 0 * inf is not 0
        losses = -np.sum(np.where(y > 0, y.astype(np.float64) * logp, 0.0), -1)
    return float(np.average(losses, weights=weight))


def accuracy(logits: Any, y: Any, weight: Any = None) -> float:
    """Share of rows whose largest logit is the label's; a soft label is its largest entry."""
    from sklearn.metrics import accuracy_score

    logits, y, weight = _rows(logits, y, weight)
    return float(accuracy_score(_hard(y), logits.argmax(-1), sample_weight=weight))


def top_k(logits: Any, y: Any, k: int, weight: Any = None) -> float:
    """Share of rows whose label is among the `k` largest logits; ties go to the smaller class, as in ``argmax``."""
    # Not scikit-learn's: it raises for the -inf of masked classes and for two classes.
    logits, y, weight = _rows(logits, y, weight)
    y = _hard(y)[:, None].astype(np.int64)
    own = np.take_along_axis(logits, y, -1)
    ahead = ~(logits <= own) | ((logits == own) & (np.arange(logits.shape[-1]) < y))  # NaN is ahead of everything
    return float(np.average(ahead.sum(-1) < k, weights=weight))


def confusion_matrix(logits: Any, y: Any, weight: Any = None) -> np.ndarray:
    """Counts (C, C), true class by predicted class: int64, or float64 sums of the weights."""
    from sklearn.metrics import confusion_matrix as count

    logits, y, weight = _rows(logits, y, weight)
    return count(_hard(y), logits.argmax(-1), labels=np.arange(logits.shape[-1]), sample_weight=weight)


def precision_recall_f1(logits: Any, y: Any, weight: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, three float64 arrays (C,).

    0 where a class is only among the labels or only among the predictions; NaN where it is in neither, so that
    ``np.nanmean`` is scikit-learn's macro average.
    """
    from sklearn.metrics import precision_recall_fscore_support

    logits, y, weight = _rows(logits, y, weight)
    y, predicted, classes = _hard(y), logits.argmax(-1), np.arange(logits.shape[-1])
    three = precision_recall_fscore_support(y, predicted, labels=classes, sample_weight=weight, zero_division=0)[:3]
    occurs = np.isin(classes, y) | np.isin(classes, predicted)
    precision, recall, f1 = (np.where(occurs, value, np.nan) for value in three)
    return precision, recall, f1


def expected_calibration_error(logits: Any, y: Any, bins: int = 15, weight: Any = None) -> float:
    """Mean over rows of |accuracy - confidence| in `bins` equal bins of the confidence (Guo et al. 2017), in [0, 1].

    The confidence is the largest probability; bins are closed on the right. NaN where a logit is.
    """
    from scipy.special import softmax

    logits, y, weight = _rows(logits, y, weight)
    confidence = softmax(logits, -1).max(-1)
    if np.isnan(confidence).any():
        return float("nan")
    weight = np.ones(len(confidence)) if weight is None else weight
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = weight * ((_hard(y) == logits.argmax(-1)) - confidence)
    return float(np.abs(np.bincount(place, gap, bins)).sum() / weight.sum())


def _needs(split: dict[str, Any], outputs: dict[str, Any] | None) -> None:
    if "y" not in split:
        raise ValueError(f'split={sorted(split)}: no labels; give the split a leaf "y", or metrics that need none')
    if outputs is not None and "logits" not in outputs:
        raise ValueError(f'outputs={sorted(outputs)}: no "logits" to measure; give metrics of what is predicted')


def classification(top: Sequence[int] = (5,), bins: int = 15, per_class: int = 1000) -> Metrics:
    """Metrics of logits (N, C) for labels ``y`` (N,); soft labels (N, C), and tokens (N, T, V) for (N, T), as well.

    Returns a function to: ``loss`` (mean cross-entropy, nats), ``accuracy``, ``top5`` for each k of `top` below the
    number of classes, ``ece`` (expected calibration error over `bins`), and up to `per_class` classes ``precision``,
    ``recall``, ``f1`` (macro averages over the classes that occur), ``per_class/precision``, ``per_class/recall``,
    ``per_class/f1`` (C,), and ``confusion`` (C, C), counts of true by predicted.

    Raises (the function): ValueError for labels that are missing, of another shape, or beyond the logits.
    """

    def measure(outputs, split):
        _needs(split, outputs)
        logits, y, weight = _rows(outputs["logits"], split["y"], split.get("weight"))
        classes = logits.shape[-1]
        measured = {"loss": cross_entropy(logits, y, weight), "accuracy": accuracy(logits, y, weight)}
        measured |= {f"top{k}": top_k(logits, y, k, weight) for k in top if k < classes}
        measured["ece"] = expected_calibration_error(logits, y, bins, weight)
        if classes <= per_class:
            each = dict(zip(("precision", "recall", "f1"), precision_recall_f1(logits, y, weight), strict=True))
            measured |= {name: float(np.nanmean(value)) for name, value in each.items()}
            measured |= {f"per_class/{name}": value for name, value in each.items()}
            measured["confusion"] = confusion_matrix(logits, y, weight)
        return measured

    def check(split, outputs):
        _needs(split, outputs)
        if outputs is not None:
            y, weight = np.asarray(split["y"]), split.get("weight")
            if weight is not None and y.ndim:
                seen = np.asarray(weight) > 0
                y = y[seen] if seen.ndim <= y.ndim else y
            _in_range(y, outputs["logits"].shape[-1])

    measure.check = check
    return measure


def multilabel(threshold: float = 0.5) -> Metrics:
    """Metrics of logits (N, L) for labels ``y`` (N, L) of 0 and 1, any number of them 1 in a row.

    Returns a function to: ``loss`` (mean binary cross-entropy over rows and labels, nats), ``accuracy`` (rows right in
    every label), ``label_accuracy`` (share of single labels right), ``precision``, ``recall``, ``f1`` (macro, 0 where
    undefined), ``micro_f1``, ``map`` (mean average precision over the labels that occur; NaN if none does) and
    ``per_class/f1`` (L,). A label is predicted where its probability exceeds `threshold`.

    Raises (the function): ValueError for labels that are missing, of another shape, or neither 0 nor 1.
    """

    def measure(outputs, split):
        from scipy.special import expit
        from sklearn import metrics as sk

        _needs(split, outputs)
        logits, y = np.asarray(outputs["logits"]).astype(np.float64), np.asarray(split["y"])
        if y.shape != logits.shape or y.ndim != 2 or not np.isin(y, (0, 1)).all():
            raise ValueError(
                f"y has shape {y.shape} for logits of shape {logits.shape}: give 0 or 1 for each of (N, L)"
            )
        weight = np.asarray(split.get("weight", np.ones(len(y))), np.float64)
        logits, y, weight = logits[weight > 0], y[weight > 0].astype(np.int64), weight[weight > 0]
        predicted = (expit(logits) > threshold).astype(np.int64)
        options = {"sample_weight": weight, "zero_division": 0.0}
        each = sk.precision_recall_fscore_support(y, predicted, average=None, **options)[:3]
        macro = dict(zip(("precision", "recall", "f1"), (float(value.mean()) for value in each), strict=True))
        present = y.any(0)
        sound = present.any() and not np.isnan(logits).any()
        losses = np.logaddexp(0, logits) - y * logits
        return {
            "loss": float(np.average(losses.mean(-1), weights=weight)),
            "accuracy": float(sk.accuracy_score(y, predicted, sample_weight=weight)),
            "label_accuracy": float(np.average((y == predicted).mean(-1), weights=weight)),
            **macro,
            "micro_f1": float(sk.f1_score(y, predicted, average="micro", **options)),
            "map": float(sk.average_precision_score(y[:, present], logits[:, present], sample_weight=weight))
            if sound
            else float("nan"),
            "per_class/f1": each[2],
        }

    measure.check = _needs
    return measure


def regression() -> Metrics:
    """Metrics of predictions ``logits`` (N,), (N, 1) or (N, D) for ``y`` (N,) or (N, D), in the units of ``y``.

    Returns a function to: ``mse``, ``rmse``, ``mae``, means over rows and dimensions, and ``r2``, the mean over
    dimensions of the share of the variance explained. All are NaN where a prediction is not finite, and ``r2`` for
    fewer than two rows.

    Raises (the function): ValueError for targets that are missing or of another shape.
    """

    def measure(outputs, split):
        from sklearn import metrics as sk

        _needs(split, outputs)
        y, predicted = np.asarray(split["y"], np.float64), np.asarray(outputs["logits"]).astype(np.float64)
        if y.size != predicted.size or len(y) != len(predicted):
            raise ValueError(
                f"y has shape {y.shape} for predictions of shape {predicted.shape}: give one target a prediction"
            )
        y, predicted = y.reshape(len(y), -1), predicted.reshape(len(y), -1)
        weight = np.asarray(split.get("weight", np.ones(len(y))), np.float64)
        y, predicted, weight = y[weight > 0], predicted[weight > 0], weight[weight > 0]
        if not np.isfinite(predicted).all():
            return dict.fromkeys(("mse", "rmse", "mae", "r2"), float("nan"))
        mse = float(sk.mean_squared_error(y, predicted, sample_weight=weight))
        r2 = float(sk.r2_score(y, predicted, sample_weight=weight)) if len(y) > 1 else float("nan")
        mae = float(sk.mean_absolute_error(y, predicted, sample_weight=weight))
        return {"mse": mse, "rmse": mse**0.5, "mae": mae, "r2": r2}

    measure.check = _needs
    return measure
