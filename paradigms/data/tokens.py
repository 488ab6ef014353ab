"""Texts as integer arrays: characters of one long text, or the bytes of many."""

import numpy as np


def characters(splits: dict) -> list[str]:
    """Replaces "tokens", a list of byte strings, by one array (T,) of character numbers, in place.

    Documents are joined by newlines. The vocabulary is the sorted set of the characters of every split (nanoGPT's:
    65 for Shakespeare). uint8 where it has at most 256, otherwise int32.

    Args:
      splits: {split: {"tokens": list of UTF-8 byte strings}}.

    Returns:
      The vocabulary.
    """
    # Code points as an array: a Python loop over the characters would take seconds a megabyte.
    texts = {name: b"\n".join(split["tokens"]).decode("utf-8", "replace") for name, split in splits.items()}
    points = {name: np.frombuffer(text.encode("utf-32-le"), np.uint32) for name, text in texts.items()}
    vocabulary = np.unique(np.concatenate(list(points.values())))
    dtype = np.uint8 if len(vocabulary) <= 256 else np.int32
    for name, split in splits.items():
        split.clear()
        split["tokens"] = np.searchsorted(vocabulary, points[name]).astype(dtype)
    return [chr(point) for point in vocabulary.tolist()]


def padded(splits: dict, size: int | None) -> None:
    """Replaces "tokens", a list of byte strings, by an array (N, L) uint8 of bytes, cut to L and filled with 0, in place.

    Args:
      splits: {split: {"tokens": list of byte strings, ...}}.
      size: L, >= 1; None is the longest text of any split.
    """
    length = size or max([1, *(len(text) for split in splits.values() for text in split["tokens"])])
    for split in splits.values():
        rows = np.zeros((len(split["tokens"]), length), np.uint8)
        for row, text in zip(rows, split["tokens"], strict=True):
            values = np.frombuffer(text[:length], np.uint8)
            row[: len(values)] = values
        split["tokens"] = rows
