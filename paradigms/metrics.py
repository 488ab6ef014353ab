"""Metric functions for `evaluate`, which runs ``trainer.predict`` over a whole split, and what they are made of.

A metric function is ``(outputs, split) -> {name: float or array}`` over the whole-split NumPy arrays of one run:
``outputs["logits"]`` (N, C) and ``split["y"]`` (N,), rows in the same order. `classification`, `multilabel` and
`regression` make such functions; any function of that form will do. Means are over examples, or over tokens where the
logits are (N, T, V) and ``y`` is (N, T). ``split["weight"]``, (N,) or the shape of ``y``, weighs them; 0 is left out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paradigms.evaluation import Metrics


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
        bad, fix = int(y.min() if y.min() < 0 else y.max()), "weight 0 to what should not count"
        raise ValueError(f"y has label {bad} for {classes} logits: give labels 0 to {classes - 1}, or {fix}")


def _predicted(logits: np.ndarray) -> np.ndarray:
    """The class of the largest logit; -1, which is no class, where a logit is NaN: a diverged run predicts nothing."""
    return np.where(np.isnan(logits).any(-1), -1, logits.argmax(-1))


def _hard(y: np.ndarray) -> np.ndarray:
    return y if y.ndim == 1 else y.argmax(-1)


def cross_entropy(logits: Any, y: Any, weight: Any = None) -> float:
    """Mean cross-entropy in nats of logits (..., C) for labels, integer (...) or soft (..., C).

    Args:
      logits: (..., C), of any float dtype; computed in float64.
      y: integer labels (...), 0 to C - 1, or soft labels (..., C), floats.
      weight: (...) or (N,), 0 or more; rows of weight 0 are left out, whatever their label. Default: 1 for every row.

    Raises:
      ValueError: labels of another shape or beyond the logits, or no row of positive weight.
    """
    from scipy.special import log_softmax

    logits, y, weight = _rows(logits, y, weight)
    with np.errstate(invalid="ignore"):  # a diverged run is NaN, not an error of the others trained with it
        logp = log_softmax(logits, -1)
    if y.ndim == 1:
        losses = -np.take_along_axis(logp, y[:, None].astype(np.int64), -1)[:, 0]
    else:  # a masked class has logit -inf, and 0 * inf is not 0
        losses = -np.sum(y.astype(np.float64) * np.where(y > 0, logp, 0.0), -1)
    return float(np.average(losses, weights=weight))


def accuracy(logits: Any, y: Any, weight: Any = None) -> float:
    """Share of rows whose largest logit is the label's; a soft label is its largest entry.

    Args:
      logits: (..., C), of any float dtype; computed in float64.
      y: integer labels (...), 0 to C - 1, or soft labels (..., C), floats.
      weight: (...) or (N,), 0 or more; rows of weight 0 are left out, whatever their label. Default: 1 for every row.

    Raises:
      ValueError: labels of another shape or beyond the logits, or no row of positive weight.
    """
    from sklearn.metrics import accuracy_score

    logits, y, weight = _rows(logits, y, weight)
    return float(accuracy_score(_hard(y), _predicted(logits), sample_weight=weight))


def top_k(logits: Any, y: Any, k: int, weight: Any = None) -> float:
    """Share of rows whose label is among the `k` largest logits; ties go to the smaller class, as in ``argmax``.

    Args:
      logits: (..., C), of any float dtype; computed in float64.
      y: integer labels (...), 0 to C - 1, or soft labels (..., C), floats.
      k: 1 or more; 1 in each row where it is C or more and no logit is NaN.
      weight: (...) or (N,), 0 or more; rows of weight 0 are left out, whatever their label. Default: 1 for every row.

    Raises:
      ValueError: labels of another shape or beyond the logits, or no row of positive weight.
    """
    # Not scikit-learn's: it raises for the -inf of masked classes and for two classes.
    logits, y, weight = _rows(logits, y, weight)
    y = _hard(y)[:, None].astype(np.int64)
    own = np.take_along_axis(logits, y, -1)
    ahead = ~(logits <= own) | ((logits == own) & (np.arange(logits.shape[-1]) < y))  # NaN is ahead of everything
    return float(np.average(ahead.sum(-1) < k, weights=weight))


def confusion_matrix(logits: Any, y: Any, weight: Any = None) -> np.ndarray:
    """Counts (C, C), true class by predicted class: int64, or float64 sums of the weights.

    Args:
      logits: (..., C), of any float dtype; computed in float64.
      y: integer labels (...), 0 to C - 1, or soft labels (..., C), floats.
      weight: (...) or (N,), 0 or more; rows of weight 0 are left out, whatever their label. Default: 1 for every row.

    Raises:
      ValueError: labels of another shape or beyond the logits, or no row of positive weight.
    """
    from sklearn.metrics import confusion_matrix as count

    logits, y, weight = _rows(logits, y, weight)
    return count(_hard(y), _predicted(logits), labels=np.arange(logits.shape[-1]), sample_weight=weight)


def precision_recall_f1(logits: Any, y: Any, weight: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, three float64 arrays (C,).

    0 where a class is only among the labels or only among the predictions; NaN where it is in neither, so that
    ``np.nanmean`` is scikit-learn's macro average.

    Args:
      logits: (..., C), of any float dtype; computed in float64.
      y: integer labels (...), 0 to C - 1, or soft labels (..., C), floats.
      weight: (...) or (N,), 0 or more; rows of weight 0 are left out, whatever their label. Default: 1 for every row.

    Raises:
      ValueError: labels of another shape or beyond the logits, or no row of positive weight.
    """
    from sklearn.metrics import precision_recall_fscore_support

    logits, y, weight = _rows(logits, y, weight)
    y, predicted, classes = _hard(y), _predicted(logits), np.arange(logits.shape[-1])
    three = precision_recall_fscore_support(y, predicted, labels=classes, sample_weight=weight, zero_division=0.0)[:3]  # pyright: ignore[reportArgumentType]
    occurs = np.isin(classes, y) | np.isin(classes, predicted)
    precision, recall, f1 = (np.where(occurs, value, np.nan) for value in three)
    return precision, recall, f1


