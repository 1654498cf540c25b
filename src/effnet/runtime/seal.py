"""A seal at the end of an artifact: the crc32 of everything before it, so that damaged or edited files are not run.

    model.xml   a comment behind its last element, of model.xml and then model.bin
    .onnx       the last entry of its metadata

Neither format has a checksum of its own, and an engine computes with whatever weights it finds. A .pt2 file is a zip
file, which has one for each member. crc32 shows damage in 0.4 of the time that sha256 takes; whoever changes a file
on purpose could write either. Artifacts of earlier versions have no seal, and are read without one.
"""

from __future__ import annotations

import mmap
import re
import zlib
from pathlib import Path

from effnet.errors import ArtifactError

_KEY = b"effnet.crc32"
ENDS: dict[str, tuple[bytes, bytes]] = {  # by suffix, what stands before and behind the digits
    ".xml": (b"<!-- effnet crc32 ", b" -->\n"),
    # protobuf: field 14 of a model, and in it the key (1) and the value (2), each with its length
    ".onnx": (bytes([14 << 3 | 2, 2 + len(_KEY) + 2 + 8, 1 << 3 | 2, len(_KEY)]) + _KEY + bytes([2 << 3 | 2, 8]), b""),
}
DIGITS = 8
LEAST = 5  # bytes by which a seal is recognised that was cut off


def write_seal(file: Path) -> None:
    """Seal a complete artifact; nothing may be written to it afterwards."""
    before, behind = ENDS[file.suffix]
    with file.open("ab") as stream:
        stream.write(before + _crc32(file, file.stat().st_size) + behind)


def check_seal(file: Path) -> None:
    """Compare an artifact with its seal, if it has one.

    Raises:
        ArtifactError: it has other bytes than were written.
        OSError: it cannot be read.
    """
    suffix, size = file.suffix.lower(), file.stat().st_size
    if suffix not in ENDS or not all(each.is_file() for each in _parts(file)):
        return  # its engine says what is missing
    before, behind = ENDS[suffix]
    length = len(before) + DIGITS + len(behind)
    with file.open("rb") as stream:
        stream.seek(max(0, size - length))
        end = stream.read()
    found = re.fullmatch(re.escape(before) + b"([0-9a-f]{8})" + re.escape(behind), end, re.DOTALL)
    if found is None and before[:LEAST] not in end:
        return
    if found is None or found[1] != _crc32(file, size - length):
        names = " and ".join(each.name for each in _parts(file))
        raise ArtifactError(f"{file} was changed or cut short: the crc32 of {names} is another; export the model again")


def _crc32(file: Path, length: int) -> bytes:
    """Of the first bytes of a file and all of the weights beside it, as digits."""
    found = 0
    for each in _parts(file):
        if count := length if each == file else each.stat().st_size:
            with (
                each.open("rb") as stream,
                mmap.mmap(stream.fileno(), count, access=mmap.ACCESS_READ) as pages,
            ):
                found = zlib.crc32(pages, found)
    return b"%08x" % found


def _parts(file: Path) -> list[Path]:
    return [file, file.with_suffix(".bin")] if file.suffix.lower() == ".xml" else [file]
