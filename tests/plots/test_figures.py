"""The pictures: what is on them, how they are written, and what is refused."""

import re
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from effnet.describing.rivals import RIVALS
from effnet.errors import ArgumentError, MissingExtraError
from effnet.plots.figures import compare_rivals, picture

# Table 2 of the paper (v5): top-1, parameters (M), multiply-adds (B) of B0 ... B7
PRINTED = (
    (77.1, 5.3, 0.39),
    (79.1, 7.8, 0.70),
    (80.1, 9.2, 1.0),
    (81.6, 12, 1.8),
    (82.9, 19, 4.2),
    (83.6, 30, 9.9),
    (84.0, 43, 19),
    (84.3, 66, 37),
)


def test_every_network_is_named_and_the_source_is_told(tmp_path: Path) -> None:
    out = tmp_path / "rivals.svg"
    compare_rivals(out)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", out.read_text("utf-8"))
    for name in [f"B{i}" for i in range(8)] + [rival.name for rival in RIVALS]:
        assert texts.count(name) == (1 if name == "GPipe" else 2), name
    joined = " ".join(texts)
    assert "published figures, not measured here" in joined
    assert "Table 2 of the paper (v5)" in joined


def test_the_points_are_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (drawn.append(figure), save(figure, *args, **kw))
    )
    compare_rivals(tmp_path / "rivals.png")
    for axes, column in zip(drawn[0].axes, (1, 2), strict=True):
        (line,) = axes.lines
        assert list(line.get_ydata()) == [row[0] for row in PRINTED]
        assert list(line.get_xdata()) == pytest.approx([row[column] for row in PRINTED], rel=0.05)
        (points,) = axes.collections
        assert len(points.get_offsets()) == 17 - column


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_the_suffix_decides_and_the_bytes_repeat(tmp_path: Path, suffix: str, magic: bytes) -> None:
    first, second = tmp_path / f"new/folder/a{suffix}", tmp_path / f"b{suffix}"
    for out in (first, second):
        with picture(out, 2, 1, "title") as figure:
            figure.subplots().plot([1, 2], [1, 2])
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()


def test_another_suffix_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`out` \(='.*rivals\.bmp'\) must end in \.png, \.svg, \.pdf\."):
        compare_rivals(tmp_path / "rivals.bmp")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'effnet\[plots\]'"):
        compare_rivals(tmp_path / "rivals.svg")


def test_a_failure_leaves_the_old_picture_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rivals.svg"
    out.write_text("old")

    def half(figure: Figure, path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        compare_rivals(out)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_matplotlibs_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whoever imports it fails
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 9)
    compare_rivals(tmp_path / "rivals.png")
    assert matplotlib.rcParams["font.size"] == 9
