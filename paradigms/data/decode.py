"""The records of a TFDS folder as arrays, decoded without tensorflow."""

import contextlib
from pathlib import Path

import numpy as np

from paradigms.data.prepared import damaged, description
from paradigms.data.tokens import characters, padded

_SPLITS = ("train", "validation", "test")
_CHUNK = 512


class _Unreadable(Exception):
    """A file of a prepared set is not what TFDS wrote."""


@contextlib.contextmanager
def _reading():
    """Turns what TFDS and array_record raise on damaged or missing files, a mixed lot, into `_Unreadable`.

    Only around their calls, and not for any exception: the answer to this one is to delete the folder, which must not be
    said of a mistake in an argument, of a lack of memory, or of libraries that do not fit.
    """
    from google.protobuf.json_format import ParseError
    from google.protobuf.message import DecodeError

    try:
        yield
    except PermissionError:
        raise
    except (OSError, RuntimeError, ValueError, IndexError, KeyError, DecodeError, ParseError) as error:
        raise _Unreadable(repr(error)) from error


def decode(folder: Path, size: int | None, remedy: str) -> tuple[dict, dict]:
    """Reads a prepared set whole.

    Args:
      folder: of the set.
      size: as in `load`.
      remedy: how to prepare the set anew, for the messages.

    Returns:
      ({split: {leaf: array}}, facts), for the splits train, validation and test that it has.

    Raises:
      ValueError: where no leaf can be made of the features, or images differ in size and no size is given.
      OSError: where files are damaged or missing.
    """
    import tensorflow_datasets as tfds

    for name in ("dataset_info.json", "features.json"):
        description(folder / name, remedy)
    try:
        with _reading():
            builder = tfds.builder_from_directory(folder)
    except _Unreadable as error:
        raise damaged(f"the description of {folder} (dataset_info.json, features.json)", str(error), folder, remedy) from error
    names = [name for name in _SPLITS if name in builder.info.splits]
    if not names:
        raise ValueError(f"{folder} has the splits {sorted(builder.info.splits)}, none of them {' or '.join(_SPLITS)}")
    plan = _plan(tfds, builder.info, folder, size)
    splits = {}
    for name in names:
        try:
            with _reading():
                records = builder.as_data_source(split=name)  # pyright: ignore[reportCallIssue]  # its decorator hides the signature
            splits[name] = _columns(records, plan, size)
        except _Unreadable as error:
            raise damaged(f"split {name!r} of {folder}", str(error), folder, remedy) from error
    facts = {"classes": plan["classes"], "class_names": plan["class_names"]}
    if plan["kind"] == "image":
        _tidy(splits)
    if plan["kind"] == "text" and plan["label"] is None:
        facts["class_names"] = characters(splits)
        facts["classes"] = len(facts["class_names"])
    elif plan["kind"] == "text":
        padded(splits, size)
    return splits, facts


def _plan(tfds, info, folder, size) -> dict:
    """Which feature becomes which leaf."""
    features = dict(_flatten(tfds, info.features, ""))
    keys = [key for key in (info.supervised_keys or ()) if isinstance(key, str)]
    labels = [name for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    label = keys[-1] if len(keys) > 1 and _numeric(features.get(keys[-1])) else None
    label = label or ("label" if "label" in labels else labels[0] if len(labels) == 1 else None)
    images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
    numbers = [name for name, feature in features.items() if name != label and _numeric(feature)]
    first = keys[:1]
    if images:
        kind, inputs = "image", [name for name in first if name in images] or images[:1]
        if None in features[inputs[0]].shape and size is None:
            raise ValueError(
                f"the images of {folder} differ in size: pass size=, the side in pixels that each is resized and cropped to"
            )
    elif texts and (not numbers or "text" in texts or (first and first[0] in texts)):
        inputs = [name for name in first if name in texts] or [name for name in texts if name == "text"] or texts[:1]
        kind = "text"
    elif numbers:
        kind, inputs = "table", numbers
    else:
        raise ValueError(f"{folder} has no image, text or numeric feature of fixed shape, only {info.features}")
    names = (features[label].names or []) if label in labels else []
    return {
        "kind": kind,
        "inputs": inputs,
        "label": label,
        "extra": [] if kind == "table" else [name for name in numbers if name not in inputs],
        "classes": int(features[label].num_classes or 0) if label in labels else 0,
        "class_names": [str(name) for name in names],
    }


def _flatten(tfds, features, prefix):
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _flatten(tfds, feature, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", feature


def _numeric(feature) -> bool:
    """Whether a feature is numbers of one fixed shape, and no image."""
    if feature is None or not type(feature).__name__.endswith(("Tensor", "Scalar", "ClassLabel", "BBoxFeature")):
        return False
    return np.dtype(feature.np_dtype).kind in "iufb" and None not in feature.shape


def _columns(records, plan, size) -> dict:
    """The leaves of one split, decoded in slices."""
    lists: dict = {"input": [], "y": [], **{name: [] for name in plan["extra"]}}
    needed = [*plan["inputs"], *plan["extra"], *([plan["label"]] if plan["label"] else [])]
    with _reading():
        count = len(records)
    for start in range(0, count, _CHUNK):
        with _reading():
            rows = records.__getitems__(list(range(start, min(start + _CHUNK, count))))
        for i, row in enumerate(rows, start):
            # Of a file cut at a block's end, or of another set, array_record gives records without content.
            if absent := [name for name in needed if _get(row, name) is None]:
                raise _Unreadable(f"record {i} has no {absent[0]!r}")
        if plan["kind"] == "text":
            lists["input"] += [_get(row, plan["inputs"][0]) for row in rows]
        elif plan["kind"] == "image":
            images = [np.asarray(_get(row, plan["inputs"][0])) for row in rows]
            lists["input"].append(np.stack([_fit(image, size) for image in images] if size else images))
        else:
            columns = [np.stack([np.asarray(_get(row, name), np.float32).ravel() for row in rows]) for name in plan["inputs"]]
            lists["input"].append(np.concatenate(columns, axis=1))
        for name in plan["extra"]:
            lists[name].append(np.stack([np.asarray(_get(row, name)) for row in rows]))
        if plan["label"]:
            lists["y"].append(np.stack([np.asarray(_get(row, plan["label"])) for row in rows]))
    inputs = lists.pop("input")
    out = {"tokens": inputs} if plan["kind"] == "text" else {"x": np.concatenate(inputs)}
    return out | {name: _narrow(np.concatenate(parts)) for name, parts in lists.items() if parts}


def _get(row, name):
    for part in name.split("/"):
        row = row[part]
    return row


def _narrow(array):
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)


def _fit(image, size):
    """The shorter side resized to `size`, the centre cropped to a square: the usual evaluation crop."""
    from PIL import Image

    height, width, channels = image.shape
    scale = size / min(height, width)
    shape = max(size, round(width * scale)), max(size, round(height * scale))
    picture = Image.fromarray(image[..., 0] if channels == 1 else image).resize(shape, Image.Resampling.BILINEAR)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size))).reshape(size, size, channels)


def _tidy(splits) -> None:
    """One channel where all are equal everywhere; {0, 1} pixels, as 1-bit PNGs decode, stretched to {0, 255}."""
    images = [split["x"] for split in splits.values()]
    if any(image.dtype != np.uint8 for image in images):
        return
    grey = all(image.shape[-1] == 3 and (image == image[..., :1]).all() for image in images)
    bits = all(image.max(initial=0) <= 1 for image in images)
    for split in splits.values():
        x = split["x"][..., :1] if grey else split["x"]
        split["x"] = np.ascontiguousarray(x * np.uint8(255) if bits else x)
