"""TFDS folders in array_record format, found and decoded without tensorflow."""

import difflib
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from paradigms.data.tokens import characters, padded

_NAME = re.compile(r"(\w+)(?:/([\w+][\w+.-]*))?(?::(\d+\.\d+\.\d+))?", re.ASCII)
_SPLITS = ("train", "validation", "test")
_CHUNK = 512


def data_root(data_dir=None) -> Path:
    """`data_dir`, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`, TFDS's own default."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()


def parse(name: str) -> tuple[str, str | None, str | None]:
    """(set, config, version) of "set", "set/config", "set:1.0.0" or "set/config:1.0.0".

    Raises:
      ValueError: where the name has another form.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or ".." in name:
        raise ValueError(f'name is {name!r}, must be "digits" or a TFDS name: "set", "set/config" or "set:1.0.0"')
    return match[1], match[2], match[3]


def how_to_prepare(name: str, data_dir: Path) -> str:
    """What to type to get the set, once, where tensorflow and a network are."""
    call = f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()"
    return (
        "prepare it once, in any environment with tensorflow and a network, and copy the folder here if that was "
        f'another machine:\n  python -c "import tensorflow_datasets as tfds; {call}"'
    )


def find(name: str, data_dir: Path) -> Path | None:
    """The folder of a prepared set, the newest version where none is named; None where there is none.

    Raises:
      ValueError: where the set was prepared in a format that needs tensorflow to read.
    """
    dataset, config, version = parse(name)
    folder = data_dir / dataset / config if config else data_dir / dataset
    versions = [path.parent for path in folder.glob("*/dataset_info.json") if re.fullmatch(r"[\d.]+", path.parent.name)]
    versions = [path for path in versions if version in (None, path.name)]
    versions.sort(key=lambda path: [int(part) for part in path.name.split(".") if part])
    if not versions:
        return None
    # A newer version in a format that cannot be read does not hide an older one that can.
    readable = [path for path in versions if _format(path) == "array_record"]
    if not readable:
        raise ValueError(
            f"{name} in {versions[-1]} is in {_format(versions[-1])} format, which needs tensorflow to read; "
            + how_to_prepare(name, data_dir)
        )
    return readable[-1]


def _format(folder):
    return json.loads((folder / "dataset_info.json").read_text()).get("fileFormat") or "tfrecord"


def missing(name: str, data_dir: Path) -> Exception:
    """The error for a set that is not in `data_dir`: how to prepare it, or which names are close."""
    dataset, config, _ = parse(name)
    here = sorted({path.parent.parent for path in data_dir.glob("*/*/dataset_info.json")})
    here += sorted({path.parent.parent for path in data_dir.glob("*/*/*/dataset_info.json")})
    here = ["digits", *(path.relative_to(data_dir).as_posix() for path in here)]
    wanted = f"{dataset}/{config}" if config else dataset
    try:
        import tensorflow_datasets as tfds

        known = set(tfds.list_builders(with_community_datasets=False))
    except Exception:  # the list is a courtesy of the message; whatever breaks it must not hide the message
        known = set()
    if dataset in known or wanted in here:
        return FileNotFoundError(f"{name} is not prepared in {data_dir}; {how_to_prepare(name, data_dir)}")
    close = difflib.get_close_matches(wanted, sorted({*here, *known}), n=4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ValueError(
        f"no data set {name!r}: {hint}{data_dir} has {', '.join(here[1:]) or 'nothing'}; digits is built in. If TFDS "
        f"has it, {how_to_prepare(name, data_dir)}"
    )


def fingerprint(folder: Path) -> str:
    """Changes when the set is prepared anew with other content: a digest of its description and file sizes."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + str(path.stat().st_size).encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def decode(folder: Path, size: int | None) -> tuple[dict, dict]:
    """({split: {leaf: array}}, facts) of a prepared set, for the splits train, validation and test that it has.

    Raises:
      ValueError: where no leaf can be made of the features, or images differ in size and no size is given.
      OSError: where records cannot be read.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    names = [name for name in _SPLITS if name in builder.info.splits]
    if not names:
        raise ValueError(f"{folder} has the splits {sorted(builder.info.splits)}, none of them {' or '.join(_SPLITS)}")
    plan = _plan(tfds, builder.info, folder, size)
    splits = {}
    for name in names:
        try:
            splits[name] = _columns(builder.as_data_source(split=name), plan, size)  # pyright: ignore[reportCallIssue]  # its decorator hides the signature
        except ValueError:
            raise
        except Exception as error:  # array_record raises bare RuntimeErrors on damaged or missing files
            raise OSError(
                f"split {name!r} of {folder} cannot be read ({error!r}): files may be missing or damaged; delete the "
                "folder and " + how_to_prepare(builder.name, folder.parent.parent)
            ) from error
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
    for start in range(0, len(records), _CHUNK):
        rows = records.__getitems__(list(range(start, min(start + _CHUNK, len(records)))))
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
