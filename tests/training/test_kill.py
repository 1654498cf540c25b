"""Real processes, killed at random moments: what they end with is what an undisturbed run ends with, to the bit."""

from __future__ import annotations

import csv
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import same, weights

from effnet.errors import TrainingError
from effnet.training.run_folder import load_checkpoint
from effnet.training.train import train

COMMAND = [sys.executable, "-m", "effnet", "train"]
PAIR = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "effnet", "train"]
HARD = shlex.split(
    "--epochs 6 --batch 8 --lr 0.02 --threads 1 --train-memory 1.3MB --save-seconds 0 --recipe scratch "
    "--set augmentation=autoaugment --set mixup=0.2 --set head-first=0.1 --class-weights"
)
STEPS = 6 * (42 // 8)
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def start(command: list[str], *arguments: object) -> subprocess.Popen[str]:
    words = [*command, *map(str, arguments)]
    return subprocess.Popen(
        words, env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def step_of(folder: Path) -> int:
    try:
        return int(load_checkpoint(folder)[0]["step"])
    except TrainingError:  # there is none yet
        return -1


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Wait until a checkpoint of that step is written."""
    deadline = time.monotonic() + 170
    while step_of(folder) < step and process.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def finish(process: subprocess.Popen[str]) -> None:
    output = process.communicate(timeout=170)[0]
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("command", "workers"), [(COMMAND, (0, 1)), (PAIR, (0,))], ids=["one", "pair"])
def test_kill_9_costs_nothing(
    shapes: Path, spec_file: Path, tmp_path: Path, command: list[str], workers: tuple[int, ...]
) -> None:
    """Neither does it matter whether another process loads the images: all equal the undisturbed run without one."""

    def begin(out: Path, workers: int) -> subprocess.Popen[str]:
        return start(command, shapes, "--model", spec_file, "--out", out, *HARD, "--workers", workers)

    whole, best = tmp_path / "whole", Path("best", "model.safetensors")
    undisturbed = begin(whole, 0)
    for number in workers:
        broken = tmp_path / f"broken-{number}"
        killed = begin(broken, number)
        wait_for_step(killed, broken, random.randint(1, 20))
        time.sleep(random.random() / 20)  # anywhere within a step or a write
        subprocess.run(["pkill", "-9", "-f", str(broken)], check=False)  # torchrun starts sessions
        killed.communicate(timeout=120)
        assert step_of(broken) < STEPS
        finish(start(command, "--resume", broken))
    finish(undisturbed)
    assert weights(whole)["step"] == STEPS
    for number in workers:
        broken = tmp_path / f"broken-{number}"
        assert same(weights(whole), weights(broken))
        assert (whole / best).read_bytes() == (broken / best).read_bytes()


@pytest.mark.slow
def test_a_polite_signal_to_all_processes_saves_first(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    """As a terminal, `timeout` or a cluster sends it: at the start, the process that loads images dies of it."""
    out = tmp_path / "run"
    long = ["--epochs", "2000", "--batch", "8", "--threads", "1", "--workers", "1", "--save-seconds", "0"]
    process = start(COMMAND, shapes, "--model", spec_file, "--out", out, "--recipe", "scratch", *long)
    wait_for_step(process, out, 0)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert f"stopped and saved after {step_of(out)} steps; go on with: effnet train --resume {out}" in output


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch": 8, "workers": 0, "threads": 1}
    trained = train(shapes, spec_file, "scratch", out=tmp_path / "start", epochs=1, **options)
    options |= {"epochs": 2, "precision": "fp32", "lr": 1e-3, "dropout": 0, "drop_connect": 0}
    train(shapes, trained.bundle, "few", out=tmp_path / "one", **options)  # batch statistics stay in this recipe
    words = [f"--{name}={options.pop(name)}" for name in ("batch", "workers", "threads", "epochs", "precision", "lr")]
    words += [f"--set={name}={value}" for name, value in options.items()]
    finish(start(PAIR, shapes, "--model", trained.bundle, "--out", tmp_path / "two", "--recipe=few", *words))
    one, two = (
        list(csv.DictReader((tmp_path / name / "results.csv").read_text().splitlines())) for name in ("one", "two")
    )
    for row, other in zip(one, two, strict=True):
        for figure in ("train_loss", "val_loss"):
            assert float(other[figure]) == pytest.approx(float(row[figure]), rel=1e-4)
