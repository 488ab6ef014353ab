"""The few-shot benchmarks: every method with every setting fits its data, without training anything."""

import json
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.meta import cifar_fs, omniglot
from paradigms import data
from paradigms.objective import check

CLASSES = Path(omniglot.__file__).parent / "classes"


def images(shape, classes=64, each=20):
    rows = classes * each
    split = {"x": np.zeros((rows, *shape), np.uint8), "y": np.repeat(np.arange(classes, dtype=np.int32), each)}
    names = tuple(map(str, range(classes)))
    return data.Data("blank", split, split, split, classes, names, (0.5,) * shape[-1], (0.25,) * shape[-1])


def steps_of(learner):
    """The numbers of inner steps that are tested, after the learner was traced on its own batches."""
    batch = jax.eval_shape(learner.source.batch, jax.random.key(0), 0)
    check(learner.objective, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch))
    return learner.steps


@pytest.mark.parametrize("method", typing.get_args(omniglot.Method))
def test_omniglot(method):
    steps = steps_of(omniglot.learner(omniglot.Config(tier="paper", methods=(method,)), images((28, 28, 1)), method))
    reported = {"protonet": None, "imaml": 16, "reptile": 5, "meta_sgd": 1}.get(method, 3)
    assert (steps and steps[0]) == reported


@pytest.mark.parametrize("method", ["maml", "anil", "protonet", "ridge"])
def test_cifar_fs(method):
    steps = steps_of(cifar_fs.learner(cifar_fs.Config(methods=(method,), shots=5), images((32, 32, 3)), method))
    assert (steps and steps[0]) == (10 if method in ("maml", "anil") else None)


def test_cifar_fs_splits_the_hundred_classes():
    classes = json.loads((CLASSES / "cifar_fs.json").read_text())
    assert len({name for names in classes.values() for name in names}) == 100
