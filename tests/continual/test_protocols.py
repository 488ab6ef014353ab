"""The continual benchmarks: every method with every setting fits its data, and what is published is of their methods."""

import typing

import jax
import numpy as np
import pytest

import paradigms as pd
from experiments.continual import (
    der,
    differences,
    learner,
    permuted_mnist,
    rotated_mnist,
    split_cifar10,
    split_mnist,
    three_scenarios,
)
from paradigms import context, continual, data, nn
from paradigms.objective import check

OF_BUZZEGA = {"permuted": permuted_mnist, "rotated": rotated_mnist, "split": split_mnist, "cifar": split_cifar10}
METHODS = [(name, method) for name, module in OF_BUZZEGA.items() for method in typing.get_args(module.Method)]
IMAGES = {"x": np.zeros((40, 28, 28, 1), np.uint8), "y": np.repeat(np.arange(10, dtype=np.int32), 4)}
BLANK = data.Data("blank", IMAGES, IMAGES, IMAGES, 10, tuple("0123456789"), (0.5,), (0.25,))
TASKS = data.split_classes(BLANK, per_task=2)


def of_split(table):
    return continual.class_incremental(table, continual.every(table))


STREAMS = {
    "permuted": (data.permuted(BLANK, 20), continual.domain_incremental),
    "rotated": (data.rotated(BLANK, 20), continual.domain_incremental),
    "split": (TASKS, of_split),
    "cifar": (TASKS, of_split),
}


def answered(learner, tasks, rules, rows=2):
    """The shape of the answer after one update and one boundary, told what the scenario says: all traced, on the stream."""
    batch = jax.eval_shape(tasks.train(0, rows).opened(jax.random.key(0)).batch, jax.random.key(0), 0)
    batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch)
    objective = continual.told(learner.objective, rules)
    check(objective, batch)
    trainer = pd.Trainer(objective, learner.optimizer, learner.aggregate)
    state = jax.eval_shape(trainer.pure.init, jax.random.key(0), batch)
    state, _ = jax.eval_shape(trainer.pure.step, state, batch)
    stacked = jax.tree.map(lambda leaf: leaf[None], batch)
    state = jax.eval_shape(lambda state: trainer.pure.boundary(state, stacked, "end"), state)
    return jax.eval_shape(trainer.pure.predict, state, batch)["logits"].shape


@pytest.mark.parametrize(("benchmark", "name"), METHODS)
def test_the_settings_of_buzzega_fit(benchmark, name):
    settings, network = OF_BUZZEGA[benchmark].SETTINGS[name], pd.from_nnx(lambda rngs: nn.MLP(hidden=(4, 4), rngs=rngs))
    tasks, scenario = STREAMS[benchmark]
    rules, wrap = scenario(tasks.table), None
    if benchmark == "cifar":
        wrap = lambda objective: pd.augmented(objective, data.augment(data.crop(padding=4), data.flip()))
    different = {}  # programs: rates and weights alone make none
    for buffer in (0,) if name in der.WITHOUT else der.BUFFERS:
        chosen = {"replay": 4, "buffer": buffer, **der.at(settings, buffer)}
        chosen.pop("batch_size", None)
        made = learner.method(
            name, network=network, table=tasks.table, scenario=rules, task_size=8, wrap=wrap, **{**chosen, "buffer": buffer}
        )
        assert made.draws == {"joint": "all", "cumulative": "so far"}.get(name, "task")
        different[chosen["replay"]] = made
    for made in different.values():
        assert answered(made, tasks, rules) == (2, 10)


@pytest.mark.parametrize("scenario", typing.get_args(three_scenarios.ScenarioName))
@pytest.mark.parametrize("name", typing.get_args(three_scenarios.Method))
def test_the_three_scenarios_fit(scenario, name):
    if (name == "xdg" and scenario != "task") or (name == "icarl" and scenario != "class"):
        pytest.skip("is not of this scenario")
    tasks = data.split_classes(BLANK, per_task=2, shuffled=True, shared=scenario == "domain")
    made, outputs = three_scenarios.learner(name, scenario, tasks), 2 if scenario == "domain" else 10
    assert answered(made, tasks, three_scenarios.RULES[scenario](tasks.table)) == (2, outputs)


