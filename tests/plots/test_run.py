"""The pictures of a run: what is on them, that they appear whole, and the sheet of mistakes."""

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from effnet.data.dataset import Dataset, Sample
from effnet.errors import ArgumentError, MissingExtraError
from effnet.metrics.evaluate import Evaluation, Predicted, evaluate
from effnet.plots.run import (
    CAPTION,
    GAP,
    TILE,
    draw_confusion,
    draw_reliability,
    draw_results,
    mistakes_sheet,
    write_per_class,
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
    draw_confusion(evaluated(k), out)
    words = texts(out)
    assert f"{5 * k:,} images, 80.0% named right" in words
    assert words.count("kind 1") == (2 if k <= 30 else 0)
    assert words.count("4") == (k if k <= 20 else 0)
    listed = [word for word in words if word.startswith("1 x kind")]
    assert len(listed) == (0 if k <= 30 else 16)
    (image,) = drawn[0].axes[0].images
    assert max(image.get_array().shape) <= 400
    assert image.get_array().max() == pytest.approx(0.8**0.5)  # a row is shares of its class


def test_confusion_leaves_out_what_does_not_occur(tmp_path: Path) -> None:
    found = evaluate(np.eye(900)[[3, 5, 5]], [3, 3, 5], [f"kind {i}" for i in range(900)])
    draw_confusion(found, tmp_path / "c.svg")
    assert sorted(set(re.findall(r"kind \d+", " ".join(texts(tmp_path / "c.svg"))))) == ["kind 3", "kind 5"]


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    found = evaluate(np.eye(2)[[0, 1]], [0, 1], ["5 $ bill", "$x_1$"])
    draw_confusion(found, tmp_path / "c.svg")
    assert texts(tmp_path / "c.svg").count("$x_1$") == 2


def test_reliability(tmp_path: Path, drawn: list[Figure]) -> None:
    found = evaluated(6)
    draw_reliability(found.before, found.after, tmp_path / "r.svg")
    words = texts(tmp_path / "r.svg")
    assert f"as it is: ECE {found.before.ece:.1%}" in words
    assert f"divided by T = 1.5: ECE {found.after.ece:.1%}" in words
    upper = drawn[0].axes[0]
    assert [bar.get_height() for bar in upper.patches] == list(found.before.accuracy)
    draw_reliability(found.before, found.before, tmp_path / "one.svg")
    assert len(drawn[1].axes) == 2


def test_per_class(tmp_path: Path) -> None:
    found = evaluate(np.eye(3)[[0, 0, 1]], [0, 0, 0], ["a, b", "c", "d"])
    write_per_class(found, tmp_path / "per_class.csv")
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["a, b", "c", "d"]
    assert [row["images"] for row in rows] == ["3", "0", "0"]
    assert [row["named"] for row in rows] == ["2", "1", "0"]
    assert float(rows[0]["recall"]) == pytest.approx(2 / 3)
    recall = found.scores[0].recall
    assert recall is not None
    assert (float(rows[0]["recall_low"]), float(rows[0]["recall_high"])) == (recall.low, recall.high)
    assert (rows[1]["precision"], rows[1]["recall"], rows[1]["f1"]) == ("0.0", "", "")
    assert rows[2]["precision"] == ""


@pytest.fixture
def photographed(tmp_path: Path) -> tuple[Dataset, Predicted]:
    """Nine photos of grey 0, 20, 40 ..., three each of three classes; "5.png" cannot be read."""
    samples = []
    for i in range(9):
        Image.new("RGB", (300, 200), (20 * i,) * 3).save(tmp_path / f"{i}.png")
        samples.append(Sample(f"{i}.png", i % 3))
    (tmp_path / "5.png").write_bytes(b"no image")
    logits = np.zeros((8, 3), np.float32)
    labels = np.array([i % 3 for i in range(9) if i != 5])
    logits[np.arange(8), labels] = 9  # right ...
    for place, sure in ((1, 3), (3, 6), (7, 1)):  # ... but for three
        logits[place] = 0
        logits[place, (labels[place] + 1) % 3] = sure
    return Dataset(tmp_path, ("one", "two", "three"), tuple(samples)), Predicted(logits, labels, {"5.png": "broken"})


def tiles(path: Path) -> list[int]:
    """The grey in the middle of each photo on a sheet."""
    sheet = Image.open(path)
    rows = (sheet.height - 48) // (TILE + CAPTION + GAP)
    middles = [
        (GAP + column * (TILE + GAP) + TILE // 2, 48 + row * (TILE + CAPTION + GAP) + TILE // 2)
        for row in range(rows)
        for column in range(6)
    ]
    found = [sheet.getpixel(middle) for middle in middles]
    return [red for red, green, blue in found if max(red, green, blue) < 250]


def test_the_surest_mistakes_come_first(photographed: tuple[Dataset, Predicted], tmp_path: Path) -> None:
    data, predicted = photographed
    mistakes_sheet(data, predicted, tmp_path / "sheet.jpg")
    assert tiles(tmp_path / "sheet.jpg") == pytest.approx([60, 20, 160], abs=3)  # photos 3, 1 and 8
    mistakes_sheet(data, predicted, tmp_path / "one.jpg", n=1)
    assert tiles(tmp_path / "one.jpg") == pytest.approx([60], abs=3)
    mistakes_sheet(data, predicted, tmp_path / "again.jpg", temperature=1.0)
    assert (tmp_path / "again.jpg").read_bytes() == (tmp_path / "sheet.jpg").read_bytes()
    mistakes_sheet(data, predicted, tmp_path / "warm.jpg", temperature=3.0)
    assert (tmp_path / "warm.jpg").read_bytes() != (tmp_path / "sheet.jpg").read_bytes()


def test_the_words_of_a_mistake(
    photographed: tuple[Dataset, Predicted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageDraw

    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda draw, place, words, *more: written.append(words))
    data, predicted = photographed
    mistakes_sheet(data, predicted, tmp_path / "sheet.jpg")
    sure = np.exp(6) / (np.exp(6) + 2)
    assert written[0] == "3 of 8 images named wrong, the surest first"
    assert written[1:4] == ["is: one", "said: two", f"{sure:.1%} sure, 3.png"]
    long = Dataset(data.root, tuple(40 * name for name in data.classes), data.samples)
    written.clear()
    mistakes_sheet(long, predicted, tmp_path / "sheet.jpg")
    assert written[1].endswith("…")
    assert len(written[1]) < 40


def test_a_sheet_without_mistakes(photographed: tuple[Dataset, Predicted], tmp_path: Path) -> None:
    data, predicted = photographed
    right = predicted._replace(logits=np.eye(3, dtype=np.float32)[predicted.labels])
    mistakes_sheet(data, right, tmp_path / "sheet.jpg")
    assert tiles(tmp_path / "sheet.jpg") == []


def test_a_photo_that_is_gone_leaves_its_place_empty(photographed: tuple[Dataset, Predicted], tmp_path: Path) -> None:
    data, predicted = photographed
    (tmp_path / "3.png").unlink()
    mistakes_sheet(data, predicted, tmp_path / "sheet.jpg")
    assert tiles(tmp_path / "sheet.jpg")[1:] == pytest.approx([20, 160], abs=3)


def test_a_sheet_is_refused(photographed: tuple[Dataset, Predicted], tmp_path: Path) -> None:
    data, predicted = photographed
    with pytest.raises(ArgumentError, match=r"must end in \.jpg"):
        mistakes_sheet(data, predicted, tmp_path / "sheet.png")
    with pytest.raises(ArgumentError, match="must be the data's 9"):
        mistakes_sheet(data, predicted._replace(unreadable={}), tmp_path / "sheet.jpg")
    assert not list(tmp_path.glob("sheet*"))


def test_without_matplotlib_the_extra_is_named(
    photographed: tuple[Dataset, Predicted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"effnet\[plots\]"):
        mistakes_sheet(*photographed, tmp_path / "sheet.jpg")


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_confusion(evaluated(8), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
