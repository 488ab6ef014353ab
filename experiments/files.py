"""Small files of runs: JSON that is read with one clear error, and text that is written whole or not at all."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any


def read(path: pathlib.Path) -> dict:
    """The object in a JSON file; a ValueError that names the file where there is none."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device might never end
            raise OSError("not a file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give another path, or restore the file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object; restore the file")
    return content


def write(path: pathlib.Path, text: str) -> None:
    """All of `text` or nothing: a kill half-way leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def new(folder: pathlib.Path, name: pathlib.Path, suffix: str) -> pathlib.Path:
    """The path of a new file in `folder`, from a name in it or a path into it.

    Raises:
      ValueError: it would lie outside, as behind ``..`` or a link, it has another suffix, or it is there already.
    """
    path = name if name.resolve().is_relative_to(folder.resolve()) else folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name}: lies outside {folder}; give a name inside, and copy the file")
    if path.suffix != suffix:
        raise ValueError(f"{name}: give a name that ends in {suffix}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it, or give another name")
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path}: is there already; give another name with --out, or remove it")
    return path


def plain(value: Any) -> Any:
    """`value` in JSON's types: paths, dtypes and functions by name, None where a number is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if callable(tolist := getattr(value, "tolist", None)):  # an array or a NumPy number
        return plain(tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else getattr(value, "__name__", str(value))
