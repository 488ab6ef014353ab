"""Malformed configurations and data sets: each ends in one line on standard error and exit code 2, and runs nothing."""

import importlib
import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import optax
import pytest

import paradigms as pd
from experiments import __main__ as command
from experiments import catalog
from paradigms import data, logging, nn
from paradigms.data import cache

GOOD = {"seeds": 1, "folds": 2, "hidden": [4], "epochs": 1, "batch_size": 64, "learning_rate": 0.001, "weight_decay": 0.0}
GOOD |= {"smoothing": 0.0, "dropout": 0.0}
FASHION = {"networks": ["mlp"], "seeds": 1, "mlp_epochs": 1, "cnn_epochs": 1, "batch_size": 8, "learning_rate": 0.1}
FASHION |= {"weight_decay": 0.0, "smoothing": 0.0, "decay": 0.9, "key": 0}
CIFAR = {"recipe": "fast", "seeds": 1, "steps": None, "batch_size": 8, "key": 0}


def config(experiment="supervised.digits", settings=GOOD, **others):
    """The bytes of a config.json."""
    return json.dumps({"experiment": experiment, "settings": settings, **others}).encode()


def wrong(**changes):
    return config(settings={**GOOD, **changes})


RERUN = {  # the bytes of config.json, and what the message has to name
    "empty": (b"", "config.json"),
    "garbage": (b"\x00\xff\xfe\x80garbage", "config.json"),
    "not UTF-8": ('{"experiment": "é"}'.encode("latin-1"), "config.json"),
    "UTF-16": (config().decode().encode("utf-16"), "config.json"),
    "truncated": (config()[:-5], "config.json"),
    "a list": (b"[1]", "holds a list"),
    "null": (b"null", "holds a NoneType"),
    "deep lists": (b"[" * 100_000, "config.json"),
    "deep objects": (b'{"a":' * 100_000, "config.json"),
    "an endless number": (config().replace(b'"seeds": 1', b'"seeds": ' + b"9" * 5000), "config.json"),
    "no experiment": (b'{"settings": {}}', '"experiment"'),
    "experiment a number": (config(3), '"experiment"'),
    "experiment empty": (config(""), "no experiment ''"),
    "experiment above": (config("../../x"), "no experiment '../../x'"),
    "experiment a module": (config("os.system"), "no experiment 'os.system'"),
    "experiment a command": (config("commands.rerun"), "no experiment"),
    "experiment with NUL": (config("supervised.digits\0"), "no experiment"),
    "experiment endless": (config("a" * 100_000), "no experiment"),
    "no settings": (b'{"experiment": "supervised.digits"}', '"settings"'),
    "settings a list": (config(settings=[1]), '"settings"'),
    "settings empty": (config(settings={}), "batch_size, dropout"),
    "unknown setting": (wrong(__class__="x"), "__class__"),
    "missing setting": (config(settings={k: v for k, v in GOOD.items() if k != "folds"}), "folds is missing"),
    "deterministic text": (config(deterministic="yes"), "deterministic"),
    "int as text": (wrong(seeds="1"), "seeds is '1', must be int"),
    "int as float": (wrong(seeds=1.5), "seeds is 1.5, must be int"),
    "int as bool": (wrong(seeds=True), "seeds is True, must be int"),
    "int as null": (wrong(seeds=None), "seeds is null, must be int"),
    "int as list": (wrong(seeds=[1]), "seeds is [1], must be int"),
    "int of 80 bits": (wrong(seeds=2**80), "64 bits"),
    "int of 33 bits": (wrong(seeds=2**33), "--seeds 8589934592"),
    "width of 60 bits": (wrong(hidden=[10**18]), "--hidden 1000000000000000000"),
    "a billion seeds": (wrong(seeds=2**30), "seeds=1073741824"),
    "more steps than 32 bits": (wrong(epochs=2**30), ""),
    "no seeds": (wrong(seeds=0), "--seeds 0"),
    "fewer than no folds": (wrong(folds=-3), "--folds -3"),
    "float NaN": (wrong(learning_rate=float("nan")), "learning_rate is nan"),
    "float infinite": (wrong(learning_rate=float("inf")), "learning_rate is inf"),
    "float too large": (config().replace(b"0.001", b"1e999"), "learning_rate is inf"),
    "float as text": (wrong(learning_rate="fast"), "learning_rate is 'fast', must be float"),
    "float as object": (wrong(learning_rate={"a": 1}), "learning_rate"),
    "float negative": (wrong(weight_decay=-1), "--weight-decay -1"),
    "list as number": (wrong(hidden=4), "hidden is 4, must be a list"),
    "list of text": (wrong(hidden=[4, "b"]), "hidden[1] is 'b', must be int"),
    "list of lists": (wrong(hidden=[[4]]), "hidden[0] is [4], must be int"),
    "width 0": (wrong(hidden=[0]), "hidden"),
    "width -1": (wrong(hidden=[-1]), "hidden"),
    "share above 1": (wrong(dropout=1.5), "1.5"),
    "share below 0": (wrong(smoothing=-1.0), "-1"),
    "more folds than examples": (wrong(folds=100_000), "n_splits=100000"),
    "batch larger than the data": (wrong(batch_size=100_000), "100000"),
    "choice unknown": (
        config("supervised.fashion_mnist", {**FASHION, "networks": ["../../rnn"]}),
        "must be one of 'mlp', 'cnn'",
    ),
    "choices none": (config("supervised.fashion_mnist", {**FASHION, "networks": []}), "--networks"),
    "choice that is code": (config("supervised.cifar10", {**CIFAR, "recipe": "__import__('os')"}), "recipe"),
    "choice of another type": (config("supervised.cifar10", {**CIFAR, "recipe": ["fast"]}), "recipe"),
    "neither int nor null": (config("supervised.cifar10", {**CIFAR, "steps": "many"}), "must be int or null"),
}
FLAGS = {  # arguments of the command line
    "text for int": (["supervised.digits", "--epochs", "x"], "--epochs"),
    "float for int": (["supervised.digits", "--epochs", "1.5"], "--epochs"),
    "no value": (["supervised.digits", "--seeds"], "--seeds"),
    "unknown flag": (["supervised.digits", "--nothing", "1"], "--nothing"),
    "text in a list": (["supervised.digits", "--hidden", "4", "b"], "--hidden"),
    "NaN": (["supervised.digits", "--learning-rate", "nan"], "--learning-rate"),
    "infinity": (["supervised.digits", "--weight-decay", "inf"], "--weight-decay"),
    "overflow": (["supervised.digits", "--seeds", "9" * 30], "--seeds"),
    "NaN where no limit is": (["supervised.digits", "--dropout", "nan"], "--dropout nan"),
    "infinity in a dry run": (["supervised.digits", "--dry-run", "--smoothing", "inf"], "--smoothing inf"),
    "unknown choice": (["supervised.cifar10", "--recipe", "slow"], "--recipe"),
    "unknown log": (["supervised.digits", "--log", "mlflow"], "--log"),
    "resume nothing": (["supervised.digits", "--resume", "nowhere"], "nowhere"),
    "resume a file": (["supervised.digits", "--resume", "a file"], "a file"),
    "out a file": (["supervised.digits", "--out", "a file"], "a file"),
    "out with NUL": (["supervised.digits", "--out", "a\0b"], "null byte"),
    "path as experiment": (["../../etc/passwd"], "no experiment"),
    "package as experiment": (["os.system"], "no experiment"),
    "option as experiment": (["--eval"], "no experiment"),
    "rerun nothing": (["rerun"], "Missing"),
    "rerun nowhere": (["rerun", "nowhere"], "nowhere"),
    "rerun a file": (["rerun", "a file"], "a file"),
    "rerun a folder without configuration": (["rerun", "."], "config.json"),
    "a dry run of nonsense": (["supervised.digits", "--dry-run", "--hidden", "-5"], "hidden"),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    return tmp_path


def ended(arguments, root=catalog.HERE):
    try:
        return command.main(arguments, root)
    except SystemExit as stopped:  # how tyro leaves
        return stopped.code


def check(code, said, names):
    """One line of error, after at most the one that says where the run is; the name of what is wrong is in it."""
    *before, line = said.splitlines()
    assert code == 2
    assert line.startswith("error: ")
    assert names in line
    assert len(line) < 1000
    assert [one for one in before if ": runs/" not in one] == []


@pytest.mark.parametrize("case", RERUN)
def test_malformed_configurations(home, capsys, case):
    content, names = RERUN[case]
    (home / "run").mkdir()
    (home / "run/config.json").write_bytes(content)
    check(ended(["rerun", "run"]), capsys.readouterr().err, names)
    assert {path.name for path in home.iterdir()} <= {"a file", "run", "runs"}  # nothing was written elsewhere
    assert [path.name for path in (home / "run").iterdir()] == ["config.json"]
    assert not list(home.glob("runs/*/*/result.json"))


@pytest.mark.parametrize("case", FLAGS)
def test_malformed_flags(home, capsys, case):
    arguments, names = FLAGS[case]
    check(ended(arguments), capsys.readouterr().err, names)
    assert {path.name for path in home.iterdir()} == {"a file"}


def test_too_little_memory_is_said_in_one_line(home, package, capsys):
    def case():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes.\n[in a block]")

    importlib.import_module(f"{package.name}.toy.data").CASE = case
    check(ended(["toy.data"], package), capsys.readouterr().err, "Out of memory")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_a_configuration_that_is_no_file_is_not_waited_for(home, capsys, make):
    (home / "run").mkdir()
    make(home / "run/config.json")
    check(ended(["rerun", "run"]), capsys.readouterr().err, "not a file")


@pytest.mark.parametrize("result", [b"{}", b"[1]", b"\xff", config("../../x"), b'{"experiment": "toy.data", "metrics": 1}'])
def test_a_result_of_something_else_is_not_saved(home, package, capsys, result):
    importlib.import_module(f"{package.name}.toy.data").CASE = lambda: None
    (home / "run").mkdir()
    (home / "run/config.json").write_bytes(config("toy.data", {"seeds": 1}, deterministic=False))
    (home / "run/result.json").write_bytes(result)
    check(ended(["toy.data", "--resume", "run", "--save-result"], package), capsys.readouterr().err, "run/result.json")
    assert not (package / "results").exists()
    assert not list(package.parent.rglob("x.json"))


@pytest.mark.parametrize("arguments", [["rerun", "run"], ["../x"], ["supervised.digits", "--seeds", "0"]])
def test_a_shell_sees_one_line_and_code_2(home, arguments):
    (home / "run").mkdir()
    (home / "run/config.json").write_bytes(b"\xff")
    environment = {**os.environ, "PYTHONPATH": str(catalog.HERE.parent)}
    words = [sys.executable, "-m", "experiments", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    check(done.returncode, done.stderr, "")
    assert done.stdout == ""


# --- data sets ------------------------------------------------------------------------------------------------------

X, Y = np.zeros((16, 8, 8, 1), np.uint8), np.arange(16, dtype=np.int32) % 10
REAL = np.zeros((16, 64), np.float32)


def train(**leaves):
    """Trains on a split; the case is that it cannot."""
    model = pd.from_nnx(lambda rngs: nn.MLP(64, (4,), 10, rngs=rngs))
    trainer = pd.Trainer(pd.supervised(model), optax.sgd(0.1))
    pd.fit(trainer, data.resident({"x": X, "y": Y, **leaves}, 8), 1, log=logging.several())


def put(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


def prepared(root):
    """A small TFDS set in array_record format; its folder."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tfds.features.FeaturesDict({"image": tfds.features.Tensor(shape=(2,), dtype=np.float32),
                                           "label": tfds.features.ClassLabel(num_classes=3)})  # fmt: skip
    folder = root / "toys/1.0.0"
    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(str(folder / "toys-train.array_record-00000-of-00001"), "group_size:1")
    for i in range(20):
        writer.write(features.serialize_example(features.encode_example({"image": np.full(2, i, "f"), "label": i % 3})))
    writer.close()
    features.save_config(folder)
    split = {"name": "train", "numBytes": "1", "shardLengths": ["20"]}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    keys = {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}}
    info = {"name": "toys", "version": "1.0.0", "fileFormat": "array_record", "supervisedKeys": keys, "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def read_prepared(damage):
    def case(home):
        damage(prepared(home / "tfds"))
        data.load("toys", data_dir=home / "tfds", cache_dir=home / "cache")

    return case


def read_cached(damage):
    def case(home):
        folder = cache.entry(home / "cache", "toys----1.0.0--")
        facts = {"classes": 3, "class_names": [], "source": None}
        cache.write(folder, {"train": {"x": REAL, "y": Y % 3}}, facts)
        damage(folder)
        data.load("toys", data_dir=home / "none", cache_dir=home / "cache")

    return case


def pickled(folder):
    np.save(folder / "train-0.npy", np.array([Evil()], object), allow_pickle=True)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


DATA = {
    "NaN": (lambda home: train(x=put(REAL, (3, 1), np.nan)), "'x'"),
    "infinity": (lambda home: train(x=put(REAL, (3, 1), -np.inf)), "'x'"),
    "empty": (lambda home: train(x=X[:0], y=Y[:0]), "empty"),
    "ragged": (lambda home: train(y=Y[:-1]), "different lengths"),
    "objects": (lambda home: train(x=np.array([X[0], None] * 8, object)), "object"),
    "text": (lambda home: train(x=np.array(["a"] * 16)), "dtype <U1"),
    "dates": (lambda home: train(x=np.zeros(16, "M8[s]")), "datetime64"),
    "complex numbers": (lambda home: train(x=REAL.astype(np.complex64)), "complex64"),
    "a list": (lambda home: train(y=list(Y)), "no example axis"),
    "one number": (lambda home: train(y=np.int32(1)), "no example axis"),
    "None": (lambda home: data.resident(None, 8), "no arrays"),  # pyright: ignore[reportArgumentType]
    "no labels": (lambda home: data.resident({"x": X}, 8) and train(y=np.zeros((16, 0), np.int32)), "y"),
    "negative label": (lambda home: train(y=put(Y, 3, -1)), "negative labels"),
    "label beyond the classes": (lambda home: train(y=put(Y, 3, 10)), "10"),
    "label of 64 bits": (lambda home: train(y=put(Y.astype(np.int64), 3, 2**40)), "32 bits"),
    "labels that are not whole": (lambda home: train(y=Y + 0.5), "y"),
    "labels of two axes": (lambda home: train(y=np.stack([Y, Y], 1)), "y"),
    "another shape": (lambda home: train(x=np.zeros((16, 7, 7, 1), np.uint8)), "(7, 7, 1)"),
    "too few for a batch": (lambda home: train(x=X[:4], y=Y[:4]), "batch_size"),
    "no split of it": (lambda home: data.resident(data.load("digits"), 8), ".train"),  # pyright: ignore[reportArgumentType]
    "a stream of text": (lambda home: data.stream(["a", "b"], 1), "must give dicts"),
    "an unknown set": (lambda home: data.load("nothing", data_dir=home, cache_dir=home), "nothing"),
    "a path as set": (lambda home: data.load("../../etc/passwd", data_dir=home, cache_dir=home), "name is"),
    "a truncated record": (read_prepared(lambda f: cut(next(f.glob("*record-*")), 0.6)), "toys"),
    "an empty record": (read_prepared(lambda f: next(f.glob("*record-*")).write_bytes(b"")), "toys"),
    "a missing record": (read_prepared(lambda f: next(f.glob("*record-*")).unlink()), "toys"),
    "a garbled description": (read_prepared(lambda f: (f / "features.json").write_bytes(b"\xff\x00")), "features.json"),
    "a description of lists": (read_prepared(lambda f: (f / "dataset_info.json").write_text("[]")), "dataset_info.json"),
    "a cache with a wrong checksum": (read_cached(lambda f: cut(f / "train-0.npy", 0.9)), "train-0.npy has SHA-256"),
    "a cache without its file": (read_cached(lambda f: (f / "train-1.npy").unlink()), "train-1.npy cannot be read"),
    "a cache that is a pickle": (read_cached(pickled), "train-0.npy"),
    "a manifest of nonsense": (read_cached(lambda f: (f / "manifest.json").write_text('{"a": 1}')), "manifest.json"),
    "a manifest, deep": (read_cached(lambda f: (f / "manifest.json").write_text("[" * 100_000)), "manifest.json"),
}


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of one experiment, whose ``CASE`` is what it does."""
    root = tmp_path_factory.mktemp("fake") / "bad_data_experiments"
    (root / "toy").mkdir(parents=True)
    text = '''
        """Does what the test says."""
        import dataclasses

        @dataclasses.dataclass(frozen=True)
        class Config:
            seeds: int = 1

        def run(config, folder):
            CASE()
            return {"accuracy": 1.0}
    '''
    (root / "toy/data.py").write_text(textwrap.dedent(text))
    sys.path.insert(0, str(root.parent))
    yield root
    sys.path.remove(str(root.parent))


@pytest.mark.parametrize("case", DATA)
def test_malformed_data(home, package, capsys, case):
    run, names = DATA[case]
    module = importlib.import_module(f"{package.name}.toy.data")
    module.CASE = lambda: run(home)
    check(ended(["toy.data"], package), capsys.readouterr().err, names)
    assert not (home / "made by a pickle").exists()
