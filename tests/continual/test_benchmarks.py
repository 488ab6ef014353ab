"""The continual benchmarks: every method with every setting fits its data, and what is published is of their methods."""

import typing

import jax
import numpy as np
import pytest
from flax import nnx

import paradigms as pd
from experiments.continual import der, learner, permuted_mnist, rotated_mnist, split_cifar10, split_mnist, three_scenarios
from paradigms import context, continual, data, nn
from paradigms.objective import check

OF_BUZZEGA = {"permuted": permuted_mnist, "rotated": rotated_mnist, "split": split_mnist, "cifar": split_cifar10}
METHODS = [(name, method) for name, module in OF_BUZZEGA.items() for method in typing.get_args(module.Method)]
IMAGES = {"x": np.zeros((40, 28, 28, 1), np.uint8), "y": np.repeat(np.arange(10, dtype=np.int32), 4)}
BLANK = data.Data("blank", IMAGES, IMAGES, IMAGES, 10, tuple("0123456789"), (0.5,), (0.25,))
TASKS = data.split_classes(BLANK, per_task=2)


def fits(objective, tasks, rules, rows=2):
    """Traced as it is trained: told what the scenario says, on the stream's batches."""
    batch = jax.eval_shape(tasks.train(0, rows).opened(jax.random.key(0)).batch, jax.random.key(0), 0)
    check(continual.told(objective, rules), jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch))


@pytest.mark.parametrize(("benchmark", "name"), METHODS)
def test_the_settings_of_buzzega_fit(benchmark, name):
    settings, network = OF_BUZZEGA[benchmark].SETTINGS[name], pd.from_nnx(lambda rngs: nn.MLP(rngs=rngs))
    rules = continual.class_incremental(TASKS.table, continual.every(TASKS.table))
    for buffer in (0,) if name in der.WITHOUT else der.BUFFERS:
        chosen = {"replay": 4, "buffer": buffer, **der.at(settings, buffer)}
        chosen.pop("batch_size", None)
        made = learner.method(name, network=network, table=TASKS.table, scenario=rules, task_size=8, **chosen)
        fits(made.objective, TASKS, rules)
        assert made.draws == {"joint": "all", "cumulative": "so far"}.get(name, "task")


@pytest.mark.parametrize("scenario", typing.get_args(three_scenarios.ScenarioName))
@pytest.mark.parametrize("name", typing.get_args(three_scenarios.Method))
def test_the_three_scenarios_fit(scenario, name):
    if (name == "xdg" and scenario != "task") or (name == "icarl" and scenario != "class"):
        pytest.skip("is not of this scenario")
    tasks = data.split_classes(BLANK, per_task=2, shuffled=True, shared=scenario == "domain")
    fits(three_scenarios.learner(name, scenario, tasks).objective, tasks, three_scenarios.RULES[scenario](tasks.table))


@pytest.mark.parametrize("benchmark", OF_BUZZEGA)
def test_published_numbers_are_of_methods_with_settings(benchmark):
    module = OF_BUZZEGA[benchmark]
    for label in module.PUBLISHED:
        name, *buffer, metric = label.split("/")
        assert name in module.SETTINGS
        assert metric in ("accuracy", "task accuracy")
        assert buffer == ([] if name in der.WITHOUT else [str(size) for size in der.BUFFERS if [str(size)] == buffer])


def test_a_change_to_a_benchmark_is_the_only_one():
    """What `differences` changes reaches the learner: the same initial losses but for it."""
    batch = {"x": np.random.default_rng(0).random((8, 28, 28, 1), np.float32), "y": np.arange(8) % 2, "task": np.zeros(8, int)}

    def first(name, scenario, task=1, **changes):
        objective = three_scenarios.learner(name, scenario, TASKS, **changes).objective
        params, state = objective.init(jax.random.key(0), batch)
        moved = jax.tree.map(lambda leaf: leaf * 1.1, params)
        return objective.losses(moved, state, batch, context(task=task, train=True))[0]

    theirs, plain = first("lwf", "class"), first("lwf", "class", mix=continual.plain)
    np.testing.assert_allclose(plain["supervised"], 2 * theirs["supervised"], rtol=1e-5)  # 1/t and 1 - 1/t in the second task
    np.testing.assert_allclose(plain["lwf"], 2 * theirs["lwf"], rtol=1e-5)
    network = pd.from_nnx(lambda rngs: nn.MLP(784, (400, 400), kernel_init=nnx.initializers.zeros, rngs=rngs))
    np.testing.assert_allclose(first("none", "class", network=network)["supervised"], np.log(4), rtol=1e-5)
