"""Several processes, as torchrun starts them: they train what one process trains, and end together."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from forked import ranks as as_ranks
from ranks import DRAWN, FROZEN, SHORT, interrupted, watched
from short_run import Recorder
from tiny import draw_images, same, weights, write_spec
from torch import Tensor
from torch.testing import assert_close

from effnet.arch.segments import Keep
from effnet.errors import ArgumentError, ProcessLostError, TrainingError
from effnet.training.processes import make_fabric, together
from effnet.training.run_folder import LAST, RunPlan
from effnet.training.settings import Settings
from effnet.training.train import describe_share, resume, share_again, train

WORLD, IMAGES = 4, 42  # to train with
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four processes made the trainings of support/ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    data, spec = draw_images(folder / "shapes"), write_spec(folder / "tiny.yaml")
    with watched(8):
        first = train(data, spec, "scratch", out=folder / "first", **{**SHORT, "lr": 0.02})
    shutil.copytree(first.bundle, folder / "start")
    with watched(8 // WORLD), interrupted():
        train(data, spec, "scratch", out=folder / "alone", **DRAWN)
    for process in as_ranks(folder, WORLD, ranks.main, folder):
        said = process.communicate(timeout=580)
        assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """The same training by one process, which puts as many images through the network at once."""
    with watched(8 // WORLD) as seen:
        train(folder / "shapes", folder / "tiny.yaml", "scratch", out=folder / "one", **DRAWN)
        return dict(seen)


def of_ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(WORLD)]


def rows_of(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "results.csv").read_text().splitlines()))


def assert_close_runs(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in ("losses", "network", "average"):
        assert_close(found[name], wanted[name], **CLOSE)


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_every_image_counts_once_an_epoch_and_the_rest_of_a_batch_not(folder: Path, one: dict[str, Any]) -> None:
    seen = of_ranks(folder, "whole")
    for epoch in range(3):
        shares = [[index for number, index in each["images"] if number == epoch] for each in seen]
        assert [len(share) for share in shares] == [IMAGES // 8 * 8 // WORLD] * WORLD
        assert len(set().union(*shares)) == IMAGES // 8 * 8
    steps = [sorted(key for each in seen for key in each["images"][2 * step : 2 * step + 2]) for step in range(15)]
    assert steps == [sorted(one["images"][8 * step : 8 * step + 8]) for step in range(15)]


def test_batch_statistics_and_random_draws_are_those_of_one_process(folder: Path, one: dict[str, Any]) -> None:
    """By the kernels, with mixing, dropout, stochastic depth and augmentation, the classifier first."""
    for found in of_ranks(folder, "whole"):
        assert_close_runs(found, one)


def test_parts_and_a_recompute_plan(folder: Path) -> None:
    with watched(1, Keep.BOTTLENECKS) as seen:
        train(folder / "shapes", folder / "tiny.yaml", "scratch", out=folder / "planned-one", **ranks.PARTS)
    assert_close_runs(of_ranks(folder, "planned")[0], seen)
    assert RunPlan.read(folder / "planned")[0].execution.parts == 2
    assert RunPlan.read(folder / "planned-one")[0].execution.parts == 8


def test_the_average_is_one(folder: Path) -> None:
    for name in ("whole", "few"):  # with "few", rank 0 fits the classifier
        first, *others = of_ranks(folder, name)
        kept: dict[str, Tensor] = weights(folder / name)["average"]
        assert all(torch.equal(kept[key], value) for key, value in first["average"].items())
        assert all(same(first[each], other[each]) for other in others for each in ("average", "network"))


def test_validation_counts_each_image_once(folder: Path) -> None:
    """The val split has 9 images for 4 processes; three images leave one process without any."""
    with watched(8) as seen:
        train(folder / "shapes", folder / "start", "few", out=folder / "few-one", **FROZEN)
    few = of_ranks(folder, "few")
    assert_close_runs(few[0], seen)
    for found, wanted in zip(rows_of(folder / "few"), rows_of(folder / "few-one"), strict=True):
        assert found["val_top1"] == wanted["val_top1"]
        assert float(found["val_loss"]) == pytest.approx(float(wanted["val_loss"]), rel=1e-6)
    assert {each["few"] for each in few} == {few[0]["few"]}
    assert few[0]["few"] == pytest.approx(seen["few"], rel=1e-6)


def test_a_resumed_run_ends_as_an_undisturbed_one(folder: Path) -> None:
    """To the bit: also a sum over four processes, whose order depends on where a gradient lies in DDP's messages."""
    assert same(weights(folder / "whole"), weights(folder / "broken"))