def expected_calibration_error(logits: Any, y: Any, bins: int = 15, weight: Any = None) -> float:
    """Mean over rows of |accuracy - confidence| in `bins` equal bins of the confidence (Guo et al. 2017), in [0, 1].

    The confidence is the largest probability; bins are closed on the right. NaN where a logit is.

    Args:
      logits: (..., C), of any float dtype; computed in float64.
      y: integer labels (...), 0 to C - 1, or soft labels (..., C), floats.
      bins: 1 or more.
      weight: (...) or (N,), 0 or more; rows of weight 0 are left out, whatever their label. Default: 1 for every row.

    Raises:
      ValueError: labels of another shape or beyond the logits, or no row of positive weight.
    """
    from scipy.special import softmax

    logits, y, weight = _rows(logits, y, weight)
    with np.errstate(invalid="ignore"):
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

    Args:
      top: the k of ``top5`` and the like, 1 or more; those of C or more are left out.
      bins: of the calibration error, 1 or more.
      per_class: the most classes for which the metrics of single classes are computed.

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
            y, seen = np.asarray(split["y"]), np.asarray(split.get("weight", np.ones(len(split["y"])))) > 0
            _in_range(y[seen], outputs["logits"].shape[-1])

    measure.check = check
    return measure


def multilabel(threshold: float = 0.5) -> Metrics:
    """Metrics of logits (N, L) for labels ``y`` (N, L) of 0 and 1, any number of them 1 in a row.

    Returns a function to: ``loss`` (mean binary cross-entropy over rows and labels, nats), ``accuracy`` (rows right in
    every label), ``label_accuracy`` (single labels right), ``precision``, ``recall``, ``f1`` (macro, 0 where
    undefined), ``micro_f1``, ``map`` (mean average precision over the labels that occur; NaN if none does, or where
    a logit is not finite) and ``per_class/f1`` (L,). A label is predicted where its probability exceeds `threshold`.

    Args:
      threshold: a probability, in [0, 1].

    Raises (the function): ValueError for labels that are missing, of another shape, or neither 0 nor 1.
    """

    def measure(outputs, split):
        from scipy.special import expit
        from sklearn import metrics as sk

        logits, y, weight = _columns(outputs, split)
        if not np.isin(y, (0, 1)).all():
            raise ValueError("y has values other than 0 and 1: give 1 for each label that applies")
        y, predicted = y.astype(np.int64), (expit(logits) > threshold).astype(np.int64)
        options = {"sample_weight": weight, "zero_division": 0.0}
        each = sk.precision_recall_fscore_support(y, predicted, average=None, **options)[:3]
        occurs, mean_ap = y.any(0), float("nan")
        if occurs.any() and np.isfinite(logits).all():
            mean_ap = float(sk.average_precision_score(y[:, occurs], logits[:, occurs], sample_weight=weight))
        with np.errstate(invalid="ignore"):
            losses = np.logaddexp(0, logits) - y * logits
        return {
            "loss": float(np.average(losses.mean(-1), weights=weight)),
            "accuracy": float(sk.accuracy_score(y, predicted, sample_weight=weight)),
            "label_accuracy": float(np.average((y == predicted).mean(-1), weights=weight)),
            **{name: float(np.mean(value)) for name, value in zip(("precision", "recall", "f1"), each, strict=True)},
            "micro_f1": float(sk.f1_score(y, predicted, average="micro", **options)),
            "map": mean_ap,
            "per_class/f1": each[2],
        }

    measure.check = _needs
    return measure


