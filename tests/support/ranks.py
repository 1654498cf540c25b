"""Trainings one after another, as one process makes them or as each of several does that torchrun starts:

    torchrun --standalone --nproc-per-node 4 tests/support/ranks.py FOLDER

FOLDER has images (shapes), a network (tiny.yaml), a bundle of it (start) and a run that one process began (alone).
What each process saw and ended with is written there, too.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from short_run import CrashError

from effnet.arch.recompute import RecomputePlan
from effnet.arch.segments import Keep
from effnet.data.loader import TrainingImages
from effnet.progress import SILENT
from effnet.training.learner import score
from effnet.training.loop import Loop
from effnet.training.train import resume, train

STOP = 7  # the step before which a run is interrupted
SHORT: dict[str, Any] = {"batch": 8, "epochs": 3, "workers": 0, "threads": 1, "save_seconds": 0.0, "precision": "fp32"}
DRAWN: dict[str, Any] = {  # all that is drawn, in steps that enlarge no rounding
    **SHORT,
    "augmentation": "autoaugment",
    "mixup": 0.2,
    "head_first": 0.3,
    "class_weights": True,
    "optimizer": "sgd",
    "lr": 0.1,
}
PARTS: dict[str, Any] = {**DRAWN, "epochs": 1, "head_first": 0.0}
FROZEN: dict[str, Any] = {**SHORT, "lr": 1e-3, "dropout": 0, "drop_connect": 0}  # with the recipe "few"
FEW = 3  # images to validate with, fewer than processes


@contextmanager
def watched(part: int, keep: Keep | None = None) -> Iterator[dict[str, Any]]:
    """Runs put `part` images through the network at once and draw no pictures; what the last one did and ended with."""
    seen: dict[str, Any] = {}
    run, read = Loop.run, TrainingImages.__getitems__

    def fit_memory(spec: Any, *_: Any) -> tuple[int, RecomputePlan | None]:
        return part, None if keep is None else RecomputePlan.uniform(spec, keep)

    def recorded(self: Loop) -> None:
        seen["images"] = []
        run(self)
        kept = self.updater.averaged
        three = dataclasses.replace(val := self.data.subset("val"), samples=val.samples[:FEW])
        seen.update(
            loop=self,
            steps=self.step,
            done=self.done,
            losses=[row["train_loss"] for row in self.rows],
            network={name: value.clone() for name, value in self.network.named_parameters()},
            average={name: value.clone() for name, value in kept.named_parameters()},
            few=score(kept, self.plan.input, three, batch=2, fabric=self.fabric, progress=SILENT),
        )

    def noted(self: TrainingImages, keys: Any) -> Any:
        seen["images"] += keys
        return read(self, keys)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_draw", "write_report"):
            patch.setattr(f"effnet.training.result.{name}", lambda *_: None)
        patch.setattr("effnet.training.execution.fit_memory", fit_memory)
        patch.setattr(Loop, "run", recorded)
        patch.setattr(TrainingImages, "__getitems__", noted)
        yield seen


@contextmanager
def interrupted() -> Iterator[None]:
    """A run that ends within its second epoch."""
    step = Loop._step

    def stopped(self: Loop, images: Any) -> None:
        if self.step == STOP:
            raise CrashError
        step(self, images)

    with pytest.MonkeyPatch.context() as patch, suppress(CrashError):
        patch.setattr(Loop, "_step", stopped)
        yield
        raise AssertionError("it was to be interrupted")


@contextmanager
def clock(pace: float) -> Iterator[None]:
    """A clock by which every step takes `pace` seconds."""
    now, step = [0.0], Loop._step

    def timed(self: Loop, images: Any) -> None:
        now[0] += pace
        step(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", timed)
        for module in ("loop", "train"):
            patch.setattr(f"effnet.training.{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
        yield


def main(folder: Path) -> None:
    """All trainings."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data, spec = folder / "shapes", folder / "tiny.yaml"

    def write(name: str) -> None:
        seen.pop("loop")
        torch.save(seen, folder / f"{name}-{rank}.pt")

    with watched(8 // world) as seen:
        train(data, spec, "scratch", out=folder / "whole", **DRAWN)
        write("whole")
        with interrupted():
            train(data, spec, "scratch", out=folder / "broken", **DRAWN)
        torch.distributed.barrier()
        if not rank:
            shutil.copytree(folder / "broken", folder / "half")
        torch.distributed.barrier()
        resume(folder / "broken")
        write("broken")
        resume(folder / "alone")
        write("alone")
        with clock(0.3 * (1 + rank)):
            train(data, spec, "scratch", out=folder / "timed", **{**SHORT, "epochs": None, "minutes": 0.25})
        write("timed")
        train(data, folder / "start", "few", out=folder / "few", **FROZEN)
        write("few")
    with watched(4 // world, Keep.BOTTLENECKS) as seen:
        train(data, spec, "scratch", out=folder / "planned", **PARTS)
        write("planned")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