def test_minutes_are_rank_0s(folder: Path) -> None:
    """Its clock runs slowest, so by their own the others would have ended earlier."""
    ends = [(each["steps"], each["done"]) for each in of_ranks(folder, "timed")]
    assert len(set(ends)) == 1
    assert ends[0][0] > 15
    assert ends[0][1] == 1


def test_another_number_of_processes_goes_on(folder: Path, one: dict[str, Any]) -> None:
    for found in of_ranks(folder, "alone"):  # one process began it
        assert_close(found["network"], one["network"], **CLOSE)
    recorder = Recorder()
    with watched(8 // WORLD) as seen:
        resume(folder / "half", progress=recorder)
    assert_close_runs(seen, one)
    line = next(text for text in recorder.messages if text.startswith("1 instead of 4 processes"))
    for fact in ("batch of 8", "learning rate", "order of the images stay", "last digits"):
        assert fact in line
    recorder.messages.clear()
    resume(folder / "half", progress=recorder)
    assert not recorder.has("instead of 4 processes")  # it went on with one
    with pytest.raises(TrainingError, match=r"batch of 8 images does not divide among 3 processes: take 1, 2, 4, 8"):
        share_again(RunPlan.read(folder / "half")[0], 3)


def test_what_another_number_of_processes_changes(folder: Path) -> None:
    plan = RunPlan.read(folder / "few-one")[0]
    halves = share_again(plan, 2)
    assert (halves.processes, halves.execution.part, halves.execution.parts) == (2, 4, 1)
    assert "random draws are of 4 instead of 8 images" in (text := describe_share(plan, halves, 1))
    assert "statistics" not in text  # the recipe "few" freezes them
    moving = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, bn_momentum=0.1))
    assert "batch statistics and random draws are of 4" in describe_share(moving, share_again(moving, 2), 1)
    pixel = dataclasses.replace(moving, spec=dataclasses.replace(moving.spec, resolution=4))
    with pytest.raises(ArgumentError, match=r"batch.* too few"):
        share_again(pixel, 8)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection reset by peer"), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_the_loss_of_a_process_is_told_from_other_errors(error: RuntimeError, lost: bool, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / LAST).touch()
    try:
        with pytest.raises(ProcessLostError if lost else RuntimeError) as caught, together(_two(), tmp_path):
            raise error
        # torchrun's signal must not end the process before its line is written
        assert signal.getsignal(signal.SIGTERM) is (signal.SIG_IGN if lost else before)
        assert (f"--resume {tmp_path}" in str(caught.value)) == lost
    finally:
        signal.signal(signal.SIGTERM, before)


def test_torchrun_ends_a_process_that_works_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            pytest.raises(ProcessLostError, match=r"torchrun ended the 2 processes: nothing was trained"),
            together(_two()),
        ):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_processes_that_torchrun_starts_again_do_not_wait_for_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one store for all attempts; where each has its own, a process is lost or not as in the first."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ProcessLostError, match=r"torchrun restarts .* yourself, with --resume"):
        make_fabric(Settings())
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert make_fabric(Settings()).world_size == 1


def _two() -> Any:
    return SimpleNamespace(world_size=2)
