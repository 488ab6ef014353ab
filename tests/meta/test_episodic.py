"""Heads against loops and dense solves, and the leaf that trains features for them: statistics, padding, other ways."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paradigms import Model, Trainer, adversarial, context, data, from_functions, from_nnx, linf, metrics, nn, pgd
from paradigms.meta.episodic import episodic
from paradigms.meta.heads import attention, prototypes, ridge

KEY = jax.random.key(2)
WAYS, WIDTH = 3, 4
HEADS = {"prototypes": prototypes, "attention": attention, "ridge": ridge}


def task(rng, shots=7, queries=5, width=WIDTH):
    y = np.arange(shots, dtype=np.int32) % WAYS  # classes of unequal size
    return rng.normal(size=(shots, width)), y, rng.normal(size=(queries, width))


def log_softmax(logits):
    logits = np.asarray(logits)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def learned(scale=2.5, penalty=0.3, bias=-0.4):
    return {"log_penalty": jnp.asarray(np.log(penalty)), "scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}


def params_of(name):
    return learned() if name == "ridge" else {}


def test_prototypes_by_loops(x64, rng):
    support, y, queries = task(rng)
    squared, absolute = np.zeros((2, len(queries), WAYS))
    for k in range(WAYS):
        mean = sum(x for x, label in zip(support, y, strict=True) if label == k) / sum(y == k)
        for q, query in enumerate(queries):
            squared[q, k] = -sum((a - b) ** 2 for a, b in zip(query, mean, strict=True))
            absolute[q, k] = -sum(abs(a - b) for a, b in zip(query, mean, strict=True))
    np.testing.assert_allclose(prototypes(WAYS).logits({}, support, y, queries), squared, rtol=1e-12)
    head = prototypes(WAYS, lambda q, c: jnp.abs(q[:, None] - c[None]).sum(-1))
    np.testing.assert_allclose(head.logits({}, support, y, queries), absolute, rtol=1e-12)


def test_attention_by_loops(x64, rng):
    support, y, queries = task(rng)
    share = np.zeros((len(queries), WAYS))
    for q, query in enumerate(queries):
        cosines = [query @ x / np.sqrt(query @ query) / np.sqrt(x @ x) for x in support]
        for cosine, label in zip(cosines, y, strict=True):
            share[q, label] += np.exp(cosine) / sum(map(np.exp, cosines))
    np.testing.assert_allclose(jax.nn.softmax(attention(WAYS).logits({}, support, y, queries)), share, rtol=1e-12)


def test_attention_has_finite_gradients_at_features_of_zero(rng):
    support, y, queries = task(rng)
    loss = lambda support, queries: attention(WAYS).logits({}, support, y, queries).sum()
    for grad in jax.grad(loss, (0, 1))(jnp.zeros_like(support), jnp.zeros_like(queries)):
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("width", [4, 12], ids=["more rows", "more features"])
def test_ridge_is_the_primal_solution(x64, rng, width):
    support, y, queries = task(rng, width=width)
    weight = np.array([1, 0, 2, 0.5, 1, 1, 3])
    onehot = np.eye(WAYS)[y]
    for told, d in ((None, np.eye(7)), (weight, np.diag(weight))):
        w = np.linalg.solve(support.T @ d @ support + 0.3 * np.eye(width), support.T @ d @ onehot)
        got = ridge(WAYS).logits(learned(), support, y, queries, told)
        np.testing.assert_allclose(got, 2.5 * queries @ w - 0.4, rtol=1e-9)
    start = ridge(WAYS, penalty=0.3).init(KEY, width)
    for name, value in learned(1.0, 0.3, 0.0).items():
        np.testing.assert_allclose(start[name], value, rtol=1e-6)
        assert start[name].dtype == jnp.float32


@pytest.mark.parametrize("width", [4, 12], ids=["more rows", "more features"])
def test_gradients_through_ridge_by_finite_differences(x64, rng, width):
    support, y, queries = task(rng, width=width)
    flat, unravel = jax.flatten_util.ravel_pytree((learned(), jnp.asarray(support), jnp.asarray(queries)))

    def loss(flat):
        params, support, queries = unravel(flat)
        return -jax.nn.log_softmax(ridge(WAYS).logits(params, support, y, queries))[:, 1].mean()

    steps = 1e-5 * jnp.eye(len(flat))
    sides = jax.jit(jax.vmap(loss))(jnp.concatenate([flat[None] + steps, flat[None] - steps]))
    differences = (sides[: len(flat)] - sides[len(flat) :]) / 2e-5
    np.testing.assert_allclose(jax.grad(loss)(flat), differences, rtol=1e-6, atol=1e-9)
    assert (np.abs(differences[:3]) > 1e-4).sum() == 2  # the bias moves all logits alike


@pytest.mark.parametrize("name", HEADS)
class TestHeads:
    def test_other_numbers_for_the_classes_permute_the_logits(self, x64, rng, name):
        support, y, queries = task(rng)
        head, number = HEADS[name](WAYS), np.array([2, 0, 1], np.int32)
        logits = head.logits(params_of(name), support, y, queries)
        renumbered = head.logits(params_of(name), support, number[y], queries)
        np.testing.assert_allclose(renumbered[:, number], logits, rtol=1e-12)

    def test_padding_does_not_count(self, x64, rng, name):
        support, y, queries = task(rng)
        padded = np.concatenate([support, 9 + rng.normal(size=(3, WIDTH))])
        labels, weight = np.concatenate([y, np.array([0, 0, 2], np.int32)]), np.repeat([1.0, 0.0], [7, 3])
        head, params = HEADS[name](WAYS), params_of(name)
        expected = head.logits(params, support, y, queries)
        np.testing.assert_allclose(head.logits(params, padded, labels, queries, weight), expected, rtol=1e-9)
        assert not np.allclose(head.logits(params, padded, labels, queries), expected)

    def test_classes_without_support_are_never_answered(self, x64, rng, name):
        support, y, queries = task(rng)
        few, many, params = HEADS[name](WAYS), HEADS[name](WAYS + 5), params_of(name)
        expected = log_softmax(few.logits(params, support, y, queries))
        logits = many.logits(params, support, y, queries)
        np.testing.assert_allclose(log_softmax(logits)[:, :WAYS], expected, rtol=1e-9)
        assert (logits[:, WAYS:].max(1) < logits[:, :WAYS].min(1) - 700).all()
        for weight in (None, np.zeros(len(y))):  # the class asked for is absent, or all of them
            loss = lambda x, w=weight: -jax.nn.log_softmax(many.logits(params, x, y, queries, w))[:, -1].mean()
            value, grad = jax.value_and_grad(loss)(jnp.asarray(support))
            assert np.isfinite(value)
            assert np.isfinite(grad).all()

    def test_ways_below_one_raise(self, name):
        with pytest.raises(ValueError, match="ways=0: must be an integer, 1 or more"):
            HEADS[name](0)


def test_a_penalty_of_zero_raises():
    with pytest.raises(ValueError, match="penalty=0: must be > 0"):
        ridge(5, penalty=0)


def tanh_net():
    """6 -> 4 features; nothing couples the rows."""
    return from_functions(
        lambda key, x: {"w": jax.random.normal(key, (6, WIDTH))}, lambda p, x: {"features": jnp.tanh(x @ p["w"])}
    )


def episodes(rng, tasks=3, ways=WAYS, shots=6, queries=4):
    def part(rows):
        y = np.tile(np.arange(rows, dtype=np.int32) % ways, (tasks, 1))
        return {"x": rng.normal(size=(tasks, rows, 6)).astype(np.float32), "y": y}

    return {"support": part(shots), "query": part(queries)}


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_answers_are_the_heads_on_the_features_of_each_task(rng, name):
    head, batch = HEADS[name](WAYS), episodes(rng)
    batch["query"]["weight"] = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [2, 0, 0, 1]], np.float32)
    batch["weight"] = np.array([1, 0, 3], np.float32)
    objective = episodic(tanh_net(), head)
    params, state = objective.init(KEY, batch)
    assert ("head" in params) == (name == "ridge")
    values, (new, aux) = jax.jit(objective.losses)(params, state, batch, context(KEY, train=True))
    outputs, after = jax.jit(objective.predict)(params, state, batch, context(KEY))
    assert new == after == state == {"model": {}}
    features = np.tanh(batch["query"]["x"] @ params["model"]["w"])
    np.testing.assert_allclose(outputs["features"], features.reshape(-1, WIDTH), rtol=1e-5, atol=1e-6)
    expected, losses, hits = [], [], []
    for t in range(3):
        shots = np.tanh(batch["support"]["x"][t] @ params["model"]["w"])
        logits = head.logits(params.get("head", {}), shots, batch["support"]["y"][t], features[t])
        y, share = batch["query"]["y"][t], batch["query"]["weight"][t] / batch["query"]["weight"][t].sum()
        expected.append(logits)
        losses.append(share @ -log_softmax(logits)[np.arange(4), y])
        hits.append(share @ (np.argmax(logits, -1) == y))
    np.testing.assert_allclose(outputs["logits"], np.concatenate(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values["episodic"], (losses[0] + 3 * losses[2]) / 4, rtol=1e-4)
    np.testing.assert_allclose(aux["accuracy"], (hits[0] + 3 * hits[2]) / 4, rtol=1e-5)
    alone = objective.predict(params, state, jax.tree.map(lambda leaf: leaf[1:2], batch), context(KEY))[0]
    np.testing.assert_allclose(alone["logits"], outputs["logits"][4:8], rtol=1e-5, atol=1e-6)


def test_trained_with_more_ways_than_tested(rng):
    train, test = episodic(tanh_net(), prototypes(WAYS)), episodic(tanh_net(), prototypes(2))
    params, state = train.init(KEY, episodes(rng))
    assert jax.tree.structure(test.init(KEY, episodes(rng, ways=2))) == jax.tree.structure((params, state))
    batch = episodes(rng, ways=2)
    two, three = (o.predict(params, state, batch, context())[0]["logits"] for o in (test, train))
    assert two.shape == (12, 2)
    np.testing.assert_allclose(two, three[:, :2], rtol=1e-5)


def test_support_and_queries_share_the_statistics_of_their_task(rng):
    """A network that centres on its batch in training, and on a running mean (rate 1/2) otherwise."""

    def apply(params, state, x, *, train=False, key=None):
        mean = x.mean(0) if train else state["mean"]
        moved = {"mean": (state["mean"] + mean) / 2} if train else state
        return {"features": jnp.exp(x - mean[None]) * params["w"][None]}, moved

    model = Model(lambda key, x: ({"w": jnp.ones(6)}, {"mean": jnp.full(6, 0.1)}), apply)
    head, batch = attention(WAYS), episodes(rng)
    objective = episodic(model, head)
    params, state = objective.init(KEY, batch)
    values, (new, _) = objective.losses(params, state, batch, context(KEY, train=True))
    means, losses = [], []
    for s, q in zip(*(np.split(batch[part]["x"], 3) for part in ("support", "query")), strict=True):
        mean = np.concatenate([s[0], q[0]]).mean(0)
        logits = head.logits({}, np.exp(s[0] - mean), batch["support"]["y"][0], np.exp(q[0] - mean))
        losses.append(-log_softmax(logits)[np.arange(4), batch["query"]["y"][0]].mean())
        means.append((0.1 + mean) / 2)
    np.testing.assert_allclose(values["episodic"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(new["model"]["mean"], np.mean(means, 0), rtol=1e-5, atol=1e-7)
    for train in (False, True):  # an answer is given in evaluation mode, whatever the context says
        outputs, after = objective.predict(params, state, batch, context(train=train))
        np.testing.assert_allclose(outputs["features"], np.exp(batch["query"]["x"].reshape(-1, 6) - 0.1), rtol=1e-5)
        assert after is state


def test_an_attack_moves_support_and_queries(rng):
    objective = adversarial(episodic(tanh_net(), prototypes(WAYS)), pgd(linf(0.3), 2))
    batch = jax.tree.map(lambda leaf: abs(leaf) % 1 if leaf.dtype == np.float32 else leaf, episodes(rng))  # pixels
    params, state = objective.init(KEY, batch)
    ctx = context(KEY, train=True)
    clean = episodic(tanh_net(), prototypes(WAYS)).losses(params, state, batch, ctx)[0]["episodic"]
    assert sum(objective.losses(params, state, batch, ctx)[0].values()) > clean + 0.05


def test_what_does_not_fit_raises_before_compilation(rng):
    good = episodes(rng)
    objective = episodic(tanh_net(), prototypes(WAYS))
    logits_only = from_functions(lambda key, x: {"w": jnp.ones((6, 3))}, lambda p, x: x @ p["w"])
    broken = good["query"]["x"].copy()
    broken[1, 2, 3] = np.nan
    for wrong, made, message in [
        (good["query"], objective, 'episodic needs {"support": ..., "query": ...}'),
        (good, episodic(logits_only, prototypes(WAYS)), r"model: gives \['logits'\] and no \"features\""),
        (good, episodic(tanh_net(), prototypes(2)), r"labels of the support go from 0 to 2, but the head has ways=2"),
        ({**good, "query": {**good["query"], "y": good["query"]["y"] - 1}}, objective, "labels of the query go from -1"),
        ({**good, "query": {**good["query"], "y": np.ones((3, 4))}}, objective, "y of the query has type float64"),
        ({**good, "support": {"x": good["support"]["x"]}}, objective, 'has no leaf "y"'),
        ({**good, "query": {**good["query"], "x": broken}}, objective, "x is not finite"),
    ]:
        trainer = Trainer(made, optax.sgd(0.1))
        with pytest.raises(ValueError, match=message):
            trainer.init(0, wrong)
        assert trainer._init._cache_size() == 0


def digits(split, classes, queries, tasks):
    """3-way 5-shot episodes of some classes of the digits."""
    keep = np.isin(split["y"], classes)
    return data.episodes({name: split[name][keep] for name in ("x", "y")}, ways=3, shots=5, queries=queries, tasks=tasks)


def test_prototypical_networks_on_digits():
    model = from_nnx(lambda rngs: nn.MLP(64, (64, 64), 0, rngs=rngs))
    loaded = data.load("digits")
    source, seen = digits(loaded.train, range(6), 5, 4), digits(loaded.test, range(6), 15, 40)
    trainer = Trainer(episodic(model, prototypes(3)), optax.adam(1e-3))
    start = trainer.init(0, source.batch(jax.random.key(0), 0))

    def accuracy(state, episodes):
        batch = episodes.batch(jax.random.key(1), 0)
        return metrics.accuracy(trainer.predict(state, batch)["logits"], np.asarray(batch["query"]["y"]).reshape(-1))

    untrained = accuracy(start, seen)
    state, _ = trainer.scan(start, source, 100)
    assert accuracy(state, seen) > max(0.95, untrained + 0.05)
    # six classes are too few to learn what tells others apart: new ones are far above chance, as under random features
    assert accuracy(state, digits(loaded.train, range(6, 10), 15, 40)) > 0.7
