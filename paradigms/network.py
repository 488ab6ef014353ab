"""A trained network read from disk, ready to predict on arrays. `paradigms.export` writes it."""

import functools
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

PROGRAM, WEIGHTS, FACTS = "predict.bin", "weights.npz", "model.json"
FORMAT = 1
# What a program may call beyond StableHLO itself: checks of shapes, random bits, linear algebra. No call back to a host.
CALLS = (
    "shape_assertion|Sharding",
    r"cu_threefry2x32\w*|(lapack|cusolver|cublas|hip)\w+",
    r"Qr|Eigh|LuDecomposition|TopK|\w*Householder\w*",
)


class Network(NamedTuple):
    """A trained network, ready to predict; the normalisation of inputs is inside.

    Attributes:
      predict: ``(x, batch_size=512) -> {"logits": ..., "features": ...}`` on NumPy arrays of any number of rows; more
        than `batch_size` are answered that many at a time.
      weights: {"params": ..., "state": ...}, nested dicts of arrays as in a `TrainState`: what ``predict`` reads, and the
        whole network.
      classes: names of the classes, one a logit; () where the outputs are no classes.
      shape: of one example.
      dtype: of the examples that the program takes.
      pixels: whether examples are images in [0, 1], for which uint8 stands as well.
    """

    predict: Callable[..., dict]
    weights: dict
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    pixels: bool


def load_run(folder: "pathlib.Path | str", name: str | None = None) -> Network:
    """The trained network of a run.

    Args:
      folder: of the run.
      name: which part of a run that saved several, by its folder in the run's. Default: the run's own, or its only one.

    Returns:
      a `Network`.

    Raises:
      ValueError: no model there, several and no `name`, or files that are damaged or none of ours.
    """
    program, leaves, facts = read(find(folder, name))
    shape, dtype, pixels = tuple(facts["shape"]), np.dtype(facts["dtype"]), facts["pixels"]
    call, placed = jax.jit(program.call), jax.device_put(leaves)

    def predict(x: Any, batch_size: int = 512) -> dict:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give 1 or more")
        x = _checked(np.asarray(x), shape, dtype, pixels)
        parts = [jax.device_get(call(placed, x[i : i + batch_size])) for i in range(0, len(x), batch_size)]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *parts)

    return Network(predict, _nested(facts, leaves), tuple(facts["classes"]), shape, dtype, pixels)


def weight_name(path: list) -> str:
    """The name of a weight in ``weights.npz``: "params/model/head/kernel"."""
    return "/".join(map(str, path))


def only_computes(program: export.Exported) -> None:
    """Raises ValueError for a program that calls anything but the library functions of XLA."""
    text = program.mlir_module()
    calls = re.findall(r'stablehlo\.custom_call @"?([^"(]*)', text)
    foreign = sorted({call for call in calls if not re.fullmatch("|".join(CALLS), call)})
    if foreign or len(calls) != text.count("stablehlo.custom_call"):
        raise ValueError(f"program: calls {foreign or 'functions without a name'}; only what XLA itself computes is allowed")


def find(folder, name) -> pathlib.Path:
    """The folder of the model of the run, or of its part `name`; whatever `name` is, one inside the run's."""
    root = pathlib.Path(folder)
    places = [path for pattern in ("model", "*/model", "*/*/model") for path in sorted(root.glob(pattern))]
    found = {path.parent.relative_to(root).as_posix(): path for path in places if (path / FACTS).is_file()}
    if not found:
        raise ValueError(f"{root}: holds no saved model; give the folder of a run that ended, or save one with save_model")
    if name is None and (len(found) == 1 or "." in found):
        return found.get(".") or next(iter(found.values()))
    if name not in found:
        raise ValueError(f"{root}: part {name!r} is none of those with a model; name one of {sorted(found)}")
    return found[name]


