"""Checkpoints are written whole or not at all, and damaged ones are detected."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from planted import sound_data

from effnet.errors import DataError, TrainingError
from effnet.progress import SILENT
from effnet.training.run_folder import (
    FORMAT,
    LAST,
    PREVIOUS,
    check_resumed,
    load_checkpoint,
    read_split,
    save_checkpoint,
    versions,
    write_split,
)
from effnet.training.settings import Settings


def written(folder: Path, *steps: int) -> Path:
    for step in steps:
        save_checkpoint(folder, {"step": step, "weights": torch.full((100,), float(step))})
    return folder


class Touch:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("write", [pickle.dumps, lambda content: saved(content)], ids=["pickle", "torch.save"])
def test_a_checkpoint_that_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    """Its sha256 fits, as whoever wrote it could compute it."""
    monkeypatch.chdir(tmp_path)
    payload = write({"step": 1, "x": Touch()})
    head = f"effnet checkpoint {FORMAT} {hashlib.sha256(payload).hexdigest()}\n"
    (tmp_path / LAST).write_bytes(head.encode() + payload)
    with pytest.raises(
        TrainingError, match=r"cannot be resumed: last\.ckpt is damaged \(it is not what[^\n]*$"
    ) as caught:
        load_checkpoint(tmp_path)
    assert "weights_only" not in str(caught.value), "torch advises to switch its protection off"
    assert not (tmp_path / "touched").exists()


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_the_last_and_the_one_before(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]
    state, complaint = load_checkpoint(tmp_path)
    assert (state["step"], complaint) == (3, "")
    assert torch.equal(state["weights"], torch.full((100,), 3.0))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "other"])
def test_a_damaged_one_falls_back(tmp_path: Path, damage: str) -> None:
    last = written(tmp_path, 1, 2) / LAST
    blob = bytearray(last.read_bytes())
    if damage == "gone":
        last.unlink()
    elif damage == "flip":
        blob[len(blob) // 2] ^= 1
        last.write_bytes(blob)
    else:
        last.write_bytes({"cut": bytes(blob[:-1]), "empty": b"", "other": b"PK\3\4 something else"}[damage])
    state, complaint = load_checkpoint(tmp_path)
    assert state["step"] == 1
    assert LAST in complaint


def test_without_a_checkpoint_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"there is no last.ckpt, there is no previous.ckpt"):
        load_checkpoint(tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, 1, 2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(TrainingError, match=r"cannot be written \(No space left"):
            save_checkpoint(tmp_path, {"step": 3})
    assert load_checkpoint(tmp_path)[0]["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]


def test_a_disk_that_became_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither can a checkpoint be written there nor the half of one be removed."""
    written(tmp_path, 1, 2)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(TrainingError, match=r"last\.ckpt cannot be written \(Read-only file system\)"):
            save_checkpoint(tmp_path, {"step": 3})
    assert load_checkpoint(tmp_path)[0]["step"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems rename twice")
def test_there_is_a_last_checkpoint_whichever_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, 1, 2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(TrainingError, match=r"cannot be written \(No space left"):
            save_checkpoint(tmp_path, {"step": 3})
    assert (tmp_path / LAST).is_file()
    assert load_checkpoint(tmp_path)[0]["step"] in (2, 3)


def test_what_the_data_lacks_is_said(tmp_path: Path) -> None:
    data, said = sound_data(tmp_path / "my data", 8), []
    for place, file in enumerate(sorted((data / "val" / "dog").iterdir())):
        file.rename(data / "train" / "dog" / f"more{place}.png")
    (data / "train" / "cat" / "notes.xml").touch()
    (data / "train" / "cat" / "up").symlink_to("..")
    classes = write_split(str(data), Settings(), tmp_path, SimpleNamespace(message=said.append, update=print))
    assert classes == ("cat", "dog")
    assert said == [
        f"2 files are skipped in {data}, such as 'train/cat/notes.xml'; effnet check '{data}' says why",
        "no image in val of 'dog': the figures there do not show how well it is recognised",
    ]
    shutil.rmtree(data / "train" / "dog")
    single = tmp_path / "single"
    (single / "cat").mkdir(parents=True)
    shutil.copy(next((data / "train" / "cat").glob("*.png")), single / "cat")
    for each in (data, single):  # the single image leaves none for val, either
        with pytest.raises(DataError, match="at least two are needed: 'cat' is its only class"):
            write_split(str(each), Settings(), tmp_path, SILENT)


def test_several_ranges_of_pixels_are_said(tmp_path: Path) -> None:
    noise, said = np.random.default_rng(0), list[str]()
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(9):
            values = noise.integers(0, 1024 if number == 3 else 4096, (64, 64)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / "data" / label / f"{number}.png")
    write_split(str(tmp_path / "data"), Settings(), tmp_path, SimpleNamespace(message=said.append, update=print))
    assert said[0].startswith("pixel values have several ranges: 0 ... 4,095 in 16 images, 0 ... 1,023 in 2 images;")


@pytest.mark.skipif(sys.platform == "win32", reason="names are bytes on POSIX only")
def test_file_names_of_any_bytes_are_found_again(tmp_path: Path) -> None:
    data = sound_data(tmp_path / "data", 8)
    odd = tmp_path / os.fsdecode(b"data/train/cat/caf\xe9 \r.png")
    (data / "train" / "cat" / "00.png").rename(odd)
    classes = write_split(str(data), Settings(), tmp_path, SILENT)
    again = read_split(str(data), tmp_path, classes)
    assert odd in {again.file(sample) for sample in again.samples}
    plan = SimpleNamespace(data=str(data), processes=1)
    assert check_resumed(plan, tmp_path, versions(), again) == []
    odd.write_bytes(b"shorter")
    assert "1 image has another size" in check_resumed(plan, tmp_path, versions(), again)[0]
