"""Files are read and compared only once, and the state of the cache never changes results."""

from __future__ import annotations

import os
import struct
import threading
import time
import zlib
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from tiny import draw_images

from effnet.checking.findings import check
from effnet.data import duplicates
from effnet.data import fingerprint_cache as module
from effnet.data.dataset import read_data
from effnet.data.duplicates import Duplicates, find_duplicates
from effnet.data.fingerprint import Fingerprint, read_fingerprint
from effnet.data.fingerprint_cache import ROW, load_table, save_table
from effnet.errors import ImageError
from effnet.packing.pack import pack
from effnet.progress import SILENT
from effnet.training import run_folder

AGO = 10**10  # nanoseconds


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which is not there yet."""
    monkeypatch.setenv("EFFNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fingerprints"


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's image was decoded, and (under "pairs") images were compared."""
    counts, lock = Counter[str](), threading.Lock()

    def read(file: Path) -> Fingerprint:
        with lock:
            counts[file.name] += 1
        return read_fingerprint(file)

    find = duplicates._find_pairs
    monkeypatch.setattr(duplicates, "read_fingerprint", read)
    monkeypatch.setattr(duplicates, "_find_pairs", lambda known: (counts.update(["pairs"]), find(known))[1])
    return counts


def settle(folder: Path) -> None:
    """Make all files older, as they are a moment later."""
    for file in folder.rglob("*"):
        if file.is_file():
            changed = file.stat().st_mtime_ns - AGO
            os.utime(file, ns=(changed, changed))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images: a copy, a mirrored one, 16 bits, frames, EXIF, one colour; and a file that is not an image."""
    folder = draw_images(tmp_path / "images", 6)
    first = Image.open(folder / "disc" / "000.png")
    first.save(folder / "ring" / "copy.jpg", quality=95)
    ImageOps.mirror(first).save(folder / "disc" / "mirror.png")
    Image.fromarray((np.arange(1024).reshape(32, 32) * 3).astype(np.uint16)).save(folder / "disc" / "deep.png")
    first.save(folder / "disc" / "moving.gif", save_all=True, append_images=[ImageOps.mirror(first)])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    first.resize((40, 20)).save(folder / "ring" / "turned.jpg", exif=exif)
    Image.new("CMYK", (30, 9), (9, 9, 9, 9)).save(folder / "ring" / "ink.tif")
    (folder / "disc" / "broken.png").write_bytes(b"nothing")
    (folder / "disc" / "0\udcff.png").write_bytes((folder / "ring" / "001.png").read_bytes())  # a name not of UTF-8
    settle(folder)
    return folder


def find(folder: Path) -> Duplicates:
    data = read_data(folder)
    return find_duplicates([data.file(sample) for sample in data.samples])


def alike(one: Duplicates, two: Duplicates) -> bool:
    """Whether two answers are equal; errors by their words."""
    words = [[str(each) if isinstance(each, ImageError) else each for each in it.fingerprints] for it in (one, two)]
    return words[0] == words[1] and (one.contents, one.pairs, one.groups) == (two.contents, two.pairs, two.groups)


def test_a_second_check_decodes_nothing_and_finds_the_same(images: Path, looked: Counter[str]) -> None:
    first = check(read_data(images))
    assert sum(looked.values()) == first.images + 1
    assert {each.kind for each in first.findings} >= {"label_conflict", "unreadable", "deep", "animated", "turned"}
    looked.clear()
    second = check(read_data(images))
    assert looked == Counter({"broken.png": 1, "pairs": 1})  # what cannot be read is read again
    assert second.to_dict() == first.to_dict()
    assert alike(second.duplicates, first.duplicates)


def test_images_are_compared_once(images: Path, looked: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MANY", 2)
    first = find(images)
    assert first.pairs
    assert {pair.mirrored for pair in first.pairs} == {False, True}
    again = find(images)
    assert looked["pairs"] == 1
    assert alike(again, first)
    (images / "disc" / "002.png").unlink()
    assert find(images).pairs != first.pairs  # the same, with other numbers
    assert looked["pairs"] == 2


@pytest.mark.parametrize("same_size", [False, True])
def test_a_changed_image_is_looked_at_again(images: Path, looked: Counter[str], same_size: bool) -> None:
    find(images)
    looked.clear()
    changed = images / "ring" / "003.png"
    content = bytearray((images / "ring" / "004.png").read_bytes())
    if same_size:
        content += bytes(10_000)
        changed.write_bytes(content)
        settle(changed.parent)
        find(images)
        looked.clear()
        content[-1] = 1
    changed.write_bytes(content)
    found = find(images)
    assert looked == Counter({"broken.png": 1, "003.png": 1, "pairs": 1})
    index = found.files.index(changed)
    assert found.fingerprints[index] == read_fingerprint(changed)


def test_what_was_unreadable_is_read_once_it_is_mended(images: Path) -> None:
    assert [isinstance(each, ImageError) for each in find(images).fingerprints].count(True) == 1
    (images / "disc" / "broken.png").write_bytes((images / "ring" / "000.png").read_bytes())
    assert not any(isinstance(each, ImageError) for each in find(images).fingerprints)


def test_what_changed_a_moment_ago_is_not_kept(images: Path, looked: Counter[str]) -> None:
    file = images / "ring" / "003.png"
    for moment in (time.time_ns() + 10**7, time.time_ns() - 10**10, time.time_ns() + 10**10):  # clocks differ
        os.utime(file, ns=(moment, moment))
        find(images)
        looked.clear()
        find(images)
        assert looked["003.png"] == (abs(moment - time.time_ns()) < 5 * 10**9)


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "text", "version", "folder", "short"])
def test_a_damaged_cache_is_ignored_and_written_anew(
    images: Path, cache: Path, looked: Counter[str], harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find(images)
    [file] = cache.glob("*.images")
    content = bytearray(file.read_bytes())
    match harm:
        case "cut":
            file.write_bytes(content[:-700])
        case "flip":
            content[-200] ^= 1
            file.write_bytes(content)
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("something else\n" * 1000)
        case "version":
            file.write_bytes(content.replace(module._maker().encode(), b"0" * 16, 1))
        case "folder":
            file.unlink()
            (file / "x").mkdir(parents=True)
        case "short":  # sound by its checksum, and no whole number of rows
            rows = bytes(content.partition(b"\n")[2][:-1])
            file.write_bytes(module._head(rows) + rows)
    looked.clear()
    assert alike(find(images), first)
    assert sum(looked.values()) == len(first.files) + 1
    looked.clear()
    assert alike(find(images), first)
    again = len(first.files) if harm == "folder" else 1  # nothing that is in the way is removed
    assert sum(looked.values()) == again + 1


@pytest.mark.parametrize("place", ["file", "below a file", "nowhere"])
def test_without_a_folder_everything_is_computed(
    images: Path, tmp_path: Path, looked: Counter[str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find(images)
    (tmp_path / "file").write_text("mine")
    chosen = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "nowhere": Path("/proc/effnet")}[
        place
    ]
    monkeypatch.setenv("EFFNET_CACHE", str(chosen))
    for _ in range(2):
        looked.clear()
        assert alike(find(images), first)
        assert sum(looked.values()) == len(first.files) + 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_full_costs_only_time(images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_head", full)
        first = find(images)
    assert not [*cache.glob("*")]
    assert alike(find(images), first)


def test_part_of_a_folder_is_known_from_the_whole(images: Path, cache: Path, looked: Counter[str]) -> None:
    find(images)
    [whole] = cache.glob("*.images")
    before = whole.read_bytes()
    looked.clear()
    part = [images / "ring" / f"{number:03}.png" for number in range(6)]
    find_duplicates(part)
    assert looked == Counter(pairs=1)
    assert [*cache.iterdir()] == [whole]
    (images / "new").mkdir()
    Image.new("RGB", (9, 9)).save(images / "new" / "new.png")
    settle(images / "new")
    find_duplicates([*part, images / "disc" / "000.png", images / "new" / "new.png"])  # adds to the whole
    looked.clear()
    find(images)
    assert looked == Counter({"broken.png": 1, "pairs": 1})
    assert before != whole.read_bytes()


def test_a_stopped_check_keeps_what_it_read(images: Path, looked: Counter[str]) -> None:
    class Stop(type(SILENT)):  # type: ignore[misc]
        def update(self, task: str, done: float, total: float, detail: str = "") -> None:
            if done == 9:
                raise KeyboardInterrupt

    data = read_data(images)
    files = [data.file(sample) for sample in data.samples]
    with pytest.raises(KeyboardInterrupt):
        find_duplicates(files, progress=Stop())
    looked.clear()
    find_duplicates(files)
    assert len(files) - 9 <= sum(looked.values()) - 1 <= len(files) - 8  # broken.png may have been among the nine


def test_shards_are_known_by_size_and_crc32(
    images: Path, tmp_path: Path, looked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "disc" / "broken.png").unlink()
    folder = find(images)
    shards = tmp_path / "shards"
    pack(read_data(images), shards, 20_000)
    settle(shards)
    first = find(shards)
    assert first.fingerprints == folder.fingerprints
    looked.clear()
    assert alike(find(shards), first)
    assert looked == Counter(pairs=1)
    shard = shards / "images-000001.tar"
    content = bytearray(shard.read_bytes())
    name, offset, *_ = shard.with_suffix(".index").read_text(errors="surrogateescape").splitlines()[1].split("\t")
    content[int(offset) + 30] ^= 1
    shard.write_bytes(content)  # another time: its images are read again, and the damaged one is found
    again = find(shards)
    [bad] = [file for file, each in zip(again.files, again.fingerprints, strict=True) if isinstance(each, ImageError)]
    assert bad == shard / name
    assert set(looked) - {"pairs"} == {file.name for file in again.files if file.is_relative_to(shard)}


def test_training_opens_no_file_that_a_check_has_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_data(images)
    opened: list[str] = []
    real = run_folder.open_file
    monkeypatch.setattr(run_folder, "open_file", lambda file: (opened.append(Path(file).name), real(file))[1])
    assert len([*run_folder._unreadable(data, SILENT)]) == 1
    assert len(opened) == len(data)
    find(images)
    opened.clear()
    [reason] = run_folder._unreadable(data, SILENT)
    assert "broken.png is not an image" in reason
    assert opened == ["broken.png"]


def test_what_was_used_longest_ago_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.zeros(10, ROW)
    monkeypatch.setattr(module, "LIMIT", 3 * (rows.nbytes + 100))
    for number in range(5):
        save_table(f"{number}.images", rows)
        os.utime(cache / f"{number}.images", (10**9 + number, 10**9 + number))
        if number == 2:
            assert load_table("0.images", ROW) is not None  # which uses it
    assert {each.name for each in cache.iterdir()} == {"0.images", "3.images", "4.images"}
    monkeypatch.setattr(module, "FILES", 2)
    (cache / ".killed").mkdir()
    (cache / ".busy").mkdir()
    os.utime(cache / ".killed", (10**9, 10**9))
    save_table("5.images", rows)
    assert {each.name for each in cache.iterdir()} == {"0.images", "5.images", ".busy"}


def test_a_data_set_beyond_the_limit_is_kept_in_part(
    images: Path, cache: Path, looked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT", 8 * ROW.itemsize + 500)
    first = find(images)
    looked.clear()
    assert alike(find(images), first)
    assert sum(looked.values()) - 1 == len(first.files) - 8
    assert sum(file.stat().st_size for file in cache.iterdir()) <= module.LIMIT


def _find_often(folder: str, parts: list[list[str]]) -> int:
    """How many of a process's finds had another answer than the images themselves."""
    os.environ["EFFNET_CACHE"] = folder
    wrong = 0
    for part in parts:
        files = [Path(name) for name in part]
        wrong += [*find_duplicates(files, threads=1).fingerprints] != [read_fingerprint(file) for file in files]
    return wrong


