"""Example images of a run: files ``examples/<name>.npz`` in its folder, which its report shows as grids."""

import os
import pathlib
import re
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from paradigms.report.figures import as_grid


class Examples(NamedTuple):
    """Images in rows and columns, such as clean, perturbed and perturbation.

    Attributes:
      images: uint8 (rows, columns, height, width, 1 or 3).
      rows: a label a row, or ().
      columns: a label a column, or ().
      caption: what they show.
    """

    images: np.ndarray
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    caption: str = ""


def save_examples(
    folder: "str | os.PathLike",
    name: str,
    images: Any,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    caption: str = "",
) -> pathlib.Path:
    """Writes images for a run's report to ``folder/examples/<name>.npz``.

    Args:
      folder: of the run, or of a part of it.
      name: of the file: letters, digits, "-" and "_". An earlier file of this name is replaced.
      images: (rows, columns, height, width, channels) with 1 or 3 channels, or without that axis; uint8, or floats in
        [0, 1]. What has a sign, such as a perturbation of at most r, goes in as ``0.5 + it / (2 * r)``.
      rows: a label a row, or none.
      columns: a label a column, or none.
      caption: what the images show; default: `name`.

    Returns:
      the file's path.

    Raises:
      ValueError: a name that is no file's, images of another shape or range, or labels that do not match them.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name={name!r}: is a file's; use letters, digits, - and _")
    path = pathlib.Path(folder) / "examples" / f"{name}.npz"
    images = as_grid(images, rows, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = {"rows": np.array(rows, np.str_), "columns": np.array(columns, np.str_), "caption": np.str_(caption or name)}
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, images=images, **labels)
    os.replace(part, path)
    return path


def read_examples(folder: "str | os.PathLike") -> list[Examples]:
    """All that `save_examples` wrote to `folder` and the folders in it, by path.

    Args:
      folder: of a run.

    Returns:
      a list of `Examples`, empty where there are none.

    Raises:
      ValueError: a file that `save_examples` did not write.
    """
    found = []
    for path in sorted(pathlib.Path(folder).rglob("examples/*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                rows, columns = (tuple(map(str, file[name])) for name in ("rows", "columns"))
                found.append(Examples(as_grid(file["images"], rows, columns), rows, columns, str(file["caption"])))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: no examples ({error}); write them with save_examples, or remove the file") from None
    return found
