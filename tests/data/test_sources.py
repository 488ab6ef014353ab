import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paradigms.data import Data, Source, augment, batches, chain, crop, flip, mixup, resident, stream, windows


def _split(n=23):
    x = np.random.default_rng(0).integers(0, 256, (n, 6, 6, 1), dtype=np.uint8)
    return {"x": x, "y": np.arange(n) % 5, "index": np.arange(n)}


@jax.jit
def _batch(source, key, step):
    return source.batch(key, step)


def _indices(source, key, steps):
    return np.concatenate([np.asarray(_batch(source, key, s)["index"]) for s in steps])


def test_every_example_once_an_epoch_across_borders():
    source, key = resident(_split(), 4), jax.random.key(0)
    seen = _indices(source, key, range(23))  # four epochs of 23 in batches of 4
    epochs = seen.reshape(4, 23)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(23), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (source.size, source.steps_per_epoch) == (23, 6)


def test_rows_belong_together_and_pixels_are_scaled():
    split = _split()
    batch = _batch(resident(split, 4), jax.random.key(1), 3)
    index = np.asarray(batch["index"])
    assert batch["x"].dtype == jnp.float32
    assert batch["y"].dtype == jnp.int32
    np.testing.assert_array_equal(batch["x"], split["x"][index].astype(np.float32) * np.float32(1 / 255))
    np.testing.assert_array_equal(batch["y"], split["y"][index])


def test_unshuffled_is_in_order():
    source = resident(_split(), 10, shuffle=False)
    np.testing.assert_array_equal(_indices(source, jax.random.key(0), range(3)), np.arange(30) % 23)


def test_sources_built_alike_share_one_program_and_capture_nothing():
    traces = []

    @jax.jit
    def first_row(source, key, step):
        traces.append(1)
        return source.batch(key, step)["x"][0]

    for seed in range(3):
        source = resident(_split(), 4, transform=chain(augment(crop(1), flip()), mixup(0.2, 5)))
        first_row(source, jax.random.key(seed), seed)
    assert len(traces) == 1
    jaxpr = jax.make_jaxpr(lambda s, k, i: s.batch(k, i))(source, jax.random.key(0), 0)
    assert all(np.size(constant) < 100 for constant in jaxpr.consts)
    assert "sort[" not in str(jaxpr)


def test_scan_equals_single_steps():
    source, key = resident(_split(), 4, transform=augment(crop(1))), jax.random.key(2)
    _, scanned = jax.jit(lambda s: jax.lax.scan(lambda c, i: (c, s.batch(key, i)), 0, jnp.arange(8)))(source)
    for i in range(8):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), scanned, _batch(source, key, i))


def test_data_is_copied():
    split = _split()
    source = resident(split, 23, shuffle=False)
    before = np.array(_batch(source, jax.random.key(0), 0)["x"])
    split["x"][:] = 0
    np.testing.assert_array_equal(_batch(source, jax.random.key(0), 0)["x"], before)


def test_batches_pad_the_last_and_weigh_it_zero():
    split = _split()
    out = batches(split, 10)
    assert out["x"].shape == (3, 10, 6, 6, 1)
    np.testing.assert_array_equal(out["weight"].ravel(), np.arange(30) < 23)
    np.testing.assert_array_equal(out["index"].ravel()[:23], np.arange(23))
    np.testing.assert_array_equal(out["x"].reshape(30, 6, 6, 1)[:23], split["x"].astype(np.float32) * np.float32(1 / 255))
    weighted = batches({**split, "weight": np.full(23, 0.5, np.float32)}, 30)["weight"]
    np.testing.assert_array_equal(weighted, 0.5 * (np.arange(30) < 23)[None])


