import importlib
import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest

from paradigms.data import decode, few_labels, imbalance, label_flips, label_noise, load, prepared
from paradigms.data.cache import entry, read, write
from paradigms.data.splits import holdout
from paradigms.data.tokens import characters, padded

loading = importlib.import_module("paradigms.data.load")
LOADER = importlib.import_module("paradigms.data.load")  # the package has a function of this name
SOURCE = prepared.data_root()
FACTS = {"classes": 0, "class_names": [], "source": None}


def _need(name):
    if prepared.find(name, SOURCE) is None:
        pytest.skip(f"{name} is not prepared in {SOURCE}")


def test_importing_imports_no_heavy_reader():
    heavy = ("tensorflow", "tensorflow_datasets", "grain", "sklearn", "matplotlib")
    code = f"import sys, paradigms.data; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_digits():
    data = load("digits")
    assert [len(s["x"]) for s in (data.train, data.validation, data.test)] == [1294, 144, 359]
    assert data.train["x"].shape[1:] == (8, 8, 1)
    assert (data.train["x"].dtype, data.train["y"].dtype) == (np.uint8, np.int32)
    assert (data.classes, data.class_names) == (10, tuple("0123456789"))
    pixels = data.train["x"].astype(np.float64) / 255
    np.testing.assert_allclose((data.mean[0], data.std[0]), (pixels.mean(), pixels.std()), rtol=1e-9)
    np.testing.assert_allclose(pixels * 16, np.round(pixels * 16), atol=0.04)
    other = load("digits", validation=200, seed=1)
    np.testing.assert_array_equal(other.test["x"], data.test["x"])  # the test rows do not follow the seed
    assert len(other.validation["x"]) == 200
    assert len(load("digits", validation=0).validation["y"]) == 0
    for bad in (1.0, -0.1, 5000, "a", True, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"validation is .*must be a fraction in \[0, 1\)"):
            load("digits", validation=bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": 0.999999}, "validation is 0.999999, all 1438 examples of train: must be at most 0.999"),
        ({"seed": -1}, "seed is -1, must be an integer >= 0"),
        ({"seed": 0.5}, "seed is 0.5, must be an integer >= 0"),
        ({"size": 16}, "size is 16, must be None for digits"),
        ({"size": 14.5}, "size is 14.5, must be an integer >= 1"),
        ({"size": 0}, "size is 0, must be an integer >= 1"),
    ],
)
def test_arguments_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load("digits", **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 20, 0), r"count is 20, must be an integer in \[0, 10\]"),
        ((10, -2, 0), "count is -2"),
        ((10, 2.5, 0), "count is 2.5"),
        ((10, 2, 0, np.zeros(9, int)), r"labels has shape \(9,\), must be \(10,\)"),
    ],
)
def test_holdout_refuses_what_is_no_share_of_its_rows(arguments, message):
    with pytest.raises(ValueError, match=message):
        holdout(*arguments)


