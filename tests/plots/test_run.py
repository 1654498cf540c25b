"""The pictures of a run: what is on them, that they appear whole, and the sheet of mistakes."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from effnet.data.dataset import Dataset, Sample
from effnet.errors import ArgumentError, MissingExtraError
from effnet.metrics.evaluate import Evaluation, evaluate
from effnet.plots.run import (
    CAPTION,
    GAP,
    HEAD,
    TILE,
    draw_confusion,
    draw_mistakes,
    draw_reliability,
    draw_results,
)

ROWS = [
    {
        "epoch": i + 1,
        "step": 10 * i,
        "seconds": 12.5 * (i + 1),
        "lr": 1e-3 / (i + 1),
        "train_loss": 2 / (i + 1),
        "val_loss": 2.2 / (i + 1),
        "val_top1": 1 - 0.5 / (i + 1),
    }
    for i in range(4)
]


def evaluated(k: int, each: int = 5) -> Evaluation:
    """Every class's last image is taken for the next class."""
    labels = np.repeat(np.arange(k), each)
    said = labels.copy()
    said[each - 1 :: each] = (said[each - 1 :: each] + 1) % k
    return evaluate(np.eye(k)[said] * 3, labels, [f"kind {i}" for i in range(k)], temperature=1.5)


def confuse(found: Evaluation, out: Path) -> None:
    draw_confusion(found.confusion, found.classes, out)


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text("utf-8"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (figures.append(figure), save(figure, *args, **kw))
    )
    return figures


def test_learning_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_results(ROWS, tmp_path / "results.png")
    curves = {
        (axes.get_ylabel(), line.get_label()): list(line.get_ydata()) for axes in drawn[0].axes for line in axes.lines
    }
    assert curves["loss", "training"] == [row["train_loss"] for row in ROWS]
    assert curves["loss", "validation"] == [row["val_loss"] for row in ROWS]
    assert curves["top-1 of the validation part, %", "validation"] == [100 * row["val_top1"] for row in ROWS]
    (seconds,) = [values for (label, _), values in curves.items() if label.startswith("seconds")]
    assert seconds == [12.5] * 4  # of each epoch, not since the start
    (rates,) = [values for (label, _), values in curves.items() if label == "learning rate"]
    assert rates == [row["lr"] for row in ROWS]


def test_learning_curves_from_the_file(tmp_path: Path) -> None:
    draw_results(ROWS, tmp_path / "numbers.svg")
    draw_results([{name: str(value) for name, value in row.items()} for row in ROWS], tmp_path / "texts.svg")
    assert (tmp_path / "numbers.svg").read_bytes() == (tmp_path / "texts.svg").read_bytes()
    draw_results([{"epoch": 1, "lr": 0.1}], tmp_path / "one.svg")
    assert "learning rate" in texts(tmp_path / "one.svg")
    assert "loss" not in texts(tmp_path / "one.svg")
    with pytest.raises(ArgumentError, match="at least one epoch"):
        draw_results([], tmp_path / "none.svg")


@pytest.mark.parametrize("k", [2, 20, 21, 30, 31, 1000])
def test_confusion_is_readable_for_any_number_of_classes(tmp_path: Path, drawn: list[Figure], k: int) -> None:
    out = tmp_path / "confusion.svg"
    confuse(evaluated(k), out)
    words = texts(out)
    assert f"{5 * k:,} images, 80.0% named correctly" in words
    assert words.count("kind 1") == (2 if k <= 30 else 0)
    assert words.count("4") == (k if k <= 20 else 0)
    listed = [word for word in words if word.startswith("1 x kind")]
    assert len(listed) == (0 if k <= 30 else 16)
    (image,) = drawn[0].axes[0].images
    assert max(image.get_array().shape) <= 400
    assert image.get_array().max() == pytest.approx(0.8**0.5)  # a row is shares of its class


def test_confusion_leaves_out_what_does_not_occur(tmp_path: Path) -> None:
    found = evaluate(np.eye(900)[[3, 5, 5]], [3, 3, 5], [f"kind {i}" for i in range(900)])
    confuse(found, tmp_path / "c.svg")
    assert sorted(set(re.findall(r"kind \d+", " ".join(texts(tmp_path / "c.svg"))))) == ["kind 3", "kind 5"]


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    found = evaluate(np.eye(2)[[0, 1]], [0, 1], ["5 $ bill", "$x_1$"])
    confuse(found, tmp_path / "c.svg")
    assert texts(tmp_path / "c.svg").count("$x_1$") == 2


