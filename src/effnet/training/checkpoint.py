"""Checkpoints: the state of a run in a file, whole or not at all, and the one before it.

A file is a line with the sha256 of what follows, then what torch.save writes. So a file that was cut short or changed
is recognised, and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from effnet.errors import TrainingError
from effnet.training.run import LAST, PREVIOUS

MARK = b"effnet checkpoint 2 "


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write last.ckpt; what was there becomes previous.ckpt. One of the two is whole at any time.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; the files that were there are intact.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    last, temporary = folder / LAST, folder / f".{LAST}.part"
    try:
        with temporary.open("wb") as file:
            file.write(MARK + hashlib.sha256(payload).hexdigest().encode() + b"\n")
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        if last.exists():
            last.replace(folder / PREVIOUS)
        temporary.replace(last)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        problem = f"{last} cannot be written ({error.strerror or error})"
        raise TrainingError(f"{problem}; earlier checkpoints are intact: make room, then resume") from error


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """The newest whole state in a run's folder, and why it is not the last one, if so.

    Raises:
        TrainingError: there is none.
    """
    problems: list[str] = []
    for name in (LAST, PREVIOUS):
        try:
            return _read(folder / name), "; ".join(problems)
        except FileNotFoundError:
            problems.append(f"there is no {name}")
        except ValueError as error:
            problems.append(f"{name} is damaged ({error})")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    raise TrainingError(f"{folder} cannot be resumed: {', '.join(problems)}")


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head, payload = file.readline(len(MARK) + 65), file.read()
    if not head.startswith(MARK):
        raise ValueError("it does not begin as a checkpoint of this version does")
    if hashlib.sha256(payload).hexdigest().encode() != head[len(MARK) :].strip():
        raise ValueError("it was cut short or changed")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state
