"""Real processes, killed at random moments: what they end with is what an undisturbed run ends with, to the bit."""

from __future__ import annotations

import csv
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import same, weights

from effnet.errors import TrainingError
from effnet.training.checkpoint import load_checkpoint
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


def kill_after(process: subprocess.Popen[str], folder: Path, step: int, number: int = signal.SIGKILL) -> str:
    """Send a signal to all processes of a run once a checkpoint of that step was written; what they printed."""
    deadline = time.monotonic() + 170
    while step_of(folder) < step and process.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.05)
    time.sleep(random.random() / 20)  # anywhere within a step or a write
    subprocess.run(["pkill", f"-{int(number)}", "-f", str(folder)], check=False)  # torchrun starts sessions
    return process.communicate(timeout=120)[0]


def finish(command: list[str], folder: Path) -> str:
    process = start(command, "--resume", folder)
    said = process.communicate(timeout=170)[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("command", "workers"), [(COMMAND, 1), (PAIR, 0)], ids=["workers", "pair"])
def test_kill_9_costs_nothing(shapes: Path, spec_file: Path, tmp_path: Path, command: list[str], workers: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(command, shapes, "--model", spec_file, "--out", whole, *HARD, "--workers", workers)
    deadline = time.monotonic() + 170
    while step_of(whole) < 0 and undisturbed.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)
    broken.mkdir()
    for name in ("last.ckpt", "args.yaml", "split.csv"):  # its beginning, with what was chosen
        shutil.copy(whole / name, broken)
    said = undisturbed.communicate(timeout=170)[0]
    assert undisturbed.returncode == 0, said
    assert step_of(broken) < 42 // 8  # no best weights yet
    kills = 0
    for _ in range(2):
        before = step_of(broken)
        kill_after(start(command, "--resume", broken), broken, before + random.randint(1, 12))
        kills += step_of(broken) < STEPS
    assert kills
    finish(command, broken)
    assert weights(whole)["step"] == STEPS
    assert same(weights(whole), weights(broken))
    assert (whole / "best" / "model.safetensors").read_bytes() == (broken / "best" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_polite_signal_saves_first(shapes: Path, spec_file: Path, tmp_path: Path, number: int, workers: int) -> None:
    out = tmp_path / "run"
    long = ["--epochs", "2000", "--batch", "8", "--threads", "1", "--workers", workers, "--save-seconds", "9999"]
    process = start(COMMAND, shapes, "--model", spec_file, "--out", out, "--recipe", "scratch", *long)
    deadline = time.monotonic() + 60
    while not (out / "results.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number) if workers else process.send_signal(number)  # as a terminal does
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    stopped = step_of(out)
    assert f"stopped and saved after {stopped} steps; go on with: effnet train --resume {out}" in said
    assert stopped > 0


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    trained = train(shapes, spec_file, "scratch", out=tmp_path / "start", epochs=1, batch=8, workers=0, threads=1)
    calm = shlex.split("--epochs 2 --batch 8 --threads 1 --workers 0 --precision fp32 --recipe few --lr 1e-3")
    calm += shlex.split("--set dropout=0 --set drop-connect=0")  # batch statistics stay in this recipe
    rows = {}
    for name, command in (("one", COMMAND), ("two", PAIR)):
        process = start(command, shapes, "--model", trained.bundle, "--out", tmp_path / name, *calm)
        said = process.communicate(timeout=170)[0]
        assert process.returncode == 0, said
        rows[name] = list(csv.DictReader((tmp_path / name / "results.csv").read_text().splitlines()))
    for one, two in zip(rows["one"], rows["two"], strict=True):
        for figure in ("train_loss", "val_loss"):
            assert float(two[figure]) == pytest.approx(float(one[figure]), rel=1e-4)
