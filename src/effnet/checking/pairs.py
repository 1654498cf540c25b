"""A sheet of the copies that a check of a data set found, side by side, for a person to judge. Pillow only."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from effnet.checking.findings import KINDS, Finding, Findings
from effnet.data.dataset import Dataset
from effnet.data.image import open_photo
from effnet.errors import ArgumentError, ImageError
from effnet.files import write_file

SHOWN = ("label_conflict", "leak", "mirrored_label", "duplicate")  # the worst first
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
MOST = 60  # pairs on a sheet
ACROSS = 3  # pairs in a row
SIDE, GAP, LINE = 200, 8, 17  # pixels of an image, between things, of a line of text
WIDE, HIGH = 2 * SIDE + 3 * GAP, SIDE + 3 * LINE + 2 * GAP  # of a pair with its lines
INK, GREY, PALE, RED = "#222222", "#666666", "#DDDDDD", "#D55E00"


def sheet_format(out: Path) -> str:
    """Pillow's format for `out`; asked before a long check, so that its sheet is not refused afterwards.

    Raises:
        ArgumentError: `out` has another suffix than .jpg, .jpeg or .png.
    """
    if out.suffix.lower() not in FORMATS:
        raise ArgumentError("pictures", str(out), f"must end in {', '.join(FORMATS)}.")
    return FORMATS[out.suffix.lower()]


def draw_pairs(dataset: Dataset, findings: Findings, out: Path) -> int:
    """Draw two images of each group of copies, with their files below, at most MOST groups; the worst kinds first.

    Returns:
        How many pairs were drawn. Without any no file is written.

    Raises:
        ArgumentError: `out` has another suffix than .jpg, .jpeg or .png.
    """
    form = sheet_format(out)
    shown = [finding for kind in SHOWN for finding in findings.of(kind)][:MOST]
    if not shown:
        return 0
    rows = -(-len(shown) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * WIDE, rows * HIGH), "white")
    for number, finding in enumerate(shown):
        _draw(sheet, (number % ACROSS * WIDE, number // ACROSS * HIGH), dataset, finding)
    with write_file(out) as temporary:
        sheet.save(temporary, form)
    return len(shown)


def _draw(sheet: Image.Image, corner: tuple[int, int], dataset: Dataset, finding: Finding) -> None:
    """One pair: two images, what is wrong, and the name of each."""
    left, top = corner
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, path in enumerate(finding.files[:2]):
        place = left + GAP + number * (SIDE + GAP), top + GAP
        image = _small(dataset.root / path)
        if image is None:
            pen.rectangle((*place, place[0] + SIDE, place[1] + SIDE), PALE)
        else:
            sheet.paste(image, (place[0] + (SIDE - image.width) // 2, place[1] + (SIDE - image.height) // 2))
        words = f"{number + 1}: {path}"
        pen.text((left + GAP, top + SIDE + 2 * GAP + (number + 1) * LINE), _fitted(words, font), GREY, font)
    more = f", {len(finding.files)} files" if len(finding.files) > 2 else ""
    words = f"{KINDS[finding.kind][1].replace('(s)', '').replace('(es)', '')}: {finding.message}{more}"
    colour = RED if finding.severity == "error" else INK
    pen.text((left + GAP, top + SIDE + 2 * GAP), _fitted(words, font), colour, font)


def _small(file: Path) -> Image.Image | None:
    try:
        image = open_photo(file)
    except ImageError:  # it was there a moment ago
        return None
    ratio = SIDE / max(image.size)
    return image.resize(tuple(max(1, round(side * ratio)) for side in image.size), reducing_gap=3.0)  # type: ignore[arg-type]  # two sides


def _fitted(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The words, without their middle where they are too wide for a pair."""
    kept = len(words)
    fitted = words
    while font.getlength(fitted) > WIDE - 2 * GAP and kept > 2:
        kept -= 1
        fitted = f"{words[: kept // 2]}...{words[len(words) - (kept - kept // 2) :]}"
    return fitted
