"""Pixels of more than 8 bits -> 8 bits, by the range of their values.

    16-bit grey and colour   cameras and scanners store 10, 12 or 14 bits in 16: the number of bits that the file states
                             (PNG's sBIT, TIFF's BitsPerSample and MaxSampleValue, always in PPM and JPEG2000) if no
                             value exceeds it; 16 if every value is an 8-bit value x 256 or x 257; else the smallest of
                             10, 12, 14 and 16 that holds every value
    32-bit integers, floats  the smallest of RANGES that holds every value; other images are refused. Floats may exceed
                             it by one level of 255, as after resampling, and are clipped

A dark image that states nothing may be taken for one of fewer bits, and brightened; `effnet check` names the range of
every image of more than 8 bits. Of 16 bits the high byte is kept, which is exact if 8 bits were widened by x 256 or by
x 257. Grey with alpha in a 16-bit PNG is always read as 16 bits, since Pillow does not read its low bytes.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from effnet.errors import ImageError
from effnet.fields import write_count

BITS = (10, 12, 14, 16)  # significant bits of 16
RANGES = {"I": (255, 1023, 4095, 16383, 65535), "F": (1, 255, 1023, 4095, 16383, 65535)}  # highest values, by mode
HAIR = 1 / 255  # share of the range by which floats may exceed it
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # TIFF's tags
SCALED = ("PPM", "JPEG2000")  # Pillow scales their values from their stated depth to 16 bits
PART = 1 << 18  # pixels that are processed at once
STATED, RANGE = "stated bits", "range"  # keys in an image's info
Box = tuple[int, int, int, int]  # left, top, right, bottom
LOW = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}  # Pillow's raw modes


def note_bits(image: ImageFile.ImageFile, file: BinaryIO) -> None:
    """Store in `image.info` the number of bits that the file states, if it is between 8 and 16."""
    bits = 16 if image.format in SCALED else 0
    if image.format == "PNG":
        position = file.tell()
        bits = _significant_bits(file)
        file.seek(position)
    elif image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        with suppress(TypeError, ValueError):  # a broken tag, but good pixels
            highest, stored = (int(np.max(tags.get(tag, 0))) for tag in (MAX_SAMPLE_VALUE, BITS_PER_SAMPLE))
            bits = highest.bit_length() or stored % 16  # 16 is only the storage size
    if 8 < bits <= 16:
        image.info[STATED] = bits


def pixel_range(image: Image.Image) -> int | None:
    """The highest value of the range that a decoded image's pixels are scaled from; None for 8 bits.

    Raises:
        ImageError: no usual range holds its values.
    """
    if RANGE in image.info:
        return int(image.info[RANGE])
    if image.mode.startswith("I;16"):
        return _range_of_16(image, (values for _, values in _parts(image)))
    if image.mode not in RANGES:
        return None
    ends = [(values.min(), values.max()) for _, values in _parts(image)]
    low, high = np.min(ends), np.max(ends)  # numpy's propagate NaN
    spare = 1 + HAIR if image.mode == "F" else 1
    ranges = ((1 << image.info[STATED]) - 1, *RANGES["I"]) if STATED in image.info else RANGES[image.mode]
    top = next((top for top in ranges if high <= spare * top), None)
    if top is not None and low >= top * (1 - spare):
        return top
    usual = ", ".join(f"0 ... {top}" for top in RANGES[image.mode])
    raise ImageError(f"holds values from {low} to {high}; a photo's lie in one of {usual}.")


def describe_ranges(ranges: Iterable[int | None]) -> str:
    """How many images have each range, most common first; "" if there is at most one range."""
    counts = Counter(top for top in ranges if top)
    words = (f"0 ... {top:,} in {write_count(count, 'image')}" for top, count in counts.most_common())
    return ", ".join(words) if len(counts) > 1 else ""


def narrow_grey(image: Image.Image) -> Image.Image:
    """Convert mode I;16*, I or F to L, or to LA if one value means transparent."""
    top, clear = pixel_range(image), image.info.get("transparency")
    assert top is not None
    narrowed = Image.new("L" if clear is None else "LA", image.size)
    for box, values in _parts(image):
        grey = np.rint(values / top * 255).clip(0, 255) if image.mode == "F" else values // ((top + 1) // 256)
        channels = [grey.astype(np.uint8)]
        if clear is not None:
            channels.append(np.where(values == clear, 0, 255).astype(np.uint8))
        narrowed.paste(Image.merge(narrowed.mode, [Image.fromarray(channel) for channel in channels]), box)
    return narrowed


def load_colours(image: Image.Image) -> Image.Image:
    """Decode an image; 16-bit colours with fewer significant bits are read with their low bytes too.

    Pillow keeps only their high byte, which would leave 4 bits of 12.
    """
    file, tiles = getattr(image, "fp", None), list(getattr(image, "tile", ()))
    image.load()
    swapped = [_swap_bytes(tile) for tile in tiles]
    if file is None or image.mode not in ("RGB", "RGBA") or not swapped or None in swapped:
        return image
    # the high byte has 6 of 14 bits
    if max(high for _, high in image.getextrema()[:3]) >= 64 or image.info.get(STATED) == 16:  # type: ignore[misc]  # a pair for each channel
        image.info[RANGE] = RANGES["I"][-1]
        return image
    file.seek(0)
    second = type(image)(file, "")  # type: ignore[call-arg]  # the plugin's class, as `identify` calls it
    second.tile = swapped  # type: ignore[attr-defined]  # image files have tiles, type(image) says only Image
    second.load()

    def joined() -> Iterator[tuple[Box, NDArray[np.uint16]]]:
        for (box, high), (_, low) in zip(_parts(image), _parts(second), strict=True):
            yield box, high.astype(np.uint16) << 8 | low

    image.info[RANGE] = top = _range_of_16(image, (values[..., :3] for _, values in joined()))
    if top == RANGES["I"][-1]:
        return image
    own = image.mode == "RGBA" and any(values[..., 3].max() > top for _, values in joined())
    narrowed = Image.new(image.mode, image.size)
    for box, values in joined():
        colours = values >> top.bit_length() - 8
        if own:  # alpha has its own range
            colours[..., 3] = values[..., 3] >> 8
        narrowed.paste(Image.fromarray(colours.astype(np.uint8), image.mode), box)
    narrowed.info = dict(image.info)
    return narrowed


def _parts(image: Image.Image) -> Iterator[tuple[Box, NDArray[Any]]]:
    """The pixels of an image with their places, PART at a time to avoid several copies of the whole image."""
    width, height = image.size
    across = min(width, PART)
    down = PART // across
    for top in range(0, height, down):
        for left in range(0, width, across):
            box = left, top, min(width, left + across), min(height, top + down)
            yield box, np.asarray(image.crop(box))


def _range_of_16(image: Image.Image, parts: Iterable[NDArray[np.uint16]]) -> int:
    """The highest value of the range of 16-bit values, as described in the module's docstring."""
    highest, empty, repeated = 0, True, True  # whether low bytes are always 0, or always repeat the high byte
    for values in parts:
        highest = max(highest, int(values.max()))
        low = values & 255
        empty, repeated = empty and not low.any(), repeated and bool((values >> 8 == low).all())
    bits = int(image.info.get(STATED, 0))
    if not bits or highest >= 1 << bits:
        bits = 16 if empty or repeated else next(bits for bits in BITS if highest < 1 << bits)
    return (1 << bits) - 1


def _significant_bits(file: BinaryIO) -> int:
    """The largest entry of a PNG's sBIT chunk; 0 if it has none."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"sBIT":
            return max(file.read(length), default=0)
        if kind == b"IDAT":
            break
        file.seek(length + 4, 1)
    return 0


def _swap_bytes(tile: Any) -> Any:
    """A Pillow tile that decodes the low bytes of 16-bit colours where this one decodes the high bytes; or None."""
    arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    name, _, raw = str(arguments[0] if arguments else "").partition(";")
    if name not in ("RGB", "RGBA") or raw not in LOW:
        return None
    swapped = (f"{name};{LOW[raw]}", *arguments[1:])
    return tile._replace(args=swapped if isinstance(tile.args, tuple) else swapped[0])
