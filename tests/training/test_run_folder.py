"""Checkpoints are whole or not at all, and a damaged one is known."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from effnet.errors import TrainingError
from effnet.training.run_folder import LAST, PREVIOUS, load_checkpoint, save_checkpoint


def written(folder: Path, *steps: int) -> Path:
    for step in steps:
        save_checkpoint(folder, {"step": step, "weights": torch.full((100,), float(step))})
    return folder


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