def test_reliability(tmp_path: Path, drawn: list[Figure]) -> None:
    found = evaluated(6)
    draw_reliability(found.reliability_curves, tmp_path / "r.svg")
    words = texts(tmp_path / "r.svg")
    assert f"uncalibrated: ECE {found.before.ece:.1%}" in words
    assert f"divided by T = 1.5: ECE {found.after.ece:.1%}" in words
    upper = drawn[0].axes[0]
    assert [bar.get_height() for bar in upper.patches] == list(found.before.accuracy)
    draw_reliability(dataclasses.replace(found, after=found.before).reliability_curves, tmp_path / "one.svg")
    assert len(drawn[1].axes) == 2


Answers = tuple[Dataset, np.ndarray, np.ndarray]


@pytest.fixture
def photographed(tmp_path: Path) -> Answers:
    """Photos of grey 0, 20, 40 ..., of three classes in turn, three of them named wrong."""
    for i in range(9):
        Image.new("RGB", (30, 20), (20 * i,) * 3).save(tmp_path / f"{i}.png")
    data = Dataset(tmp_path, ("one", "two", "three"), tuple(Sample(f"{i}.png", i % 3) for i in range(9)))
    named, confidence = np.arange(9) % 3, np.full(9, 0.99)
    for place, sure in ((1, 0.8), (3, 0.9), (8, 0.4)):
        named[place], confidence[place] = (named[place] + 1) % 3, sure
    return data, named, confidence


def tiles(path: Path) -> list[int]:
    """The grey in the middle of each photo on a sheet."""
    sheet = Image.open(path)
    rows = (sheet.height - HEAD) // (TILE + CAPTION + GAP)
    middles = [
        (GAP + column * (TILE + GAP) + TILE // 2, HEAD + row * (TILE + CAPTION + GAP) + TILE // 2)
        for row in range(rows)
        for column in range(6)
    ]
    found = [sheet.getpixel(middle) for middle in middles]
    return [red for red, green, blue in found if max(red, green, blue) < 250]


def test_the_most_confident_mistakes_come_first(photographed: Answers, tmp_path: Path) -> None:
    draw_mistakes(*photographed, tmp_path / "sheet.jpg")
    assert tiles(tmp_path / "sheet.jpg") == pytest.approx([60, 20, 160], abs=3)  # photos 3, 1 and 8
    draw_mistakes(*photographed, tmp_path / "one.jpg", n=1)
    assert tiles(tmp_path / "one.jpg") == pytest.approx([60], abs=3)


def test_the_text_below_a_mistake(photographed: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda draw, place, text, *more: written.append(text))
    data, *answers = photographed
    draw_mistakes(data, *answers, tmp_path / "sheet.jpg")
    assert written[0].startswith("3 of 9 images named wrong")
    assert written[1:4] == ["true: one", "named: two", "90.0% confident, 3.png"]
    written.clear()
    long = dataclasses.replace(data, classes=tuple(40 * name for name in data.classes))
    draw_mistakes(long, *answers, tmp_path / "sheet.jpg")
    assert written[1].endswith("…")
    assert len(written[1]) < 40


def test_a_sheet_without_mistakes(photographed: Answers, tmp_path: Path) -> None:
    data, _, confidence = photographed
    draw_mistakes(data, np.arange(9) % 3, confidence, tmp_path / "sheet.jpg")
    assert tiles(tmp_path / "sheet.jpg") == []


def test_a_photo_that_is_gone_leaves_its_place_empty(photographed: Answers, tmp_path: Path) -> None:
    (tmp_path / "3.png").unlink()
    draw_mistakes(*photographed, tmp_path / "sheet.jpg")
    assert tiles(tmp_path / "sheet.jpg")[1:] == pytest.approx([20, 160], abs=3)


def test_a_sheet_is_refused(photographed: Answers, tmp_path: Path) -> None:
    data, named, confidence = photographed
    with pytest.raises(ArgumentError, match=r"must end in \.jpg"):
        draw_mistakes(data, named, confidence, tmp_path / "sheet.png")
    with pytest.raises(ArgumentError, match="must be the data's 9"):
        draw_mistakes(data, named[1:], confidence, tmp_path / "sheet.jpg")
    assert not list(tmp_path.glob("sheet*"))


def test_without_matplotlib_the_extra_is_named(
    photographed: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"effnet\[plots\]"):
        draw_mistakes(*photographed, tmp_path / "sheet.jpg")


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        confuse(evaluated(8), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
