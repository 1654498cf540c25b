"""Overlays: colours by sign and size, the scale in words, mistakes with two maps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from corner import CELLS, CLASSES, bright_corner, corner_classifier
from PIL import Image, ImageColor, ImageDraw

from effnet.data.dataset import read_data
from effnet.plots.contact_sheet import GAP, HEAD, LINE, TILE
from effnet.plots.overlay import OPAQUE, SIDE, describe_scale, draw_cams, draw_overlay, shade, strength
from effnet.plots.style import BLUE, ORANGE


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda draw, place, text, *more: found.append(text))
    return found


def test_orange_for_blue_against_and_the_photo_where_it_is_0() -> None:
    cells = np.zeros((CELLS, CELLS))
    cells[0, 0], cells[-1, -1] = 2.0, -1.0
    found = dataclasses.replace(corner_classifier().explain(bright_corner()), map=cells, pixels=0 * bright_corner())
    assert strength([found]) == 2
    assert describe_scale([found]) == "blue against, orange for; full colour ±2 in one of 8 x 8 cells"
    picture = np.asarray(shade(found, 2.0, 400), np.float64)
    orange, blue = (OPAQUE * np.array(ImageColor.getrgb(name)) for name in (ORANGE, BLUE))
    assert picture[10, 10] == pytest.approx(orange, abs=1)  # full colour at the largest value
    assert picture[390, 390] == pytest.approx(blue / 2, abs=1)  # half of it at half of that
    assert picture[10, 390] == pytest.approx(0)


def test_a_picture_says_its_scale(tmp_path: Path, written: list[str]) -> None:
    classifier = corner_classifier()
    both = classifier.explain_pixels(bright_corner(), topk=2)
    draw_overlay(both, ["a line"], tmp_path / "x.png")
    assert describe_scale(both) in written
    assert written[:3] == ["what the network saw", "corner: +6.00", "nothing: +1.00"]
    assert written[-1] == "a line"
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width == 3 * (SIDE + GAP) + GAP


def test_mistakes_with_what_spoke_for_the_answer_and_for_the_truth(tmp_path: Path, written: list[str]) -> None:
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(bright_corner()).save(tmp_path / "data" / name / f"{name}.png")
    data, classifier = read_data(tmp_path / "data"), corner_classifier()
    draw_cams(classifier, data, np.zeros(3, np.int64), np.array([0.9, 0.8, 0.95]), tmp_path / "cams.jpg")
    text = "\n".join(written)
    assert "2 of 2 mistakes" in text
    assert text.index("nothing.png") < text.index("elsewhere.png")  # the most confident first
    assert "middle: predicted corner, logit +6.00, 95.0% confident" in text
    assert "right: its own class nothing, logit +1.00" in text
    with Image.open(tmp_path / "cams.jpg") as sheet:
        assert sheet.size == (6 * (TILE + GAP) + GAP, HEAD + TILE + 3 * LINE + GAP)
    draw_cams(classifier, data, np.arange(3), np.ones(3), tmp_path / "none.jpg")
    assert written[-1] == "No mistakes"
