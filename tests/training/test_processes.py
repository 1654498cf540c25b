"""Several processes of torchrun: they train what one process trains, and end together."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import DRAWN, FROZEN, SHORT, interrupted, watched
from short_run import Recorder
from tiny import draw_images, same, weights, write_spec

from effnet.arch.segments import Keep
from effnet.training.train import resume, train

WORLD = 4
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four processes made the trainings of support/ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    draw_images(folder / "shapes")
    write_spec(folder / "tiny.yaml")
    with watched(8):
        train(folder / "shapes", folder / "tiny.yaml", "scratch", out=folder / "first", **{**SHORT, "lr": 0.02})
        shutil.copytree(folder / "first" / "best", folder / "start")
    with watched(8 // WORLD), interrupted():
        train(folder / "shapes", folder / "tiny.yaml", "scratch", out=folder / "alone", **DRAWN)
    ended = subprocess.run(
        [*TORCHRUN, ranks.__file__, folder], env=ONE_THREAD, text=True, capture_output=True, timeout=580, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def test_x(folder: Path) -> None:
    pass
