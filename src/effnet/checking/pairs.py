"""A sheet of the copies that a check of a data set found, side by side, for a person to judge. Pillow only."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from effnet.checking.findings import COPIES, KINDS, Finding, Findings
from effnet.data.dataset import Dataset
from effnet.data.image import open_photo
from effnet.errors import ArgumentError, ImageError
from effnet.files import write_file

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
MOST = 60  # pairs on a sheet
ACROSS = 3  # pairs in a row
SIDE, GAP, LINE = 200, 8, 17  # pixels of an image, between things, of a line of text
WIDTH, HEIGHT = 2 * SIDE + 3 * GAP, SIDE + 3 * LINE + 2 * GAP  # of a pair with its lines
INK, GREY, PALE, RED = "#222222", "#666666", "#DDDDDD", "#D55E00"


def sheet_format(out: Path) -> str:
    """Pillow's format for `out`; called before a long check, so that its sheet is not refused afterwards.

    Raises:
        ArgumentError: `out` has another suffix than .jpg, .jpeg or .png, or is a folder.
    """
    if out.suffix.lower() not in FORMATS:
        raise ArgumentError("pictures", str(out), f"must end in {', '.join(FORMATS)}.")
    if out.is_dir():
        raise ArgumentError("pictures", str(out), "is a folder; name a file.")
    return FORMATS[out.suffix.lower()]


def draw_pairs(dataset: Dataset, findings: Findings, out: Path) -> int:
    """Draw two images of each group of copies, with their files below, at most MOST groups; the worst kinds first.

    Returns:
        How many pairs were drawn. Without any no file is written.

    Raises:
        ArgumentError: see `sheet_format`.
    """
    format = sheet_format(out)
    shown = [finding for kind in COPIES for finding in findings.of(kind)][:MOST]
    if not shown:
        return 0
    sheet = Image.new("RGB", (ACROSS * WIDTH, -(-len(shown) // ACROSS) * HEIGHT), "white")
    for number, finding in enumerate(shown):
        _draw(sheet, (number % ACROSS * WIDTH, number // ACROSS * HEIGHT), dataset, finding)
    with write_file(out) as temporary:
        sheet.save(temporary, format)
    return len(shown)


def _draw(sheet: Image.Image, corner: tuple[int, int], dataset: Dataset, finding: Finding) -> None:
    """One pair: two images, what is wrong, and the name of each."""
    left, top = corner
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, path in enumerate(finding.files[:2]):
        x, y = left + GAP + number * (SIDE + GAP), top + GAP
        try:
            image = ImageOps.contain(open_photo(dataset.root / path), (SIDE, SIDE))
            sheet.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
        except ImageError:  # it was there a moment ago
            pen.rectangle((x, y, x + SIDE, y + SIDE), PALE)
        text = _shortened(f"{number + 1}: {path}", font)
        pen.text((left + GAP, top + SIDE + 2 * GAP + (number + 1) * LINE), text, GREY, font)
    name = KINDS[finding.kind][1].replace("(s)", "").replace("(es)", "")
    more = f", {len(finding.files)} files" if len(finding.files) > 2 else ""
    colour = RED if finding.severity == "error" else INK
    text = _shortened(f"{name}: {finding.message}{more}", font)
    pen.text((left + GAP, top + SIDE + 2 * GAP), text, colour, font)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, without its middle where it is wider than a pair."""
    kept, short = len(text), text
    while font.getlength(short) > WIDTH - 2 * GAP and kept > 2:
        kept -= 1
        short = f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"
    return short