def test_a_change_that_no_method_takes_is_named():
    with pytest.raises(ValueError, match=r"er: takes no changes, and got \['mix'\]"):
        three_scenarios.learner("er", "class", TASKS, mix=continual.plain)


@pytest.mark.parametrize("benchmark", OF_BUZZEGA)
def test_published_numbers_are_of_methods_with_settings(benchmark):
    module = OF_BUZZEGA[benchmark]
    for label in module.PUBLISHED:
        name, *buffer, metric = label.split("/")
        assert name in module.SETTINGS
        assert metric in ("accuracy", "task accuracy")
        assert buffer == ([] if name in der.WITHOUT else [str(size) for size in der.BUFFERS if [str(size)] == buffer])


def test_the_perceptron_of_buzzega_begins_as_theirs():
    """Uniform within sqrt(6 / (inputs + outputs)), biases at zero."""
    params = der.perceptron().init(jax.random.key(0), BATCH["x"])[0]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 89_610
    shapes = {(784, 100), (100, 100), (100, 10)}
    for leaf in jax.tree.leaves(params):
        bound = np.sqrt(6 / sum(leaf.shape)) if leaf.shape in shapes else 0
        np.testing.assert_allclose(np.abs(leaf).max(), bound, rtol=2e-2)
        np.testing.assert_allclose(np.std(leaf), bound / np.sqrt(3), rtol=5e-2)
    assert shapes <= {leaf.shape for leaf in jax.tree.leaves(params)}


def test_each_case_of_the_differences_changes_what_it_says(monkeypatch):
    seen = {}

    def run(config, tasks, folder, settings, *, prefix, **how):
        seen[prefix] = {name: settings[name] for name in config.methods}
        return {}

    def measured(made, scenario, tasks, folder, label, config):
        objective = made.objective
        params, state = objective.init(jax.random.key(0), BATCH)
        moved = jax.tree.map(lambda leaf: leaf * 1.1, params)
        seen[label] = params, objective.losses(moved, state, BATCH, context(task=1, train=True))[0]
        return {}

    monkeypatch.setattr(differences.der, "run", run)
    monkeypatch.setattr(differences.three_scenarios, "measured", measured)
    for case in typing.get_args(differences.Case):
        differences.changed(case, differences.Config(tasks=2), BLANK, None)
    theirs = permuted_mnist.SETTINGS["oewc"]
    assert seen["penalty/"] == {"oewc": {**theirs, "weight": 8 * theirs["weight"]}}
    kernel = seen["uniform/xdg"][0]["model"]["encoder"]["linear1"]["kernel"]
    np.testing.assert_allclose(np.abs(kernel).max(), 1 / 28, rtol=1e-2)

    def losses(name):
        measured(three_scenarios.learner(name, "class", TASKS), "class", TASKS, None, name, None)
        return seen[name][1]

    for name, loss in seen["terms/lwf"][1].items():
        np.testing.assert_allclose(loss, 2 * losses("lwf")[name], rtol=1e-5)  # 1/t and 1 - 1/t in the second task


BATCH = {"x": np.random.default_rng(0).random((8, 28, 28, 1), np.float32), "y": np.arange(8) % 2, "task": np.zeros(8, int)}


def test_icarl_counts_exemplars_as_one_of_the_union_or_as_the_stream():
    def weights(**changes):
        objective = three_scenarios.learner("icarl", "class", TASKS, **changes).objective
        params, state = objective.init(jax.random.key(0), BATCH)
        few = jax.tree.map(lambda leaf: leaf[None, :4], BATCH)  # half as many as there are examples in a task
        _, state = objective.boundary(params, state, few, context(), "end")
        moved = jax.tree.map(lambda leaf: leaf * 1.1, params)
        stream = {**BATCH, "x": 1 - BATCH["x"]}
        return objective.losses(moved, state, stream, context(task=1, train=True))[0]["distillation"]

    assert weights() != weights(task_size=None)
