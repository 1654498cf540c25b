"""The picture of a bench: what is on it."""

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from effnet.benchmarking.plots import Panel, draw_panels
from effnet.errors import ArgumentError

SPEED = Panel("images per second", [1234.5, 20, None], [(1200, 1300), (10, 40), None], [True, False, False])
SHARE = Panel("top-1, %", [75.0, None, 74.5], [(70, 80), None, (69, 79)], share=True)
EMPTY = Panel("seconds", [None, None, None])


def drawn(out: Path, monkeypatch: pytest.MonkeyPatch, *panels: Panel) -> Figure:
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kw: (kept.append(figure), save(figure, *args, **kw)))
    draw_panels(("a", "b", "c"), panels, out, title="what", note="where")
    return kept[0]


def test_every_figure_is_drawn_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(tmp_path / "x.svg", monkeypatch, SPEED, SHARE, EMPTY, SPEED)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "x.svg").read_text("utf-8"))
    assert {"a", "b", "c", "what", "where", "top-1, %", "1,234", "20", "75.0", "74.5"} <= set(texts)
    speed, share, empty, second = (axes for axes in figure.axes if axes.get_visible())
    assert [bar.get_width() for bar in speed.patches] == [1234.5, 20]
    assert speed.patches[0].get_facecolor() != speed.patches[1].get_facecolor()
    assert [list(line.get_xdata()) for line in speed.lines] == [[1200, 1300], [10, 40]]
    assert speed.get_xlim()[0] == 0
    assert [line.get_xdata()[0] for line in share.lines] == [75, 70, 74.5, 69]
    assert not share.patches
    assert share.get_xlim()[0] > 60
    assert not empty.patches
    assert [label.get_text() for label in speed.get_yticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in second.get_yticklabels()] == ["a", "b", "c"]  # a row of its own
    assert [label.get_text() for label in share.get_yticklabels()] == ["", "", ""]
    assert speed.yaxis_inverted()


def test_a_panel_of_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`panels` \(='x'\) has 1 values for 2 names"):
        draw_panels(("a", "b"), [Panel("x", [1.0])], tmp_path / "x.png", title="", note="")
