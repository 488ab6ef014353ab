"""Few-shot evaluation against single calls: the axes of its scores, their intervals, and what an answer may see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from paradigms import Objective, Trainer, context, from_functions, from_nnx, maml, meta, nn, supervised, vectorize
from paradigms.data import Source, episodes

TASKS, WAYS, SHOTS, QUERIES = 3, 3, 2, 4


def source(rng):
    """Four batches, one after the other."""

    def part(rows):
        y = np.tile(np.repeat(np.arange(WAYS, dtype=np.int32), rows), (4, TASKS, 1))
        x = np.take_along_axis(centres, y[..., None], 2) + rng.normal(size=(*y.shape, 2))
        return {"x": x.astype(np.float32), "y": y}

    centres = rng.normal(size=(4, TASKS, WAYS, 2))
    batches = {"support": part(SHOTS), "query": part(QUERIES)}
    return Source(batches, lambda arrays, key, step: jax.tree.map(lambda leaf: jnp.asarray(leaf)[step], arrays), 4, TASKS)


def sampled(rng):
    y = np.repeat(np.arange(6), 8)
    x = (rng.normal(size=(6, 2))[y] + rng.normal(size=(48, 2))).astype(np.float32)
    return episodes({"x": x, "y": y}, ways=WAYS, shots=SHOTS, queries=QUERIES, tasks=TASKS)


def linear():
    def init(key, x):
        return {"w": 0.1 * jax.random.normal(key, (2, WAYS)), "c": jnp.zeros(WAYS)}

    return supervised(from_functions(init, lambda p, x: x @ p["w"] + p["c"][None]))


class Coupled(nnx.Module):
    """Rows see each other through the statistics of the batch at hand."""

    def __init__(self, rngs):
        self.norm, self.head = nn.CurrentBatchNorm(2), nnx.Linear(2, WAYS, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


def coupled():
    return supervised(from_nnx(lambda rngs: Coupled(rngs)))


def learner(child, steps=2):
    return maml(child, optax.sgd(1.0), steps)


def started(objective, batches, seed=0):
    init = jax.jit(Trainer(objective, optax.sgd(0.1)).pure.init)  # no evaluation asks for the losses that init would check
    return init(jax.random.key(seed), batches.batch(jax.random.key(0), 0))


def kept(batches):
    """The source, and a list in which the batches it gives come to lie with their numbers."""
    seen = []

    def get(arrays, key, step):
        batch = batches.get(arrays, key, step)
        jax.debug.callback(lambda step, batch: seen.append((int(step), batch)), step, batch)
        return batch

    return Source(batches.arrays, get, batches.size, batches.batch_size), seen


def accuracies(outputs, batch):
    y = np.asarray(batch["query"]["y"])
    return (np.argmax(outputs["logits"], -1).reshape(y.shape) == y).mean(1)


def errors(outputs, query):
    """A metric that no two answers share: the mean cross-entropy."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(outputs["logits"], query["y"]).mean()


def entropies(logits, y):
    logits = np.asarray(logits, np.float64)
    return -np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), y[..., None], -1)[..., 0]


def fresh(seen):
    """The batches of one evaluation in order, each once."""
    jax.effects_barrier()
    return [dict(seen)[number] for number in sorted(dict(seen))]


def test_scores_of_every_number_of_steps_are_those_of_single_calls(rng):
    batches, seen = kept(source(rng))
    make = lambda steps: learner(linear(), steps)
    state = started(make(1), source(rng))
    steps = (0, 1, 5)
    found = meta.evaluate_episodes(make, state, batches, steps=steps, tasks=7, metric=errors)
    told = fresh(seen)
    assert len(told) == 3  # seven tasks, three a batch
    expected = []
    for k in steps:
        predict = jax.jit(make(k).predict)
        of = []
        for batch in told:
            logits = predict(state.params, state.state, batch, context())[0]["logits"].reshape(TASKS, -1, WAYS)
            of += list(entropies(logits, np.asarray(batch["query"]["y"])).mean(1))
        expected.append(of[:7])
    for scores in found.values():  # rows do not see each other: both answers are the same
        assert scores.values.shape == (3, 7)
        np.testing.assert_allclose(scores.values, expected, rtol=1e-4)
        assert np.abs(np.diff(scores.values, axis=0)).min() > 1e-4  # every number of steps counts
        for line, mean, half in zip(expected, scores.mean, scores.interval95, strict=True):
            low, high = stats.t.interval(0.95, 6, np.mean(line), stats.sem(line))
            np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-4)


