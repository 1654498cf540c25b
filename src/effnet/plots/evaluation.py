"""Plots of an evaluation: confusion matrix, reliability diagram, contact sheet of mistakes.

All but the sheet need the extra `plots` and raise the errors of `plots.style.picture`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np
from numpy.typing import NDArray

from effnet.data.dataset import Dataset
from effnet.errors import ArgumentError
from effnet.fields import positive_int
from effnet.plots.contact_sheet import Cell, draw_sheet
from effnet.plots.fonts import label_classes
from effnet.plots.style import BLUE, GREY, INK, RED, picture

Integers = NDArray[np.int64]
Bins = tuple[Sequence[int], Sequence[float], Sequence[float]]  # counts, mean confidence and accuracy of each bin

COUNTED, NAMED = 20, 30  # most classes for which a confusion matrix shows counts in its cells, and names on its sides
CELLS = 400  # most cells per side of the drawn matrix; classes that share a cell are drawn as the darkest
PAIRS = 16  # mistakes listed beside a matrix without names
LETTERS = 24  # of a class's name
LETTERS_PER_INCH = 8  # beyond this, the names along the lower side are rotated
LIST_WIDTH = 5.0  # inches


def draw_confusion(pairs: NDArray[np.int64], classes: Sequence[str], out: Path) -> None:
    """Draw a confusion matrix, each row as shares of its class, with counts, names or the worst pairs if they fit.

    Args:
        pairs: (D, 3), true class, predicted class and number of images; classes in no pair are left out.
        classes: K names.
        out: the file.
    """
    used, places = np.unique(pairs[:, :2], return_inverse=True)
    (true, predicted), counts = places.reshape(-1, 2).T, pairs[:, 2]
    labels, total = label_classes(classes), counts.sum()
    names = [_short(labels[i]) for i in used.tolist()]
    shares = counts / np.bincount(true, counts)[true]
    size = min(max(0.5 * len(used), 4.0), 9.0)
    small = len(used) <= NAMED
    title = f"{total:,} images, {counts[true == predicted].sum() / total:.1%} predicted correctly"
    with picture(out, size + (2.5 if small else LIST_WIDTH), size + (2.0 if small else 0.8), title, names) as figure:
        widths = (size,) if small else (size, LIST_WIDTH)
        axes, *beside = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        axes.grid(visible=False)
        # the square root makes a cell with 1 % of the images of a class visible
        axes.imshow(
            np.sqrt(_pool(true, predicted, shares, len(used))), cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest"
        )
        axes.set(xlabel="predicted", ylabel="true")
        for panel in beside:
            axes.set(xticks=[], yticks=[], xlabel=f"predicted: {len(used)} classes")
            panel.set_axis_off()
            worst = "\n".join(_commonest_mistakes(true, predicted, counts, names))
            panel.text(0, 1, worst, va="top", fontsize=10, linespacing=1.7, parse_math=False)
        if not small:
            return
        rotation = 90 if sum(map(len, names)) > LETTERS_PER_INCH * size else 0
        axes.set_xticks(range(len(used)), names, rotation=rotation, fontsize=10)
        axes.set_yticks(range(len(used)), names, fontsize=10)
        if len(used) <= COUNTED:
            for i, j, count, share in zip(true, predicted, counts, shares, strict=True):
                colour = "white" if share > 0.4 else INK
                axes.text(j, i, f"{count}", ha="center", va="center", color=colour, fontsize=9)


def draw_reliability(curves: Mapping[str, Bins], out: Path) -> None:
    """Draw accuracy against confidence, and the number of images per bin, in a panel per title."""
    total = sum(next(iter(curves.values()))[0])
    with picture(out, 1 + 5 * len(curves), 6.4, f"Confidence and accuracy of {total:,} images") as figure:
        panels = figure.subplots(2, len(curves), sharex=True, squeeze=False, height_ratios=(3, 1))
        for (upper, lower), (title, (counts, confidence, accuracy)) in zip(panels.T, curves.items(), strict=True):
            n = len(counts)
            middles = (np.arange(n) + 0.5) / n
            filled = np.flatnonzero(counts)
            upper.plot((0, 1), (0, 1), "--", color=GREY, linewidth=1.5, label="ideal")
            upper.bar(middles, accuracy, 0.9 / n, color=BLUE, label="accuracy")
            means = np.array(confidence)[filled], np.array(accuracy)[filled]
            upper.plot(*means, "o", color=RED, zorder=3, label="means")
            upper.set(xlim=(0, 1), ylim=(0, 1.02))
            upper.set_title(title, loc="left", fontsize=12)
            lower.bar(middles, counts, 0.9 / n, color=GREY)
            lower.set(xlabel="confidence")
        panels[0, 0].set(ylabel="accuracy")
        panels[1, 0].set(ylabel="images")
        panels[0, 0].legend(frameon=False, loc="upper left")


def draw_mistakes(
    dataset: Dataset, predicted: NDArray[np.int64], confidence: NDArray[np.float64], out: Path, n: int = 24
) -> None:
    """Draw a sheet of the `n` most confident mistakes: the photo, its class, the predicted class and its confidence.

    Args:
        dataset: N images.
        predicted: the predicted class of each, (N,).
        confidence: the confidence of these predictions, (N,).
        out: a .jpg, .jpeg or .png file.
        n: maximum number of mistakes.

    Raises:
        ArgumentError: `out` has another suffix, or the number of predictions is not that of the images.
    """
    wrong = worst_mistakes(dataset, predicted, confidence)
    cells, labels = [], label_classes(dataset.classes)
    for i in wrong[: positive_int("n", n)]:
        sample = dataset.samples[i]
        lines = (
            (f"true: {labels[sample.label]}", INK),
            (f"predicted: {labels[predicted[i]]}", RED),
            (f"{confidence[i]:.1%} confident, {Path(sample.path).name}", GREY),
        )
        cells.append(Cell((dataset.file(sample),), lines))
    order = ", the most confident first" if cells else ""
    title = f"{len(wrong):,} of {len(dataset):,} images predicted wrong{order}"
    draw_sheet(cells, title, out, across=6)


def worst_mistakes(dataset: Dataset, predicted: NDArray[np.int64], confidence: NDArray[np.float64]) -> list[int]:
    """Indices of the wrong predictions, the most confident first; arguments as for `draw_mistakes`."""
    if len(predicted) != len(dataset):
        raise ArgumentError("predicted", f"{len(predicted)} images", f"must be the data's {len(dataset)}.")
    wrong = np.flatnonzero(predicted != [sample.label for sample in dataset.samples])
    found: list[int] = wrong[np.argsort(-confidence[wrong], kind="stable")].tolist()
    return found


def _pool(true: Integers, predicted: Integers, shares: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The matrix of shares, max-pooled to at most CELLS cells per side."""
    step = -(-count // CELLS)
    pooled = np.zeros((-(-count // step), -(-count // step)))
    np.maximum.at(pooled, (true // step, predicted // step), shares)
    return pooled


def _commonest_mistakes(true: Integers, predicted: Integers, counts: Integers, names: Sequence[str]) -> list[str]:
    """The pairs of classes confused most often, a line each."""
    wrong = np.flatnonzero(true != predicted)
    worst = wrong[np.argsort(-counts[wrong], kind="stable")][:PAIRS].tolist()
    return ["Mixed up most often:", *(f"{counts[i]} x {names[true[i]]}: {names[predicted[i]]}" for i in worst)]


def _short(name: str) -> str:
    widths = np.cumsum([1 + (east_asian_width(letter) in "WF") for letter in name])  # Chinese letters are twice as wide
    return name if not name or widths[-1] <= LETTERS else f"{name[: np.searchsorted(widths, LETTERS)]}…"
