"""Data: loading, sources of batches, augmentations, imperfect data sets."""

from paradigms.data.augment import crop, cutout, flip, random_resized_crop, rotate, translate
from paradigms.data.bind import bind
from paradigms.data.checks import check_arrays
from paradigms.data.classes import by_class
from paradigms.data.colour import blur, colour_jitter, greyscale, solarise
from paradigms.data.episodes import ClassDraw, episodes, turned, turned_apart, unturned
from paradigms.data.families import sinusoids, task_family
from paradigms.data.imperfect import few_labels, imbalance, label_flips, label_noise
from paradigms.data.load import Data, load
from paradigms.data.order import locate, order
from paradigms.data.policies import randaugment, trivial_augment
from paradigms.data.sources import Source, batches, resident, stacked, windows
from paradigms.data.splits import holdout
from paradigms.data.stream import Stream, stream
from paradigms.data.task_streams import permuted, rotated, split_classes, tasks_of
from paradigms.data.tasks import Tasks
from paradigms.data.transforms import augment, chain, cutmix, mixup, pixels

__all__ = [
    "ClassDraw",
    "Data",
    "Source",
    "Stream",
    "Tasks",
    "augment",
    "batches",
    "bind",
    "blur",
    "by_class",
    "chain",
    "check_arrays",
    "colour_jitter",
    "crop",
    "cutmix",
    "cutout",
    "episodes",
    "few_labels",
    "flip",
    "greyscale",
    "holdout",
    "imbalance",
    "label_flips",
    "label_noise",
    "load",
    "locate",
    "mixup",
    "order",
    "permuted",
    "pixels",
    "randaugment",
    "random_resized_crop",
    "resident",
    "rotate",
    "rotated",
    "sinusoids",
    "solarise",
    "split_classes",
    "stacked",
    "stream",
    "task_family",
    "tasks_of",
    "translate",
    "trivial_augment",
    "turned",
    "turned_apart",
    "unturned",
    "windows",
]
