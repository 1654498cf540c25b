"""Contact sheets: photos with lines of text below them, drawn by Pillow.

Fonts are those of fonts.py; without matplotlib, Pillow's own, which has only ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from effnet.data.image import open_photo
from effnet.errors import ArgumentError, ImageError
from effnet.files import write_file
from effnet.plots.fonts import characters, choose_fonts, drawable_text, on_one_line
from effnet.plots.style import INK, PALE

SHEET_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
HEAD, TILE, LINE, GAP = 48, 200, 18, 10  # pixels: title, photo, line of text, space around a cell


@dataclass(frozen=True)
class Cell:
    """Photos side by side, with lines of text below."""

    photos: tuple[Path | Image.Image, ...]
    lines: tuple[tuple[str, str], ...]  # text and colour


def check_sheet(argument: str, out: Path) -> None:
    """Check a sheet's path before long work, not after it.

    Raises:
        ArgumentError: `out` does not end in .jpg, .jpeg or .png, or is a folder.
    """
    if out.suffix.lower() not in SHEET_FORMATS:
        raise ArgumentError(argument, str(out), f"must end in {', '.join(SHEET_FORMATS)}.")
    if out.is_dir():
        raise ArgumentError(argument, str(out), "is a folder; name a file.")


def draw_sheet(cells: Sequence[Cell], title: str, out: Path, *, across: int) -> None:
    """Draw cells in rows of `across`. All have the same number of photos and lines.

    A photo that can no longer be read leaves an empty square.

    Raises:
        ArgumentError: see `check_sheet`.
    """
    check_sheet("out", out)
    photos, lines = (len(cells[0].photos), len(cells[0].lines)) if cells else (1, 0)
    width, height = photos * (TILE + GAP), TILE + lines * LINE + GAP
    sheet = Image.new("RGB", (across * width + GAP, HEAD + -(-len(cells) // across) * height), "white")
    pen = ImageDraw.Draw(sheet)
    write_line(pen, (GAP, 14), title, INK, 18, sheet.width - GAP)
    for place, cell in enumerate(cells):
        left, top = GAP + place % across * width, HEAD + place // across * height
        for number, photo in enumerate(cell.photos):
            sheet.paste(_tile(photo), (left + number * (TILE + GAP), top))
        for number, (text, colour) in enumerate(cell.lines):
            write_line(pen, (left, top + TILE + 2 + number * LINE), text, colour, 13, width - GAP)
    with write_file(out) as temporary:
        sheet.save(temporary, SHEET_FORMATS[out.suffix.lower()], quality=90)


def _tile(source: Path | Image.Image) -> Image.Image:
    """The whole photo, padded to a square."""
    square = Image.new("RGB", (TILE, TILE), PALE)
    with suppress(ImageError):
        photo = ImageOps.contain(source if isinstance(source, Image.Image) else open_photo(source), (TILE, TILE))
        square.paste(photo, ((TILE - photo.width) // 2, (TILE - photo.height) // 2))
    return square


def write_line(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: str, size: int, width: int) -> None:
    """Write a text on one line of at most `width` pixels, in the font that has most of its characters."""
    text = on_one_line(text)
    wanted = {*map(ord, text)}
    best = max(choose_fonts(text), key=lambda font: len(wanted & characters(font.file)), default=None)
    font = ImageFont.truetype(best.file, size) if best else ImageFont.load_default(size)
    pen.text(place, _shorten(drawable_text(text, [best] if best else []), font, width), colour, font)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, without its middle if it is wider than `width` pixels."""
    kept, short = len(text), text
    while font.getlength(short) > width:
        kept -= 1
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return short
