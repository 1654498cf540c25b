"""The pictures of an evaluation: what is on them."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from effnet.data.dataset import Dataset, Sample
from effnet.errors import ArgumentError
from effnet.metrics.evaluate import Evaluation, evaluate
from effnet.plots.contact_sheet import Cell
from effnet.plots.evaluation import draw_confusion, draw_mistakes, draw_reliability


def evaluated(k: int) -> Evaluation:
    """Five images of each class, of which the last is taken for the next class."""
    labels = np.repeat(np.arange(k), 5)
    said = np.where(np.arange(5 * k) % 5 == 4, (labels + 1) % k, labels)
    return evaluate(np.eye(k)[said] * 3, labels, [f"kind {i}" for i in range(k)], temperature=1.5)


def confuse(found: Evaluation, out: Path) -> None:
    draw_confusion(found.pairs, found.classes, out)


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text("utf-8"))


@pytest.mark.parametrize("k", [20, 21, 30, 31, 801])
def test_confusion_is_readable_for_any_number_of_classes(tmp_path: Path, drawn: list[Figure], k: int) -> None:
    out = tmp_path / "confusion.svg"
    confuse(evaluated(k), out)
    words = texts(out)
    assert f"{5 * k:,} images, 80.0% predicted correctly" in words
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


def test_mistakes_are_shown_the_most_confident_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheets: list[tuple[list[Cell], str]] = []
    monkeypatch.setattr(
        "effnet.plots.evaluation.draw_sheet", lambda cells, title, *_, **__: sheets.append((cells, title))
    )
    data = Dataset(tmp_path, ("one", "two", "three"), tuple(Sample(f"{i}.png", i % 3) for i in range(9)))
    right = np.arange(9) % 3
    named, confidence = right.copy(), np.full(9, 0.99)
    for place, sure in ((1, 0.8), (3, 0.9), (8, 0.4)):
        named[place], confidence[place] = (right[place] + 1) % 3, sure
    for answers, most in ((named, 24), (named, 1), (right, 24)):
        draw_mistakes(data, answers, confidence, tmp_path / "sheet.jpg", n=most)
    (every, title), (first, _), (none, good) = sheets
    assert title == "3 of 9 images predicted wrong, the most confident first"
    assert [cell.photos[0].name for cell in every] == ["3.png", "1.png", "8.png"]
    assert [text for text, _ in every[0].lines] == ["true: one", "predicted: two", "90.0% confident, 3.png"]
    assert (first, none, good) == (every[:1], [], "0 of 9 images predicted wrong")
    with pytest.raises(ArgumentError, match="must be the data's 9"):
        draw_mistakes(data, named[1:], confidence, tmp_path / "sheet.jpg")