def test_the_score_of_an_objective_is_its_accuracy(rng):
    batches, seen = kept(source(rng))
    objective = learner(linear())
    state = started(objective, source(rng))
    found = meta.evaluate_episodes(objective, state, batches, tasks=6)
    answers = [(objective.predict(*state[3:5], batch, context())[0], batch) for batch in fresh(seen)]
    expected = np.concatenate([accuracies(*pair) for pair in answers])
    for scores in found.values():
        assert scores.values.shape == (6,)
        np.testing.assert_allclose(scores.values, expected, rtol=1e-6)
        np.testing.assert_allclose(scores.mean, np.mean(expected), rtol=1e-6)
        np.testing.assert_allclose(scores.interval95, stats.t.ppf(0.975, 5) * stats.sem(expected), rtol=1e-5)
    assert len(set(expected.tolist())) > 1


def test_a_real_target_is_scored_by_its_squared_error(rng):
    def get(arrays, key, step):
        x = jax.random.normal(jax.random.fold_in(key, step), (2, 2, 5, 2))
        return {name: {"x": x[i], "y": x[i][..., :1] * 2} for i, name in enumerate(("support", "query"))}

    batches, seen = kept(Source({}, get, 2, 2))
    line = supervised(
        from_functions(lambda key, x: {"w": jnp.ones((2, 1))}, lambda p, x: x @ p["w"]), optax.losses.squared_error
    )
    objective = maml(line, optax.sgd(0.1), 1)
    state = started(objective, batches)
    seen.clear()
    found = meta.evaluate_episodes(objective, state, batches, tasks=4)["transductive"].values
    expected = []
    for batch in fresh(seen):
        logits = objective.predict(*state[3:5], batch, context())[0]["logits"].reshape(2, 5, 1)
        expected += list(((logits - batch["query"]["y"]) ** 2).mean((1, 2)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_runs_come_first_and_share_their_tasks(rng):
    batches = source(rng)
    make = lambda k: learner(linear(), k)
    trainer = vectorize(lambda: Trainer(make(1), optax.sgd(0.1)), seeds=2)
    state = trainer.init(0, batches.batch(jax.random.key(0), 0))
    found = meta.evaluate_episodes(make, state, batches, steps=range(3), tasks=4, runs=2, metric=errors)
    for run in range(2):
        alone = jax.tree.map(lambda leaf: leaf[run], state)
        single = meta.evaluate_episodes(make, alone, batches, steps=range(3), tasks=4, metric=errors)
        for name, scores in found.items():
            assert scores.values.shape == (2, 3, 4)
            assert scores.mean.shape == scores.interval95.shape == (2, 3)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a[run], b, rtol=1e-5), scores, single[name])
    assert np.abs(np.diff(found["inductive"].values, axis=0)).max() > 1e-3
    whole = meta.evaluate_episodes(make(1), state, batches, tasks=4, runs=2, metric=errors)
    np.testing.assert_allclose(whole["inductive"].values, found["inductive"].values[:, 1], rtol=1e-5)


