"""How many scans a JPEG has: one as a rule, about ten where it is progressive.

Each scan goes through all blocks of the image, and takes no more than a few bytes of the file. So one of 100 kB may
keep a decoder busy for minutes.
"""

from __future__ import annotations

import re
from typing import BinaryIO

from effnet.errors import ImageError

MOST_SCANS = 100  # libjpeg writes 10 at most, optimisers a few more
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # markers of a frame's head
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
START, END = 0xDA, 0xD9  # of a scan, of the image
# What follows the code of a scan: behind 0xFF it has only 0 and, where it begins anew, 0xD0 ... 0xD7
MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")


def check_scans(file: BinaryIO) -> None:
    """Raise ImageError where the JPEG in a file has more than MOST_SCANS scans; the file stays where it is."""
    position = file.tell()
    file.seek(2)
    try:
        if _has_several(file) and _count(file.read()) > MOST_SCANS:
            raise ImageError(f"is a JPEG of more than {MOST_SCANS} scans.")
    finally:
        file.seek(position)


def _has_several(file: BinaryIO) -> bool:
    """Whether the first scan does not hold the whole image; the file is behind its head then."""
    components, progressive = 0, False
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        length = int.from_bytes(head[2:], "big") - 2
        if head[1] == START:
            scanned = int.from_bytes(file.read(1), "big")
            return progressive or scanned < components
        if head[1] in FRAMES:
            content = file.read(length)
            components, progressive = (content[5] if len(content) > 5 else 0), head[1] in PROGRESSIVE
        else:
            file.seek(length, 1)
    return True  # padding between segments, or a broken head


def _count(content: bytes) -> int:
    """The scans in what follows the first one's head, and that one, up to one more than MOST_SCANS."""
    found, place = 1, 0
    while found <= MOST_SCANS and (marker := MARKER.search(content, place)):
        kind, place = marker[1][0], marker.end()
        if kind == END:
            break
        found += kind == START
        place += int.from_bytes(content[place : place + 2], "big")
    return found
