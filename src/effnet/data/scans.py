"""Counts the scans of a JPEG: usually one, about ten if it is progressive.

Every scan makes the decoder go through all blocks of the image, but takes only a few bytes in the file. So 100 kB may
keep a decoder busy for minutes.
"""

from __future__ import annotations

import re
from typing import BinaryIO

from effnet.errors import ImageError

MOST_SCANS = 100  # libjpeg writes 10 at most, optimisers a few more
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # start-of-frame markers
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
START, END = 0xDA, 0xD9  # start of scan, end of image
# Markers after a scan's data, in which 0xFF is only followed by 0 or by a restart marker, 0xD0 ... 0xD7
MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")


def check_scans(file: BinaryIO) -> None:
    """Raise ImageError if the JPEG in a file has more than MOST_SCANS scans; the file's position is restored."""
    position = file.tell()
    file.seek(2)
    try:
        if _has_several(file) and _count(file.read()) > MOST_SCANS:
            raise ImageError(f"is a JPEG with more than {MOST_SCANS} scans.")
    finally:
        file.seek(position)


def _has_several(file: BinaryIO) -> bool:
    """Whether the image has more than one scan; leaves the file after the first scan's header."""
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
    return True  # padding between segments, or a broken header


def _count(content: bytes) -> int:
    """Count the scans in what follows the first one's header, including that one, up to MOST_SCANS + 1."""
    found, place = 1, 0
    while found <= MOST_SCANS and (marker := MARKER.search(content, place)):
        kind, place = marker[1][0], marker.end()
        if kind == END:
            break
        found += kind == START
        place += int.from_bytes(content[place : place + 2], "big")
    return found