def test_tasks_are_the_same_for_a_key_and_fresh_for_another(rng):
    batches = sampled(rng)
    objective = learner(linear())
    state = started(objective, batches)
    one, again, other = (
        meta.evaluate_episodes(objective, state, batches, tasks=6, metric=errors, key=key)["inductive"].values
        for key in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert len({*one.tolist(), *other.tolist()}) == 12  # no task comes twice


def test_an_inductive_answer_sees_the_support_set_and_its_own_query(rng):
    batches, seen = kept(source(rng))
    objective = learner(coupled())
    state = started(objective, source(rng))
    found = meta.evaluate_episodes(objective, state, batches, tasks=3, metric=errors)
    (batch,) = fresh(seen)
    y = np.asarray(batch["query"]["y"])
    predict = jax.jit(objective.predict)
    together = predict(*state[3:5], batch, context())[0]["logits"].reshape(TASKS, -1, WAYS)
    np.testing.assert_allclose(found["transductive"].values, entropies(together, y).mean(1), rtol=1e-4)
    single = []
    for q in range(WAYS * QUERIES):
        query = {name: np.concatenate([batch["support"][name], batch["query"][name][:, q : q + 1]], 1) for name in "xy"}
        logits = predict(*state[3:5], {"support": batch["support"], "query": query}, context())[0]["logits"]
        single.append(logits.reshape(TASKS, -1, WAYS)[:, -1])
    np.testing.assert_allclose(found["inductive"].values, entropies(np.stack(single, 1), y).mean(1), rtol=1e-4)
    assert np.abs(found["inductive"].values - found["transductive"].values).min() > 1e-3


def test_other_queries_and_their_order_do_not_matter_to_an_inductive_answer(rng):
    """The metric looks at one query, the fourth; the others are put in another order, or replaced."""
    batches = source(rng)
    first = np.concatenate([[3], np.setdiff1d(np.arange(WAYS * QUERIES)[::-1], [3])])

    def changed(change):
        def get(arrays, key, step):
            batch = batches.get(arrays, key, step)
            return {**batch, "query": change(batch["query"])}

        return Source(batches.arrays, get, batches.size, batches.batch_size)

    def replaced(query):
        others = jnp.arange(WAYS * QUERIES) != 3
        return {**query, "x": jnp.where(others[None, :, None], query["x"] + 50 * query["x"] ** 2, query["x"])}

    def of(place):
        return lambda *parts: errors(*jax.tree.map(lambda leaf: leaf[place : place + 1], parts))

    objective = learner(coupled())
    state = started(objective, batches)
    plain = meta.evaluate_episodes(objective, state, batches, tasks=3, metric=of(3))
    ordered = changed(lambda query: jax.tree.map(lambda leaf: leaf[:, first], query))
    ordered = meta.evaluate_episodes(objective, state, ordered, tasks=3, metric=of(0))
    others = meta.evaluate_episodes(objective, state, changed(replaced), tasks=3, metric=of(3))
    np.testing.assert_allclose(ordered["inductive"].values, plain["inductive"].values, rtol=1e-5)
    np.testing.assert_allclose(others["inductive"].values, plain["inductive"].values, rtol=1e-5)
    assert np.abs(others["transductive"].values - plain["transductive"].values).min() > 1e-3


def test_learners_that_see_the_support_set_anyway_see_it_once(rng):
    """What reaches the network of prototypes, as a learner and as a baseline, for an answer alone and for one together."""
    sizes = []

    def apply(params, x):
        sizes.append(len(x))
        mean = x.mean(0, keepdims=True)  # rows see each other
        return {"features": x - mean, "logits": jnp.zeros((len(x), WAYS))}

    model = from_functions(lambda key, x: {}, apply)
    batches, seen = kept(source(rng))
    for objective in (meta.episodic(model, meta.prototypes(WAYS)), meta.few_shot(supervised(model), meta.prototypes(WAYS))):
        state = started(learner(linear()), batches)._replace(params={"model": {}}, state={"model": {}})
        seen.clear()
        sizes.clear()
        found = meta.evaluate_episodes(objective, state, batches, tasks=3, metric=errors)
        assert set(sizes) == {WAYS * (SHOTS + QUERIES), WAYS * SHOTS + 1}
        (batch,) = fresh(seen)
        (xs, ys), (xq, yq) = ([np.asarray(batch[part][name]) for name in "xy"] for part in ("support", "query"))
        expected = []
        for task in range(TASKS):
            means = np.stack([xs[task][ys[task] == label].mean(0) for label in range(WAYS)])
            distances = ((xq[task][:, None] - means[None]) ** 2).sum(-1)  # a shift of all rows changes none of them
            expected.append(entropies(-distances, yq[task]).mean())
        for scores in found.values():
            np.testing.assert_allclose(scores.values, expected, rtol=1e-4)


def test_queries_with_leaves_of_their_own_and_support_sets_with_others(rng):
    """Weights of queries reach the metric, though support rows have none."""
    batches = source(rng)

    def get(arrays, key, step):
        batch = batches.get(arrays, key, step)
        weight = jnp.broadcast_to(jnp.arange(WAYS * QUERIES) < 3, batch["query"]["y"].shape).astype(jnp.float32)
        return {**batch, "query": {**batch["query"], "weight": weight}}

    weighted, seen = kept(Source(batches.arrays, get, batches.size, batches.batch_size))
    objective = learner(linear())
    state = started(objective, batches)
    found = meta.evaluate_episodes(objective, state, weighted, tasks=3)
    (batch,) = fresh(seen)
    logits = objective.predict(*state[3:5], batch, context())[0]["logits"].reshape(TASKS, -1, WAYS)
    expected = (np.argmax(logits, -1) == batch["query"]["y"])[:, :3].mean(1)
    for scores in found.values():
        np.testing.assert_allclose(scores.values, expected, rtol=1e-6)


def test_batches_and_numbers_of_steps_share_one_program(rng):
    traced = []
    child = linear()

    def predict(*args):
        traced.append(1)
        return child.predict(*args)

    batches, make = source(rng), lambda k: learner(child._replace(predict=predict), k)
    state = started(make(1), batches)
    traces = []
    for steps, tasks in ((range(4), 9), ([1], 2)):
        traced.clear()
        meta.evaluate_episodes(make, state, batches, steps=steps, tasks=tasks)
        traces.append(len(traced))
    assert traces[0] == traces[1]  # neither batches nor numbers of steps add a trace


def test_what_cannot_be_evaluated_raises(rng):
    batches = source(rng)
    objective = learner(linear())
    state = started(objective, batches)
    with pytest.raises(ValueError, match="tasks=1"):
        meta.evaluate_episodes(objective, state, batches, tasks=1)
    with pytest.raises(ValueError, match="steps=None"):
        meta.evaluate_episodes(lambda k: objective, state, batches)
    with pytest.raises(ValueError, match="steps=range"):
        meta.evaluate_episodes(objective, state, batches, steps=range(2))
    for steps in ([], [-1, 2]):
        with pytest.raises(ValueError, match="steps="):
            meta.evaluate_episodes(lambda k: learner(linear(), k), state, batches, steps=steps)
    with pytest.raises(ValueError, match=r"steps=1\.5: must be an integer"):
        meta.evaluate_episodes(lambda k: learner(linear(), k), state, batches, steps=[1.5])
    with pytest.raises(ValueError, match="steps=3: give one or more numbers"):
        meta.evaluate_episodes(lambda k: learner(linear(), k), state, batches, steps=3)
    with pytest.raises(ValueError, match="runs=2: the state has one"):
        meta.evaluate_episodes(objective, state, batches, runs=2)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    with pytest.raises(ValueError, match=r"runs=None: the state has \(2,\)"):
        meta.evaluate_episodes(objective, both, batches)
    few = meta.episodic(from_functions(lambda key, x: {}, lambda p, x: {"features": x, "logits": x}), meta.prototypes(2))
    with pytest.raises(ValueError, match="source: has labels from 0 to 2, but the learner answers 2 classes"):
        meta.evaluate_episodes(few, state._replace(params={"model": {}}, state={"model": {}}), batches)
    flat = Source({}, lambda arrays, key, step: {"x": jnp.ones((2, 2)), "y": jnp.zeros(2, jnp.int32)}, 2, 2)
    with pytest.raises(ValueError, match=r"source: gives batches of \['x', 'y'\]"):
        meta.evaluate_episodes(objective, state, flat, tasks=2)


def test_adapt_answers_as_predict(rng):
    batches = source(rng)
    objective = learner(coupled())
    trainer = Trainer(objective, optax.sgd(0.1))
    batch = batches.batch(jax.random.key(3), 0)
    state = trainer.init(0, batch)
    support, query = (jax.tree.map(lambda leaf: leaf[1], batch[part]) for part in ("support", "query"))
    answer = meta.adapt(trainer, state, support)
    alone = jax.tree.map(lambda leaf: leaf[1:2], batch)
    expected = trainer.predict(state, alone)["logits"]
    np.testing.assert_allclose(answer(query["x"])["logits"], expected, rtol=1e-6)
    np.testing.assert_allclose(answer(np.asarray(query["x"])[::-1])["logits"], expected[::-1], rtol=1e-4, atol=1e-5)
    assert answer(query["x"][:5])["logits"].shape == (5, WAYS)
    several = vectorize(lambda: Trainer(objective, optax.sgd(0.1)), seeds=2)
    both = several.init(0, batch)
    with pytest.raises(ValueError, match=r"trainer: has 2 runs; pass trainer.members"):
        meta.adapt(several, both, support)
    for given, message in (
        ({"x": support["x"]}, r"support: \['x'\]; give"),
        ({"x": support["x"], "y": support["y"][:2]}, "leaves must agree in rows"),
    ):
        with pytest.raises(ValueError, match=message):
            meta.adapt(trainer, state, given)
    with pytest.raises(ValueError, match=r"x: has shape \(2,\)"):
        answer(query["x"][0])
    with pytest.raises(ValueError, match="support: has labels from 7 to 9, but the learner answers 3 classes"):
        meta.adapt(trainer, state, {**support, "y": support["y"] + 7})(query["x"])
    one = meta.adapt(several.members[1], jax.tree.map(lambda leaf: leaf[1], both), support)(query["x"])
    np.testing.assert_allclose(one["logits"], several.predict(both, alone)["logits"][1], rtol=1e-4, atol=1e-5)


def test_scores_take_any_objective_that_answers_episodes(rng):
    """An objective without adaptation: a constant answer."""

    def predict(params, state, batch, ctx):
        rows = batch["query"]["y"].size
        return {"logits": jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0]), (rows, WAYS))}, state

    constant = Objective(lambda key, batch: ({}, {}), lambda *args: ({}, ({}, {})), predict)
    batches = source(rng)
    state = started(learner(linear()), batches)._replace(params={}, state={})
    for scores in meta.evaluate_episodes(constant, state, batches, tasks=4).values():
        np.testing.assert_allclose(scores.values, np.full(4, 1 / WAYS), rtol=1e-6)  # classes are balanced
        np.testing.assert_allclose(scores.interval95, 0, atol=1e-7)


