"""The loop: steps, epochs, checkpoints, and the end of a run.

Lightning's Fabric carries processes, devices and gradient averaging. The loop is ours, because its state has
to be a handful of numbers for a resumed run to equal an undisturbed one to the bit: every random draw of a step follows
from (seed, step, part, process), every image's from (seed, epoch, image), and checkpoints are written between steps.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor, nn

from effnet.data.dataset import Dataset
from effnet.data.loader import Loader, Order, TrainingImages
from effnet.errors import TrainingError
from effnet.machine import forget_peak
from effnet.models.efficientnet import EfficientNet
from effnet.progress import Progress
from effnet.training.checkpoint import FORMAT, save_checkpoint
from effnet.training.module import Answering, Average, Learner, augment_of, score, spread
from effnet.training.optimizer import FORWARD, Horizon, make_optimizer, set_rate
from effnet.training.rules import ADVICE, ran_out, time_budget
from effnet.training.run import BEST, RunPlan, write_rows
from effnet.training.sanity_checks import SanityChecks
from effnet.weights.bundle import save

FIRST_REPLAN = 5  # steps after which a time budget is first planned by the pace of the steps
REPLAN_EVERY = 0.05  # of a time budget, or of the steps that are planned for it, from then on
SMOOTH = 0.98  # of the loss that is shown
COLUMNS = (  # of the message about an epoch: name in results.csv, width, format
    ("epoch", 6, "d"),
    ("step", 8, "d"),
    ("lr", 10, ".2g"),
    ("train_loss", 12, ".4f"),
    ("val_loss", 10, ".4f"),
    ("val_top1", 10, ".2%"),
)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; its state was saved."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"stopped and saved after {step} steps; go on with: effnet train --resume {folder}")


class Loop:
    """A run from its first step, or from where a checkpoint was written, to its last.

    Args:
        fabric: processes and device.
        plan: settings, recipe, and how steps are computed.
        learner: the network where it starts, with its loss; a resumed run's weights come from its checkpoint.
        data: in parts, its labels in the order of the network's outputs.
        folder: of the run.
        progress: told of steps, epochs, and what the user should know.
        started: when the command began, by time.monotonic; a time budget counts from there.
    """

    def __init__(
        self,
        fabric: Fabric,
        plan: RunPlan,
        learner: Learner,
        data: Dataset,
        folder: Path,
        progress: Progress,
        started: float,
    ) -> None:
        self.fabric, self.plan, self.folder, self.progress = fabric, plan, folder, progress
        self.recipe, self.execution, self.data, self.started = plan.recipe, plan.execution, data, started
        self.budget = time_budget(plan, data)
        self.network = learner.network
        if plan.settings.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.network)  # type: ignore[no-untyped-call]
        self.network.recompute(self.execution.plan)
        torch.set_num_threads(self.execution.threads)
        optimizer = make_optimizer(self.network, self.recipe)
        self.learner: Any
        self.optimizer: Any
        self.learner, self.optimizer = fabric.setup(learner, optimizer)
        self.average = Average(self.network) if self.recipe.ema else None
        train = data.part("train")
        rank, world = fabric.global_rank, fabric.world_size
        order = Order(len(train), self.recipe.batch, self.execution.part, plan.settings.seed, rank, world)
        images = TrainingImages(train, augment_of(self.recipe, plan.input), plan.settings.seed)
        self.loader = Loader(images, order, self.execution.workers)
        self.sanity_checks = SanityChecks(plan.spec.num_classes)
        self.horizon = Horizon.of(plan.steps)
        self.step, self.since_best = 0, 0
        self.best = self.kept = -1.0  # val accuracy: the highest so far, and that of the weights in best/
        self.rows: list[dict[str, Any]] = []
        self.losses: list[float] = []  # of this epoch's steps
        self.ran_out = False  # whether memory ran out once
        self.pace = (0.0, 0)  # seconds and steps since the time budget was last planned
        self.headed = False  # whether the names of the columns were shown
        writes = plan.settings.tensorboard and fabric.is_global_zero
        self.logger = TensorBoardLogger(folder, name="tensorboard", version="") if writes else None

    # state

    def state(self) -> dict[str, Any]:
        """All that decides what comes next."""
        return {
            "format": FORMAT,
            "step": self.step,
            "seconds": self.elapsed,
            "network": self.network.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "marks": list(self.horizon.marks),
            "rows": self.rows,
            "losses": self.losses,
            "best": self.best,
            "kept": self.kept,
            "since_best": self.since_best,
            "recompute": self.execution.recompute,
            "ran_out": self.ran_out,
            "sanity_checks": self.sanity_checks.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.network.load_state_dict(state["network"])
        if self.average:
            self.average.network.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.since_best = state["step"], state["since_best"]
        self.best, self.kept = state["best"], state["kept"]
        self.started = time.monotonic() - state["seconds"]
        self.horizon = Horizon(tuple((start, total) for start, total in state["marks"]))
        self.rows, self.losses, self.ran_out = list(state["rows"]), list(state["losses"]), state["ran_out"]
        self.sanity_checks.restore(state["sanity_checks"])
        self.execution = dataclasses.replace(self.execution, recompute=state["recompute"])
        self.network.recompute(self.execution.plan)

    @property
    def elapsed(self) -> float:
        """Seconds since the command began, over all its resumptions, without the pauses between."""
        return time.monotonic() - self.started

    def save(self) -> None:
        """Write a checkpoint; rank 0 does."""
        if self.fabric.is_global_zero:
            save_checkpoint(self.folder, self.state())

    # the run

    def run(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: it cannot go on; the last checkpoint is intact.
            Interrupted: a signal came, and the state was saved.
        """
        if self.step == 0:
            self.save()
        forget_peak()  # of what was read before the first step
        with caught_signals() as stop, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match")  # of filters (C, 1, K, K), for DDP
            patience = self.recipe.patience or math.inf
            while self.step < self.horizon.total and self.since_best < patience:
                self._epoch(stop)
        self.save()

    def _epoch(self, stop: list[int]) -> None:
        """The rest of the current epoch, or of the run, and its validation."""
        steps = self.loader.order.steps
        epoch, within = divmod(self.step, steps)
        parts = self.loader.epoch(epoch, within)
        self.learner.train()
        if not within:
            self.losses = []
        shown = self.losses[-1] if self.losses else None
        saved = time.monotonic()
        for _ in range(within, steps):
            began = time.monotonic()
            loss = self._step(parts)
            now = time.monotonic()
            self.pace = (self.pace[0] + now - began, self.pace[1] + 1)
            self.losses.append(loss)
            shown = loss if shown is None else SMOOTH * shown + (1 - SMOOTH) * loss
            self.step += 1
            self.progress.update("training", self.step, self.horizon.total, f"loss {shown:.3f}")
            stopping, late = self._any(bool(stop), self._is_time_to_plan)
            if late:
                self._replan()
            if self.step % steps == 0 or self.step >= self.horizon.total:
                break  # no checkpoint between an epoch's last step and its validation: a resumed run would skip it
            if stopping:
                self.save()
                raise Interrupted(self.folder, self.step)
            if now - saved >= self.plan.settings.save_seconds:
                self.save()
                saved = now
        self._validate(epoch)
        self.save()
        if self._any(bool(stop))[0]:
            raise Interrupted(self.folder, self.step)

    def _step(self, parts: Iterator[tuple[Tensor, Tensor]]) -> float:
        """One step of the optimizer, from all parts of its images; the mean loss over all processes."""
        taken = [part for _, part in zip(range(self.execution.parts), parts, strict=False)]
        if len(taken) < self.execution.parts:
            raise TrainingError("the images of a step did not arrive; a process that loads them may have stopped")
        while True:
            try:
                loss, gap = self._gradients(taken)
                break
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                if self.ran_out or self.fabric.world_size > 1:
                    raise TrainingError(f"memory ran out at step {self.step}: {ADVICE}") from error
                self._keep_less()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip or float("inf"))
        self.sanity_checks.check(self.step, loss, gap, float(norm))
        set_rate(self.optimizer, self.recipe.scaled_lr * self.recipe.lr_at(self.horizon.progress(self.step + 1)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.network, self.recipe.ema_at(self.step))
        return loss

    def _gradients(self, taken: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Gradients of a step over all processes; its loss, and how much its outputs differ."""
        self.optimizer.zero_grad(set_to_none=True)
        head_only = self.horizon.progress(self.step + 1) < self.recipe.head_first
        total, gap = torch.zeros(()), 1.0
        for number, (pixels, labels) in enumerate(taken):
            device = self.fabric.device
            seed_step(self.plan.settings.seed, self.step, number, self.fabric.global_rank)
            waits = head_only or number < len(taken) - 1
            with self.fabric.no_backward_sync(self.learner, enabled=waits):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.execution.precision == "bf16"):
                    loss, logits = self.learner(pixels.to(device), labels.to(device), head_only)
                self.fabric.backward(loss / len(taken))
            total += loss.detach().cpu() / len(taken)
            gap = min(gap, spread(logits))
        if self.fabric.world_size > 1:
            if head_only:  # whose backward pass went by the averaging
                for param in self.network.classifier.parameters():
                    assert param.grad is not None
                    dist.all_reduce(param.grad)
                    param.grad.div_(self.fabric.world_size)
            dist.all_reduce(total)
            total /= self.fabric.world_size
        return float(total), gap

    def _keep_less(self) -> None:
        """Keep less from now on: memory ran out for the first time."""
        self.ran_out = True
        self.execution = self.execution.with_less_memory(self.plan.spec)
        self.network.recompute(self.execution.plan)
        self.progress.message(
            f"memory ran out at step {self.step}; from here on each step keeps less and computes more"
        )

    @property
    def _is_time_to_plan(self) -> bool:
        """Whether the time budget should be looked at, by the clock of rank 0."""
        if self.budget is None or not self.fabric.is_global_zero:
            return False
        seconds, steps = self.pace
        late = seconds > REPLAN_EVERY * self.budget.seconds or steps > REPLAN_EVERY * self.horizon.total
        return late or self.step == FIRST_REPLAN

    def _replan(self) -> None:
        """Move the end of the run to where the time budget ends at the present pace."""
        assert self.budget is not None
        per_step = self.pace[0] / self.pace[1]
        if self.horizon.progress(self.step) < self.recipe.head_first:
            per_step /= FORWARD  # so far there was no backward pass
        self.pace = (0.0, 0)
        if self.fabric.is_global_zero:
            self.horizon = self.budget.replan(self.horizon, self.step, self.elapsed, per_step)
        self.horizon = Horizon(self.fabric.broadcast(self.horizon.marks))

    def _any(self, *flags: bool) -> list[bool]:
        """Each flag's value on any of the processes; all of them get the same answer."""
        if self.fabric.world_size == 1:
            return list(flags)
        sums = self.fabric.all_reduce(torch.tensor([float(flag) for flag in flags]), reduce_op="sum")
        return [bool(total) for total in sums]

    # validation

    def averaged_network(self) -> EfficientNet:
        """The network that is evaluated and kept: the average where there is one."""
        return self.average.network if self.average else self.network

    def _validate(self, epoch: int) -> None:
        """Accuracy on the val part, a row of results, and the best weights."""
        began = time.monotonic()
        correct, val_loss = score(
            Answering(self.averaged_network(), self.plan.input, self.plan.classes),
            self.data.part("val"),
            batch=self.execution.part,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
            progress=self.progress,
        )
        if self.budget:
            self.budget = dataclasses.replace(self.budget, validation=time.monotonic() - began)
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "seconds": round(self.elapsed, 1),
            "lr": self.recipe.scaled_lr * self.recipe.lr_at(self.horizon.progress(self.step)),
            "train_loss": float(np.mean(self.losses)) if self.losses else 0.0,
            "val_loss": val_loss,
            "val_top1": correct,
        }
        self.rows.append(row)
        self.since_best += 1
        if correct > self.best:
            self.best, self.since_best = correct, 0
        # What differs by less than a standard error of the accuracy is equally good, and of equals the later epoch
        # is kept: it saw more, at a lower rate. Of few images, the highest accuracy is mostly luck
        error = math.sqrt(self.best * (1 - self.best) / len(self.data.part("val")))
        if correct >= self.best - error:
            self.kept = correct
            if self.fabric.is_global_zero:
                save(
                    self.averaged_network(),
                    self.folder / BEST,
                    classes=self.plan.classes,
                    input=self.plan.input,
                    source=f"effnet train from {self.plan.source}",
                    metrics={"val_top1": correct, "epoch": epoch + 1},
                )
        if self.fabric.is_global_zero:
            write_rows(self.folder, self.rows)
        if self.logger:
            self.logger.log_metrics({name: value for name, value in row.items() if name != "step"}, self.step)
        if not self.headed:
            self.progress.message("".join(f"{name.replace('_', ' '):>{width}}" for name, width, _ in COLUMNS))
            self.headed = True
        self.progress.message("".join(f"{row[name]:>{width}{form}}" for name, width, form in COLUMNS))


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list to which SIGTERM and Ctrl-C are added; the second of one kind acts as it would without this block."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:  # only the main thread receives signals
        before.clear()
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def seed_step(seed: int, step: int, part: int, rank: int) -> None:
    """Seed what the network draws in one part of a step: dropout, stochastic depth, mixing."""
    value = int(np.random.SeedSequence((seed, step, part, rank)).generate_state(1, np.uint64)[0]) >> 1
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(value)