@pytest.mark.parametrize(
    ("name", "close"),
    [("MNIST", "mnist"), ("fashion-mnist", "fashion_mnist"), ("Fashion-MNIST:1.0.0", "fashion_mnist"), ("Digits", "digits")],
)
def test_close_names_whatever_the_case_and_the_dashes(tmp_path, name, close):
    for known in ("mnist", "fashion_mnist"):
        (tmp_path / known / "1.0.0").mkdir(parents=True)
        (tmp_path / known / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"did you mean (.* or )?{close}\b"):
        load(name, data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_the_newest_cached_version_among_folders_of_other_names(tmp_path):
    for name in ("a_set----abc--", "a_set------", "a_set----1.x.0--", "a_set----9.0.0--16", "a_set----3.0.0--"):
        (tmp_path / name).mkdir()
    for version, value in (("1.9.0", 1), ("1.10.0", 2)):
        write(entry(tmp_path, f"a_set----{version}--"), {"train": {"x": np.full((20, 1), value)}}, FACTS)
    data = load("a_set", data_dir=tmp_path / "none", cache_dir=tmp_path)
    assert data.train["x"][0] == 2
    assert load("a_set:1.9.0", data_dir=tmp_path / "none", cache_dir=tmp_path).train["x"][0] == 1


def test_holdout_is_stratified_exact_and_a_partition():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    kept, held_out = holdout(100, 10, 0, labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(100))
    np.testing.assert_array_equal(np.bincount(labels[held_out]), [5, 3, 2])
    np.testing.assert_array_equal(holdout(100, 10, 0, labels)[1], held_out)
    assert not np.array_equal(holdout(100, 10, 1, labels)[1], held_out)
    assert len(holdout(10, 3, 0)[1]) == 3


def test_cache_round_trip_and_every_kind_of_damage(tmp_path):
    arrays = {"train": {"x": np.arange(12, dtype=np.uint8).reshape(3, 4), "a/b": np.arange(3)}}
    folder = entry(tmp_path, "set--1")
    assert read(folder) is None

    def fresh():
        write(folder, arrays, {"classes": 3})

    fresh()
    found, facts = read(folder)
    assert facts == {"classes": 3}
    for name, array in arrays["train"].items():
        np.testing.assert_array_equal(found["train"][name], array)
    assert not list(folder.glob(".writing*"))
    file, manifest = folder / "train-0.npy", folder / "manifest.json"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    damage = {
        "has SHA-256": lambda: file.write_bytes(changed),
        "train-0.npy has": lambda: file.write_bytes(file.read_bytes()[:-3]),
        "train-0.npy cannot be read": file.unlink,
        "manifest.json cannot be read": lambda: manifest.write_text("{"),
        "its own checksum": lambda: manifest.write_text(manifest.read_text().replace('"classes": 3', '"classes": 4')),
    }
    for message, harm in damage.items():
        fresh()
        harm()
        with pytest.raises(Exception, match=message) as error:
            read(folder)
        assert type(error.value).__name__ == "CorruptCache"
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write(folder, {"train": {"x": np.array([None])}}, {})
    assert read(folder) is None  # an interrupted write leaves no cache
    for key in ("../up", "/etc", "a/b", "..", ".hidden", ""):
        with pytest.raises(ValueError, match="cache key"):
            entry(tmp_path, key)


@pytest.fixture
def shakespeare(tmp_path):
    _need("tiny_shakespeare")
    shutil.copytree(SOURCE / "tiny_shakespeare", tmp_path / "tfds" / "tiny_shakespeare")
    return {"data_dir": tmp_path / "tfds", "cache_dir": tmp_path / "cache"}


def test_text_is_characters(shakespeare):
    data = load("tiny_shakespeare", **shakespeare)
    assert (data.classes, len(data.class_names)) == (65, 65)
    assert [len(s["tokens"]) for s in (data.train, data.validation, data.test)] == [1003854, 55770, 55770]
    assert "".join(data.class_names[i] for i in data.train["tokens"][:13]) == "First Citizen"
    assert (data.mean, data.train["tokens"].dtype) == ((), np.uint8)
    cut = load("tiny_shakespeare", validation=1000, **shakespeare)
    for loaded in (data, cut, load("digits")):  # just decoded, from the cache, and built in
        leaves = [leaf for split in (loaded.train, loaded.validation, loaded.test) for leaf in split.values()]
        assert not any(leaf.flags.writeable for leaf in leaves)
    np.testing.assert_array_equal(cut.validation["tokens"], data.train["tokens"][-1000:])


def test_a_damaged_cache_is_said_and_rebuilt_or_explained(shakespeare, caplog, monkeypatch):
    load("tiny_shakespeare", **shakespeare)
    (file,) = shakespeare["cache_dir"].glob("*/train-0.npy")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"\xff")
    with caplog.at_level(logging.WARNING):
        load("tiny_shakespeare", **shakespeare)
    assert "damaged and is rebuilt" in caplog.text
    assert file.read_bytes() == good
    monkeypatch.setattr(LOADER, "decode", None)  # a sound cache is used: nothing is decoded
    shutil.rmtree(shakespeare["data_dir"])
    assert load("tiny_shakespeare", **shakespeare).classes == 65  # and outlives its source
    file.write_bytes(good[:-1])
    with pytest.raises(OSError, match=r"(?s)is damaged.*so delete .*tiny_shakespeare.*download_and_prepare"):
        load("tiny_shakespeare", **shakespeare)


