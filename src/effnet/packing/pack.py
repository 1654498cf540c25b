"""Packing: the images of a data set, byte for byte, into tar files in webdataset's layout, each with an index.

Each image, such as cat/1.jpg, is followed by the number of its class, cat/1.cls. Images are shuffled within a split,
always in the same order, so that programs that read a shard sequentially see all classes; effnet's own order does not
depend on it. Names and sizes determine the contents of each shard, so a killed pack can continue at the shard that it
was writing. A shard appears whole, then its index; shards.json, without which nothing is read, comes last, and until
then unfinished.json has the command to continue.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from effnet.data.dataset import Dataset, Sample, manifest
from effnet.data.shards import (
    FORMAT,
    INDEX,
    MANIFEST,
    SHARDS,
    TAR,
    UNFINISHED,
    Member,
    absolute,
    file_size,
    index_lines,
    open_file,
    read_index,
    read_member,
    text_of,
)
from effnet.errors import ArgumentError, DataError, ImageError
from effnet.fields import BYTES, write_amount
from effnet.files import hold_lock, write_file, write_text
from effnet.progress import SILENT, Progress
from effnet.version import __version__

UNSPLIT = "images"  # in shard names, if the data has no splits
KEY = re.compile(r"(?:[^\x00-\x1f/\\]+/)*[^\x00-\x1f/\\.]+\.[^/.\\\x00-\x1f]+")  # a key of webdataset and one suffix
BLOCK = tarfile.BLOCKSIZE
OURS = re.compile(rf"{SHARDS}|{MANIFEST}|{UNFINISHED}|(train|val|test|{UNSPLIT})-\d{{6}}({TAR}|{INDEX})|\..*")


@dataclass(frozen=True)
class Packed:
    """The result of packing."""

    images: int
    shards: int
    kept: int  # shards that existed already
    bytes: int
    missing: tuple[str, ...]  # images of a manifest that do not exist


@dataclass(frozen=True)
class _Image:
    name: str  # in the shard
    file: Path
    sample: Sample
    size: int


def pack(dataset: Dataset, out: Path, shard_bytes: int, *, progress: Progress = SILENT) -> Packed:
    """Write the images of a data set to the folder `out`, in shards of at most `shard_bytes` bytes or one image.

    Raises:
        ArgumentError: `out` contains something else, or another process is packing into it.
        DataError: the data set is empty, or an image cannot be read.
    """
    if out.exists() and not (out.is_dir() and all(OURS.fullmatch(each.name) for each in out.iterdir())):
        raise ArgumentError("out", str(out), "exists and holds something else; choose another folder.")
    ordered = sorted(dataset.samples, key=lambda sample: sample.name)
    sizes = [file_size(dataset.file(sample)) for sample in ordered]
    missing = tuple(sample.path for sample, size in zip(ordered, sizes, strict=True) if size < 0)
    there = [(sample, size) for sample, size in zip(ordered, sizes, strict=True) if size >= 0]
    if not there:
        raise DataError(f"{dataset} has no image to pack: none of its {len(dataset):,} files exist")
    names = member_names([sample.name for sample, _ in there])
    images = [_Image(name, dataset.file(s), s, size) for name, (s, size) in zip(names, there, strict=True)]
    shards = dict(_divide(images, shard_bytes))
    out.mkdir(parents=True, exist_ok=True)
    with hold_lock(out, "out"):
        kept = [name for name, members in shards.items() if _is_whole(out / name, members)]
        if len(kept) < len(shards):
            size = write_amount(shard_bytes, BYTES)
            words = ("effnet", "pack", text_of(absolute(str(dataset))), str(out.absolute()), "--shard-size", size)
            write_text(out / UNFINISHED, json.dumps({"command": shlex.join(words)}) + "\n")
        _sweep(out, shards, whole=len(kept) == len(shards))
        done = 0
        for name, members in shards.items():
            if name not in kept:
                _write_shard(out / name, members, len(images), done, progress)
            done += len(members)
            progress.update("packing", done, len(images))
        place = {image.name: f"{shard}/{image.name}" for shard, members in shards.items() for image in members}
        samples = tuple(dataclasses.replace(image.sample, path=place[image.name]) for image in images)
        write_text(out / MANIFEST, manifest(dataclasses.replace(dataset, samples=samples)))
        rows = [_describe(out / name, len(members)) for name, members in shards.items()]
        described = {"effnet": __version__, "format": FORMAT, "classes": dataset.classes, "shards": rows}
        write_text(out / SHARDS, json.dumps(described, indent=1) + "\n")
        (out / UNFINISHED).unlink(missing_ok=True)
        return Packed(len(images), len(shards), len(kept), sum(int(str(row["bytes"])) for row in rows), missing)


def member_names(paths: Sequence[str]) -> list[str]:
    """Names of images in their shards: their paths, if webdataset reads each as a unique key with one suffix.

    Otherwise all get a number as prefix, which keeps their order, and dots within names become underscores.
    """
    keys = {path.rpartition(".")[0] for path in paths}
    if len(keys) == len(paths) and all(KEY.fullmatch(path) and not path.startswith(("/", "../")) for path in paths):
        return [*paths]
    return [f"{number:09}/{_plain(path)}" for number, path in enumerate(paths)]


def _plain(path: str) -> str:
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    parts = [re.sub(r"[\x00-\x1f]", "_", part) for part in parts]
    last = PurePosixPath(parts.pop())
    return "/".join((*parts, f"{last.stem.replace('.', '_')}{last.suffix or '.img'}"))


def _divide(images: Sequence[_Image], limit: int) -> Iterator[tuple[str, list[_Image]]]:
    """The images of each shard, by its name."""
    for split in sorted({image.sample.split for image in images}):
        own = [image for image in images if image.sample.split == split]
        order = np.random.default_rng(0).permutation(len(own)).tolist()
        number, members, used = 0, list[_Image](), 0
        for image in (own[index] for index in order):
            needed = _packed_size(image)
            if members and _padded(used + needed + 2 * BLOCK, tarfile.RECORDSIZE) > limit:
                yield f"{split or UNSPLIT}-{number:06}{TAR}", members
                number, members, used = number + 1, [], 0
            members.append(image)
            used += needed
        yield f"{split or UNSPLIT}-{number:06}{TAR}", members


def _packed_size(image: _Image) -> int:
    """Bytes of an image and its class with their headers, which are larger for long and non-ASCII names."""
    name = image.name.encode(errors="surrogateescape")
    more = 2 * BLOCK + _padded(len(name) + 2 * BLOCK) if len(name) > 96 or not name.isascii() else 0
    return _padded(image.size) + 3 * BLOCK + 2 * more


def _padded(size: int, unit: int = BLOCK) -> int:
    return -(-size // unit) * unit


def _is_whole(shard: Path, images: Sequence[_Image]) -> bool:
    """Whether a shard contains these images intact, and none of them was changed since."""
    with suppress(OSError, ImageError):
        members, written = read_index(str(shard)), shard.with_suffix(INDEX).stat().st_mtime_ns
        found = {name: (member.size, member.label) for name, member in members.items()}
        same = found == {image.name: (image.size, image.sample.label) for image in images}
        if same and all(_changed_ns(image.file) < written for image in images):
            end, size = max(member.offset + member.size for member in members.values()), shard.stat().st_size
            if size < end + 4 * BLOCK or size % tarfile.RECORDSIZE:  # the last class and two empty blocks follow
                return False
            for member in members.values():
                read_member(str(shard), member)
            return True
    return False


def _changed_ns(file: Path) -> int:
    try:
        status = file.stat()
    except OSError:  # the image is in a shard
        return 0
    return max(status.st_mtime_ns, status.st_ctime_ns)  # moving a file here changes only ctime


def _sweep(out: Path, shards: dict[str, list[_Image]], whole: bool) -> None:
    """Remove files of killed and other packs, so that nothing is read until this pack is complete."""
    wanted = {UNFINISHED, *shards, *(name.removesuffix(TAR) + INDEX for name in shards)}
    for each in [*out.iterdir()]:
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        elif each.name not in wanted and not (whole and each.name in (SHARDS, MANIFEST)):
            each.unlink()


def _write_shard(shard: Path, images: Sequence[_Image], total: int, done: int, progress: Progress) -> None:
    shard.with_suffix(INDEX).unlink(missing_ok=True)
    members = {}
    with write_file(shard) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for count, image in enumerate(images, start=done + 1):
            try:
                with open_file(image.file) as file:
                    content = file.read()
            except (ImageError, OSError) as error:
                raise DataError(f"{image.file} cannot be packed: {error}") from error
            end = _add(tar, image.name, content)
            start, crc = end - _padded(len(content)), zlib.crc32(content)
            members[image.name] = Member(start, len(content), crc, image.sample.label)
            _add(tar, image.name.rpartition(".")[0] + ".cls", str(image.sample.label).encode())
            progress.update("packing", count, total)
    with write_file(shard.with_suffix(INDEX)) as temporary:
        temporary.write_bytes(index_lines(members))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a file, and return the offset of its end, with its padding."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    return int(tar.offset)


def _describe(shard: Path, images: int) -> dict[str, object]:
    crc = zlib.crc32(shard.with_suffix(INDEX).read_bytes())
    return {"name": shard.name, "bytes": shard.stat().st_size, "images": images, "index_crc32": crc}
