"""check and clean: each fault is found once, with what to do, and the cleaned data has none."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from planted import jpeg, scaled, sound_data, textures

from effnet.checking.findings import Findings, check, clean
from effnet.data.dataset import Dataset, missing_classes, read_data, split_data, write_manifest
from effnet.errors import ArgumentError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_data(tmp_path_factory.mktemp("sound"), 12)


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    """train and val, cat and dog, 12 images each, nothing wrong."""
    return Path(shutil.copytree(sound, tmp_path / "data"))


@pytest.fixture
def strange() -> list[Image.Image]:
    """Images that are not in the data."""
    return list(textures(6, seed=3))


def of(findings: Findings, kind: str) -> list[tuple[str, ...]]:
    return [finding.files for finding in findings.of(kind)]


def kinds(findings: Findings) -> set[str]:
    return {finding.kind for finding in findings.findings}


def test_sound_data_has_no_findings(data: Path) -> None:
    findings = check(read_data(data), resolution=224)
    assert findings.findings == ()
    assert findings.errors == 0
    assert findings.classes == {"cat": {"train": 12, "val": 12}, "dog": {"train": 12, "val": 12}}
    assert clean(read_data(data), findings).samples == read_data(data).samples


def test_leaks_are_errors_and_leave_train(data: Path, strange: list[Image.Image]) -> None:
    strange[0].save(data / "val/cat/new.png")
    scaled(strange[0], 0.6).save(data / "train/cat/small.jpg", quality=80)
    ImageOps.mirror(strange[0]).save(data / "train/cat/mirror.png")
    findings = check(read_data(data))
    assert kinds(findings) == {"leak", "duplicate"}
    (leak,) = findings.of("leak")
    assert set(leak.files) == {"train/cat/small.jpg", "train/cat/mirror.png", "val/cat/new.png"}
    assert {path.split("/")[0] for path in leak.files[:2]} == {"train", "val"}
    assert findings.errors == 1
    left = {sample.path for sample in clean(read_data(data), findings).samples}
    assert "val/cat/new.png" in left
    assert not {"train/cat/small.jpg", "train/cat/mirror.png"} & left


def test_test_images_stay_in_test(data: Path, strange: list[Image.Image]) -> None:
    for split in ("train", "val", "test"):
        (data / split / "cat").mkdir(parents=True, exist_ok=True)
        strange[0].save(data / split / "cat/same.png")
    dataset = read_data(data)
    findings = check(dataset)
    assert findings.of("leak")[0].message == "the same file"
    assert [s.path for s in clean(dataset, findings).samples if "same" in s.path] == ["test/cat/same.png"]
    assert of(findings, "missing_class") == [("dog",)]


def test_several_labels_are_an_error_and_all_copies_go(data: Path, strange: list[Image.Image]) -> None:
    strange[0].save(data / "train/cat/a.png")
    jpeg(strange[0], 60).save(data / "train/dog/b.png")
    strange[1].save(data / "train/dog/c.png")
    findings = check(read_data(data))
    assert kinds(findings) == {"label_conflict"}
    assert of(findings, "label_conflict") == [("train/cat/a.png", "train/dog/b.png")]
    values = json.loads(json.dumps(findings.to_dict()))
    assert (values["images"], values["errors"], values["resolution"]) == (51, 1, None)
    (row,) = values["findings"]
    assert (row["kind"], row["severity"], row["files"][0]) == ("label_conflict", "error", "train/cat/a.png")
    with pytest.raises(ArgumentError, match="are for another data set"):
        clean(read_data(data).subset("train"), findings)
    left = {sample.path for sample in clean(read_data(data), findings).samples}
    assert "train/dog/c.png" in left
    assert not {"train/cat/a.png", "train/dog/b.png"} & left


def test_a_mirror_image_may_have_another_label(data: Path, strange: list[Image.Image]) -> None:
    strange[0].save(data / "train/cat/b.png")
    ImageOps.mirror(strange[0]).save(data / "train/dog/d.png")
    findings = check(read_data(data))
    assert kinds(findings) == {"mirrored_label"}
    assert findings.errors == 0
    assert "flip" in findings.of("mirrored_label")[0].advice
    cleaned = clean(read_data(data), findings)
    assert len(cleaned) == 50
    grouped = {sample.path: sample.group for sample in cleaned.samples if sample.group}
    assert len(grouped) == 2
    assert len(set(grouped.values())) == 1  # they stay in one split


def test_of_copies_the_largest_stays(data: Path, strange: list[Image.Image]) -> None:
    scaled(strange[0], 0.5).save(data / "train/cat/a.png")
    strange[0].save(data / "train/cat/b.png")
    strange[0].save(data / "train/cat/c.png")
    findings = check(read_data(data))
    assert of(findings, "duplicate") == [("train/cat/a.png", "train/cat/b.png", "train/cat/c.png")]
    names = [sample.path for sample in clean(read_data(data), findings).samples]
    assert [name for name in names if name[10:] in ("a.png", "b.png", "c.png")] == ["train/cat/b.png"]


def test_unreadable_files_are_errors_with_their_reason(data: Path) -> None:
    (data / "train/cat/empty.jpg").touch()
    (data / "train/cat/words.jpg").write_text("hello")
    whole = (data / "train/dog/03.png").read_bytes()
    (data / "val/cat/cut.png").write_bytes(whole[: len(whole) // 2])
    findings = check(read_data(data))
    assert kinds(findings) == {"unreadable"}
    reasons = {finding.files[0]: finding.message for finding in findings.findings}
    assert reasons["train/cat/empty.jpg"] == "is empty: 0 bytes"
    assert "cut short" in reasons["val/cat/cut.png"]
    assert "not an image" in reasons["train/cat/words.jpg"]
    assert len(clean(read_data(data), findings)) == 48


def test_strange_files(data: Path, strange: list[Image.Image]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    strange[0].save(data / "train/cat/turned.jpg", exif=exif)
    strange[1].save(data / "train/cat/really_png.jpg", "PNG")
    strange[2].convert("CMYK").save(data / "train/cat/ink.jpg")
    strange[3].resize((400, 100)).save(data / "train/cat/long.png")
    frames = [Image.new("RGB", (90, 90), colour) for colour in ("red", "blue")]
    frames[0].save(data / "train/cat/moving.gif", save_all=True, append_images=frames[1:])
    findings = check(read_data(data))
    expected = {"turned": "turned.jpg", "misnamed": "really_png.jpg", "deep": "ink.jpg", "long": "long.png"}
    expected |= dict.fromkeys(("animated", "one_colour"), "moving.gif")
    assert kinds(findings) == set(expected)
    for kind, name in expected.items():
        assert of(findings, kind) == [(f"train/cat/{name}",)]
    assert findings.of("misnamed")[0].message == "is PNG, but its name says JPEG"
    assert findings.errors == 0


def test_classes(tmp_path: Path) -> None:
    for number, image in enumerate(textures(43)):
        folder = tmp_path / ("many" if number < 40 else "few")
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{number}.png")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("later")
    findings = check(read_data(tmp_path))
    assert {kind: of(findings, kind) for kind in kinds(findings)} == {
        "passed_over": [("none/notes.txt",)],
        "empty_class": [("none",)],
        "tiny_class": [("few",)],
        "unbalanced": [("many", "few")],
    }
    assert findings.of("unbalanced")[0].message == "40 and 3 images: 13 to 1"


def test_a_class_that_training_leaves_without_val_and_test_images(tmp_path: Path) -> None:
    images = list(textures(41))
    for number in range(40):
        (tmp_path / "good" / "again").mkdir(exist_ok=True, parents=True)
        (tmp_path / "defect").mkdir(exist_ok=True)
        jpeg(images[40], 60 + number).save(tmp_path / "good" / f"{number}.png")
        images[number].save(tmp_path / "defect" / f"{number}.png")
    images[0].rotate(90).save(tmp_path / "defect" / "another.png")
    (tmp_path / "single").mkdir()
    images[1].rotate(90).save(tmp_path / "single" / "1.png")
    findings = check(read_data(tmp_path))
    assert {finding.files: finding.message for finding in findings.of("missing_class")} == {
        ("good",): "40 images, 1 if near-duplicates count once: training leaves none for val and test",
        ("single",): "1 image: training leaves none for val and test",
    }
    planned = split_data(read_data(tmp_path), groups=findings.duplicates.groups)
    assert missing_classes(planned) == {"good": ["val", "test"], "single": ["val", "test"]}


def test_what_is_passed_over_is_said_with_the_reason(data: Path, strange: list[Image.Image]) -> None:
    for number in range(5):
        (data / f"train/cat/notes{number}.xml").touch()
    strange[0].save(data / "loose.png")
    (data / "train/dog" / "dogs").symlink_to("..")
    findings = check(read_data(data))
    assert findings.images == 48
    reasons = {finding.message: len(finding.files) for finding in findings.of("passed_over")}
    assert reasons == {"suffix .xml": 5, "not in a class folder": 1, "a link to a folder above it": 1}
    assert findings.errors == 0


def test_one_class_and_folders_of_one_name(data: Path) -> None:
    (data / "train" / "cat ").mkdir()
    (data / "train/cat/00.png").rename(data / "train/cat /00.png")
    findings = check(read_data(data))
    assert [(each.files, each.message) for each in findings.of("several_folders")] == [
        (("cat",), "from the folders 'cat', 'cat '")
    ]
    assert kinds(findings) == {"several_folders"}
    shutil.rmtree(data / "val")
    shutil.rmtree(data / "train" / "dog")
    (data / "train" / "cat ").rename(data / "train" / "cat" / "inner")
    found = check(read_data(data))
    assert [each.message for each in found.of("one_class")] == [
        "'cat' is its only class; if 'inner' in it are the classes, name that folder instead"
    ]
    assert found.errors == 1


SMALL = [(28, "train with --resolution 32 --stem-stride 1"), (100, "train with --resolution 112"), (112, None)]


@pytest.mark.parametrize(("side", "words"), SMALL)
def test_images_smaller_than_the_network_sees(side: int, words: str | None, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, image in enumerate(textures(3)):
        image.resize((side, side)).save(tmp_path / "a" / f"{number}.png")
    findings = check(read_data(tmp_path), resolution=224)
    assert [words in finding.message for finding in findings.of("resolution")] == ([True] if words else [])
    assert findings.sizes == dict.fromkeys(("median", "smallest", "largest"), (side, side))
    assert not check(read_data(tmp_path)).of("resolution")


def test_the_cleaned_manifest_is_clean_and_says_groups(data: Path, strange: list[Image.Image], tmp_path: Path) -> None:
    strange[0].save(data / "val/cat/new.png")
    scaled(strange[0], 0.6).save(data / "train/cat/leaked.jpg", quality=80)
    strange[1].save(data / "train/cat/a.png")
    strange[1].save(data / "train/dog/b.png")
    strange[2].save(data / "train/cat/c.png")
    strange[2].save(data / "train/cat/d.webp", quality=80)
    (data / "val/dog/empty.jpg").touch()
    dataset = read_data(data)
    findings = check(dataset)
    assert findings.errors == 3
    write_manifest(clean(dataset, findings), tmp_path / "clean.csv")
    again = read_data(tmp_path / "clean.csv")
    assert check(again).findings == ()
    assert len(again) == 48 + 2
    assert clean(dataset, findings).samples == clean(dataset, check(dataset)).samples


def test_groups_that_were_there_stay(data: Path, strange: list[Image.Image]) -> None:
    strange[0].save(data / "train/cat/b.png")
    ImageOps.mirror(strange[0]).save(data / "train/dog/d.png")
    dataset = read_data(data)
    samples = tuple(
        dataclasses.replace(sample, group="patient" if sample.path.endswith(("b.png", "00.png")) else "")
        for sample in dataset.samples
    )
    dataset = Dataset(dataset.root, dataset.classes, samples)
    cleaned = clean(dataset, check(dataset))
    grouped = {sample.path for sample in cleaned.samples if sample.group == "patient"}
    assert {"train/cat/b.png", "train/dog/d.png", "train/cat/00.png"} <= grouped
    assert {sample.group for sample in cleaned.samples} == {"patient", ""}


def test_frames_of_a_film_do_not_all_go(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    noise = np.asarray(next(textures(1, seed=9)).resize((400, 200)))
    for number in range(30):  # each frame is like the next, the last is like no other than its neighbours
        Image.fromarray(noise[:, 6 * number : 6 * number + 200]).save(tmp_path / "a" / f"{number:02d}.png")
        Image.fromarray(noise[:, 6 * number : 6 * number + 200]).save(tmp_path / "a" / f"{number:02d} copy.bmp")
    dataset = read_data(tmp_path)
    findings = check(dataset)
    left = clean(dataset, findings)
    assert 10 <= len(left) <= 30
