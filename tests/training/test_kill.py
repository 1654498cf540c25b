"""Real processes, killed at random moments, end with the same bits as an undisturbed run.

Those that need not be started as a user does are forked, see support/forked.py, and draw nothing: pictures and report
take as long as these trainings and are not compared.
"""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from forked import Forked, ranks
from tiny import same, weights

from effnet.cli import main
from effnet.errors import TrainingError
from effnet.training import result
from effnet.training.run_folder import load_checkpoint

MODULE = ["-m", "effnet", "train"]
COMMAND = [sys.executable, *MODULE]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
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


def undrawn(words: list[str]) -> None:
    """`effnet train` without pictures and a report."""
    result._draw = result.write_report = lambda *_: None
    main(["train", *words])


def fork(log: Path, *words: object) -> Forked:
    return Forked(log, undrawn, list(map(str, words)))


def fork_pair(folder: Path, *words: object) -> list[Forked]:
    """In two processes."""
    return ranks(folder, 2, undrawn, list(map(str, words)))


def wait_for_step(process: subprocess.Popen[str] | Forked, folder: Path, step: int) -> None:
    """Wait until a checkpoint of that step is written."""
    deadline = time.monotonic() + 170
    while step_of(folder) < step and process.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def words(data: Path, spec: Path, out: Path, workers: int = 0) -> list[object]:
    return [data, "--model", spec, "--out", out, *HARD, "--workers", workers]


def finish(process: subprocess.Popen[str] | Forked) -> None:
    output = process.communicate(timeout=170)
    assert process.returncode == 0, output


def rank_of(torchrun: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank."""
    for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError("no process of that rank")


def assert_one_line(output: str, folder: Path) -> None:
    """One line of effnet's own says what happened and how to go on."""
    (line,) = (line for line in output.splitlines() if line.startswith("effnet:"))
    for fact in ("one of the 2 processes is gone", "checkpoint is whole", f"train --resume {folder}"):
        assert fact in line


def assert_equal(whole: Path, broken: Path) -> None:
    """Checkpoints and models are the same to the bit, and complete."""
    assert weights(whole)["step"] == STEPS
    assert same(weights(whole), weights(broken))
    best = Path("best", "model.safetensors")
    assert (whole / best).read_bytes() == (broken / best).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_costs_nothing(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    """Neither does it matter whether another process loads the images: all equal the undisturbed run without one."""
    whole = tmp_path / "whole"
    undisturbed = start(COMMAND, *words(shapes, spec_file, whole))
    for workers in (0, 1):
        broken = tmp_path / f"broken-{workers}"
        killed = fork(tmp_path / f"killed-{workers}.log", *words(shapes, spec_file, broken, workers))
        wait_for_step(killed, broken, random.randint(1, 20))
        time.sleep(random.random() / 20)  # anywhere within a step or a write
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate(timeout=120)
        assert step_of(broken) < STEPS
        finish(fork(tmp_path / f"resumed-{workers}.log", "--resume", broken))
    finish(undisturbed)
    for workers in (0, 1):
        assert_equal(whole, tmp_path / f"broken-{workers}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_ends_the_others(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    """With one line, whichever it was; the run goes on with --resume. One is torchrun's own, the other goes as one."""
    whole, broken, rank = tmp_path / "whole", tmp_path / "broken", random.randint(0, 1)
    undisturbed = fork_pair(tmp_path / "undisturbed", *words(shapes, spec_file, whole))
    killed = start([*TORCHRUN, *MODULE], *words(shapes, spec_file, broken))
    wait_for_step(killed, broken, 1 + random.randint(0, 6))
    os.kill(rank_of(killed, rank), signal.SIGKILL)
    output = killed.communicate(timeout=120)[0]
    assert killed.returncode == 1
    assert_one_line(output, broken)
    resumed = fork_pair(tmp_path / "resumed", "--resume", broken)
    gone, left = resumed[1 - rank], resumed[rank]
    wait_for_step(left, broken, 9 + random.randint(0, 6))
    os.kill(gone.pid, signal.SIGKILL)
    time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.kill(left.pid, signal.SIGTERM)  # as torchrun does
    assert_one_line("".join(left.communicate(timeout=120)), broken)
    assert left.returncode == 2
    resumed = fork_pair(tmp_path / "again", "--resume", broken)
    for process in (*resumed, *undisturbed):
        finish(process)
    assert_equal(whole, broken)


@pytest.mark.slow
def test_a_polite_signal_to_all_processes_saves_first(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    """As a terminal, `timeout` or a cluster sends it: at the start, the process that loads images dies of it."""
    out = tmp_path / "run"
    long = ["--epochs", "2000", "--batch", "8", "--threads", "1", "--workers", "1", "--save-seconds", "0"]
    given = (shapes, "--model", spec_file, "--out", out, "--recipe", "scratch", *long)
    process = fork(tmp_path / "run.log", *given)
    wait_for_step(process, out, 0)
    os.killpg(process.pid, signal.SIGTERM)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 130, output
    assert f"stopped and saved after {step_of(out)} steps; go on with: effnet train --resume {out}" in output