def regression() -> Metrics:
    """Metrics of predictions ``logits`` (N,), (N, 1) or (N, D) for ``y`` (N,) or (N, D), in the units of ``y``.

    Returns a function to: ``mse``, ``rmse``, ``mae``, means over rows and dimensions, and ``r2``, the mean over
    dimensions of the share of variance explained. NaN where a prediction is; ``r2`` also for fewer than two rows.

    Raises (the function): ValueError for targets that are missing or of another shape.
    """

    def measure(outputs, split):
        from sklearn import metrics as sk

        predicted, y, weight = _columns(outputs, split)
        if not np.isfinite(predicted).all():
            return {name: float("nan") for name in ("mse", "rmse", "mae", "r2")}
        mse = float(sk.mean_squared_error(y, predicted, sample_weight=weight))
        r2 = float(sk.r2_score(y, predicted, sample_weight=weight)) if len(y) > 1 else float("nan")
        mae = float(sk.mean_absolute_error(y, predicted, sample_weight=weight))
        return {"mse": mse, "rmse": mse**0.5, "mae": mae, "r2": r2}

    measure.check = _needs
    return measure


def _columns(outputs: dict, split: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions (M, D), targets (M, D) and weights (M,), rows of weight 0 left out."""
    _needs(split, outputs)
    logits, y = np.asarray(outputs["logits"]).astype(np.float64), np.asarray(split["y"]).astype(np.float64)
    if len(y) != len(logits) or (logits.shape[1:] or (1,)) != (y.shape[1:] or (1,)):
        raise ValueError(f"y has shape {y.shape} for outputs of shape {logits.shape}: give one value for each output")
    weight = np.asarray(split.get("weight", np.ones(len(y))), np.float64)
    if not (seen := weight > 0).any():
        raise ValueError("weight is 0 for every example: give one example a positive weight")
    return logits.reshape(len(y), -1)[seen], y.reshape(len(y), -1)[seen], weight[seen]
