"""Sheets of photos: where each photo and each line is, and what is refused."""

import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from effnet.errors import ArgumentError
from effnet.plots.contact_sheet import GAP, HEAD, LINE, TILE, Cell, check_sheet, draw_sheet


@pytest.fixture
def greys(tmp_path: Path) -> list[Path]:
    """Photos of one grey each: 0, 40, 80, 120, 160, 200."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("RGB", (30, 20), (40 * i,) * 3).save(path)
    return paths


@pytest.mark.parametrize("name", ["new/sheet.jpg", "sheet.PNG"])
def test_photos_are_side_by_side_in_rows(greys: list[Path], tmp_path: Path, name: str) -> None:
    greys[3].unlink()
    cells = [Cell((greys[i], greys[i + 1]), (("one", "black"), ("two", "red"))) for i in (0, 2, 4)]
    draw_sheet(cells, "a title", tmp_path / name, across=2)
    with Image.open(tmp_path / name) as sheet:
        assert sheet.size == (4 * (TILE + GAP) + GAP, HEAD + 2 * (TILE + 2 * LINE + GAP))
        middles = [(GAP + TILE // 2 + column * (TILE + GAP), HEAD + TILE // 2) for column in range(4)]
        second_row = [(x, y + TILE + 2 * LINE + GAP) for x, y in middles[:2]]
        shown = [sheet.getpixel(place)[0] for place in (*middles, *second_row)]
    assert shown == pytest.approx([0, 40, 80, 0xDD, 160, 200], abs=3)  # a photo that is gone leaves an empty square


def test_long_lines_lose_their_middle(greys: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda draw, place, text, *more: written.append(text))
    cell = Cell((greys[0],), (("short", "black"), ("begin" + 40 * "-" + "end", "black")))
    draw_sheet([cell], "title", tmp_path / "sheet.png", across=1)
    assert written[:2] == ["title", "short"]
    assert written[2].startswith("begin-")
    assert written[2].endswith("-end")
    assert "…" in written[2]


def test_a_sheet_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_sheet([], "no mistakes", tmp_path / "sheet.png", across=6)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == HEAD


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, rule in (("sheet.gif", r"\.jpg, \.jpeg, \.png"), ("folder.png", "is a folder")):
        with pytest.raises(ArgumentError, match=f"`pictures` .*{rule}"):
            check_sheet("pictures", tmp_path / name)
