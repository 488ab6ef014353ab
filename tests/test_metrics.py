"""Whole-split evaluation is exact, and every metric equals a derivation by loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paradigms import metrics
from paradigms.evaluation import evaluate, interval


class Linear:
    """Logits ``x @ state``: a trainer as `evaluate` sees it, which counts its traces and calls."""

    def __init__(self, runs=None):
        self.runs, self.traces, self.batches = runs, 0, []
        self._predict = jax.jit(self._compute)

    def _compute(self, state, batch):
        self.traces += 1
        one = lambda weights: {"logits": batch["x"] @ weights, "features": batch["x"]}
        return one(state) if self.runs is None else jax.vmap(one)(state)

    def predict(self, state, batch):
        self.batches.append(batch)
        return self._predict(state, batch)


def data(count=37, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3)).astype(np.float32)
    return {"x": x, "y": rng.integers(0, classes, count)}, rng.normal(size=(3, classes)).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 8, 16, 37, 512])
def test_evaluate_is_exact_for_any_batch_size_and_compiles_once(batch_size):
    split, weights = data()
    trainer, seen = Linear(), {}

    def keep(outputs, whole):
        seen.update(outputs)
        return metrics.classification()(outputs, whole)

    measured = evaluate(trainer, weights, split, keep, batch_size)
    assert trainer.traces == 1
    np.testing.assert_allclose(seen["logits"], split["x"] @ weights, rtol=1e-5, atol=1e-6)
    assert seen["features"].shape == split["x"].shape
    expected = metrics.classification()({"logits": split["x"] @ weights}, split)
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert measured["accuracy"] == expected["accuracy"]
    np.testing.assert_array_equal(measured["confusion"], expected["confusion"])


def test_padding_has_weight_zero_and_rows_of_the_split():
    split, weights = data(count=11)
    split["weight"] = np.arange(1, 12, dtype=np.float32)
    trainer = Linear()
    evaluate(trainer, weights, split, metrics.classification(), batch_size=8)
    first, last = (jax.device_get(batch) for batch in trainer.batches)
    np.testing.assert_array_equal(first["weight"], split["weight"][:8])
    np.testing.assert_array_equal(last["weight"], [9, 10, 11, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(last["x"][3:], split["x"][:5])


def test_runs_are_measured_one_by_one():
    split, weights = data()
    stacked = np.stack([weights, -weights, 2 * weights])
    together = evaluate(Linear(runs=3), stacked, split, metrics.classification(), batch_size=16)
    assert together["confusion"].shape == (3, 4, 4)
    for run in range(3):
        alone = evaluate(Linear(), stacked[run], split, metrics.classification(), batch_size=16)
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][run], value, rtol=1e-5, err_msg=name)


def test_evaluate_takes_device_arrays_and_holds_only_the_outputs_asked_for():
    split, weights = data()
    seen = evaluate(Linear(), weights, jax.tree.map(jnp.asarray, split), lambda o, s: {"n": sorted(o)}, outputs=["logits"])
    assert seen == {"n": ["logits"]}


def test_evaluate_makes_only_explicit_transfers():
    split, weights = data()
    split["y"], weights = split["y"].astype(np.int32), jax.device_put(weights)
    with jax.transfer_guard("disallow"):
        evaluate(Linear(), weights, split, metrics.classification(), batch_size=16)


def test_errors_come_before_the_work():
    split, weights = data()
    run = lambda split, **options: evaluate(trainer, weights, split, metrics.classification(), **options)
    trainer = Linear()
    with pytest.raises(ValueError, match="no examples"):
        run({"x": split["x"][:0], "y": split["y"][:0]})
    with pytest.raises(ValueError, match="no examples"):
        run({})
    with pytest.raises(ValueError, match="differ in length"):
        run({"x": split["x"], "y": split["y"][:5]})
    with pytest.raises(ValueError, match="batch_size=0"):
        run(split, batch_size=0)
    with pytest.raises(ValueError, match='leaf "y"'):
        run({"x": split["x"]})
    assert not trainer.batches
    with pytest.raises(ValueError, match="label 4 for 4 logits"):
        run({**split, "y": split["y"] + 1}, batch_size=8)
    with pytest.raises(ValueError, match="'attention'"):
        run(split, outputs=["attention"], batch_size=8)
    assert len(trainer.batches) == 2


def by_loops(logits, y, weight):
    """Loss, accuracy, top 2, confusion and calibration error, one row after the other."""
    classes = logits.shape[1]
    loss = right = near = 0.0
    confusion, bins = np.zeros((classes, classes)), [[0.0, 0.0, 0.0] for _ in range(5)]
    for row, label, w in zip(logits, y, weight, strict=True):
        p = [math.exp(v) / sum(math.exp(u) for u in row) for v in row]
        guess = max(range(classes), key=lambda c: p[c])
        loss -= w * math.log(p[label])
        right += w * (guess == label)
        near += w * (label in sorted(range(classes), key=lambda c: -p[c])[:2])
        confusion[label, guess] += w
        place = next(b for b in range(5) if b / 5 < p[guess] <= (b + 1) / 5)
        for i, value in enumerate((w, w * (guess == label), w * p[guess])):
            bins[place][i] += value
    n = sum(weight)
    ece = sum(abs(hits / size - sure / size) * size / n for size, hits, sure in bins if size)
    return loss / n, right / n, near / n, confusion, ece


@pytest.mark.parametrize("weighted", [False, True])
def test_classification_equals_loops(weighted):
    rng = np.random.default_rng(1)
    logits, y = rng.normal(size=(60, 4)) * 2, rng.integers(0, 4, 60)
    weight = rng.integers(0, 3, 60).astype(float) if weighted else np.ones(60)
    split = {"y": y, "weight": weight} if weighted else {"y": y}
    found = metrics.classification(top=(2, 4, 9), bins=5)({"logits": logits}, split)
    loss, right, near, confusion, ece = by_loops(logits, y, weight)
    assert found["loss"] == pytest.approx(loss)
    assert found["accuracy"] == pytest.approx(right)
    assert found["top2"] == pytest.approx(near)
    assert "top4" not in found
    assert "top9" not in found
    assert found["ece"] == pytest.approx(ece)
    np.testing.assert_allclose(found["confusion"], confusion)
    hits = np.diag(confusion)
    precision, recall = hits / confusion.sum(0), hits / confusion.sum(1)
    f1 = 2 * precision * recall / (precision + recall)
    for name, value in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(found[f"per_class/{name}"], value)
        assert found[name] == pytest.approx(value.mean())


def test_weight_zero_equals_leaving_out_even_with_no_valid_label():
    rng = np.random.default_rng(2)
    logits, y = rng.normal(size=(20, 3)), rng.integers(0, 3, 20)
    weight = (np.arange(20) % 4 > 0).astype(np.float32)
    kept = weight > 0
    measure = metrics.classification(top=(2,))
    found = measure({"logits": logits}, {"y": np.where(kept, y, -1), "weight": weight})
    expected = measure({"logits": logits[kept]}, {"y": y[kept]})
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name)
    with pytest.raises(ValueError, match="weight is 0"):
        measure({"logits": logits}, {"y": y, "weight": 0 * weight})


def test_tokens_are_rows():
    rng = np.random.default_rng(3)
    logits, y = rng.normal(size=(6, 5, 3)), rng.integers(0, 3, (6, 5))
    weight = rng.integers(0, 2, (6, 5))
    measure = metrics.classification()
    found = measure({"logits": logits}, {"y": y})
    assert found["loss"] == pytest.approx(metrics.cross_entropy(logits.reshape(30, 3), y.reshape(30)))
    assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == y))
    found = measure({"logits": logits}, {"y": y, "weight": weight})
    assert found["accuracy"] == pytest.approx(np.mean((logits.argmax(-1) == y)[weight > 0]))
    whole = metrics.accuracy(logits, y, np.arange(6))
    assert whole == pytest.approx(np.average((logits.argmax(-1) == y).mean(-1), weights=np.arange(6)))


def test_soft_labels_and_masked_classes():
    rng = np.random.default_rng(4)
    logits, y = rng.normal(size=(9, 3)), rng.integers(0, 3, 9)
    hard = np.eye(3)[y]
    assert metrics.cross_entropy(logits, hard) == pytest.approx(metrics.cross_entropy(logits, y))
    soft = 0.9 * hard + 0.1 / 3
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert metrics.cross_entropy(logits, soft) == pytest.approx(-np.mean(np.sum(soft * logp, -1)))
    assert metrics.accuracy(logits, soft) == metrics.accuracy(logits, y)
    masked = np.concatenate([logits, np.full((9, 1), -np.inf)], 1)
    assert metrics.cross_entropy(masked, y) == pytest.approx(metrics.cross_entropy(logits, y))
    assert metrics.cross_entropy(masked, np.eye(4)[y]) == pytest.approx(metrics.cross_entropy(logits, y))
    assert metrics.top_k(masked, y, 2) == metrics.top_k(logits, y, 2)
    with pytest.raises(ValueError, match="shape"):
        metrics.accuracy(logits, y[:, None])


def test_top_k_of_ties_and_nan():
    assert metrics.top_k(np.zeros((3, 3)), np.arange(3), 1) == pytest.approx(1 / 3)
    assert metrics.top_k(np.zeros((3, 3)), np.arange(3), 2) == pytest.approx(2 / 3)
    assert metrics.top_k(np.full((3, 3), np.nan), np.arange(3), 2) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_run_measures_nan_and_does_not_raise(value):
    logits = np.full((4, 3), value)
    found = metrics.classification()({"logits": logits}, {"y": np.array([0, 1, 2, 0])})
    assert np.isnan(found["loss"])
    assert np.isnan(found["ece"])
    assert np.isnan(metrics.regression()({"logits": logits}, {"y": np.zeros((4, 3))})["mse"])
    assert np.isnan(metrics.multilabel()({"logits": logits}, {"y": np.ones((4, 3))})["map"])


def test_a_class_that_does_not_occur_is_nan_and_outside_the_macro_average():
    logits, y = 5 * np.eye(4)[[0, 1, 1]], np.array([0, 1, 2])
    precision, recall, f1 = metrics.precision_recall_f1(logits, y)
    np.testing.assert_allclose(precision, [1, 0.5, 0, np.nan])
    np.testing.assert_allclose(recall, [1, 1, 0, np.nan])
    np.testing.assert_allclose(f1, [1, 2 / 3, 0, np.nan])
    assert metrics.classification()({"logits": logits}, {"y": y})["f1"] == pytest.approx((1 + 2 / 3) / 3)


def test_many_classes_have_no_matrix():
    found = metrics.classification(per_class=2)({"logits": np.eye(3)}, {"y": np.arange(3)})
    assert sorted(found) == ["accuracy", "ece", "loss"]


def test_multilabel_equals_loops():
    rng = np.random.default_rng(5)
    logits, y = rng.normal(size=(30, 3)), rng.integers(0, 2, (30, 3))
    found = metrics.multilabel(0.6)({"logits": logits}, {"y": y})
    p = 1 / (1 + np.exp(-logits))
    guess = p > 0.6
    assert found["loss"] == pytest.approx(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))
    assert found["accuracy"] == pytest.approx(np.mean([all(g == t) for g, t in zip(guess, y, strict=True)]))
    assert found["label_accuracy"] == pytest.approx(np.mean(guess == y))
    f1 = [2 * (guess & (y > 0))[:, c].sum() / (guess[:, c].sum() + y[:, c].sum()) for c in range(3)]
    np.testing.assert_allclose(found["per_class/f1"], f1)
    precisions = []
    for c in range(3):
        hits = y[np.argsort(-p[:, c]), c]
        precisions.append(np.sum(hits * np.cumsum(hits) / np.arange(1, 31)) / hits.sum())
    assert found["map"] == pytest.approx(np.mean(precisions))
    with pytest.raises(ValueError, match="other than 0 and 1"):
        metrics.multilabel()({"logits": logits}, {"y": y + 1})


@pytest.mark.parametrize("shape", [(25,), (25, 1), (25, 2)])
def test_regression_equals_its_definition(shape):
    rng = np.random.default_rng(6)
    y, predicted = rng.normal(size=shape), rng.normal(size=shape)
    flat = y.reshape(25) if shape == (25, 1) else y
    found = metrics.regression()({"logits": predicted}, {"y": flat})
    assert found["mse"] == pytest.approx(np.mean((y - predicted) ** 2))
    assert found["rmse"] == pytest.approx(np.sqrt(found["mse"]))
    assert found["mae"] == pytest.approx(np.mean(np.abs(y - predicted)))
    r2 = 1 - np.sum((y - predicted) ** 2, 0) / np.sum((y - y.mean(0)) ** 2, 0)
    assert found["r2"] == pytest.approx(np.mean(r2))
    with pytest.raises(ValueError, match="one value for each output"):
        metrics.regression()({"logits": predicted}, {"y": y[:-1]})


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3), rel=1e-6)  # t table, 2 degrees
    assert interval(3.0) == (3.0, None)
    assert interval([0.5]) == (0.5, None)
    assert interval([2.0, 2.0]) == (2.0, 0.0)
    assert np.isnan(interval([1.0, np.nan])).all()
    with pytest.raises(ValueError, match="one number a seed"):
        interval([])
    with pytest.raises(ValueError, match="one number a seed"):
        interval(np.zeros((2, 2)))


def test_interval_covers_the_mean_in_95_percent_of_samples():
    samples = np.random.default_rng(7).normal(size=(1000, 4))
    covered = [abs(mean) <= half for mean, half in map(interval, samples)]
    assert 0.93 < np.mean(covered) < 0.97


def test_bfloat16_logits():
    logits = jnp.asarray([[1.0, 2.0], [3.0, 0.5]], jnp.bfloat16)
    assert metrics.accuracy(np.asarray(logits), np.array([1, 0])) == 1.0
    assert metrics.cross_entropy(np.asarray(logits), np.asarray(jax.nn.one_hot(jnp.array([1, 0]), 2, dtype=jnp.bfloat16))) > 0
