"""Arrays on disk as `.npy` files with a manifest of SHA-256 checksums; no pickle."""

import hashlib
import json
import logging
import os
import re
import tempfile
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_FORMAT = 1


class CorruptCache(Exception):
    """A cached file is missing, unreadable or not what was written."""


def cache_root(cache_dir=None) -> Path:
    """Where cached arrays are.

    Args:
      cache_dir: a path, or None.

    Returns:
      `cache_dir`, else `$PARADIGMS_CACHE`, else `~/.cache/paradigms`.
    """
    return Path(cache_dir or os.environ.get("PARADIGMS_CACHE") or Path.home() / ".cache" / "paradigms").expanduser()


def entry(root: Path, key: str) -> Path:
    """The folder of a key.

    Args:
      root: of the cache.
      key: letters, digits, "_", "-", "+" and single dots.

    Returns:
      A path inside `root`.

    Raises:
      ValueError: where the key could lead outside.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", key) or ".." in key:
        raise ValueError(f"cache key {key!r} must be letters, digits, '_', '-', '+' and single dots")
    return root / key


def read(folder: Path) -> tuple[dict, dict] | None:
    """What `write` stored.

    Every byte is compared with its checksum first.

    Args:
      folder: from `entry`.

    Returns:
      (arrays, facts) as `write` was given them, the arrays memory-mapped and read-only, or None where nothing is cached.

    Raises:
      CorruptCache: saying which file, and how it differs.
    """
    path = folder / _MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        content = {name: manifest[name] for name in ("format", "files", "facts")}
        if manifest["sha256"] != _digest_of(content):
            raise CorruptCache(f"{path} does not have its own checksum")
        files = [(item["group"], item["name"], item["file"], item["sha256"]) for item in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCache(f"{path} cannot be read ({error!r})") from error
    if manifest["format"] != _FORMAT:
        return None
    arrays: dict = {}
    for group, name, file, digest in files:
        file = folder / Path(file).name
        try:
            with open(file, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != digest:
                raise CorruptCache(f"{file} has SHA-256 {found[:12]}..., was written with {digest[:12]}...")
            arrays.setdefault(group, {})[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CorruptCache(f"{file} cannot be read ({error!r})") from error
    return arrays, manifest["facts"]


def write(folder: Path, arrays: dict, facts: dict) -> None:
    """Stores arrays and what is known of them.

    Each file appears whole or not at all, the manifest last, so an interrupted write leaves no cache, not a bad one.

    Args:
      folder: from `entry`; made where it is not there.
      arrays: {group: {name: array}}.
      facts: a dict that json can hold.

    Raises:
      OSError: where the disk does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)
    files = []
    for group, named in arrays.items():
        for i, (name, array) in enumerate(named.items()):
            file = f"{re.sub(r'[^A-Za-z0-9]', '_', group)}-{i}.npy"
            _replace(folder / file, lambda stream, array=array: np.save(stream, array, allow_pickle=False))
            with open(folder / file, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            files.append({"group": group, "name": name, "file": file, "sha256": digest})
    content = {"format": _FORMAT, "files": files, "facts": facts}
    text = json.dumps({**content, "sha256": _digest_of(content)}, indent=1).encode()
    _replace(folder / _MANIFEST, lambda stream: stream.write(text))


def _digest_of(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, fill) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as stream:
            fill(stream)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