def test_windows_are_shifted_by_one_and_cover_the_text():
    tokens = np.arange(50, dtype=np.uint8)
    source = windows(tokens, 64, 7)
    batch = _batch(source, jax.random.key(0), 0)
    x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(np.diff(x, axis=1), 1)
    starts = np.concatenate([np.asarray(_batch(source, jax.random.key(0), i)["x"][:, 0]) for i in range(12)])
    assert set(starts.tolist()) == set(range(43))
    assert source.size == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((0, 2))}, "different lengths"),
        (
            {"x": np.array([[1.0], [np.nan], [np.inf]]), "y": np.zeros(3, int)},
            "2 NaN or infinite values, the first in row 1",
        ),
        ({"x": np.zeros((3, 1)), "y": np.array([0, 1, -1])}, r"1 negative labels \(lowest -1, first row 2\)"),
        ({"x": np.array([1, "a", None], object), "y": np.zeros(3, int)}, "dtype object, must be numbers"),
        ({"x": np.array(["a", "b", "c"]), "y": np.zeros(3, int)}, "must be numbers: encode it"),
        ({"x": [1, 2, 3]}, "must be an array|no example axis|is a int"),
        ({"x": np.full(3, 2**40), "y": np.zeros(3, int)}, "beyond 32 bits"),
    ],
)
def test_bad_splits_raise_before_compiling(change, message):
    with pytest.raises(ValueError, match=message):
        resident({"y": np.zeros(3, int), **change}, 1)


@pytest.mark.parametrize("use", [lambda whole: resident(whole, 64), lambda whole: batches(whole, 64)])
def test_a_whole_data_set_is_no_split(use):
    with pytest.raises(ValueError, match=r"split is a Data, must be .* one of its splits: pass its \.train"):
        use(Data("name", _split(), _split(), _split(), 5, (), (), ()))


def test_bad_sizes_raise():
    with pytest.raises(ValueError, match=r"split is empty \(0 examples\)"):
        resident({"x": np.zeros((0, 2))}, 1)
    with pytest.raises(ValueError, match="split has no arrays"):
        resident({}, 1)
    for bad in (0, 24, 2.5):
        with pytest.raises(ValueError, match=f"batch_size is {bad}"):
            resident(_split(), bad)
    with pytest.raises(ValueError, match=r"length is 9, must be in \[1, 8\]"):
        windows(np.zeros(9, np.uint8), 1, 9)
    with pytest.raises(ValueError, match="tokens must be a"):
        windows(np.zeros((2, 9)), 1, 3)


def _records(n=11):
    return [{"x": np.full((4, 4, 1), i, np.uint8), "y": i % 3, "index": i} for i in range(n)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_every_example_once_an_epoch_and_resumes_from_the_step(workers):
    key, transform = jax.random.key(0), augment(crop(1))
    whole = stream(_records(), 4, seed=3, transform=transform, workers=workers)
    run = jax.jit(lambda s, start: jax.lax.map(lambda i: s.batch(key, start + i), jnp.arange(3)))
    chunks = [run(whole.chunk(3 * i, 3), 3 * i) for i in range(4)]
    assert run._cache_size() == 1  # no compilation from chunk to chunk
    seen = np.concatenate([np.asarray(chunk["index"]).ravel() for chunk in chunks])[:44].reshape(4, 11)
    np.testing.assert_array_equal(np.sort(seen, axis=1), np.tile(np.arange(11), (4, 1)))
    assert len({tuple(epoch) for epoch in seen}) == 4
    resumed = stream(_records(), 4, seed=3, transform=transform, workers=workers)
    jax.tree.map(np.testing.assert_array_equal, run(resumed.chunk(6, 3), 6), chunks[2])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[1]), _batch(whole.chunk(4, 1), key, 4), chunks[1])
    assert whole.batch(key, 4).keys() == chunks[1].keys()
    assert chunks[0]["x"].dtype == jnp.float32
    assert (whole.size, whole.batch_size, whole.steps_per_epoch) == (11, 4, 3)
    whole.close()
    resumed.close()


def test_streams_check_what_they_are_given():
    for dataset, message in [([], "empty"), ([1, 2], "must give dicts"), ([{"x": "a"}] * 2, "must be numbers")]:
        with pytest.raises(ValueError, match=message):
            stream(dataset, 1)
    with pytest.raises(ValueError, match="batch_size is 12"):
        stream(_records(), 12)
    with pytest.raises(ValueError, match="workers is -1"):
        stream(_records(), 1, workers=-1)
    with pytest.raises(ValueError, match="seed is -1"):
        stream(_records(), 1, seed=-1)


def test_a_batch_outside_of_a_program_is_traced_once_for_all_steps():
    traced = []

    def get(arrays, key, step):
        traced.append(step)
        return {"x": arrays["x"][step]}

    source = Source({"x": jnp.arange(4.0)}, get, 4, 1)
    assert [float(source.batch(jax.random.key(0), step)["x"]) for step in range(4)] == [0, 1, 2, 3]
    assert len(traced) == 1
