"""The commands predict and export: every kind of file gives the same answer, and what is odd gets one line."""

import csv
import io
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import paradigms as pd
from experiments import __main__ as command
from paradigms import data, nn

DIGITS = data.load("digits")
X = DIGITS.test["x"][:3]
PIXELS = ",".join(map(str, X[0].ravel()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run with a network of images, and one with a table's regression of two outputs and a network of features alone."""
    images, parts = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("parts")
    trainer = pd.Trainer(pd.supervised(pd.from_nnx(lambda rngs: nn.MLP(64, (8,), rngs=rngs))), optax.sgd(0.1))
    state = trainer.init(0, {"x": jnp.ones((2, 8, 8, 1)), "y": jnp.zeros(2, int)})
    pd.save_model(images, trainer, state, DIGITS.test["x"], classes=[f"digit {i}" for i in range(10)])
    linear = pd.from_functions(lambda key, x: {"w": jnp.asarray([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])}, lambda p, x: x @ p["w"])
    table = pd.Trainer(pd.supervised(linear, optax.losses.squared_error), optax.sgd(0.1))
    pd.save_model(parts / "table", table, table.init(0, {"x": jnp.ones((2, 3)), "y": jnp.ones((2, 2))}), np.ones((2, 3)))
    mute = table.objective._replace(predict=lambda params, state, batch, ctx: ({"features": batch["x"]}, state))
    mute = pd.Trainer(mute, optax.sgd(0.1))
    pd.save_model(parts / "features", mute, mute.init(0, {"x": jnp.ones((2, 3)), "y": jnp.ones((2, 2))}), np.ones((2, 3)))
    return images, parts


@pytest.fixture
def run(folders, tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty folder: ``(code, what it printed, its errors)``."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = command.main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    call.images, call.parts = folders
    return call


def expected(folder, x):
    """Class names and probabilities by hand."""
    odds = np.exp(pd.load_run(folder).predict(x)["logits"].astype(float))
    return [(f"digit {row.argmax()}", float(row.max() / row.sum())) for row in odds]


def test_every_kind_of_file_gives_the_same_answers(run):
    np.save("bytes.npy", X)
    np.save("flat.npy", X[..., 0])
    np.save("one.npy", X[0])
    np.savez("named.npz", x=X / 255, y=[1, 2, 3])
    np.savez("only.npz", images=X)
    np.savetxt("whole.csv", X.reshape(3, -1), "%d", ",", header=",".join(f"p{i}" for i in range(64)), comments="")
    np.savetxt("unit.csv", X.reshape(3, -1) / 255, delimiter=",")
    Image.fromarray(X[0, ..., 0]).save("digit.png")
    Image.fromarray(np.repeat(X[0], 3, -1)).save("colour.PNG")
    files = ["bytes.npy", "flat.npy", "named.npz", "only.npz", "whole.csv", "unit.csv", "one.npy", "digit.png", "colour.PNG"]
    code, printed, said = run("predict", run.images, *files)
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert list(rows[0]) == ["file", "row", "class", "probability"]
    assert [(row["file"], row["row"]) for row in rows[:4]] == [*(("bytes.npy", str(i)) for i in range(3)), ("flat.npy", "0")]
    assert [row["file"] for row in rows[-3:]] == ["one.npy", "digit.png", "colour.PNG"]
    answers = expected(run.images, X)
    for row, (name, share) in zip(rows, answers * 6 + answers[:1] * 3, strict=True):
        assert row["class"] == name
        assert float(row["probability"]) == pytest.approx(share, rel=1e-4)
    assert said.splitlines() == ["whole.csv: whole numbers, read as pixels from 0 to 255", "colour.PNG: RGB made grey"]


def test_images_are_turned_and_fitted_and_it_is_said(run):
    big = Image.fromarray(X[0, ..., 0]).resize((32, 32), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees to be seen upright
    big.rotate(-90).save("turned.jpg", quality=100, exif=exif)
    big.save("upright.png")
    big.rotate(-90).save("fallen.png")
    Image.merge("LA", [big, Image.new("L", big.size, 0)]).save("empty.png")
    code, printed, said = run("predict", run.images, "turned.jpg", "upright.png", "fallen.png", "empty.png")
    assert code == 0
    fitted = "32 x 32 cropped and resized to 8 x 8"
    assert said.splitlines()[:3] == [f"{name}: {fitted}" for name in ("turned.jpg", "upright.png", "fallen.png")]
    assert said.splitlines()[3] == f"empty.png: put on black, RGB made grey, {fitted}"
    turned, upright, fallen, empty = (float(row["probability"]) for row in csv.DictReader(io.StringIO(printed)))
    assert turned == pytest.approx(upright, abs=0.002)  # JPEG loses a little
    assert abs(upright - fallen) > 0.005
    assert empty == pytest.approx(expected(run.images, np.zeros_like(X[:1]))[0][1], rel=1e-4)


def test_outputs_that_are_no_classes_and_parts(run):
    with open("table.csv", "w") as file:
        file.write("\ufeffa,b,c\n1,2,4\n\n0.5,0,-1e1\n")
    code, printed, _ = run("predict", run.parts, "table.csv", "--part", "table")
    assert code == 0
    assert printed == "file,row,output0,output1\ntable.csv,0,3,6\ntable.csv,1,-4.5,-5\n"
    code, _, said = run("predict", run.parts, "table.csv")
    assert code == 2
    assert "name one of ['features', 'table']" in said
    code, _, said = run("predict", run.parts, "table.csv", "--part", "features")
    assert code == 2
    assert "no logits" in said


def test_answers_go_to_new_files_in_the_run_s_folder_alone(run, tmp_path):
    np.save("x.npy", X)
    _, printed, _ = run("predict", run.images, "x.npy")
    out = run.images / "answers.csv"
    assert run("predict", run.images, "x.npy", "--out", "answers.csv")[:2] == (0, f"{out}\n")
    assert out.read_text() == printed
    (run.images / "away").symlink_to(tmp_path)
    (run.images / "link.csv").symlink_to(tmp_path / "target.csv")
    wrong = {
        "answers.csv": "is there already",
        out: "is there already",
        "../answers.csv": "outside",
        tmp_path / "answers.csv": "outside",
        "away/answers.csv": "outside",
        "link.csv": "outside",
        "nowhere/answers.csv": "no folder",
        "config.json": "ends in .csv",
        "a\0.csv": "null",
    }
    for name, message in wrong.items():
        code, printed, said = run("predict", run.images, "x.npy", "--out", name)
        assert (code, printed) == (2, ""), name
        assert message in said
        assert said.count("\n") == 1
    assert os.listdir(tmp_path) == ["x.npy"]


BAD = {
    "missing.npy": (None, "no such file"),
    "words.txt": (b"a", "none of .csv, .npy"),
    "folder.csv": ("folder", "no such file"),
    "pickle.npy": (np.array([object()]), "pickle"),
    "cut.npz": (b"PK\x03\x04", "cut.npz: "),
    "other.npy": (np.ones((2, 7, 7, 1)), "has shape (2, 7, 7, 1)"),
    "nan.npy": (np.full((2, 8, 8, 1), np.nan), "not finite in 2 rows"),
    "large.npy": (X * 1.0, "divide by 255"),
    "two.npz": ({"a": X, "b": X}, "holds the arrays ['a', 'b']"),
    "empty.csv": (b"", "no line of numbers"),
    "names.csv": (b"a,b\n", "no line of numbers"),
    "short.csv": (b"1,2\n", "line 1 has 2 values; the network takes 64"),
    "word.csv": (f"{PIXELS}\n{PIXELS[:-1]}x\n".encode(), "line 2 holds"),
    "beyond.csv": (f"{PIXELS[:-1]}999\n".encode(), "goes from 0 to"),
    "bytes.csv": (b"\xff\xfe\x00", "bytes.csv: "),
    "text.png": (b"no image", "cannot identify"),
    "cut.png": (b"\x89PNG\r\n\x1a\n\x00", "cut.png: "),
    "deep.png": (np.full((8, 8), 70, np.uint16), "8 bits a channel"),
    "gif.png": (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "cannot identify"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_input_are_named_in_one_line(run, name):
    content, message = BAD[name]
    if isinstance(content, bytes):
        with open(name, "wb") as file:
            file.write(content)
    elif isinstance(content, dict):
        np.savez(name, **content)
    elif isinstance(content, str):
        os.mkdir(name)
    elif content is not None and name.endswith(".png"):
        Image.fromarray(content).save(name)
    elif content is not None:
        np.save(name, content, allow_pickle=True)
    code, printed, said = run("predict", run.images, name)
    assert (code, printed) == (2, "")
    assert said.startswith(f"error: {name}: ")
    assert message in said
    assert said.count("\n") == 1


def test_bad_runs_and_no_files(run):
    assert run("predict", run.images)[::2] == (
        2,
        "error: predict: no files; give images, arrays or tables\n",
    )
    np.save("x.npy", X)
    assert "no saved model" in run("predict", "nowhere", "x.npy")[2]
    assert "no saved model" in run("export", "nowhere")[2]
    assert "['features', 'table']" in run("export", run.parts, "--part", "../table")[2]
    np.save("image.npy", X)
    Image.fromarray(X[0, ..., 0]).save("digit.png")
    assert "takes examples of shape (3,)" in run("predict", run.parts, "digit.png", "--part", "table")[2]


def test_export_prints_three_lines_that_predict(run):
    code, printed, _ = run("export", run.images)
    assert code == 0
    assert printed.count("\n") == 3
    assert str(run.images / "model" / "model.jax") in printed
    names = {"x": X / np.float32(255)}
    exec(printed, names)
    np.testing.assert_allclose(names["outputs"]["logits"], pd.load_run(run.images).predict(X)["logits"], atol=1e-5)
    assert isinstance(names["outputs"]["logits"], jax.Array)
    code, _, said = run("export", run.images)
    assert code == 2
    assert "is there already" in said
    assert run("export", run.images, "--out", "again.jax")[0] == 0
    for name in ("../out.jax", "/tmp/out.jax", "model/weights.npz"):
        assert run("export", run.images, "--out", name)[0] == 2
