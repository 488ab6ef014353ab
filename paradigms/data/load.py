"""Data sets by name, as NumPy arrays."""

import dataclasses
import logging
import operator
import re
from pathlib import Path

import numpy as np

from paradigms.data import cache, prepared
from paradigms.data.decode import decode
from paradigms.data.splits import check_seed, count_of, holdout

logger = logging.getLogger(__name__)

# The test rows of a set without a test split do not follow the caller's seed: what was tested on stays unseen.
_TEST_SEED, _TEST_SHARE = 0, 0.2


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set in three splits.

    Attributes:
      name: as given to `load`.
      train, validation, test: dicts of arrays with the example axis first. Images {"x": (N, H, W, C) uint8, "y": (N,)
        int32}; tables {"x": (N, D) float32, "y"}; labelled texts {"tokens": (N, L) uint8, bytes filled up with 0, "y"};
        texts without labels {"tokens": (T,) uint8 or int32}, one long text. Further numeric features keep their names.
        The arrays are read-only: the cache's own files may lie under them.
      classes: number of classes; of a text without labels, characters in its vocabulary; 0 for regression.
      class_names: names of the classes, or the characters; () where the set has none.
      mean, std: per channel of the training images in [0, 1], or per column of a table (std 1 where it is constant), to
        hand to the network, which normalises; () for texts.
    """

    name: str
    train: dict
    validation: dict
    test: dict
    classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(
    name: str,
    *,
    validation: float | int | None = None,
    seed: int = 0,
    size: int | None = None,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Data:
    """A data set: decoded once, cached with checksums, split by a fixed seed.

    "digits" is built in: scikit-learn's 1,797 images (8, 8, 1) of 0 to 16, stored as round(v * 255 / 16). Any other
    name is a TFDS set, "set", "set/config" or "set:1.0.0", prepared in array_record format; tensorflow is not needed.
    Label and input are the set's supervised keys where it names them. RGB images whose channels are equal everywhere
    become one channel; 1-bit images (Omniglot) are stretched to {0, 255}. Strings and features of varying shape are
    left out.

    A set with no test split is tested on its validation split; with neither, a fifth of train is taken, stratified, the
    same whatever the seed.

    Args:
      name: of the set.
      validation: a fraction or a number of training examples to hold out, stratified by label; a text loses its end.
        None uses the set's own validation split, else a tenth of train. A number leaves the set's own unused.
      seed: of the validation split, >= 0.
      size: images are resized and cropped to this side; texts are cut or filled up to this many bytes. Needed
        only where images differ in size. >= 1; None for digits.
      data_dir: where TFDS folders are; None is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      cache_dir: None is `$PARADIGMS_CACHE` or `~/.cache/paradigms`. Arrays that need no copy are maps of its files.

    Returns:
      The set in three splits of read-only arrays.

    Raises:
      ValueError: the name is unknown (with close ones), the folder is in a format that needs tensorflow, the set has no
        train split, or an argument is out of range.
      FileNotFoundError: the set is not prepared here; says how to.
      OSError: the cache or the prepared folder is damaged and cannot be rebuilt; says what to delete.
    """
    size = _checked_size(size)
    check_seed(seed)
    if name == "digits":
        if size is not None:
            raise ValueError(f"size is {size}, must be None for digits: its images are 8 x 8 and are not resized")
        splits, facts = _digits()
    else:
        splits, facts = _cached(name, size, prepared.data_root(data_dir), cache.cache_root(cache_dir))
    if "train" not in splits:
        raise ValueError(f"{name} has the splits {sorted(splits)} and no train split to learn from")
    train, held_out, test = _split(splits, validation, seed)
    for split in (train, held_out, test):
        for leaf in split.values():
            leaf.setflags(write=False)  # maps of cached files are: what comes of a load must not depend on the cache
    mean, std = moments(train.get("x"))
    return Data(name, train, held_out, test, facts["classes"], tuple(facts["class_names"]), mean, std)


def _checked_size(size):
    if size is None:
        return None
    try:
        whole = operator.index(size)
    except TypeError:
        whole = 0
    if whole < 1 or isinstance(size, bool):
        raise ValueError(f"size is {size!r}, must be an integer >= 1, pixels or bytes, or None")
    return whole


def _digits():
    from sklearn.datasets import load_digits  # half a second to import, for those that use it

    images, labels = load_digits(return_X_y=True)
    x = np.round(np.reshape(images, (-1, 8, 8, 1)) * (255 / 16)).astype(np.uint8)
    return {"train": {"x": x, "y": np.asarray(labels, np.int32)}}, {"classes": 10, "class_names": list("0123456789")}


def _cached(name, size, data_dir, root):
    dataset, config, version = prepared.parse(name)
    folder = prepared.find(name, data_dir)
    key = "--".join([dataset, config or "", folder.name if folder else version or "*", str(size or "")])
    # A cache outlives its source: the newest version that is whole will do.
    places = [cache.entry(root, key)] if folder else _versions(root, key)
    print_of_source = prepared.fingerprint(folder) if folder else None
    for place in places:
        try:
            found = cache.read(place)
        except cache.CorruptCache as error:
            if folder is None:
                raise OSError(
                    f"the cache of {name} is damaged: {error}. Its source is not in {data_dir} either, so delete "
                    f"{place} and {prepared.how_to_prepare(name, data_dir)}"
                ) from error
            logger.warning("the cache of %s is damaged and is rebuilt from %s: %s", name, folder, error)
            continue
        if found and print_of_source in (None, found[1]["source"]):
            return found
    if folder is None:
        raise prepared.missing(name, data_dir)
    logger.info("decoding %s from %s", name, folder)
    splits, facts = decode(folder, size, prepared.how_to_prepare(name, data_dir))
    try:
        cache.write(places[0], splits, {**facts, "source": print_of_source})
    except OSError as error:
        logger.warning(
            "%s could not be cached in %s (%s) and will be decoded again next time: set PARADIGMS_CACHE or "
            "cache_dir to a folder with space that can be written",
            name,
            places[0],
            error,
        )
    return splits, facts


def _versions(root, key):
    """The folders of `key`, whose version may be "*", newest first; folders with another name are none of ours."""
    pattern = re.compile(re.escape(key).replace(re.escape("*"), r"(\d+(?:\.\d+)*)"))
    found = [(match, path) for path in root.glob(key) if (match := pattern.fullmatch(path.name))]
    newest = lambda item: [int(part) for group in item[0].groups() for part in group.split(".")]
    return [path for _, path in sorted(found, key=newest, reverse=True)]


def _split(splits, validation, seed):
    train = splits["train"]
    own, test = splits.get("validation"), splits.get("test")
    if test is None and own is not None:
        own, test = None, own
    if test is None:
        train, test = _hold(train, count_of(_TEST_SHARE, _length(train)), _TEST_SEED)
    if validation is None and own is not None:
        return train, own, test
    count = count_of(0.1 if validation is None else validation, _length(train))
    train, held_out = _hold(train, count, seed)
    return train, held_out, test


def _length(split):
    return len(next(iter(split.values())))


def _hold(split, count, seed):
    """(kept, held out): whole rows, or the end of one long text."""
    n = _length(split)
    if set(split) == {"tokens"} and split["tokens"].ndim == 1:
        return {"tokens": split["tokens"][: n - count]}, {"tokens": split["tokens"][n - count :]}
    if count == 0:
        return split, {name: leaf[:0] for name, leaf in split.items()}
    y = split.get("y")
    stratified = y is not None and y.ndim == 1 and y.dtype.kind in "iu"
    kept, held_out = holdout(n, count, seed, y if stratified else None)
    return tuple({name: leaf[rows] for name, leaf in split.items()} for rows in (kept, held_out))


def moments(x):
    """Mean and standard deviation over all axes but the last, in pieces; pixels in units of 255."""
    if x is None or len(x) == 0:
        return (), ()
    unit = 255.0 if x.dtype == np.uint8 else 1.0
    count, total, square = 0, 0.0, 0.0
    rows = max(1, 2**22 // max(1, x[0].size))
    shift = x[:rows].reshape(-1, x.shape[-1]).mean(axis=0, dtype=np.float64)  # keeps the squares from cancelling
    for start in range(0, len(x), rows):
        piece = x[start : start + rows].reshape(-1, x.shape[-1])
        if x.dtype == np.uint8:
            levels = [np.bincount(piece[:, c], minlength=256) for c in range(piece.shape[1])]
            table = np.arange(256.0)[:, None] - shift
            counts = np.stack(levels, axis=1)
            total, square = total + (counts * table).sum(axis=0), square + (counts * table**2).sum(axis=0)
        else:
            centred = piece - shift
            total, square = total + centred.sum(axis=0), square + (centred**2).sum(axis=0)
        count += len(piece)
    mean = shift + total / count
    std = np.sqrt(np.maximum(square / count - (total / count) ** 2, 0))
    std = np.where(std > 0, std, unit)
    return tuple((mean / unit).tolist()), tuple((std / unit).tolist())
