"""Splits by class: whose rows go where under which labels, what is refused, and the class files of the experiments."""

import json
from pathlib import Path

import numpy as np
import pytest

from paradigms import data
from paradigms.data import prepared

FILES = Path(__file__).parents[2] / "experiments" / "meta" / "classes"
SIZES = {"omniglot": (1100, 100, 423), "omniglot_vinyals": (1028, 172, 423), "cifar_fs": (64, 16, 20)}
CLASSES = {"train": ["7", "0"], "validation": ["3"], "test": ["9", "8", "1"]}
DIGITS = data.load("digits")


def _files(name):
    return json.loads((FILES / f"{name}.json").read_text())


def test_a_split_has_all_rows_of_its_classes_under_labels_from_0():
    found = data.by_class(DIGITS, CLASSES)
    parts = [DIGITS.train, DIGITS.validation, DIGITS.test]
    x, y = (np.concatenate([part[leaf] for part in parts]) for leaf in ("x", "y"))
    for part, names in CLASSES.items():
        split = getattr(found, part)
        assert split["y"].dtype == np.int32
        assert not split["x"].flags.writeable
        for label, name in enumerate(names):
            np.testing.assert_array_equal(split["x"][split["y"] == label], x[y == int(name)])
        assert len(split["y"]) == sum((y == int(name)).sum() for name in names)
    assert (found.name, found.classes, found.class_names) == ("digits", 2, ("7", "0"))
    pixels = found.train["x"] / 255
    np.testing.assert_allclose((found.mean[0], found.std[0]), (pixels.mean(), pixels.std()), rtol=1e-9)
    assert data.by_class(DIGITS, CLASSES, name="few").name == "few"


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({**CLASSES, "train": ["77"]}, r"classes\['train'\] names '77', which is no class of the set: did you mean '7'"),
        ({**CLASSES, "train": [7]}, "names 7, which is no class"),
        ({**CLASSES, "train": ["one"]}, "there are"),
        ({**CLASSES, "test": ["7"]}, r"'7' is named in classes\['train'\] and again in classes\['test'\]"),
        ({**CLASSES, "test": ["2", "2"]}, r"'2' is named in classes\['test'\] and again"),
        ({**CLASSES, "test": []}, r"classes\['test'\] is \[\], must be a sequence"),
        ({**CLASSES, "test": "89"}, r"classes\['test'\] is '89', must be a sequence"),
        ({"train": ["1"], "test": ["2"]}, r"classes has \['test', 'train'\], must be"),
        ({**CLASSES, "val": ["2"]}, "must be {.train.: names"),
        (["1"], "classes has list"),
    ],
)
def test_what_is_no_division_of_classes_is_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        data.by_class(DIGITS, classes)


def test_sets_without_named_classes_or_rows_are_refused():
    def digits(**change):
        fields = ("name", "train", "validation", "test", "classes", "class_names", "mean", "std")
        return data.Data(**{**{field: getattr(DIGITS, field) for field in fields}, **change})

    with pytest.raises(ValueError, match="no named classes"):
        data.by_class(digits(class_names=()), CLASSES)
    with pytest.raises(ValueError, match="no named classes"):
        data.by_class(digits(train={"x": DIGITS.train["x"]}), CLASSES)
    with pytest.raises(ValueError, match=r"\['7'\] name two classes each"):
        data.by_class(digits(class_names=("7", *DIGITS.class_names[1:])), CLASSES)
    with pytest.raises(ValueError, match=r"names \['ten'\], of which digits has no rows"):
        data.by_class(digits(class_names=(*DIGITS.class_names, "ten")), {**CLASSES, "test": ["8", "ten"]})


@pytest.mark.parametrize("name", SIZES)
def test_class_files_have_the_published_sizes_and_name_no_class_twice(name):
    classes = _files(name)
    assert tuple(len(classes[part]) for part in ("train", "validation", "test")) == SIZES[name]
    assert len({one for part in classes.values() for one in part}) == sum(SIZES[name])


@pytest.mark.parametrize("name", ["omniglot", "omniglot_vinyals"])
def test_omniglot_has_twenty_rows_of_every_class_of_the_files(name):
    if prepared.find("omniglot", prepared.data_root()) is None:
        pytest.skip(f"omniglot is not prepared in {prepared.data_root()}")
    found = data.by_class(data.load("omniglot", size=28), _files(name))
    for part, classes in zip(("train", "validation", "test"), SIZES[name], strict=True):
        split = getattr(found, part)
        assert (split["x"].shape, split["x"].dtype) == ((20 * classes, 28, 28, 1), np.uint8)
        assert (np.bincount(split["y"]) == 20).all()
        assert len(np.unique(split["y"])) == classes