def test_processes_that_write_at_once(images: Path, tmp_path: Path, cache: Path, looked: Counter[str]) -> None:
    (images / "disc" / "broken.png").unlink()
    files = sorted(str(file) for file in images.rglob("*.*"))
    rng = np.random.default_rng(0)
    tasks = [[sorted(rng.choice(files, 8, replace=False).tolist()) for _ in range(12)] for _ in range(3)]
    with get_context("fork").Pool(3) as pool:
        assert pool.starmap(_find_often, [(str(tmp_path / "cache"), task) for task in tasks]) == [0, 0, 0]
    assert all(load_table(file.name, ROW) is not None for file in cache.iterdir())
    find(images)
    looked.clear()
    find(images)
    assert looked == Counter(pairs=1)


def test_frames_that_a_file_only_claims(images: Path) -> None:
    """A PNG says in four bytes that it has 2^31 - 1 frames; of a TIFF every page takes time to count."""
    path = images / "disc" / "000.png"
    control = b"acTL" + struct.pack(">II", 2**31 - 1, 0)
    content, chunk = path.read_bytes(), struct.pack(">I", 8) + control + struct.pack(">I", zlib.crc32(control))
    path.write_bytes(content[:33] + chunk + content[33:])
    page = Image.new("L", (1, 1))
    page.save(images / "ring" / "pages.tiff", save_all=True, append_images=[page] * 1200)
    settle(images)
    told = [{each.files[0]: each.message for each in check(read_data(images)).of("animated")} for _ in range(2)]
    assert told[0] == told[1]
    assert told[0]["disc/000.png"] == "1000000 frames"
    assert told[0]["ring/pages.tiff"] == "1000 frames or more"
