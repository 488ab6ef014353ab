"""TFDS folders in array_record format, found without tensorflow; `decode` reads them."""

import difflib
import hashlib
import json
import os
import re
from pathlib import Path

# No set has a dash in its name; one that is asked for is answered with the close names, not with the grammar.
_NAME = re.compile(r"(\w+(?:-\w+)*)(?:/([\w+][\w+.-]*))?(?::(\d+\.\d+\.\d+))?", re.ASCII)


def data_root(data_dir=None) -> Path:
    """Where prepared sets are.

    Args:
      data_dir: a path, or None.

    Returns:
      `data_dir`, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`, TFDS's own default.
    """
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()


def parse(name: str) -> tuple[str, str | None, str | None]:
    """The parts of a name.

    Args:
      name: "set", "set/config", "set:1.0.0" or "set/config:1.0.0".

    Returns:
      (set, config, version), None where the name has none.

    Raises:
      ValueError: where the name has another form.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or ".." in name:
        raise ValueError(f'name is {name!r}, must be "digits" or a TFDS name: "set", "set/config" or "set:1.0.0"')
    return match[1], match[2], match[3]


def how_to_prepare(name: str, data_dir: Path) -> str:
    """What to type to get a set, once, where tensorflow and a network are.

    Args:
      name: of the set.
      data_dir: where it is to be.

    Returns:
      The end of an error's message.
    """
    call = f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()"
    return (
        "prepare it once, in any environment with tensorflow and a network, and copy the folder here if that was "
        f'another machine:\n  python -c "import tensorflow_datasets as tfds; {call}"'
    )


def find(name: str, data_dir: Path) -> Path | None:
    """The folder of a prepared set, the newest version where none is named.

    Args:
      name: of the set.
      data_dir: where prepared sets are.

    Returns:
      The folder, or None where there is none.

    Raises:
      ValueError: where the set was prepared in a format that needs tensorflow to read.
      OSError: where its description is damaged.
    """
    dataset, config, version = parse(name)
    folder = data_dir / dataset / config if config else data_dir / dataset
    versions = [path.parent for path in folder.glob("*/dataset_info.json") if re.fullmatch(r"[\d.]+", path.parent.name)]
    versions = [path for path in versions if version in (None, path.name)]
    versions.sort(key=lambda path: [int(part) for part in path.name.split(".") if part])
    if not versions:
        return None
    # A newer version in a format that cannot be read does not hide an older one that can.
    remedy = how_to_prepare(name, data_dir)
    formats = {path: description(path / "dataset_info.json", remedy).get("fileFormat") or "tfrecord" for path in versions}
    readable = [path for path in versions if formats[path] == "array_record"]
    if not readable:
        raise ValueError(
            f"{name} in {versions[-1]} is in {formats[versions[-1]]} format, which needs tensorflow to read; {remedy}"
        )
    return readable[-1]


def description(path, remedy) -> dict:
    """The content of one of the JSON files of a folder; OSError, with the remedy, where it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise damaged(path, error, path.parent, remedy) from error
    if not isinstance(content, dict):
        raise damaged(path, "it holds no object", path.parent, remedy)
    return content


def damaged(what, error, folder, remedy) -> OSError:
    """The error for a file or folder `what` that cannot be read."""
    reason = error if isinstance(error, str) else repr(error)
    return OSError(
        f"{what} cannot be read ({reason}): files may be missing or damaged; delete the folder {folder} and " + remedy
    )


def missing(name: str, data_dir: Path) -> Exception:
    """The error for a set that is not prepared here.

    Args:
      name: of the set.
      data_dir: where it was looked for.

    Returns:
      FileNotFoundError with how to prepare it where it is known, else ValueError with close names.
    """
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
    plain = {name.lower().replace("-", "_"): name for name in sorted({*here, *known})}
    close = [plain[key] for key in difflib.get_close_matches(wanted.lower().replace("-", "_"), plain, n=4)]
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ValueError(
        f"no data set {name!r}: {hint}{data_dir} has {', '.join(here[1:]) or 'nothing'}; digits is built in. If TFDS "
        f"has it, {how_to_prepare(name, data_dir)}"
    )


def fingerprint(folder: Path) -> str:
    """Changes when the set is prepared anew with other content.

    Args:
      folder: of the prepared set.

    Returns:
      A digest of its description and file sizes, hexadecimal.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + str(path.stat().st_size).encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    return digest.hexdigest()
