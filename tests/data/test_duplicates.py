"""find_duplicates: copies are found, look-alikes are not, whatever the files are."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import imagehash
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageEnhance, ImageOps
from planted import COPIES, jpeg, plant, scaled, textures, tiles

from effnet.data import duplicates as module
from effnet.data.duplicates import _hashes, connect, find_duplicates
from effnet.data.fingerprint import Fingerprint, read_fingerprint
from effnet.errors import ImageError


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, int]:
    return plant(tmp_path_factory.mktemp("planted"))


def test_every_kind_of_copy_is_found_and_nothing_else(
    planted: dict[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(planted)
    counts: list[tuple[float, float]] = []
    progress = SimpleNamespace(update=lambda task, done, total: counts.append((done, total)))
    found = find_duplicates(files, threads=1, progress=progress)
    assert counts == [(done, len(files)) for done in range(1, len(files) + 1)]
    together = {frozenset((files[pair.first], files[pair.second])) for pair in found.pairs}
    wanted = {frozenset((one, two)) for one, two in itertools.combinations(files, 2) if planted[one] == planted[two]}
    assert together <= wanted  # precision 1
    assert len(together & wanted) >= 0.97 * len(wanted)
    assert {min(pair, key=lambda file: len(file.name)).suffix for pair in together} == {".bmp"}
    for name in COPIES:
        assert any(file.stem.endswith(name) for pair in together for file in pair), name
    monkeypatch.setattr(module, "CELLS", 2**10)
    monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setenv("EFFNET_CACHE", str(tmp_path))  # all is read and compared again
    again = find_duplicates(files, threads=3)
    assert (again.groups, again.pairs) == (found.groups, found.pairs)


def save(images: Sequence[Image.Image], folder: Path, suffix: str = ".png") -> list[Path]:
    paths = [folder / f"{number:04d}{suffix}" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths


def find_similarities(paths: Sequence[Path]) -> np.ndarray:
    """The correlation of the slopes of every two, written down independently."""
    rows = []
    for path in paths:
        grey = np.asarray(Image.open(path).convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
        padded = np.pad(grey, 1, mode="edge")
        kernel = np.outer((1, 2, 1), (1, 2, 1)) / 16
        shifts = list(np.ndindex(3, 3))
        blurred = sum(kernel[down, right] * padded[down : down + 32, right : right + 32] for down, right in shifts)
        slopes = np.diff(blurred, axis=1)[:-1].ravel(), np.diff(blurred, axis=0)[:, :-1].ravel()
        rows.append(np.concatenate(slopes))
    unit = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


def test_similarity_is_the_correlation_of_slopes(tmp_path: Path) -> None:
    image = next(tiles())
    paths = save([image, jpeg(image, 40), scaled(image, 0.6)], tmp_path)
    expected = find_similarities(paths)
    assert [pair.similarity for pair in find_duplicates(paths).pairs] == pytest.approx(expected, abs=2e-3)


def test_recoloured_images_are_no_copies_but_grey_ones_are(tmp_path: Path) -> None:
    image = next(textures(1))
    luma, blue, red = image.convert("YCbCr").split()
    swapped = Image.merge("YCbCr", (luma, red, blue)).convert("RGB")
    found = find_duplicates(save([image, swapped, image.convert("L")], tmp_path))
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 2), (1, 2)]


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
    (path,) = save([next(tiles())], tmp_path)
    found = find_duplicates([path] * 200)
    assert not found.pairs  # and not 19,900
    assert set(found.groups) == {0}


def test_a_still_scene_has_a_bounded_number_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 3)
    scene = np.asarray(next(tiles())).astype(int)
    noise = np.random.default_rng(0).integers(-2, 3, (20, *scene.shape))
    frames = [Image.fromarray((scene + each).clip(0, 255).astype(np.uint8)) for each in noise]
    found = find_duplicates(save(frames, tmp_path, ".bmp"))
    assert 20 <= len(found.pairs) <= 20 * 3  # of 190
    assert set(found.groups) == {0}


def test_mirror_images_are_said_to_be_such(tmp_path: Path) -> None:
    image = next(tiles())
    paths = save([image, ImageOps.mirror(image), ImageEnhance.Brightness(image).enhance(0.9)], tmp_path)
    pairs = {(pair.first, pair.second): pair.mirrored for pair in find_duplicates(paths).pairs}
    assert pairs == {(0, 1): True, (0, 2): False, (1, 2): True}


def test_a_photo_lying_on_its_side_is_the_upright_one(tmp_path: Path) -> None:
    image = next(textures(1))  # 120 x 106
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "upright.jpg", quality=90)
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.jpg", quality=90, exif=exif)
    paths = [tmp_path / "upright.jpg", tmp_path / "lying.jpg"]
    assert find_duplicates(paths).groups == (0, 0)
    upright, lying = map(read_fingerprint, paths)
    assert (lying.width, lying.height, lying.turned) == (*image.size, True)
    assert (upright.width, upright.height, upright.turned) == (*image.size, False)


def test_what_cannot_be_read_comes_back_as_an_error(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "words.png").write_text("not an image")
    file = io.BytesIO()
    Image.open(photos / "coffee.png").convert("RGB").save(file, "JPEG")
    (tmp_path / "whole.jpg").write_bytes(file.getvalue())
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    (tmp_path / "folder.jpg").mkdir()
    names = ["empty.jpg", "words.png", "cut.jpg", "missing.jpg", "folder.jpg", "whole.jpg", "empty.jpg"]
    found = find_duplicates([tmp_path / name for name in names])
    reasons = [str(answer) if isinstance(answer, ImageError) else "" for answer in found.fingerprints]
    wanted = ["is empty", "is not an image", "cut short", "does not exist", "is a folder", "", "is empty"]
    assert all(words in reason for words, reason in zip(wanted, reasons, strict=True))
    assert reasons[5] == ""
    assert find_duplicates([]).groups == ()
    assert found.groups == found.contents == tuple(range(7))
    assert found.pairs == ()


def test_a_large_jpeg_decoded_smaller_is_like_its_png(tmp_path: Path, photos: Path) -> None:
    large = scaled(Image.open(photos / "coffee.png").convert("RGB"), 3)
    large.save(tmp_path / "large.jpg", quality=85)
    look = read_fingerprint(tmp_path / "large.jpg")
    assert (look.width, look.height) == (1800, 1200)
    assert find_duplicates([tmp_path / "large.jpg", photos / "coffee.png"]).groups == (0, 0)


def test_hashes_are_imagehashs(photos: Path) -> None:
    """Within what its float64 and its grey before the resizing make of coefficients near the median."""
    for name in ("chelsea.png", "coffee.png"):
        thumbnail = np.frombuffer(read_fingerprint(photos / name).thumbnail, np.uint8).reshape(1, 32, 32)
        theirs = imagehash.phash(Image.open(photos / name)).hash.ravel()
        assert ((_hashes(thumbnail)[0] > 0) != theirs).sum() <= 2


def test_connections_go_over_several_steps() -> None:
    assert connect(6, [(4, 5), (1, 3), (5, 1)]) == [0, 1, 2, 1, 1, 1]


def test_a_fingerprint_says_what_the_file_is(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (70, 50), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    next(tiles()).convert("CMYK").save(tmp_path / "print.jpg")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20).save(tmp_path / "deep.png")
    moving, ink, deep = (read_fingerprint(tmp_path / name) for name in ("moving.gif", "print.jpg", "deep.png"))
    assert isinstance(moving, Fingerprint)
    assert (moving.format, moving.frames, moving.spread) == ("GIF", 2, 0)
    assert (ink.format, ink.mode, ink.frames) == ("JPEG", "CMYK", 1)
    assert (deep.mode, deep.width, deep.height) == ("I;16", 60, 40)
    assert deep.spread > 10
