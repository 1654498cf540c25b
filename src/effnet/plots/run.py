"""The pictures of a trained model: how it learned, what it mixes up, how far its confidence can be believed.

Needs the extra `plots`; see plots.py for what all pictures have in common. The sheet of mistakes is a JPEG, for it
holds photos, and is drawn by Pillow.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from effnet.data.dataset import Dataset
from effnet.data.photo import open_photo
from effnet.errors import ArgumentError, ImageError, MissingExtraError
from effnet.fields import positive_int
from effnet.files import write_file
from effnet.metrics.calibration import BINS, Reliability, confidence
from effnet.metrics.evaluate import Evaluation, Predicted
from effnet.plots.figures import BLUE, GREY, INK, ORANGE, PALE, RED, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COUNTED, NAMED = 20, 30  # classes up to which the cells of a confusion matrix have counts, and its sides names
CELLS = 400  # of a side of the matrix, at most: the darkest of several classes is drawn for all of them
PAIRS = 16  # that are listed beside a matrix without names
LETTERS = 24  # of a name
ROOM = 8  # letters to an inch of the lower side, beyond which names stand upright
WORDS = 5.0  # inches for that list

TILE, CAPTION, GAP = 200, 58, 10  # pixels of a mistake: its photo, the words below it, the space around both
ACROSS = 6

# What the panels of `draw_results` show of the columns of results.csv.
PANELS = (
    # label of the axis, columns with their names, scale of the values
    ("loss", (("train_loss", "training"), ("val_loss", "validation")), 1.0),
    ("top-1 of the validation part, %", (("val_top1", "validation"),), 100.0),
    ("learning rate", (("lr", ""),), 1.0),
    ("seconds of the epoch", (("seconds", ""),), 1.0),
)


def draw_results(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw the learning curves of a run.

    Args:
        rows: of results.csv, numbers or their texts: epoch, train_loss, val_loss, val_top1 (0 to 1), lr, and seconds
            since the start; a panel whose columns are missing is left out.
        out: the picture.

    Raises:
        ArgumentError: there are no rows, or `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    if not rows:
        raise ArgumentError("rows", rows, "must have at least one epoch.")
    panels = [panel for panel in PANELS if all(column in rows[0] for column, _ in panel[1])]
    epochs = [float(row["epoch"]) for row in rows]
    with picture(out, 12, 3.6 * -(-len(panels) // 2), f"{len(rows)} epoch{'s'[: len(rows) - 1]}") as figure:
        for place, (label, columns, scale) in enumerate(panels, start=1):
            axes = figure.add_subplot(-(-len(panels) // 2), 2, place)
            for column, name in columns:
                values = np.array([float(row[column]) * scale for row in rows])
                if column == "seconds":
                    values = np.diff(values, prepend=0.0)
                colour = ORANGE if name == "training" else BLUE
                axes.plot(epochs, values, "o-", color=colour, markersize=4, label=name)
            axes.set(xlabel="epoch", ylabel=label)
            axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
            _whole_numbers(axes)
            if label == "seconds of the epoch":
                axes.set_ylim(bottom=0)
            if len(columns) > 1:
                axes.legend(frameon=False)


def draw_confusion(evaluation: Evaluation, out: Path) -> None:
    """Draw the confusion matrix, each row as shares of its class, with counts, names or the worst pairs as they fit.

    Classes that have neither images nor answers are left out.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    matrix = evaluation.confusion
    used = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    counts, names = matrix[np.ix_(used, used)], [_short(evaluation.classes[i]) for i in used]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(max(0.5 * len(used), 4.0), 9.0)
    small = len(used) <= NAMED
    title = f"{evaluation.n:,} images, {evaluation.top1.value:.1%} named right"
    with picture(out, size + (2.5 if small else WORDS), size + (2.0 if small else 0.8), title) as figure:
        axes, *beside = figure.subplots(1, 1 if small else 2, squeeze=False, width_ratios=(size, WORDS)[: 2 - small])[0]
        axes.grid(visible=False)
        # the square root of the share: a class that loses 1 % of its images to another is seen
        axes.imshow(np.sqrt(_pooled(shares)), cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest")
        axes.set(xlabel="named", ylabel="true")
        for panel in beside:
            axes.set(xticks=[], yticks=[], xlabel=f"named: {len(used)} classes")
            panel.set_axis_off()
            panel.text(0, 1, "\n".join(_pairs(evaluation)), va="top", fontsize=10, linespacing=1.7, parse_math=False)
        if not small:
            return
        turned = 90 if sum(map(len, names)) > ROOM * size else 0
        axes.set_xticks(range(len(used)), names, rotation=turned, fontsize=10, parse_math=False)
        axes.set_yticks(range(len(used)), names, fontsize=10, parse_math=False)
        if len(used) <= COUNTED:
            for (i, j), count in np.ndenumerate(counts):
                if count:
                    colour = "white" if shares[i, j] > 0.4 else INK
                    axes.text(j, i, f"{count}", ha="center", va="center", color=colour, fontsize=9)


def draw_reliability(before: Reliability, after: Reliability, out: Path) -> None:
    """Draw accuracy over confidence, before and after the temperature; one panel where there is none.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    shown = (before,) if after.temperature == before.temperature else (before, after)
    middles = (np.arange(BINS) + 0.5) / BINS
    with picture(out, 1 + 5 * len(shown), 6.4, f"Confidence and accuracy of {sum(before.counts):,} images") as figure:
        panels = figure.subplots(2, len(shown), sharex=True, squeeze=False, height_ratios=(3, 1))
        for (upper, lower), found in zip(panels.T, shown, strict=True):
            upper.plot((0, 1), (0, 1), "--", color=GREY, linewidth=1.5, label="as it should be")
            upper.bar(middles, found.accuracy, 0.9 / BINS, color=BLUE, label="accuracy")
            filled = np.array(found.counts) > 0
            upper.plot(
                np.array(found.confidence)[filled],
                np.array(found.accuracy)[filled],
                "o",
                color=RED,
                zorder=3,
                label="means",
            )
            upper.set(xlim=(0, 1), ylim=(0, 1.02))
            words = "as it is" if found is before else f"divided by T = {found.temperature:.3g}"
            upper.set_title(f"{words}: ECE {found.ece:.1%}", loc="left", fontsize=12)
            lower.bar(middles, found.counts, 0.9 / BINS, color=GREY)
            lower.set(xlabel="confidence")
        panels[0, 0].set(ylabel="accuracy")
        panels[1, 0].set(ylabel="images")
        panels[0, 0].legend(frameon=False, loc="upper left")


def mistakes_sheet(dataset: Dataset, predicted: Predicted, out: Path, n: int = 24, *, temperature: float = 1.0) -> None:
    """A sheet of the mistakes that the model was surest of: the photo, its class, what was said, and how sure it was.

    Args:
        dataset: what was predicted.
        predicted: its logits.
        out: a .jpg file.
        n: mistakes at most.
        temperature: of the confidence.

    Raises:
        ArgumentError: `out` has another suffix, or the images are not the data set's.
        MissingExtraError: matplotlib is not installed, which brings the letters.
    """
    if out.suffix.lower() not in (".jpg", ".jpeg"):
        raise ArgumentError("out", str(out), "must end in .jpg: it holds photos.")
    samples = [sample for sample in dataset.samples if sample.path not in predicted.unreadable]
    if len(samples) != len(predicted.labels):
        raise ArgumentError("predicted", f"{len(predicted.labels)} images", f"must be the data's {len(samples)}.")
    said, sure = predicted.logits.argmax(1), confidence(predicted.logits, temperature)
    wrong = np.flatnonzero(said != predicted.labels)
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][: positive_int("n", n)].tolist()
    fonts = _font(13), _font(18)
    rows = max(1, -(-len(worst) // ACROSS))
    head = 48
    sheet = Image.new("RGB", (ACROSS * (TILE + GAP) + GAP, head + rows * (TILE + CAPTION + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    title = f"{len(wrong):,} of {len(samples):,} images named wrong" + (", the surest first" if worst else "")
    draw.text((GAP, 14), title, INK, fonts[1])
    for place, i in enumerate(worst):
        left, top = GAP + place % ACROSS * (TILE + GAP), head + place // ACROSS * (TILE + CAPTION + GAP)
        sheet.paste(_tile(dataset.file(samples[i])), (left, top))
        true, name = dataset.classes[predicted.labels[i]], dataset.classes[said[i]]
        for line, (words, colour) in enumerate(
            ((f"is: {true}", INK), (f"said: {name}", RED), (f"{sure[i]:.1%} sure, {Path(samples[i].path).name}", GREY))
        ):
            draw.text((left, top + TILE + 3 + 18 * line), _fitting(words, fonts[0]), colour, fonts[0])
    with write_file(out) as temporary:
        sheet.save(temporary, format="JPEG", quality=90)


def write_per_class(evaluation: Evaluation, out: Path) -> None:
    """Write a CSV line for each class, in order; what is not defined is empty."""
    columns = "class", "images", "named", "precision", "recall", "recall_low", "recall_high", "f1"
    with write_file(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for score in evaluation.scores:
            recall = score.recall
            bounds = (recall.value, recall.low, recall.high) if recall else ("", "", "")
            writer.writerow((score.name, score.n, score.named, score.precision, *bounds, score.f1))


def _whole_numbers(axes: Axes) -> None:
    """No half epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _pooled(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix with at most CELLS cells a side, each the largest of those that it stands for."""
    step = -(-len(shares) // CELLS)
    starts = np.arange(0, len(shares), step)
    rows: NDArray[np.float64] = np.maximum.reduceat(shares, starts, axis=0)
    pooled: NDArray[np.float64] = np.maximum.reduceat(rows, starts, axis=1)
    return pooled


def _pairs(evaluation: Evaluation) -> list[str]:
    """The commonest mistakes in words."""
    worst = evaluation.mistakes[:PAIRS]
    return ["Mixed up most often:", *(f"{each.count} x {_short(each.true)}: {_short(each.named)}" for each in worst)]


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"


def _tile(path: Path) -> Image.Image:
    """The whole photo on a square; an empty one where it cannot be read any more."""
    square = Image.new("RGB", (TILE, TILE), PALE)
    try:
        photo = ImageOps.contain(open_photo(path), (TILE, TILE))
    except ImageError:
        return square
    square.paste(photo, ((TILE - photo.width) // 2, (TILE - photo.height) // 2))
    return square


def _font(size: int) -> ImageFont.FreeTypeFont:
    try:
        from matplotlib import get_data_path
    except ImportError as error:
        raise MissingExtraError("drawing", "plots") from error
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _fitting(words: str, font: ImageFont.FreeTypeFont) -> str:
    """As much of the words as is not wider than a photo."""
    if font.getlength(words) <= TILE:
        return words
    while words and font.getlength(f"{words}…") > TILE:
        words = words[:-1]
    return f"{words}…"
