"""Names in any script: drawn in a font that has them, or as numbers and codes; never as boxes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from effnet.plots import fonts
from effnet.plots.contact_sheet import Cell, draw_sheet
from effnet.plots.evaluation import _short, draw_confusion
from effnet.plots.fonts import Font, choose_fonts, explain_labels, label_classes, on_one_line

CLASSES = ("猫", "cat", "a\nb", "$x_1$ 犬", "d\u2028e\r")


@pytest.fixture
def none_but_dejavu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "system_fonts", lambda: ())


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Font:
    """A font with two Chinese characters and those of ASCII, all of them squares."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap(dict.fromkeys((*range(32, 127), *map(ord, "猫犬…")), "square"))
    builder.setupGlyf(dict.fromkeys((".notdef", "square"), pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "square"), (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    file = tmp_path / "squares.ttf"
    builder.save(file)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    font_manager.fontManager.addfont(file)
    found = Font("Squares", str(file))
    monkeypatch.setattr(fonts, "system_fonts", lambda: (found,))
    return found


def draw(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[tuple[str, str]]]:
    """The svg of a confusion matrix, and text and font of each line of a sheet; a missing glyph would be a warning."""
    draw_confusion(np.c_[np.arange(5), np.arange(5), np.ones(5, int)], CLASSES, folder / "c.png")
    draw_confusion(np.c_[np.arange(5), np.arange(5), np.ones(5, int)], CLASSES, folder / "c.svg")
    lines: list[tuple[str, str]] = []
    write = ImageDraw.ImageDraw.text
    with monkeypatch.context() as patch:
        patch.setattr(
            ImageDraw.ImageDraw,
            "text",
            lambda pen, place, text, colour, font: (
                lines.append((text, font.getname()[0])),
                write(pen, place, text, colour, font),
            ),
        )
        Image.new("RGB", (8, 8)).save(folder / "photo.png")
        cells = [Cell((folder / "photo.png",), ((name, "black"),)) for name in label_classes(CLASSES)]
        draw_sheet(cells, "猫/犬.png", folder / "sheet.png", across=2)
    return (folder / "c.svg").read_text("utf-8"), lines


@pytest.mark.usefixtures("none_but_dejavu")
def test_a_class_that_no_font_can_show_has_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert label_classes(CLASSES) == ["class 1", "cat", r"a\nb", "class 4", r"d\u2028e\r"]
    said = explain_labels(CLASSES)
    assert "class 1 is 猫, class 4 is $x_1$ 犬" in said
    assert explain_labels(CLASSES[1:3]) == ""
    assert "and 4 more" in explain_labels(["猫"] * 12)
    svg, lines = draw(tmp_path, monkeypatch)
    shown = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert [shown.count(label) for label in label_classes(CLASSES)] == [2] * 5
    names = ["class 1", "cat", r"a\nb", "class 4", r"d\u2028e\r"]
    assert lines == [(text, "DejaVu Sans") for text in (r"\u732b/\u72ac.png", *names)]


def test_a_font_of_the_system_shows_what_dejavu_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Font, drawn: list[Figure]
) -> None:
    assert label_classes(CLASSES) == ["猫", "cat", r"a\nb", "$x_1$ 犬", r"d\u2028e\r"]
    assert explain_labels(CLASSES) == ""
    svg, lines = draw(tmp_path, monkeypatch)
    assert "Squares" in svg
    assert drawn[0].axes[0].get_yticklabels()[0].get_fontfamily() == ["DejaVu Sans", "Squares"]
    assert lines[:3] == [("猫/犬.png", "Squares"), ("猫", "Squares"), ("cat", "DejaVu Sans")]
    assert choose_fonts("cat") == choose_fonts("")
    assert installed not in choose_fonts("ไทย")  # which it does not have either


def test_long_names_are_cut_by_their_width() -> None:
    assert [_short("a" * 24), _short("a" * 25), _short("猫" * 13)] == ["a" * 24, "a" * 23 + "…", "猫" * 11 + "…"]


def test_a_text_is_one_line_without_what_is_not_seen() -> None:
    assert on_one_line(" a\tb\u202ec\x85\udcff\xa0") == r" a\tbc\x85\udcff\xa0"
