"""The training loop: steps, epochs, checkpoints, and the end of a run.

Lightning's Fabric handles processes, devices and gradient averaging. The loop is our own, because a resumed run must
equal an uninterrupted one to the bit, which needs a small state: every random draw of a step follows from
(seed, step, part), every image's from (seed, epoch, image), and checkpoints are written between steps.
"""

from __future__ import annotations

import math
import shlex
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

SHOWN = 50  # steps that the displayed loss is averaged over
FORWARD = 1 / 3  # share of a training step's time: the backward pass takes twice as long as the forward pass
ENDING = 8.0  # seconds for pictures and files
RARE = 20  # an epoch ends with a checkpoint if the last one is this many times older than it took to write
SMOOTH = 0.9  # decay of the average step time
COLUMNS = (  # of an epoch's message: name in results.csv, width, format
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
    """Seconds for a run; the share of them that has passed is the progress of the schedule.

    Time is reserved for what follows the last step: validation, the evaluation of the best weights, pictures, files.
    """

    seconds: float
    validation_steps: float  # training steps that one validation takes as long as, used until one was timed
    final: float  # time to evaluate the best weights, relative to a validation

    def end(self, per_step: float, validation: float | None = None) -> float:
        """When the last step must end, for steps of `per_step` seconds and a validation of `validation` seconds."""
        if validation is None:
            validation = self.validation_steps * per_step
        return self.seconds - ENDING - validation * (1 + self.final)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; its state was saved."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(
            f"stopped and saved after {step} steps; go on with: effnet train --resume {shlex.quote(str(folder))}"
        )


class Loop:
    """A run from its first step, or from a checkpoint, to its last.

    Args:
        fabric: processes and device.
        plan: settings, recipe, and how steps are computed.
        learner: the network with its initial weights; a resumed run's come from its checkpoint.
        data: the split data, with labels in the order of the network's outputs.
        folder: the run's folder.
        progress: receives steps and epochs.
        started: when the command started, by time.monotonic; a time budget counts from then.
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
        self.done = 0.0  # progress of the schedule
        self.best = -1.0  # the highest val accuracy so far
        self.rows: list[dict[str, Any]] = []
        self.saved, self.saving = time.monotonic(), 0.0  # when the last checkpoint was written, and how long that took
        self.losses: list[float] = []  # of this epoch's steps
        self.begun = self.elapsed  # when the first step started
        self.per_step, self.unread_since = plan.guess_step_seconds(), time.monotonic()
        self.validation: float | None = None  # seconds of the last validation
        writes = plan.settings.tensorboard and fabric.is_global_zero
        self.logger = TensorBoardLogger(folder, name="tensorboard", version="") if writes else None

    # state

    def save(self) -> None:
        """Write a checkpoint with everything that the next steps depend on; only rank 0 does.

        Raises:
            TrainingError: the run cannot succeed, so the previous checkpoint stays.
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
        """Write a checkpoint if the last one is older than this."""
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
        """Seconds since the command started, over all resumptions, without the pauses in between."""
        return time.monotonic() - self.started

    # the run

    def run(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: the run cannot go on; the last checkpoint is intact.
            Interrupted: a signal came, and the state was saved.
        """
        if self.step == 0:
            self.save()
        forget_peak()  # ignore what was read before the first step
        forget_device_peak(self.fabric.device)
        with caught_signals() as stop, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match")  # DDP, about filters (C, 1, K, K)
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
                images = []  # the signal also reached the processes that load images
            if self._any(bool(stop)):
                self._stop()
            self._step(images)
            recent = self.losses[-SHOWN:]
            detail = f"loss {sum(recent) / len(recent):.3f}" if recent else ""
            self.progress.update("training", self.step, round(self.step / self.done), detail)
            if self.step % steps == 0 or self.done >= 1:
                break  # no checkpoint between an epoch's last step and its validation, or a resumed run would skip it
            self._save_after(longest)
        self._validate(epoch)
        self._save_after(min(longest, RARE * self.saving))
        if self._any(bool(stop)):
            self._stop()

    def _settle(self) -> None:
        """Run a step that changes nothing, after which DDP orders gradients in its buckets by when they arrive.

        The last digits of a sum over three or more processes depend on this order, which a resumed run finds anew.
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
        self.fabric.barrier()  # torchrun ends all processes when one ends
        raise Interrupted(self.folder, self.step)

    def _step(self, images: list[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step, over all parts of its images."""
        done = self._done_after_step()
        try:
            loss, least_spread = self._gradients(images, head_only=done < self.recipe.head_first)
            losses = self.updater.update(self.step, done, loss, least_spread)
        except (RuntimeError, MemoryError) as error:
            if compile_failed(error, self.network):
                reason = " ".join(str(error).split("\n")[:2])  # the error's class and its message
                self.progress.message(f"torch.compile failed, so the run goes on uncompiled: {reason}")
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
        """Record the losses of the steps that were just checked, and the average step time."""
        if losses:
            self.losses += losses
            taken, share = (time.monotonic() - self.unread_since) / len(losses), SMOOTH ** len(losses)
            self.per_step = share * self.per_step + (1 - share) * taken

    def _done_after_step(self) -> float:
        """The schedule's progress after the next step; with a time budget, by rank 0's clock."""
        if self.budget is None:
            return (self.step + 1) / self.plan.steps
        ahead = self.unread_since + len(self.updater.unread) * self.per_step  # queued on a GPU
        now, end = max(time.monotonic(), ahead) - self.started, self.budget.end(self.per_step, self.validation)
        now += self.per_step
        share = 1.0 if now >= end else max(self.done, (now - self.begun) / (end - self.begun))
        return self.fabric.broadcast(share)

    def _gradients(self, images: list[tuple[Tensor, Tensor]], head_only: bool) -> tuple[Tensor, Tensor]:
        """Compute a step's gradients; its mean loss over all processes, (), and the spread of its outputs, ()."""
        device, low = self.fabric.device, AUTOCAST.get(self.execution.precision)
        total, least_spread = torch.zeros((), device=device), torch.ones((), device=device)
        for number, (pixels, labels) in enumerate(images):
            # for dropout, stochastic depth and mixing
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
            if head_only:  # the head's gradients were not averaged
                for param in self.network.classifier.parameters():
                    assert param.grad is not None
                    dist.all_reduce(param.grad)
                    param.grad.div_(self.fabric.world_size)
            sums = torch.stack([total, least_spread])
            dist.all_reduce(sums)
            total, least_spread = sums / self.fabric.world_size
        return total, least_spread

    def _any(self, flag: bool) -> bool:
        """Whether a flag is set in any process; all processes get the same answer."""
        if self.fabric.world_size == 1:
            return flag
        return bool(self.fabric.all_reduce(torch.tensor(float(flag)), reduce_op="sum"))

    # validation

    def _validate(self, epoch: int) -> None:
        """Evaluate on the val split; add a row to the results, and save the best weights."""
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
        # Epochs within a standard error of the best accuracy count as equal, and the latest of them is kept: it has
        # seen more, at a lower rate. With few images, the highest accuracy is mostly luck.
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
    final = (val + test) / val * plan.processes  # only rank 0 evaluates them
    return TimeBudget(60 * plan.settings.minutes, val * FORWARD / plan.recipe.batch, final)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that collects SIGTERM and Ctrl-C; a second signal of a kind has its usual effect."""
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
