"""The loop: steps, epochs, checkpoints, and the end of a run.

Lightning's Fabric handles processes, devices and gradient averaging. The loop is ours, because its state has
to be a handful of numbers for a resumed run to equal an undisturbed one to the bit: every random draw of a step follows
from (seed, step, part), every image's from (seed, epoch, image), and checkpoints are written between steps.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from effnet.console import csv_lines
from effnet.data.blocks import find_blocks
from effnet.data.dataset import Dataset
from effnet.data.loader import KEPT_BYTES, Loader, Order, TrainingImages
from effnet.errors import TrainingError, ran_out_of_memory
from effnet.files import write_text
from effnet.machine import forget_peak
from effnet.progress import Progress
from effnet.training.device import AUTOCAST, Feed, compile_failed, forget_device_peak, seed_draws
from effnet.training.execution import processes_here
from effnet.training.fabric import Fabric, TensorBoardLogger
from effnet.training.learner import Learner, augment_of, derive_seed, score, spread
from effnet.training.optimizer import Updater
from effnet.training.processes import take_over
from effnet.training.run_folder import BEST, RESULTS, RunPlan, run_inputs, save_checkpoint
from effnet.weights.bundle import save

SHOWN = 50  # steps over which the loss that is shown is averaged
FORWARD = 1 / 3  # of a training step's time: the backward pass takes twice as long as the forward pass
ENDING = 8.0  # seconds for pictures and files
RARE = 20  # an epoch ends with a checkpoint where the last one is so many times as old as it took to write
SMOOTH = 0.9  # decay of the average time of a step
COLUMNS = (  # of the message about an epoch: name in results.csv, width, format
    ("epoch", 6, "d"),
    ("step", 8, "d"),
    ("lr", 10, ".2g"),
    ("train_loss", 12, ".4f"),
    ("val_loss", 10, ".4f"),
    ("val_top1", 10, ".2%"),
)
# attributes of a Loop that a checkpoint keeps
STATE = ("step", "done", "begun", "rows", "losses", "best", "since_best")


@dataclass(frozen=True)
class TimeBudget:
    """Seconds for a run: the share of them that is gone is the share of the schedule that is done.

    Time is held back for what follows the last step: a validation, the evaluation of the best weights, pictures, files.
    """

    seconds: float
    validation_steps: float  # training steps that take as long as one validation, until one was timed
    final: float  # time for the evaluation of the best weights, as a multiple of a validation's

    def end(self, per_step: float, validation: float | None = None) -> float:
        """When the last step must be over, for steps of `per_step` seconds and a validation of `validation`."""
        if validation is None:
            validation = self.validation_steps * per_step
        return self.seconds - ENDING - validation * (1 + self.final)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; its state was saved."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"stopped and saved after {step} steps; go on with: effnet train --resume {folder}")


class Loop:
    """A run from its first step, or from where a checkpoint was written, to its last.

    Args:
        fabric: processes and device.
        plan: settings, recipe, and how steps are computed.
        learner: the network with its first weights; those of a resumed run come from its checkpoint.
        data: the split data, its labels in the order of the network's outputs.
        folder: of the run.
        progress: follows steps and epochs.
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
        self.network, self.inputs = learner.network, run_inputs(plan, folder)
        if plan.settings.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.network)  # type: ignore[no-untyped-call]
        self.network.recompute(self.execution.plan)
        torch.set_num_threads(self.execution.threads)
        learner.to(fabric.device)  # before the optimizer and the average refer to its tensors
        take_over(self.network, fabric)
        self.updater = Updater(self.network, self.recipe, self.execution.precision)
        if plan.settings.compile:
            self.network.compile()
        self.learner: Any = fabric.setup_module(learner)
        self.feed = Feed(fabric.device)
        train, seed, world = data.subset("train"), plan.settings.seed, fabric.world_size
        blocks = find_blocks([data.file(each) for each in train.samples]) if plan.settings.shuffle == "block" else None
        order = Order(len(train), self.recipe.batch, self.execution.part, seed, fabric.global_rank, world, blocks)
        sharing = max(1, plan.execution.workers) * processes_here(world)
        keep = KEPT_BYTES // sharing if plan.settings.train_memory is None else 0
        images = TrainingImages(train, augment_of(self.recipe, plan.input), seed, keep)
        self.loader = Loader(images, order, self.execution.workers, pinned=fabric.device.type == "cuda")
        self.step, self.since_best = 0, 0
        self.done = 0.0  # share of the schedule
        self.best = -1.0  # the highest val accuracy so far
        self.rows: list[dict[str, Any]] = []
        self.saved, self.saving = time.monotonic(), 0.0  # when the last checkpoint was written, and how long that took
        self.losses: list[float] = []  # of this epoch's steps
        self.begun = self.elapsed  # when the first step began
        self.per_step, self.unread_since = plan.guess_step_seconds(), time.monotonic()
        self.validation: float | None = None  # seconds of the last one
        writes = plan.settings.tensorboard and fabric.is_global_zero
        self.logger = TensorBoardLogger(folder, name="tensorboard", version="") if writes else None

    # state

    def save(self) -> None:
        """Write a checkpoint of all that decides what comes next; rank 0 does.

        Raises:
            TrainingError: what would be written cannot succeed; the checkpoint before it stays.
        """
        began = time.monotonic()
        self._note(self.updater.look())
        if self.fabric.is_global_zero:
            state = {name: getattr(self, name) for name in STATE} | self.updater.state()
            state |= {"seconds": self.elapsed, "inputs": self.inputs, "processes": self.fabric.world_size}
            save_checkpoint(self.folder, tree_map_only(Tensor, Tensor.cpu, state))
        self.saved = time.monotonic()
        self.saving = self.saved - began

    def _save_after(self, seconds: float) -> None:
        """Write a checkpoint where the last one is so old."""
        if time.monotonic() - self.saved >= seconds:
            self.save()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in STATE:
            setattr(self, name, state[name])
        self.inputs = state["inputs"]
        self.updater.restore(state)
        self.started = time.monotonic() - state["seconds"]

    @property
    def elapsed(self) -> float:
        """Seconds since the command began, over all its resumptions, without the pauses between."""
        return time.monotonic() - self.started

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
        forget_device_peak(self.fabric.device)
        with caught_signals() as stop, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match")  # of filters (C, 1, K, K), for DDP
            if self.fabric.world_size > 1 and self.done < 1:
                self._settle()
            self.progress.message("".join(f"{name.replace('_', ' '):>{width}}" for name, width, _ in COLUMNS))
            patience = self.recipe.patience or math.inf
            while self.done < 1 and self.since_best < patience:
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
        longest = self.plan.settings.save_seconds
        for _ in range(within, steps):
            if not self.updater.unread:
                self.unread_since = time.monotonic()
            try:
                images = [next(parts) for _ in range(self.execution.parts)]
            except TrainingError:
                if not stop:
                    raise
                images = []  # the signal reached the processes that load images, too
            if self._any(bool(stop)):
                self._stop()
            self._step(images)
            recent = self.losses[-SHOWN:]
            detail = f"loss {sum(recent) / len(recent):.3f}" if recent else ""
            self.progress.update("training", self.step, round(self.step / self.done), detail)
            if self.step % steps == 0 or self.done >= 1:
                break  # no checkpoint between an epoch's last step and its validation: a resumed run would skip it
            self._save_after(longest)
        self._validate(epoch)
        self._save_after(min(longest, RARE * self.saving))
        if self._any(bool(stop)):
            self._stop()

    def _settle(self) -> None:
        """Make a step that changes nothing, after which DDP sorts the gradients in its messages by when they come.

        A sum over three processes and more depends on the place in its last digits, and a resumed run sorts anew.
        """
        self.learner.train()
        before = [buffer.clone() for buffer in self.network.buffers()]
        part, inputs = self.execution.part, self.plan.input
        pixels = torch.zeros(part, inputs.size, inputs.size, inputs.channels, dtype=torch.uint8)
        self._gradients([(pixels, torch.zeros(part, dtype=torch.int64))], head_only=False)
        self.updater.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(self.network.buffers(), before, strict=True):
            buffer.copy_(value)

    def _stop(self) -> NoReturn:
        self.save()
        self.fabric.barrier()  # torchrun ends all processes when the first one ends
        raise Interrupted(self.folder, self.step)

    def _step(self, images: list[tuple[Tensor, Tensor]]) -> None:
        """One step of the optimizer, from all parts of its images."""
        done = self._done_after_step()
        try:
            loss, least_spread = self._gradients(images, head_only=done < self.recipe.head_first)
            losses = self.updater.update(self.step, done, loss, least_spread)
        except (RuntimeError, MemoryError) as error:
            if compile_failed(error, self.network):
                reason = " ".join(str(error).split("\n")[:2])  # what raised, and what it said
                self.progress.message(f"torch.compile failed, so the run goes on without it: {reason}")
                self.updater.optimizer.zero_grad(set_to_none=True)
                return self._step(images)
            if not ran_out_of_memory(error):
                raise
            advice = "give a limit with --train-memory, or a smaller --batch or --resolution"
            raise TrainingError(f"memory ran out at step {self.step}: {advice}") from error
        self.step, self.done = self.step + 1, done
        self._note(losses)
        return None

    def _note(self, losses: list[float]) -> None:
        """Keep the losses of the steps that were looked at now, and what a step took on average."""
        if losses:
            self.losses += losses
            taken, share = (time.monotonic() - self.unread_since) / len(losses), SMOOTH ** len(losses)
            self.per_step = share * self.per_step + (1 - share) * taken

    def _done_after_step(self) -> float:
        """The share of the schedule that is done after the next step, within a time budget by the clock of rank 0."""
        if self.budget is None:
            return (self.step + 1) / self.plan.steps
        ahead = self.unread_since + len(self.updater.unread) * self.per_step  # a GPU has not computed them yet
        now, end = max(time.monotonic(), ahead) - self.started, self.budget.end(self.per_step, self.validation)
        now += self.per_step
        share = 1.0 if now >= end else max(self.done, (now - self.begun) / (end - self.begun))
        return self.fabric.broadcast(share)

    def _gradients(self, images: list[tuple[Tensor, Tensor]], head_only: bool) -> tuple[Tensor, Tensor]:
        """Gradients of a step; its mean loss over all processes, (), and how much its outputs differ, ()."""
        device, low = self.fabric.device, AUTOCAST.get(self.execution.precision)
        total, least_spread = torch.zeros((), device=device), torch.ones((), device=device)
        for number, (pixels, labels) in enumerate(images):
            # what the network draws: dropout, stochastic depth, mixing
            seed = derive_seed(self.plan.settings.seed, self.step, self.fabric.global_rank * len(images) + number)
            seed_draws(seed, device)
            unfinished = head_only or number < len(images) - 1
            with self.fabric.no_backward_sync(self.learner, enabled=unfinished):
                with torch.autocast(device.type, low, enabled=low is not None):
                    loss, logits = self.learner(*self.feed(pixels, labels), head_only)
                self.fabric.backward(self.updater.scaler.scale(loss / len(images)))
            total += loss.detach() / len(images)
            least_spread = torch.minimum(least_spread, spread(logits))
        if self.fabric.world_size > 1:
            if head_only:  # its gradients were not averaged
                for param in self.network.classifier.parameters():
                    assert param.grad is not None
                    dist.all_reduce(param.grad)
                    param.grad.div_(self.fabric.world_size)
            sums = torch.stack([total, least_spread])
            dist.all_reduce(sums)
            total, least_spread = sums / self.fabric.world_size
        return total, least_spread

    def _any(self, flag: bool) -> bool:
        """Whether a flag is set in any of the processes; all of them get the same answer."""
        if self.fabric.world_size == 1:
            return flag
        return bool(self.fabric.all_reduce(torch.tensor(float(flag)), reduce_op="sum"))

    # validation

    def _validate(self, epoch: int) -> None:
        """Evaluate on the val split: a row of results, and the best weights."""
        self._note(self.updater.look())
        began = time.monotonic()
        network, val = self.updater.averaged, self.data.subset("val")
        top1, loss = score(
            network, self.plan.input, val, batch=self.execution.part, fabric=self.fabric, progress=self.progress
        )
        self.validation = time.monotonic() - began
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "seconds": round(self.elapsed, 1),
            "lr": self.recipe.scaled_lr * self.recipe.lr_at(self.done),
            "train_loss": sum(self.losses) / len(self.losses),
            "val_loss": loss,
            "val_top1": top1,
        }
        self.rows.append(row)
        self.since_best += 1
        if top1 > self.best:
            self.best, self.since_best = top1, 0
        # What differs by less than a standard error of the accuracy is equally good, and among equals the later epoch
        # is kept: it saw more, at a lower rate. With few images, the highest accuracy is mostly luck
        error = math.sqrt(self.best * (1 - self.best) / len(val))
        better = top1 >= self.best - error
        if not self.fabric.is_global_zero:
            return
        if better:
            save(
                network,
                self.folder / BEST,
                classes=self.plan.classes,
                input=self.plan.input,
                source=f"effnet train from {self.plan.source}",
                metrics={"val_top1": top1, "epoch": epoch + 1},
            )
        write_text(self.folder / RESULTS, csv_lines([list(row), *(list(each.values()) for each in self.rows)]))
        if self.logger:
            self.logger.log_metrics({name: value for name, value in row.items() if name != "step"}, self.step)
        self.progress.message("".join(f"{row[name]:>{width}{form}}" for name, width, form in COLUMNS))


def time_budget(plan: RunPlan, data: Dataset) -> TimeBudget | None:
    """The run's time budget, if it has one."""
    if plan.settings.minutes is None:
        return None
    val, test = (len(data.subset(split)) if split in data.splits else 0 for split in ("val", "test"))
    final = (val + test) / val * plan.processes  # rank 0 does it alone
    return TimeBudget(60 * plan.settings.minutes, val * FORWARD / plan.recipe.batch, final)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that receives SIGTERM and Ctrl-C; the second of one kind acts as it would without this block."""
    caught: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # no other thread receives signals
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}

    def note(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