class Normalised(nnx.Module):
    """Keeps running averages, which answer."""

    def __init__(self, rngs):
        self.norm, self.head = nn.batch_norm(2, momentum=0.0, rngs=rngs), nnx.Linear(2, WAYS, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


OPTIONS = {
    "annealed, learned rates, sets of each step": lambda child, k: maml(
        child,
        optax.sgd(1.0),
        k,
        hypergradient=meta.annealed(2),
        rates=meta.per_tensor_and_step(0.5, 2),
        normalisation=meta.per_step(2),
    ),
    "implicit, support statistics": lambda child, k: maml(
        child, optax.adam(0.1), k, hypergradient=meta.implicit(1.0), normalisation=meta.support_statistics()
    ),
    "truncated": lambda child, k: maml(child, optax.sgd(0.5), k, hypergradient=meta.truncated(1), adapts=meta.only("head")),
    "minibatches": lambda child, k: meta.reptile(child, optax.adam(0.1, b1=0.0), k, batch_size=4),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_number_of_steps_that_is_traced_answers_as_one_that_is_not(rng, option):
    batches, seen = kept(source(rng))
    child, make = supervised(from_nnx(lambda rngs: Normalised(rngs))), OPTIONS[option]
    state = started(make(child, 2), source(rng))
    found = meta.evaluate_episodes(lambda k: make(child, k), state, batches, steps=(0, 3), tasks=3, metric=errors)
    (batch,) = fresh(seen)
    for k, values in zip((0, 3), found["transductive"].values, strict=True):
        if option == "minibatches" and k:  # their order is a function of the evaluation's key, which is its own affair
            assert np.isfinite(values).all()
            continue
        logits = jax.jit(make(child, k).predict)(*state[3:5], batch, context())[0]["logits"].reshape(TASKS, -1, WAYS)
        np.testing.assert_allclose(values, entropies(logits, np.asarray(batch["query"]["y"])).mean(1), rtol=1e-4)
    np.testing.assert_allclose(found["inductive"].values, found["transductive"].values, rtol=1e-4)
