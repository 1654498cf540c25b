"""Files and folders that appear whole or not at all, and what a killed process leaves of them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from effnet import files
from effnet.errors import ArgumentError
from effnet.files import Content, leftovers, new_run, sweep, write_folder

SWAPS = hasattr(ctypes.CDLL(None), "renameat2") if os.name == "posix" else False


def make(folder: Path, content: Content, text: str) -> None:
    """A folder that may be replaced, with a model card."""
    folder.mkdir(parents=True)
    name, head = ("config.json", '{"effnet": "1", "format": 1}') if content == "bundle" else ("model.xml", "effnet")
    (folder / name).write_text(head)
    (folder / "README.md").write_text(text)


def replace(target: Path, content: Content) -> None:
    with write_folder(target, content) as new:
        (new / "README.md").write_text("new")


@pytest.mark.parametrize("content", ["bundle", "artifact"])
@pytest.mark.parametrize("swaps", [pytest.param(True, marks=pytest.mark.skipif(not SWAPS, reason="Linux")), False])
def test_a_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Content, swaps: bool) -> None:
    """Also one in which a process was killed while it wrote the card; where folders can be swapped, at one moment."""
    target = tmp_path / "model"
    make(target, content, "old")
    (target / ".README.md.abc_1234").mkdir()
    moves = list[Path]()
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (moves.append(self), real(self, to))[1])
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    replace(target, content)
    assert [each.name for each in target.iterdir()] == ["README.md"]
    assert (target / "README.md").read_text() == "new"
    assert [each.name for each in moves] == ([] if swaps else ["model", "new"])
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_what_was_moved_aside_last_is_put_back(tmp_path: Path) -> None:
    """An older one was left by a process that had replaced it, and had no time to delete it."""
    for number, (name, text) in enumerate((("zzzzzzzz", "stale"), ("aaaaaaaa", "last"))):
        make(tmp_path / f".best.{name}" / "old", "bundle", text)
        os.utime(tmp_path / f".best.{name}", (number, number))
    sweep(tmp_path)
    assert (tmp_path / "best" / "README.md").read_text() == "last"
    assert [each.name for each in tmp_path.iterdir()] == ["best"]


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".results.csv.abcd1234").mkdir()
    (tmp_path / ".results.csv.abcd1234" / "results.csv").write_text("half")
    for theirs in (".git.objects/old/new", ".idea/old", ".my.settings/notes.txt"):
        (tmp_path / theirs).mkdir(parents=True)
    (tmp_path / ".env.local").write_text("mine")
    (tmp_path / ".git.objects" / "pack").mkdir()
    assert [each.name for each in leftovers(tmp_path)] == [".results.csv.abcd1234"]
    sweep(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {".git.objects", ".idea", ".my.settings", ".env.local"}


def test_a_run_begins_where_another_was_killed_before_it_wrote_anything(tmp_path: Path) -> None:
    (tmp_path / "run" / ".plan.yaml.abcd1234").mkdir(parents=True)
    with new_run(tmp_path / "run", tmp_path / "runs", "x", ("plan.yaml",)) as folder:
        (folder / "plan.yaml").touch()
    with (
        pytest.raises(ArgumentError, match="go on with it: effnet runs --resume"),
        new_run(tmp_path / "run", tmp_path / "runs", "x", ("plan.yaml",)),
    ):
        pass
