"""Class folders, split folders and manifests; what they refuse; splits that keep groups together."""

from __future__ import annotations

import csv
import os
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet.data import dataset as module
from effnet.data.dataset import Dataset, Sample, manifest, match_classes, missing_classes, read_data, split_data
from effnet.data.duplicates import find_duplicates
from effnet.data.held_out import match_split
from effnet.errors import DataError, ImageError, UnknownNameError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def made(*counts: int) -> Dataset:
    """A data set with that many images of each class, without files."""
    classes = tuple(f"class{i}" for i in range(len(counts)))
    samples = (Sample(f"class{i}/{k:04}.png", i) for i, count in enumerate(counts) for k in range(count))
    return Dataset(Path("nowhere"), classes, tuple(samples))


def test_unsplit_folder(tmp_path: Path) -> None:
    touch(tmp_path, "dog/2.jpg", "dog/deep/er/1.PNG", "cat/1.webp", "cat/.hidden.png", ".git/x.png", "cat/notes.txt")
    data = read_data(tmp_path)
    assert (data.classes, data.splits) == (("cat", "dog"), ())
    assert [(s.path, s.label) for s in data.samples] == [("cat/1.webp", 0), ("dog/2.jpg", 1), ("dog/deep/er/1.PNG", 1)]
    assert data.counts == (1, 2)
    assert data.file(data.samples[0]).exists()


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_split_folder_with_any_name_of_val(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "train/cat/1.png", "train/dog/1.png", f"{name}/dog/2.png", "test/cat/3.png")
    data = read_data(tmp_path)
    assert data.splits == ("train", "val", "test")
    assert [s.path for s in data.subset("val").samples] == [f"{name}/dog/2.png"]
    assert data.subset("val").classes == ("cat", "dog")  # labels mean the same in every split
    assert data.subset("val").samples[0].label == 1


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert read_data(touch(tmp_path, "train/1.png", "bus/1.png")).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("1.png",), "no sub-folders"),
        (("cat/1.txt",), "no image"),
        (("train/cat/1.png", "val/cat/1.png", "valid/cat/1.png"), "more than one val"),
        (("train/cat/1.png", "val/cta/1.png"), r"lacks: 'cta'; train has 'cat'"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_data(touch(tmp_path, *names))


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    touch(tmp_path, "flowers/rose/1.png")
    with pytest.raises(DataError, match=r"does not exist. Did you mean 'flowers'"):
        read_data(tmp_path / "flower")


def test_manifest_round_trip(tmp_path: Path) -> None:
    data = split_data(read_data(touch(tmp_path / "d", *(f"{c}/{i}.png" for c in "ab" for i in range(9)))))
    (tmp_path / "elsewhere").mkdir()
    module.write_manifest(data, tmp_path / "elsewhere" / "m.csv")
    again = read_data(tmp_path / "elsewhere" / "m.csv")
    assert again.classes == data.classes
    assert {again.file(s).resolve(): (s.label, s.split) for s in again.samples} == {
        data.file(s).resolve(): (s.label, s.split) for s in data.samples
    }
    (tmp_path / "split.csv").write_text(manifest(data))
    assert set(module.read_manifest(tmp_path / "split.csv", data.root).samples) == set(data.samples)


def test_a_data_set_is_called_what_it_was_read_from(tmp_path: Path) -> None:
    folder, file = touch(tmp_path / "d", "a/1.png", "b/1.png"), tmp_path / "d" / "m.csv"
    module.write_manifest(read_data(folder), file)
    assert [str(read_data(each)) for each in (folder, file)] == [str(folder), str(file)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_manifests_of_spreadsheets(tmp_path: Path, separator: str) -> None:
    """With a byte order mark and, in much of Europe, semicolons."""
    rows = [("path", "label"), ("a, b; c.png", "x"), ("d.png", "y")]
    with (tmp_path / "m.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    data = read_data(tmp_path / "m.csv")
    assert [(sample.path, data.classes[sample.label]) for sample in data.samples] == rows[1:]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no line below"),
        ("file,class\na,b\n", "needs the columns path and label.*'file', 'class'"),
        (f"{5000 * 'a'},class\na,b\n", "needs the columns path and label.*found: .{250}, 'class'$"),
        ("path,label\na.png,\n", "line 2: `label` is empty"),
        ("path,label\na.png,x\na.png,y\n", "line 3: a.png is 'x' and 'y'"),
        ("path,label\na.png,x\na.png,x\n", "line 3: a.png is listed twice"),
        ("path,label,split\na.png,x,trian\n", "line 2.*Did you mean 'train'"),
        ("path,label,split\na.png,x,not test\n", "line 2.*'not test'.*Did you mean 'test'"),
        ("path,label,split\na.png,x,pre-train\n", "line 2.*'pre-train'"),
        ("path,label,Label\na.png,x,1\n", "column label appears twice"),
        ("path,label,split\na.png,x,train\nb.png,x,\n", "with and without a split"),
    ],
)
def test_broken_manifests_name_the_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_data(tmp_path / "m.csv")


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(DataError, match="is not a manifest"):
        read_data(tmp_path / "m.csv")


def test_classes_are_matched_by_name() -> None:
    data = made(1, 1)
    matched = match_classes(data, ("class1", "other", "class0"), "the model's")
    assert [(s.path[:6], s.label) for s in matched.samples] == [("class0", 2), ("class1", 0)]
    with pytest.raises(DataError, match=r"not the model's: 'class1' is unknown.*'class2' missing here.*mean 'class2'"):
        match_classes(data, ("class0", "class2"), "the model's")


def shares(data: Dataset) -> dict[str, list[int]]:
    return {split: list(data.subset(split).counts) for split in data.splits}


def test_split_is_stratified_and_seeded() -> None:
    data = made(100, 40, 3)
    parts = split_data(data, seed=1)
    assert shares(parts) == {"train": [70, 28, 1], "val": [15, 6, 1], "test": [15, 6, 1]}
    assert split_data(data, seed=1) == parts
    assert split_data(data, seed=2) != parts
    assert shares(split_data(data, val=0.2, test=0))["train"] == [80, 32, 2]
    assert shares(split_data(made(2, 1)))["train"] == [2, 1]  # a class of two images is trained with
    with pytest.raises(DataError, match="less than 1 together"):
        split_data(made(9), val=0.5, test=0.5)
    with pytest.raises(UnknownNameError, match="'valid'"):
        data.subset("valid")


def test_split_data_gets_only_the_val_part_that_it_lacks() -> None:
    whole = made(20, 20)
    samples = (Sample(s.path, s.label, "test" if i % 2 else "train") for i, s in enumerate(whole.samples))
    halves = Dataset(whole.root, whole.classes, tuple(samples))
    parts = split_data(halves, val=0.2)
    assert shares(parts) == {"train": [8, 8], "val": [2, 2], "test": [10, 10]}
    assert split_data(parts) is parts
    with pytest.raises(DataError, match="no train split"):
        split_data(halves.subset("test"))


@given(st.lists(st.integers(0, 12), min_size=30, max_size=80), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_groups_stay_together(groups: list[int], seed: int) -> None:
    data = made(len(groups) // 2, len(groups) - len(groups) // 2)
    samples = (Sample(s.path, s.label, "", f"g{i // 3}" if i % 7 == 0 else "") for i, s in enumerate(data.samples))
    grouped = Dataset(data.root, data.classes, tuple(samples))
    parts = split_data(grouped, seed=seed, groups=groups)
    sides: dict[object, set[str]] = {}
    for sample, group in zip(parts.samples, groups, strict=True):
        sides.setdefault(group, set()).add(sample.split)
        if sample.group:
            sides.setdefault(sample.group, set()).add(sample.split)
    assert all(len(side) == 1 for side in sides.values())
    assert Counter(s.split for s in parts.samples)["train"] > 0


def test_the_digest_sees_size_class_and_split(tmp_path: Path) -> None:
    data = read_data(touch(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(5))))
    assert data.digest == read_data(tmp_path).digest
    assert split_data(data).digest != data.digest
    (tmp_path / "a" / "0.png").write_bytes(b"longer")
    assert read_data(tmp_path).digest != data.digest


def test_runs_and_evaluations_inside_the_data_are_no_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/2.png", "empty/notes.txt")
    touch(tmp_path, "runs/train/x/results.png", "runs/train/x/args.yaml")
    touch(tmp_path, "seen/confusion_matrix.png", "seen/per_class.csv")
    data = read_data(tmp_path)
    assert (data.classes, data.splits, len(data)) == (("a", "b"), ("train", "val"), 3)
    touch(tmp_path, "more/1.png")
    with pytest.raises(DataError, match="has 'train', 'val', which are splits, and other images in 'more'"):
        read_data(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="names are bytes on POSIX only")
def test_file_names_that_are_not_utf8_stay_as_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "d/a/x.png", "d/b/1.png", "d/b/line\rbreak.png", "d/b/two\nlines.png")
    (tmp_path / "d/a/x.png").rename(tmp_path / os.fsdecode(b"d/a/caf\xe9.png"))
    (tmp_path / "d/a").rename(tmp_path / os.fsdecode(b"d/\xe9"))
    data = read_data(tmp_path / "d")
    assert data.classes == (r"\xE9", "b")
    assert all(data.file(sample).is_file() for sample in data.samples)
    assert len(data.digest) == 64
    module.write_manifest(data, tmp_path / "m.csv")
    assert b"caf\xe9.png," in (tmp_path / "m.csv").read_bytes()
    again = read_data(tmp_path / "m.csv")
    assert again.classes == data.classes
    assert sorted(again.file(s) for s in again.samples) == sorted(data.file(s) for s in data.samples)
    assert set(match_split(manifest(split_data(data)), data.root, data)) == {s.path for s in data.samples}


def test_a_manifest_of_another_encoding_names_no_class_wrong(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("path,label\na.png,caf\u00e9\n".encode("cp1252"))
    with pytest.raises(DataError, match="is not a manifest: its columns or labels are not UTF-8"):
        read_data(tmp_path / "m.csv")


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbfPath, Label\na\0.png,x\n" + "é".encode() * 5000 + b".png,y\n")
    data = read_data(tmp_path / "m.csv")
    assert (data.classes, len(data.digest)) == (("x", "y"), 64)
    assert all(
        isinstance(each, ImageError) for each in find_duplicates([data.file(s) for s in data.samples]).fingerprints
    )


def test_manifests_from_windows(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))  # as macOS stores it
    touch(tmp_path, "a/1.png", r"odd\name.png", " blank.png", decomposed)
    rows = (r"a\1.png,x", r"odd\name.png,x", " blank.png,y", " a/2.png ,y", f"{composed},y")
    (tmp_path / "m.csv").write_text("path,label,split\r\n" + "".join(f"{row},Training\r\n" for row in rows), newline="")
    data = read_data(tmp_path / "m.csv")
    assert [s.path for s in data.samples] == ["a/1.png", r"odd\name.png", " blank.png", "a/2.png", decomposed]
    assert data.splits == ("train",)


def test_a_class_is_matched_by_what_people_see() -> None:
    data = Dataset(Path("nowhere"), ("café", "New York"), (Sample("1", 0), Sample("2", 1)))
    names = ("New\u00a0York ", unicodedata.normalize("NFD", "café"), "café au lait")
    assert [s.label for s in match_classes(data, names, "the model's").samples] == [1, 0]
    assert match_classes(data, names, "the model's").classes == names
    twice = ("café ", "New York", "café", "café")
    assert [s.label for s in match_classes(data, twice, "the model's").samples] == [
        2,
        1,
    ]  # the same name before a similar one


def test_a_split_without_a_class_is_known() -> None:
    assert missing_classes(split_data(made(20, 1, 2))) == {"class1": ["val", "test"], "class2": ["val", "test"]}
    assert missing_classes(split_data(made(20, 9), groups=[*range(20), *9 * [99]])) == {"class1": ["val", "test"]}
    assert missing_classes(made(3, 1)) == {}


def test_long_manifests_are_read_and_written_without_needless_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, *(f"d/{i:02}.png" for i in range(30)))
    lines = "".join(f"d\\{i:02}.png,{'ab'[i % 2]}\n" for i in range(30))
    (tmp_path / "m.csv").write_text("path,label\ngone\\1.png,a\n" + lines)
    seen, writers = list[Path](), list[object]()
    size, writer = module.file_size, csv.writer
    monkeypatch.setattr(module, "file_size", lambda path: seen.append(path) or size(path))
    monkeypatch.setattr(csv, "writer", lambda *args, **options: writers.append(args) or writer(*args, **options))
    data = read_data(tmp_path / "m.csv")
    assert [sample.path for sample in data.samples] == [r"gone\1.png", *(f"d/{i:02}.png" for i in range(30))]
    assert len(seen) == 6 + 30  # both forms of the one that is gone, twice, and of the first that is there
    assert manifest(data).count("\n") == 32
    assert len(writers) == 2
