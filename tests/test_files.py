"""Files and folders that appear whole or not at all, and the leftovers of killed processes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import os
from pathlib import Path
from typing import Any

import pytest

from effnet import files
from effnet.errors import ArgumentError
from effnet.files import Content, hold_lock, leftovers, new_run, sweep, write_file, write_folder

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
        monkeypatch.setattr(files, "exchange", lambda *_: False)
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
    (tmp_path / "a run" / ".plan.yaml.abcd1234").mkdir(parents=True)
    with new_run(tmp_path / "a run", tmp_path / "runs", "x", ("plan.yaml",)) as folder:
        (folder / "plan.yaml").touch()
    with (
        pytest.raises(ArgumentError, match=f"go on with it: effnet runs --resume '{tmp_path}/a run'"),
        new_run(tmp_path / "a run", tmp_path / "runs", "x", ("plan.yaml",)),
    ):
        pass


# disks that fail, and locks of every kind

CONFIG = '{"effnet": "0", "format": 1}'


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    return folder


@pytest.mark.parametrize("works", [0, 1])
def test_a_folder_outlives_a_disk_that_fails_between_two_renames(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, works: int
) -> None:
    """However many of the renames still work, what was there is there, or put back by `sweep`."""
    replace, calls = Path.replace, list[Path]()

    def fails(self: Path, target: Any) -> Path:
        calls.append(self)
        if len(calls) > works:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr("effnet.files.exchange", lambda *_: False)  # as on NFS and on other systems
        patch.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="Input/output"), write_folder(bundle, "bundle") as new:
            (new / "config.json").write_text("{}")
    sweep(bundle.parent)
    assert (bundle / "config.json").read_text() == CONFIG
    assert [each.name for each in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("full", [True, False])
def test_a_writer_that_does_not_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """As OpenVINO, torch and safetensors: the disk is asked."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    if full:
        monkeypatch.setattr(Path, "write_bytes", refuse)
    expected = pytest.raises(OSError, match=r"No space left.*net\.pt2") if full else pytest.raises(RuntimeError)
    with expected, write_file(tmp_path / "net.pt2"):
        raise RuntimeError("basic_ios::clear: iostream error")
    assert [*tmp_path.iterdir()] == []


def test_two_that_begin_in_one_folder(tmp_path: Path) -> None:
    """The second one takes nothing from the first, whose folder is still empty."""
    runs = tmp_path / "runs"
    with new_run(tmp_path / "run", runs, "x") as folder:
        with pytest.raises(ArgumentError, match="in use by another process"), new_run(folder, runs, "x"):
            pass
        (folder / "plan.yaml").write_text("")
    assert (folder / "plan.yaml").exists()


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_lock_of_a_folder_and_of_a_file(bundle: Path, name: str) -> None:
    refused = pytest.raises(ArgumentError, match=r"`out` .*bundle'\) is in use by another process")
    with hold_lock(bundle / name, "out"), refused, hold_lock(bundle / name, "out"):
        pass
    with hold_lock(bundle / name, "out"):  # it was given back
        pass


def test_a_lock_on_nfs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a file that was opened only for reading cannot be locked alone: flock(2)."""
    flock = fcntl.flock

    def like_nfs(opened: int, how: int) -> None:
        if fcntl.fcntl(opened, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(opened, how)

    monkeypatch.setattr("fcntl.flock", like_nfs)
    file = bundle / "config.json"
    with hold_lock(file), pytest.raises(ArgumentError, match="is in use"), hold_lock(file):
        pass


def test_a_disk_without_locks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(opened: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    with hold_lock(bundle), hold_lock(bundle):
        pass


@pytest.mark.parametrize("text", ['{"a": 1e400}', "[-1e999]", "Infinity", "[-Infinity]", 9**5 * "[", 400 * "9"])
def test_json_that_no_reader_could_use(text: str) -> None:
    with pytest.raises(ValueError, match=r"is infinite|nested too deeply|has 400 digits"):
        files.parse_json(text)


def test_json_numbers() -> None:
    assert files.parse_json("[1, 1.5, -1e308, 1e-400]") == [1, 1.5, -1e308, 0.0]
    assert math.isnan(files.parse_json("NaN"))  # of a metric that was never measured
