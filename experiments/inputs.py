"""Files of a user's, read as the examples that a trained network takes: images, NumPy arrays, tables."""

import csv
import math
import pathlib
import re
import warnings
from typing import Any

import numpy as np

from paradigms import Network

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"]  # of Pillow, 8 bits a channel or fewer


def read(path: pathlib.Path, network: Network) -> tuple[np.ndarray, str]:
    """The examples in a file.

    Args:
      path: a PNG or JPEG image; an .npy or .npz file with the array "x", or only one; or a .csv file, an example a line,
        with or without a line of names above. Where the network takes pixels, a table of whole numbers alone is from 0
        to 255, any other from 0 to 1.
      network: whose input they are to be.

    Returns:
      the examples, and what of them was changed to fit, or "".

    Raises:
      ValueError: the file is missing, damaged, of another kind, or does not fit the network.
    """
    readers = {".csv": _table, ".npy": _array, ".npz": _array} | dict.fromkeys((".png", ".jpg", ".jpeg"), _image)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: is none of {', '.join(readers)}; convert it")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give images, arrays or tables")
    try:
        return reader(path, network)
    except Exception as error:  # a damaged image or archive raises nearly anything
        raise ValueError(f"{path}: {error if str(error) else type(error).__name__}") from error


def _image(path: pathlib.Path, network: Network) -> tuple[np.ndarray, str]:
    from PIL import Image, ImageOps

    shape, changes = network.shape, []
    if not network.pixels or len(shape) != 3 or shape[2] not in (1, 3):
        raise ValueError(f"is an image; the network takes examples of shape {shape}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=("PNG", "JPEG")) as opened:
            if opened.mode not in MODES:
                raise ValueError(f"has mode {opened.mode}; convert it to 8 bits a channel")
            picture: Any = ImageOps.exif_transpose(opened)
            picture.load()
    if picture.has_transparency_data and (picture := picture.convert("RGBA")).getextrema()[3][0] < 255:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")
        changes.append("put on black")
    mode = "L" if shape[2] == 1 else "RGB"
    if picture.mode != mode:
        changes.append(f"{picture.mode} made {'grey' if mode == 'L' else mode}")
        picture = picture.convert(mode)
    height, width = shape[:2]
    if picture.size != (width, height):
        changes.append(f"{picture.width} x {picture.height} cropped and resized to {width} x {height}")
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture, np.uint8).reshape(1, *shape), ", ".join(changes)


def _array(path: pathlib.Path, network: Network) -> tuple[np.ndarray, str]:
    with path.open("rb") as file:
        loaded: Any = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            names = loaded.files
            if len(names) != 1 and "x" not in names:
                raise ValueError(f"holds the arrays {sorted(names)}; call one of them x")
            loaded = loaded["x" if "x" in names else names[0]]
    shape = network.shape
    if shape[-1:] == (1,) and shape[:-1] in (loaded.shape, loaded.shape[1:]):
        loaded = loaded[..., None]  # images without an axis of channels
    return (loaded[None] if loaded.shape == shape else loaded), ""


def _table(path: pathlib.Path, network: Network) -> tuple[np.ndarray, str]:
    width = math.prod(network.shape)
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [(number, line) for number, line in enumerate(csv.reader(file), 1) if line]
    if lines and not all(map(_number, lines[0][1])):
        del lines[0]  # the names
    if not lines:
        raise ValueError("holds no line of numbers; give an example a line")
    for number, line in lines:
        if len(line) != width:
            raise ValueError(f"line {number} has {len(line)} values; the network takes {width}, split by commas")
        if foreign := [cell for cell in line if not _number(cell)]:
            raise ValueError(f"line {number} holds {foreign[0][:40]!r}, no number; correct it")
    whole = all(re.fullmatch(r"\s*[+-]?\d{1,18}\s*", cell) for _, line in lines for cell in line)
    values = np.asarray([[int(cell) if whole else float(cell) for cell in line] for _, line in lines])
    values, note = values.reshape(-1, *network.shape), ""
    if whole and network.pixels:
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"goes from {values.min()} to {values.max()}; whole numbers are pixels, 0 to 255")
        values, note = values.astype(np.uint8), "whole numbers, read as pixels from 0 to 255"
    return values, note


def _number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
