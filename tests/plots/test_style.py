"""Pictures: how they are written, and what is refused."""

import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from effnet.errors import ArgumentError, MissingExtraError
from effnet.plots.style import picture


def draw(out: Path) -> None:
    with picture(out, 2, 1, "title") as figure:
        figure.subplots().plot([1, 2], [1, 2])


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_the_suffix_decides_and_the_bytes_repeat(tmp_path: Path, suffix: str, magic: bytes) -> None:
    first, second = tmp_path / f"new/folder/a{suffix}", tmp_path / f"b{suffix}"
    draw(first)
    draw(second)
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`out` .*a\.bmp.*\.png, \.svg, \.pdf"):
        draw(tmp_path / "a.bmp")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"effnet\[plots\]"):
        draw(tmp_path / "a.svg")


def test_a_failure_leaves_the_old_picture_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.svg"
    out.write_text("old")

    def half(figure: Figure, path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        draw(out)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_matplotlibs_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # any import of it fails
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 9)
    draw(tmp_path / "a.png")
    assert matplotlib.rcParams["font.size"] == 9
