"""find_duplicates: copies are found, look-alikes are not, whatever the files are."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageEnhance, ImageOps
from planted import COPIES, jpeg, originals, plant, scaled, textures, tiles, trousers

from effnet.data import likeness
from effnet.data.duplicates import Duplicates, find_duplicates, united
from effnet.data.fingerprint import Fingerprint, fingerprint
from effnet.errors import ImageError, MissingExtraError


def score(found: Duplicates, origin: dict[Path, int]) -> tuple[float, float]:
    """Precision and recall over all pairs of files."""
    together = apart = missed = 0
    numbered = [(origin[file], group) for file, group in zip(found.files, found.groups, strict=True)]
    for (one, group), (other, other_group) in itertools.combinations(numbered, 2):
        together += one == other and group == other_group
        apart += one != other and group == other_group
        missed += one == other and group != other_group
    return together / (together + apart), together / (together + missed)


def test_all_copies_of_a_photo_are_in_its_group_and_nothing_else(tmp_path: Path) -> None:
    origin = plant(tmp_path)
    found = find_duplicates(sorted(origin))
    precision, recall = score(found, origin)
    assert len(origin) > 500
    assert precision >= 0.99
    assert recall >= 0.95


def test_every_kind_of_copy_is_found_without_the_help_of_others(tmp_path: Path) -> None:
    origin = {}
    for number, image in enumerate(originals()):
        path = tmp_path / f"{number:03d}.png"
        image.save(path)
        origin[path] = number
        if image.width > 100:
            name, (change, suffix) = list(COPIES.items())[number % len(COPIES)]
            copy = tmp_path / f"{number:03d} {name}{suffix}"
            change(image).save(copy, **({} if suffix == ".png" else {"quality": 85}))
            origin[copy] = number
    precision, recall = score(find_duplicates(sorted(origin)), origin)
    assert precision >= 0.99
    assert recall >= 0.95


def save(images: Sequence[Image.Image], folder: Path, suffix: str = ".png") -> list[Path]:
    paths = [folder / f"{number:04d}{suffix}" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths


@pytest.mark.parametrize("side", [28, 160])
def test_look_alikes_are_no_copies(side: int, tmp_path: Path) -> None:
    many = list(trousers(400, side, spread=0.02))
    paths = save([*many, jpeg(many[7], 90), ImageOps.mirror(many[9])], tmp_path)
    found = find_duplicates(paths)
    close = find_likenesses(paths)
    assert (close > 0.95).sum() > 1000  # so there was something to fall for
    wrong = [pair for pair in found.pairs if (pair.first, pair.second) not in ((7, 400), (9, 401))]
    assert len(wrong) <= 6  # of 80,000
    assert found.groups[400] == 7
    assert found.groups[401] == 9


def find_likenesses(paths: Sequence[Path]) -> np.ndarray:
    """The correlation of the slopes of every two, written down independently."""
    rows = []
    for path in paths:
        grey = np.asarray(Image.open(path).convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
        padded = np.pad(grey, 1, mode="edge")
        kernel = np.outer((1, 2, 1), (1, 2, 1)) / 16
        blurred = sum(
            kernel[down, right] * padded[down : down + 32, right : right + 32]
            for down in range(3)
            for right in range(3)
        )
        slopes = np.diff(blurred, axis=1)[:-1].ravel(), np.diff(blurred, axis=0)[:, :-1].ravel()
        rows.append(np.concatenate(slopes))
    unit = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


def test_likeness_is_the_correlation_of_slopes(tmp_path: Path) -> None:
    image = next(tiles())
    paths = save([image, jpeg(image, 40), scaled(image, 0.6)], tmp_path)
    expected = find_likenesses(paths)
    assert [pair.likeness for pair in find_duplicates(paths).pairs] == pytest.approx(expected, abs=2e-3)


def test_recoloured_images_are_no_copies_but_grey_ones_are(tmp_path: Path) -> None:
    image = next(textures(1))
    red, green, blue = image.split()
    luma = image.convert("YCbCr").split()
    swapped = Image.merge("YCbCr", (luma[0], luma[2], luma[1])).convert("RGB")
    paths = save([image, swapped, image.convert("L"), Image.merge("RGB", (red, green, blue))], tmp_path)
    found = find_duplicates(paths)
    assert found.contents == (0, 1, 2, 0)
    assert (0, 2) in {(pair.first, pair.second) for pair in found.pairs}
    assert (0, 1) not in {(pair.first, pair.second) for pair in found.pairs}


def test_plain_images_are_copies_only_where_their_bytes_are_the_same(tmp_path: Path) -> None:
    levels = np.full((60, 60, 3), 128, np.uint8)
    paths = save([Image.fromarray(levels + number % 3) for number in range(6)], tmp_path)
    gradient = Image.linear_gradient("L").resize((90, 90)).point(lambda level: 120 + level // 32)
    paths += save([gradient, gradient.rotate(2)], tmp_path, ".bmp")
    found = find_duplicates(paths)
    assert found.contents[:6] == (0, 1, 2, 0, 1, 2)
    assert not found.pairs
    assert found.is_exact((0, 3))
    assert not found.is_exact((0, 1))


def test_the_same_pixels_in_another_file_are_one_content(tmp_path: Path) -> None:
    image = next(tiles())
    paths = save([image], tmp_path) + save([image], tmp_path, ".bmp") + save([image], tmp_path, ".tif")
    found = find_duplicates(paths)
    assert found.contents == (0, 0, 0)
    assert found.copies == {0: (0, 1, 2)}
    assert not found.is_exact((0, 1))


def test_many_copies_of_one_placeholder_stay_cheap(tmp_path: Path) -> None:
    image = next(tiles())
    paths = save([image] * 200, tmp_path)
    found = find_duplicates(paths)
    assert not found.pairs  # and not 19,900
    assert set(found.groups) == {0}


def test_mirror_images_are_said_to_be_such(tmp_path: Path) -> None:
    image = next(tiles())
    paths = save([image, ImageOps.mirror(image), ImageEnhance.Brightness(image).enhance(0.9)], tmp_path)
    pairs = {(pair.first, pair.second): pair.mirrored for pair in find_duplicates(paths).pairs}
    assert pairs == {(0, 1): True, (0, 2): False, (1, 2): True}


def test_a_photo_lying_on_its_side_is_the_upright_one(tmp_path: Path) -> None:
    image = next(textures(1))  # 180 x 160
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "upright.jpg", quality=90)
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.jpg", quality=90, exif=exif)
    paths = [tmp_path / "upright.jpg", tmp_path / "lying.jpg"]
    assert find_duplicates(paths).groups == (0, 0)
    upright, lying = map(fingerprint, paths)
    assert (lying.width, lying.height, lying.turned) == (*image.size, True)
    assert (upright.width, upright.height, upright.turned) == (*image.size, False)


def test_what_cannot_be_read_comes_back_as_an_error(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "words.png").write_text("not an image")
    whole = jpeg_bytes(photos / "coffee.png")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "folder.jpg").mkdir()
    names = ["empty.jpg", "words.png", "cut.jpg", "missing.jpg", "folder.jpg", "whole.jpg", "empty.jpg"]
    found = find_duplicates([tmp_path / name for name in names])
    reasons = [str(answer) if isinstance(answer, ImageError) else "" for answer in found.prints]
    wanted = ["is empty", "is not an image", "cut short", "does not exist", "is a folder", "", "is empty"]
    assert all(words in reason for words, reason in zip(wanted, reasons, strict=True))
    assert reasons[5] == ""
    assert found.groups == found.contents == tuple(range(7))
    assert found.pairs == ()


def jpeg_bytes(path: Path) -> bytes:
    import io

    file = io.BytesIO()
    Image.open(path).convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


def test_a_large_jpeg_decoded_smaller_is_like_its_png(tmp_path: Path, photos: Path) -> None:
    large = scaled(Image.open(photos / "coffee.png").convert("RGB"), 4)
    large.save(tmp_path / "large.jpg", quality=85)
    look, original = fingerprint(tmp_path / "large.jpg"), fingerprint(photos / "coffee.png")
    assert (look.width, look.height) == (2400, 1600)
    assert find_duplicates([tmp_path / "large.jpg", photos / "coffee.png"]).groups == (0, 0)
    assert (look.hash ^ original.hash).bit_count() <= 4


def test_hashes_are_imagehashs(photos: Path) -> None:
    import imagehash

    image = Image.open(photos / "chelsea.png").convert("RGB")
    look = fingerprint(photos / "chelsea.png")
    expected = [int(str(imagehash.phash(photo)), 16) for photo in (image, ImageOps.mirror(image))]
    assert (look.hash ^ expected[0]).bit_count() <= 2  # grey before it is resized, not after
    assert (look.mirrored_hash ^ expected[1]).bit_count() <= 2


def test_nothing_and_one(tmp_path: Path, photos: Path) -> None:
    assert find_duplicates([]).groups == ()
    assert find_duplicates([photos / "coffee.png"]).groups == (0,)
    assert find_duplicates([tmp_path / "missing.png"]).groups == (0,)


def test_groups_do_not_depend_on_threads_or_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path)
    paths = sorted(tmp_path.iterdir())[:200]
    expected = find_duplicates(paths, threads=1)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(likeness, "CELLS", 2**13)
    found = find_duplicates(paths, threads=3, progress=lambda done, total: seen.append((done, total)))
    assert found.groups == expected.groups
    assert found.pairs == expected.pairs
    assert seen == [(done, 200) for done in range(1, 201)]


def test_united_goes_over_several_steps() -> None:
    assert united(6, [(4, 5), (1, 3), (5, 1)]) == [0, 1, 2, 1, 1, 1]


def test_without_imagehash_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    monkeypatch.setattr("effnet.data.fingerprint.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"finding near-duplicates .* pip install 'effnet\[train\]'"):
        find_duplicates([photos / "coffee.png"])
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(MissingExtraError, match=r"effnet\[train\]"):
        fingerprint(photos / "coffee.png")


def test_a_fingerprint_says_what_the_file_is(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (70, 50), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    next(tiles()).convert("CMYK").save(tmp_path / "print.jpg")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20).save(tmp_path / "deep.png")
    moving, ink, deep = (fingerprint(tmp_path / name) for name in ("moving.gif", "print.jpg", "deep.png"))
    assert isinstance(moving, Fingerprint)
    assert (moving.kind, moving.frames, moving.spread) == ("GIF", 2, 0)
    assert (ink.kind, ink.mode, ink.frames) == ("JPEG", "CMYK", 1)
    assert (deep.mode, deep.width, deep.height) == ("I;16", 60, 40)
    assert deep.spread > 10