def read(home: pathlib.Path) -> tuple[export.Exported, list[np.ndarray], dict]:
    """The program in the folder of a model, the arrays it takes before x, and the facts about them.

    Raises:
      ValueError: a file is missing or damaged, or one does not fit the others.
    """
    try:
        if irregular := [name for name in (PROGRAM, WEIGHTS) if not (home / name).is_file()]:
            raise ValueError(f"no file {' and no file '.join(irregular)}")
        facts = json.loads((home / FACTS).read_bytes())
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
        files = {name: (home / name).read_bytes() for name in (PROGRAM, WEIGHTS)}
        for name, content in files.items():
            if hashlib.sha256(content).hexdigest() != facts["sha256"][name]:
                raise ValueError(f"{name} does not have its checksum")
        with np.load(io.BytesIO(files[WEIGHTS]), allow_pickle=False) as stored:
            leaves = [_leaf(stored[weight_name(entry["path"])], entry) for entry in facts["weights"]]
        _nested(facts, leaves)
        program = export.deserialize(bytearray(files[PROGRAM]))
        only_computes(program)
        *takes, x = [(list(aval.shape), aval.dtype) for aval in program.in_avals]
        if takes != [(list(leaf.shape), leaf.dtype) for leaf in leaves]:
            raise ValueError(f"{PROGRAM} takes other arrays than {WEIGHTS} holds")
        described = facts["shape"] == x[0][1:] and facts["dtype"] == x[1] and isinstance(facts["pixels"], bool)
        if not described or not all(isinstance(name, str) for name in facts["classes"]):
            raise ValueError(f"{FACTS} does not describe {PROGRAM}")
    except Exception as error:  # a foreign zip, JSON or flatbuffer raises nearly anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{home}: no whole model ({why}); restore the folder, or run again") from None
    return program, leaves, facts


def _leaf(stored: np.ndarray, entry: dict) -> np.ndarray:
    """An array, which lies there as bytes where NumPy's format does not know its type."""
    dtype = np.dtype(entry["dtype"])
    return stored if stored.dtype == dtype else np.frombuffer(stored.tobytes(), dtype).reshape(entry["shape"])


def _nested(facts: dict, leaves: list[np.ndarray]) -> dict:
    weights: dict = {"params": {}, "state": {}}
    for entry, leaf in zip(facts["weights"], leaves, strict=True):
        *above, last = entry["path"]
        functools.reduce(lambda slot, key: slot.setdefault(key, {}), above, weights)[last] = leaf
    return weights


def _checked(x: np.ndarray, shape: tuple, dtype: np.dtype, pixels: bool) -> np.ndarray:
    """`x` as the program takes it; a ValueError where it is something else, or may be."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if x.dtype.kind not in "biu" and not floating:
        raise ValueError(f"x: {x.dtype} is no array of numbers; give {dtype} or its like")
    if x.shape[1:] != shape or not len(x):
        raise ValueError(f"x: has shape {x.shape}; the network takes ({', '.join(map(str, ('n', *shape)))}), n at least 1")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if floating or x.min() < limits.min or x.max() > limits.max:
            raise ValueError(f"x: is {x.dtype} from {x.min()} to {x.max()}; the network takes {dtype}")
        return x.astype(dtype)
    if x.dtype == np.uint8 and pixels:
        return x * np.float32(1 / 255)  # as `data.pixels`
    if pixels and not floating:
        raise ValueError(f"x: is {x.dtype}; the network takes images of uint8, 0 to 255, or of floats in [0, 1]")
    if x.dtype == np.uint8:
        raise ValueError(f"x: is uint8, which is for pixels, and the network was not trained on them; give {dtype}")
    with np.errstate(over="ignore"):  # what is too large shows as infinite
        x = x.astype(dtype)
    finite = np.isfinite(x).reshape(len(x), -1).all(1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise ValueError(f"x: is not finite in {len(bad)} rows, the first is row {bad[0]}; clean the data")
    if pixels and (x.min() < -1 or x.max() > 2):  # noise may leave [0, 1], pixels to 255 leave it far behind
        raise ValueError(f"x: goes from {x.min():g} to {x.max():g}; the network takes [0, 1]: divide by 255, or give uint8")
    return x
