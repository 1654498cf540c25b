"""Class activation maps over the network's input: orange for the class, blue against it. Drawn by Pillow.

The photo is grey below the map. The colour is linear in the value, from none at 0 to full at the largest absolute value
of all maps in the picture. That value is written beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw

from effnet.data.dataset import Dataset
from effnet.files import write_file
from effnet.plots.contact_sheet import GAP, LINE, SHEET_FORMATS, Cell, draw_sheet, write_line
from effnet.plots.evaluation import worst_mistakes
from effnet.plots.fonts import label_classes
from effnet.plots.style import BLUE, GREY, INK, ORANGE, RED
from effnet.runtime.cam import Explanation
from effnet.runtime.classifier import Classifier

SIDE, BAR = 448, 12  # pixels: side of a photo, height of the scale
OPAQUE = 0.85  # share of the colour at full strength
MISTAKES = 24


def draw_overlay(found: Sequence[Explanation], lines: Sequence[str], out: Path) -> None:
    """Draw the network's input, the map of each class with its logit, and below them the scale and lines of text.

    Args:
        found: at least one explanation, all for one image.
        lines: text.
        out: a .jpg, .jpeg or .png file.
    """
    largest = strength(found)
    pictures = [_enlarged(found[0].pixels), *(shade(each, largest, SIDE) for each in found)]
    width, below = len(pictures) * (SIDE + GAP) + GAP, 2 * GAP + SIDE + LINE
    sheet = Image.new("RGB", (width, below + BAR + LINE * (len(lines) + 1) + 2 * GAP), "white")
    pen = ImageDraw.Draw(sheet)
    titles = ["what the network saw", *(f"{each.title}: {each.logit:+.2f}" for each in found)]
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left = GAP + number * (SIDE + GAP)
        sheet.paste(picture, (left, GAP))
        write_line(pen, (left, GAP + SIDE + 2), title, INK, 14, SIDE)
    ramp = np.tile(np.linspace(-1, 1, SIDE), (BAR, 1))
    sheet.paste(Image.fromarray(_blend(np.full((BAR, SIDE), 255.0), ramp)), (GAP, below))
    for number, text in enumerate((describe_scale(found), *lines)):
        write_line(pen, (GAP, below + BAR + 4 + number * LINE), text, GREY, 13, width - 2 * GAP)
    with write_file(out) as temporary:
        sheet.save(temporary, SHEET_FORMATS[out.suffix.lower()], quality=92)


def draw_cams(
    classifier: Classifier,
    dataset: Dataset,
    predicted: NDArray[np.int64],
    confidence: NDArray[np.float64],
    out: Path,
    n: int = MISTAKES,
) -> None:
    """Draw a sheet of the `n` most confident mistakes: the photo, and the maps of the predicted and the true class.

    Args:
        classifier: the model that made them.
        dataset, predicted, confidence, out: see plots.evaluation.draw_mistakes.
        n: maximum number of mistakes.
    """
    wrong, labels = worst_mistakes(dataset, predicted, confidence), label_classes(dataset.classes)
    cells = []
    for i in wrong[:n]:
        sample = dataset.samples[i]
        pixels = classifier.read(dataset.file(sample))
        found = classifier.explain_pixels(pixels, (int(predicted[i]), sample.label))
        answer, own = found
        largest = strength(found)
        lines = (
            (
                f"middle: predicted {labels[answer.index]}, logit {answer.logit:+.2f}, {confidence[i]:.1%} confident",
                RED,
            ),
            (f"right: its own class {labels[own.index]}, logit {own.logit:+.2f}", INK),
            (f"{Path(sample.path).name}; {describe_scale(found)}", GREY),
        )
        cells.append(Cell((_enlarged(pixels), *(shade(each, largest, SIDE) for each in found)), lines))
    title = f"Where the network looked: {len(cells)} of {len(wrong):,} mistakes, the most confident first"
    draw_sheet(cells, title if cells else "No mistakes", out, across=2)


def strength(found: Sequence[Explanation]) -> float:
    """The largest absolute value of a cell in all of these maps; 1 if all are 0."""
    return float(max(np.abs(each.map).max() for each in found)) or 1.0


def describe_scale(found: Sequence[Explanation]) -> str:
    """A sentence about the meaning of the colours."""
    height, width = found[0].map.shape
    most = strength(found)
    return f"blue against, orange for; full colour ±{most:.2g} in one of {height} x {width} cells"


def shade(found: Explanation, largest: float, side: int) -> Image.Image:
    """A map over the network's input in grey, `side` x `side` pixels; `largest` is the value of full colour."""
    grey = np.asarray(_enlarged(found.pixels, side).convert("L"), np.float64)
    values = found.enlarge(side) * (side * side / found.map.size) / largest  # value per cell, not per pixel
    return Image.fromarray(_blend(grey, values))


def _blend(grey: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours over grey (h, w), by values from -1 to 1."""
    against, speaks_for = (np.array(ImageColor.getrgb(name), np.float64) for name in (BLUE, ORANGE))
    share = OPAQUE * np.abs(values)[..., None]
    colour = np.where(values[..., None] < 0, against, speaks_for)
    return np.clip(np.rint(grey[..., None] * (1 - share) + colour * share), 0, 255).astype(np.uint8)


def _enlarged(pixels: NDArray[np.uint8], side: int = SIDE) -> Image.Image:
    """Pixels (size, size, C) at `side` x `side`; only the first channel unless C is 3."""
    shown = pixels if pixels.shape[2] == 3 else pixels[:, :, 0]
    return Image.fromarray(shown).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
