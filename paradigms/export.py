"""A trained network written to disk: for `load_run`, and as one program for machines that have jax alone.

A saved model is a folder of three files. ``predict.bin`` is the objective's ``predict`` as a `jax.export` program for
any number of rows, on CPU, CUDA and TPU; ``weights.npz`` holds the arrays it takes; ``model.json`` says what they are.
Nothing in them is Python: all they can do is compute.
"""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from paradigms.network import FACTS, FORMAT, PROGRAM, WEIGHTS, find, only_computes, read, weight_name
from paradigms.objective import Batch

PLATFORMS = ("cpu", "cuda", "tpu")


def save_model(
    folder: "pathlib.Path | str",
    trainer: Any,
    state: Any,
    x: Any,
    *,
    classes: Sequence = (),
    run: int | None = None,
    batch: Callable[[Any], Batch] = lambda x: {"x": x},
) -> pathlib.Path:
    """Saves what ``trainer.predict(state, ...)`` computes to ``folder/model``, for `load_run`.

    Averaged weights, masks and the like answer as in evaluation. The network is saved whole; of everything else (a memory
    of training examples, the optimizer) what ``predict`` does not read stays out.

    Args:
      folder: of the run, or of one of its parts; made when missing. A model that it holds is replaced.
      trainer: of one run, or of many.
      state: the trainer's.
      x: examples as evaluation is given them, such as ``data.test["x"]``; their shape and dtype count. uint8 is pixels.
      classes: their names, one a logit, where an example has exactly one class.
      run: which run of a trainer of many, from 0, the default.
      batch: ``x -> batch`` for an objective whose ``predict`` needs more than "x", such as a support set to adapt to.

    Returns:
      the folder of the model.

    Raises:
      ValueError: a run that there is not, classes that do not fit the logits, or an objective whose ``predict`` needs
        another batch or does not give one row an example.
    """
    one, predict = _one(trainer, state, run)
    shape, pixels = tuple(x.shape[1:]), x.dtype == np.uint8
    dtype = np.dtype(np.float32 if pixels else jax.dtypes.canonicalize_dtype(x.dtype))
    program, weights = _trace(predict, one, shape, dtype, batch)
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
    names = tuple(map(str, classes))
    _check_outputs(outputs, names, program.in_avals[-1].shape[0])

    stored, arrays = [], {}
    for path, leaf in weights:
        stored.append({"path": path, "dtype": leaf.dtype.name, "shape": leaf.shape})
        # NumPy's format does not know bfloat16 and its like; bytes it does
        plain = leaf if leaf.dtype.kind in "biufc" else np.frombuffer(leaf.tobytes(), np.uint8)
        arrays[weight_name(path)] = plain
    if len(arrays) < len(stored):
        raise ValueError(f'state: two slots have one name among {sorted(arrays)}; rename one, without "/"')
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    files = {PROGRAM: bytes(program.serialize()), WEIGHTS: packed.getvalue()}
    facts = {"format": FORMAT, "jax": jax.__version__, "shape": shape, "dtype": dtype.name, "pixels": bool(pixels)}
    facts |= {"classes": names, "outputs": jax.tree.map(str, outputs), "weights": stored}
    facts["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    home = pathlib.Path(folder) / "model"
    home.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, FACTS: json.dumps(facts, indent=1).encode()}.items():  # the checksums last
        part = home / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, home / name)
    return home


def artefact(folder: "pathlib.Path | str", name: str | None = None) -> bytes:
    """The network of a run as one `jax.export` program with the weights inside, for programs that have jax alone.

    ``jax.export.deserialize(artefact).call(x)`` gives the outputs; x is of `Network.shape` and `Network.dtype` with any
    number of rows, pixels in [0, 1]. The program runs with later versions of jax as long as `jax.export` promises.

    Args:
      folder: of the run.
      name: which part of a run that saved several; see `load_run`.

    Raises:
      ValueError: as `load_run`.
    """
    program, leaves, facts = read(find(folder, name))
    x = _rows(tuple(facts["shape"]), np.dtype(facts["dtype"]))
    return bytes(export.export(jax.jit(lambda x: program.call(leaves, x)), platforms=PLATFORMS)(x).serialize())


def _one(trainer, state, run):
    """The state of one run without its optimizer, and the function that answers."""
    count = trainer.runs or 1
    if run is not None and not 0 <= run < count:
        raise ValueError(f"run={run}: the trainer has {count}; give one from 0 to {count - 1}")
    state = state._replace(opt_state=None, aggregate_state=None)
    if trainer.runs is not None:
        state = jax.tree.map(lambda leaf: leaf[run or 0], state)
    return state, trainer.members[run or 0].pure.predict


def _trace(predict, state, shape, dtype, batch):
    """The program ``(leaves, x) -> outputs``, and the leaves it takes as pairs of path and array."""
    found, structure = jax.tree.flatten_with_path({"params": state.params, "state": state.state})
    paths = [[getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path] for path, _ in found]
    leaves = jax.device_get([leaf for _, leaf in found])
    step, task = jax.device_get((state.step, state.task))
    key, kind = np.asarray(jax.random.key_data(state.key)), jax.random.key_impl(state.key)

    def program(kept, x, platforms):
        def answer(given, x):
            at = dict(zip(kept, given, strict=True))
            whole = [at[i] if i in at else jnp.zeros(leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
            slots = jax.tree.unflatten(structure, whole)
            root = jax.random.wrap_key_data(jnp.asarray(key), impl=kind)
            return predict(state._replace(step=step, task=task, key=root, **slots), batch(x))

        given = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in kept]
        return export.export(jax.jit(answer), platforms=platforms)(given, x)

    try:  # of a program for one row jax drops the arrays that nothing reads, of one for any number it keeps them
        used = program(range(len(leaves)), jax.ShapeDtypeStruct((1, *shape), dtype), PLATFORMS[:1]).module_kept_var_idx
    except KeyError as error:
        raise ValueError(f"batch: predict of this objective needs {error} besides x; pass batch=, which makes it") from error
    kept = [i for i, path in enumerate(paths) if i in used or "model" in path]
    try:
        made = program(kept, _rows(shape, dtype), PLATFORMS)
    except Exception as error:  # whatever it is: for one row the same function went well
        why = str(error).partition("\n")[0]
        raise ValueError(f"trainer: predicts one number of rows alone ({why}); write x.shape[0] for len(x)") from error
    only_computes(made)
    return made, [(paths[i], leaves[i]) for i in kept]


def _rows(shape, dtype):
    return jax.ShapeDtypeStruct((*export.symbolic_shape("rows"), *shape), dtype)


def _check_outputs(outputs, classes, rows) -> None:
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(outputs)}
    if wrong := {name: shape for name, shape in shapes.items() if shape[:1] != (rows,)}:
        raise ValueError(f"batch: {wrong} are not one row an example; pass batch=, which makes a batch of all of x")
    logits = outputs.get("logits")
    if classes and (logits is None or logits.shape[-1] != len(classes)):
        got = "no logits" if logits is None else f"{logits.shape[-1]} logits"
        raise ValueError(f"classes: {len(classes)} names, but the network has {got}; give one name a logit")
