"""How folders are read: splits under any name, extra levels, links, ignored files, and class names."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet.data import folders
from effnet.data.dataset import explain_one_class, read_data
from effnet.data.folders import EMPTY, class_name, split_of
from effnet.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


@pytest.mark.parametrize(
    ("names", "split"),
    [
        ("train Train TRAINING training_set trainset Training-Data seg_train train2017  my-train-images", "train"),
        ("val valid Validation val_set valset 2012-val dev", "val"),
        ("test Testing test_set testset seg_test asl_alphabet_test", "test"),
        ("trains trained contest testament value trainval train_test valley evaluation holdout cat", ""),
    ],
)
def test_the_split_that_a_name_stands_for(names: str, split: str) -> None:
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("seg_train", "seg_test"),
        ("training", "validation"),
        ("archive/Training", "archive/Testing"),
        ("a/b/train", "a/b/val"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("photos_train", "photos_val"),
        ("train", "dev"),
        ("my birds, training", "my birds, test images"),
        ("train/images", "val/images"),
    ],
)
def test_splits_by_any_usual_name(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *(f"{name}/{label}/deep/{i}.png" for name in names for label in ("cat", "dog") for i in range(2)))
    data = read_data(tmp_path)
    assert (data.classes, len(data)) == (("cat", "dog"), 8)
    assert data.splits == tuple(filter(None, map(split_of, names)))
    assert all(data.file(sample).is_file() for sample in data.samples)
    assert all(sample.split == split_of(sample.path.split("/deep")[0].rsplit("/", 1)[0]) for sample in data.samples)


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (("steam train/1.png", "freight train/1.png"), ("freight train", "steam train")),  # no folders inside
        (("train/1.png", "test tube/1.png", "car/1.png"), ("car", "test tube", "train")),
        (("training/1.png", "match/1.png"), ("match", "training")),
        (("train/1.png", "bus/deep/1.png"), ("bus", "train")),
        (("bullet train/p1/1.png", "crash test/p1/1.png"), ("bullet train", "crash test")),
        (("positive test/a/1.png", "negative test/b/1.png"), ("negative test", "positive test")),
        (("train/train/1.png", "train/train/2.png", "test/train/1.png"), ("train",)),
        (("train/training/s1/1.png", "test/training/s1/1.png"), ("training",)),
        (("train/train/1.png", "train/train/s1/2.png", "test/train/1.png"), ("train",)),
        (("train/train/a/1.png", "train/train/b/1.png", "test/test/1.png"), ("a", "b")),
        (("red/x/1.png", "red/y/1.png", "blue/x/1.png"), ("blue", "red")),
        (("red/x/1.png", "red/y/1.png", "blue/x/1.png", "blue/y/1.png", "red/1.png"), ("blue", "red")),
    ],
)
def test_classes_that_sound_like_splits(tmp_path: Path, files: tuple[str, ...], classes: tuple[str, ...]) -> None:
    assert read_data(touch(tmp_path, *files)).classes == classes


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ("seg_train/a/1.png", "seg_test/a/1.png", "seg_pred/1.png"),
            "has 'seg_test', 'seg_train', which are splits",
        ),
        (("Training/a/1.png", "training_set/a/1.png", "Testing/a/1.png"), "more than one train split: 'Training', 'tr"),
        (
            ("cat/train/1.png", "cat/test/2.png", "dog/train/1.png"),
            "splits inside the class folders, not above as in test/cat",
        ),
        (
            ("train/a/1.png", "train/b/1.png", "eval/a/1.png", "eval/b/1.png"),
            "'train', which is a split.*in a manifest",
        ),
        (("train_images/a/1.png", "train_images/b/1.png", "test_images/1.png"), "'train_images', which is a split"),
        (("old/a/1.png", "old/b/1.png", "new/a/1.png", "new/b/1.png"), "same names, 'a', 'b'.*in a manifest"),
        (("positive test/x/1.png", "positive test/y/1.png", "negative test/x/1.png", "negative test/y/1.png"), "same"),
        (("cat/cat_train/1.png", "cat/cat_test/2.png", "dog/dog_train/1.png", "dog/dog_test/1.png"), "splits inside"),
        (("train/1.png", "test/2.png"), r"no image in a class folder.*skipped: 2 \(not in a class folder\)"),
        (("1.png",), r"no sub-folders.*skipped: 1"),
        (("cat/1.cr2", "cat/2.CR2", "dog/3"), r"skipped: 2 \(suffix .cr2\).*1 \(no suffix\)"),
        (("\u00a0/1.png", "dog/1.png"), "name of a class folder is blank"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, files: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_data(touch(tmp_path, *files))


def test_one_class_says_what_else_it_may_be(tmp_path: Path) -> None:
    data = read_data(touch(tmp_path, "photos/cat/1.png", "photos/dog/1.png"))
    assert data.classes == ("photos",)
    assert (
        explain_one_class(data)
        == "'photos' is its only class; if 'cat', 'dog' in it are the classes, name that folder instead"
    )
    assert explain_one_class(read_data(tmp_path / "photos" / "..")) == explain_one_class(data)


def test_links_in_a_circle_count_no_image_twice(tmp_path: Path) -> None:
    touch(tmp_path, "d/cat/1.png", "d/dog/2.png", "elsewhere/3.png")
    (tmp_path / "d/cat/up").symlink_to("..")
    (tmp_path / "d/dog/self").symlink_to(".")
    (tmp_path / "d/dog/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d/dog/itself.jpg").symlink_to("itself.jpg")
    data = read_data(tmp_path / "d")
    assert [sample.path for sample in data.samples] == ["cat/1.png", "dog/2.png", "dog/itself.jpg", "dog/more/3.png"]
    above = "a link to a folder above it"
    assert data.passed_over == (("cat/up", above), ("dog/self", above))


def test_what_is_passed_over_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_reads_heif", lambda: False)
    touch(
        tmp_path,
        "README.md",
        "cat/1.png",
        "dog/1.png",
        "cat/IMG.HEIC",
        "dog/download",
        "dog/x.xml",
        "loose.png",
        "dog/.hidden.png",
    )
    touch(tmp_path, "none/Thumbs.db", "runs/train/a/args.yaml", "runs/train/a/results.png")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    (tmp_path / "dog" / "gone.jpg").symlink_to("nowhere")
    data = read_data(tmp_path)
    assert [sample.path for sample in data.samples] == ["cat/1.png", "dog/1.png", "dog/gone.jpg"]
    assert dict(data.passed_over) == {
        "cat/IMG.HEIC": ".heic needs: pip install 'effnet[heif]'",
        "cat/pipe.jpg": "a pipe, a socket or a device",
        "dog/download": "no suffix",
        "dog/x.xml": "suffix .xml",
        "loose.png": "not in a class folder",
        "none": EMPTY,
    }


NAMES = {
    " dog": "dog",
    "dog ": "dog",
    "dog\u00a0": "dog",
    "New\u00a0York": "New York",
    "line\u2028break": "line break",
    "a\r\nb\tc": "a b c",
    unicodedata.normalize("NFD", "café"): "café",
    os.fsdecode(b"caf\xe9"): r"caf\xE9",
    "\x1b[31mred": r"\x1B[31mred",
    "猫 👩\u200d🔬": "猫 👩\u200d🔬",  # a joiner is part of a letter
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_classes(tmp_path: Path, name: str) -> None:
    assert class_name(name) == NAMES[name]
    data = read_data(touch(tmp_path, f"{name}/1.png", "other/1.png"))
    assert NAMES[name] in data.classes
    assert all(data.file(sample).is_file() for sample in data.samples)


def test_folders_of_one_name_are_one_class(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    data = read_data(touch(tmp_path, f"train/{forms[0]}/1.png", f"val/{forms[1]}/1.png", "train/tea/1.png"))
    assert data.classes == ("café", "tea")
    assert data.subset("val").counts == (1, 0)


@given(st.text(max_size=20))
def test_a_name_is_its_own_name(text: str) -> None:
    name = class_name(text)
    assert class_name(name) == name == name.strip()
    assert len(name.splitlines()) <= 1
    name.encode()
