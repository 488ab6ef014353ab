"""Families: sinusoids read back by least squares, keys, and functions that make no episode."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paradigms import data

TASKS = 256


@pytest.fixture(scope="module")
def drawn():
    source = data.sinusoids(shots=10, queries=6, tasks=TASKS)
    return jax.tree.map(np.asarray, source.batch(jax.random.key(0), 3))


def test_shapes_and_dtypes(drawn):
    for part, rows in (("support", 10), ("query", 6)):
        for leaf in ("x", "y"):
            assert (drawn[part][leaf].shape, drawn[part][leaf].dtype) == ((TASKS, rows, 1), np.float32)


def test_a_task_is_one_sinusoid_in_its_ranges(drawn):
    x, y = (np.concatenate([drawn[part][leaf][..., 0] for part in ("support", "query")], 1).astype(float) for leaf in "xy")
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5
    amplitudes, phases = [], []
    for inputs, targets in zip(x, y, strict=True):  # A sin(x - phi) = A cos(phi) sin x - A sin(phi) cos x
        basis = np.stack([np.sin(inputs), -np.cos(inputs)], 1)
        (u, v), *_ = np.linalg.lstsq(basis, targets)
        np.testing.assert_allclose(basis @ [u, v], targets, atol=1e-5)
        amplitudes.append(math.hypot(u, v))
        phases.append(math.atan2(v, u))
    for values, low, high in ((amplitudes, 0.1, 5), (phases, 0, math.pi)):
        assert low - 1e-4 < min(values) < max(values) < high + 1e-4
        counts, _ = np.histogram(values, 8, (low - 1e-4, high + 1e-4))
        assert ((counts - TASKS / 8) ** 2 / (TASKS / 8)).sum() < 27  # chi-squared of 7 degrees of freedom, p = 3e-4


def test_fixed_parameters():
    source = data.sinusoids(shots=2, queries=3, tasks=4, amplitude=(2, 2), phase=(0.5, 0.5), inputs=(0, 1))
    query = source.batch(jax.random.key(1), 0)["query"]
    np.testing.assert_allclose(query["y"], 2 * np.sin(np.asarray(query["x"]) - 0.5), atol=1e-6)


def test_every_task_of_every_step_has_its_own_key_and_repeats():
    source = data.task_family(_keys, 5)
    keys = [np.asarray(source.batch(jax.random.key(0), step)["query"]["x"]) for step in (0, 1, 0)]
    assert keys[0].shape == (5, 1, 2)
    assert len({row.tobytes() for row in np.concatenate(keys)}) == 10
    np.testing.assert_array_equal(keys[0], keys[2])
    assert not np.array_equal(keys[0], source.batch(jax.random.key(1), 0)["query"]["x"])


def _keys(key):
    rows = {"x": jax.random.key_data(key)[None]}
    return {"support": rows, "query": rows}


def test_sources_built_alike_share_a_program():
    make = lambda: (data.sinusoids(shots=2, queries=1, tasks=3), data.task_family(_keys, 3))
    assert [source.get for source in make()] == [source.get for source in make()]
    draw = jax.jit(lambda source, step: source.batch(jax.random.key(0), step))
    for source in (*make(), *make()):
        draw(source, 0)
    assert draw._cache_size() == 2


ROWS = {"x": jnp.zeros((3, 1))}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (ROWS, r"the leaves \['x'\], must return"),
        ((ROWS, ROWS), "a tuple, must return"),
        ({"support": ROWS, "query": ROWS["x"]}, "as 'query', must be a dict"),
        ({"support": {}, "query": ROWS}, "'support' of shapes {}"),
        ({"support": {**ROWS, "y": jnp.zeros(())}, "query": ROWS}, "'support' of shapes .* examples first"),
        ({"support": {**ROWS, "y": jnp.zeros(2)}, "query": ROWS}, "'support' of shapes .* as many rows"),
    ],
)
def test_a_function_that_makes_no_episode_is_refused_at_once(found, message):
    with pytest.raises(ValueError, match=message):
        data.task_family(lambda key: found, 2)


def test_what_cannot_be_drawn_is_refused():
    for bad in (None, ROWS):
        with pytest.raises(TypeError, match="must be a function key ->"):
            data.task_family(bad, 2)
    with pytest.raises(ValueError, match="tasks=0: must be an integer, 1 or more"):
        data.task_family(_keys, 0)
    shape = {"shots": 1, "queries": 1, "tasks": 1}
    for change, message in (
        ({"shots": 0}, "shots=0: must be"),
        ({"queries": 1.0}, "queries=1.0: must be an integer"),
        ({"amplitude": (5, 1)}, r"amplitude is \(5, 1\), must be two finite numbers"),
        ({"phase": 3.0}, "phase is 3.0"),
        ({"inputs": (0, math.inf)}, "inputs is"),
    ):
        with pytest.raises(ValueError, match=message):
            data.sinusoids(**{**shape, **change})