def test_a_set_prepared_anew_is_decoded_anew(shakespeare, monkeypatch):
    load("tiny_shakespeare", **shakespeare)
    (info,) = shakespeare["data_dir"].glob("*/*/dataset_info.json")
    info.write_text(info.read_text() + " ")
    calls = []
    monkeypatch.setattr(LOADER, "decode", lambda *args: calls.append(1) or decode.decode(*args))
    load("tiny_shakespeare", **shakespeare)
    load("tiny_shakespeare", **shakespeare)
    assert len(calls) == 1


def test_what_is_missing_is_explained(shakespeare, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)cifar100 is not prepared in .*file_format='array_record'\)"):
        load("cifar100", **shakespeare)
    with pytest.raises(ValueError, match=r"did you mean .*tiny_shakespeare"):
        load("tiny_shakespear", **shakespeare)
    for bad in ("../tiny_shakespeare", "/etc/passwd", "a/../b", "a b", ""):
        with pytest.raises(ValueError, match="name is"):
            load(bad, **shakespeare)
    (info,) = shakespeare["data_dir"].glob("*/*/dataset_info.json")
    sound = info.read_text()
    info.write_text(json.dumps({**json.loads(sound), "fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"(?s)tfrecord format, which needs tensorflow.*array_record"):
        load("tiny_shakespeare", **shakespeare)
    info.write_text(sound)
    next(info.parent.glob("*train*")).unlink()
    with pytest.raises(OSError, match="missing or damaged; delete the folder"):
        load("tiny_shakespeare", data_dir=shakespeare["data_dir"], cache_dir=tmp_path / "other")


@pytest.mark.parametrize(
    ("pattern", "cut", "message"),
    [
        ("*train.array_record*", 65536, r"split 'train' of .*record 0 has no 'text'"),
        ("*train.array_record*", 70000, "split 'train' of .*RuntimeError"),
        ("dataset_info.json", 100, r"dataset_info\.json cannot be read \(JSONDecodeError"),
        ("features.json", 100, r"features\.json cannot be read \(JSONDecodeError"),
    ],
)
def test_damaged_folders_say_which_file_and_what_to_delete(shakespeare, pattern, cut, message):
    (file,) = shakespeare["data_dir"].glob(f"*/*/{pattern}")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(OSError, match=rf"(?s){message}.*delete the folder {file.parent} and .*download_and_prepare"):
        load("tiny_shakespeare", **shakespeare)


def test_what_is_no_damage_is_not_called_so(shakespeare, monkeypatch):
    def mistake(*_):
        raise TypeError("a mistake")

    monkeypatch.setattr(decode, "_columns", mistake)
    with pytest.raises(TypeError, match="a mistake"):
        load("tiny_shakespeare", **shakespeare)


def test_an_unwritable_cache_is_a_warning(shakespeare, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert load("tiny_shakespeare", data_dir=shakespeare["data_dir"], cache_dir=tmp_path / "file").classes == 65
    assert "could not be cached" in caplog.text


def test_texts_with_labels_are_padded_bytes():
    splits = {"train": {"tokens": [b"abc", b""]}, "test": {"tokens": [b"longer"]}}
    padded(splits, None)
    np.testing.assert_array_equal(splits["train"]["tokens"], [[97, 98, 99, 0, 0, 0], [0] * 6])
    splits = {"a": {"tokens": ["né".encode(), b"n"]}}
    assert characters(splits) == ["\n", "n", "é"]
    np.testing.assert_array_equal(splits["a"]["tokens"], [1, 2, 0, 1])


def test_tables_and_odd_images_from_features():
    tfds = pytest.importorskip("tensorflow_datasets")
    f = tfds.features

    class Info:
        supervised_keys = None
        features = f.FeaturesDict(
            {
                "a": f.Scalar(np.float32),
                "n": {"b": f.Tensor(shape=(2,), dtype=np.int64)},
                "name": f.Text(),
                "label": f.ClassLabel(names=["u", "v"]),
            }
        )

    plan = decode._plan(tfds, Info, "folder", None)
    assert (plan["kind"], plan["inputs"], plan["label"]) == ("table", ["a", "n/b"], "label")

    class Rows(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    rows = Rows([{"a": np.float32(i), "n": {"b": np.array([1, 2])}, "name": b"", "label": i % 2} for i in range(3)])
    columns = decode._columns(rows, plan, None)
    np.testing.assert_array_equal(columns["x"], [[0, 1, 2], [1, 1, 2], [2, 1, 2]])
    np.testing.assert_array_equal(columns["y"], [0, 1, 0])
    mean, std = loading.moments(columns["x"])
    np.testing.assert_allclose(mean, [1, 1, 2])
    np.testing.assert_allclose(std, [np.sqrt(2 / 3), 1, 1])
    Info.features = f.FeaturesDict({"image": f.Image(shape=(None, None, 3)), "label": f.ClassLabel(num_classes=2)})
    with pytest.raises(ValueError, match="differ in size: pass size="):
        decode._plan(tfds, Info, "folder", None)
    assert decode._fit(np.zeros((20, 30, 3), np.uint8), 10).shape == (10, 10, 3)


def test_images_are_tidied():
    bits = np.repeat(np.random.default_rng(0).integers(0, 2, (4, 3, 3, 1), dtype=np.uint8), 3, axis=-1)
    splits = {"train": {"x": bits}}
    decode._tidy(splits)
    np.testing.assert_array_equal(splits["train"]["x"], bits[..., :1] * 255)


def _labels(counts=(40, 40, 40)):
    y = np.repeat(np.arange(len(counts)), counts)
    return {"x": np.arange(len(y), dtype=np.float32)[:, None], "y": y}


def test_label_noise_changes_its_share_to_other_classes():
    split = _labels()
    noisy = label_noise(split, 0.25, 3)["y"]
    assert (noisy != split["y"]).sum() == 30
    assert set(noisy) == {0, 1, 2}
    np.testing.assert_array_equal(label_noise(split, 0.25, 3)["y"], noisy)
    np.testing.assert_array_equal(label_noise(split, 0, 3)["y"], split["y"])
    flipped = label_flips(split, 0.5, {0: 1, 1: 0})["y"]
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (split["y"], flipped), 1)
    np.testing.assert_array_equal(confusion, [[20, 20, 0], [20, 20, 0], [0, 0, 40]])


def test_subsets():
    tail = imbalance(_labels(), 4)
    np.testing.assert_array_equal(np.bincount(tail["y"]), [40, 20, 10])
    np.testing.assert_array_equal(tail["y"], _labels()["y"][tail["x"][:, 0].astype(int)])
    few = few_labels(_labels(), 5)
    np.testing.assert_array_equal(np.bincount(few["y"]), [5, 5, 5])
    assert not np.array_equal(few["x"], few_labels(_labels(), 5, seed=1)["x"])
    for call, message in [
        (lambda: imbalance(_labels(), 0.5), "ratio is 0.5"),
        (lambda: imbalance(_labels(), 41), "ratio is 41"),
        (lambda: few_labels(_labels(), 41), "per_class is 41"),
        (lambda: label_noise(_labels(), 1.5, 3), "rate is 1.5"),
        (lambda: label_noise(_labels(), 0.5, 2), "classes is 2"),
        (lambda: label_flips(_labels(), 0.5, {7: 1}), "mapping has class 7"),
        (lambda: label_flips(_labels(), 0.5, {0: 3}), r"mapping sends class 0 to 3, must be .* in \[0, 2\]"),
        (lambda: label_flips(_labels(), 0.5, {0: -1}), "mapping sends class 0 to -1"),
        (lambda: imbalance(_labels(), float("nan")), "ratio is nan"),
        (lambda: few_labels(_labels(), 1, seed=-1), "seed is -1, must be an integer >= 0"),
        (lambda: few_labels({"x": np.zeros(3)}, 1), "no labels"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
