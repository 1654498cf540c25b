"""A training step compared with other libraries: time, memory kept for the backward pass, and peak memory.

    python benchmarks/training.py [--rows b0@224x16 b0@64x128] [--rounds 9] [--allocator default tuned] [--json]
    python benchmarks/training.py rules [--rounds 3] [--px 224 64 32]     about a minute per size

All contestants have the same random weights in channels_last, in fp32 and in bf16 (autocast): torchvision, timm, effnet
with torch's modules, and effnet with its kernels. Those of a row take turns in one process, round by round: forward and
backward. Figures are medians; "time" is relative to the fastest rival in any precision and with any allocator. "kept"
is autograd's memory per image before the backward pass, "peak" the growth of a fresh process in three steps; both are
relative to the fastest rival in fp32.

"tuned" keeps freed memory in the process (mallopt: no mmap, no trimming), which avoids page faults but costs memory.
EFFNET_ISA restricts the kernels' instruction set, ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA torch's (such as avx2).

`rules` measures the cost of the rules of effnet.training: steps of a run with the rules' choices alternate with steps
with other precisions, workers and threads, including loading images from files. A loss above 10 % is a wrong rule.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from memory import memory_of
from networks import contestants
from PIL import Image
from rows import Row
from torch import Tensor, nn

import effnet
from effnet import console
from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.dataset import Dataset, read_data
from effnet.data.loader import PREFETCH, Loader, Order, TrainingImages
from effnet.machine import load_average, this_machine
from effnet.metrics.timing import random_images, seconds
from effnet.native import training_instruction_set
from effnet.training.execution import Images, choose_execution
from effnet.training.initial_network import short_side
from effnet.training.learner import Learner, augment_of
from effnet.training.optimizer import make_optimizer
from effnet.training.recipe import Recipe
from effnet.training.settings import Settings

ROWS = "b0@224x16", "b0@64x128", "b0@32x128", "b0@224x1", "b0@224x64", "b4@380x1"
RIVALS = "torchvision", "timm"
ALLOCATORS = "default", "tuned"
STEP_IMAGES, STEPS = 8, 4  # of `rules`: a step's images, and steps that are timed together
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt

Loss = Callable[[], Tensor]


def losses_of(row: Row, wanted: Collection[str] | None = None) -> dict[str, Loss]:
    """Each contestant's forward pass on a batch, by name."""
    named = {name.split()[0]: net for name, net in contestants(row.variant).items() if name.endswith("channels_last")}
    plain: Any = named.pop("effnet")
    kernels = effnet.EfficientNet(plain.spec, policy=plain.policy).to(memory_format=torch.channels_last)
    kernels.load_state_dict(plain.state_dict())
    plain.native(False)
    named |= {"effnet by torch": plain, "effnet": kernels}
    images = random_images(row.batch, row.px, layout="channels_last")
    labels = torch.arange(row.batch)

    def loss(network: nn.Module, low: bool) -> Tensor:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = network(images)
        return nn.functional.cross_entropy(logits.float(), labels)

    return {
        f"{name} {precision}": partial(loss, network.train(), precision == "bf16")
        for name, network in named.items()
        for precision in ("fp32", "bf16")
        if wanted is None or f"{name} {precision}" in wanted
    }


def kept_bytes(loss: Loss) -> int:
    """Bytes that autograd holds before the backward pass, without parameters, buffers and images."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    loss()  # once before, so that persistent buffers exist
    before = {
        tensor.untyped_storage().data_ptr() for tensor in gc.get_objects() if type(tensor) in (Tensor, nn.Parameter)
    }
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = loss()
    total = sum(size for address, size in held.items() if address not in before)
    found.backward()
    return total


def child(task: dict[str, Any]) -> dict[str, Any]:
    """The work of a fresh process: time a row's contestants, or measure the memory growth of one."""
    libc = ctypes.CDLL(None)
    if task["allocator"] == "tuned":
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    row = Row.parse(task["row"])
    if name := task.get("name"):
        losses_of(Row("b0", 32, 2), [name])[name]().backward()  # since torch loads libraries on use
        loss = losses_of(row, [name])[name]
        gc.collect()
        libc.malloc_trim(0)  # memory freed so far, such as other networks', would hide a step's growth,
        Path("/proc/self/clear_refs").write_text("5")  # and so would the peak so far
        before = memory_of("VmRSS")
        for _ in range(3):
            loss().backward()
        return {"peak": memory_of("VmHWM") - before}
    losses = losses_of(row)
    kept = {name: kept_bytes(loss) / row.batch for name, loss in losses.items()}
    laps = [[seconds(lambda loss=loss: loss().backward()) for loss in losses.values()] for _ in range(task["rounds"])]
    return {"kept": kept, "seconds": dict(zip(losses, map(statistics.median, zip(*laps, strict=True)), strict=True))}


def in_a_fresh_process(**task: Any) -> dict[str, Any]:
    """Run `child` with this task."""
    command = [sys.executable, __file__, "child", "--task", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def compare(row: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a row of the benchmark; return the lines of its table."""
    found = []
    for allocator in options.allocator:
        timed = in_a_fresh_process(row=row, allocator=allocator, rounds=options.rounds)
        for name, taken in timed["seconds"].items():
            peak = in_a_fresh_process(row=row, allocator=allocator, name=name)["peak"]
            line = {"contestant": name, "allocator": allocator, "ms": 1000 * taken, "peak_mib": peak}
            found.append(line | {"kept_mb": timed["kept"][name] / 1e6})
    rivals = [line for line in found if line["contestant"].startswith(RIVALS)]
    fastest = min(rivals, key=lambda line: line["ms"])
    fp32 = min((line for line in rivals if line["contestant"].endswith("fp32")), key=lambda line: line["ms"])
    shares = {"time": ("ms", fastest), "kept": ("kept_mb", fp32), "peak": ("peak_mib", fp32)}
    return [line | {name: line[key] / base[key] for name, (key, base) in shares.items()} for line in found]


def photos_of(folder: Path, resolution: int) -> Dataset:
    """Typical files for this resolution: 28 px and 64 px PNG, 320 x 240 JPEG."""
    side, suffix = {32: (28, "png"), 64: (64, "png")}.get(resolution, (240, "jpg"))
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(64):
            pixels = draw.integers(0, 256, (side // 4, side // 3 if suffix == "jpg" else side // 4, 3), np.uint8)
            image = Image.fromarray(pixels).resize((pixels.shape[1] * 4, side))
            image.save(folder / name / f"{number}.{suffix}")
    return read_data(folder)


class Alternative:
    """Training steps of B0 with one precision, number of workers and number of threads."""

    def __init__(self, data: Dataset, spec: NetworkSpec, precision: str, workers: int, threads: int) -> None:
        self.precision, self.workers, self.threads = precision, workers, threads
        recipe, input_spec = Recipe(batch=STEP_IMAGES), InputSpec(spec.resolution, spec.resolution)
        network = effnet.create(spec).to(memory_format=torch.channels_last)
        self.learner = Learner(network, recipe, input_spec).train()
        self.optimizer = make_optimizer(network, recipe)
        images = TrainingImages(data, augment_of(recipe, input_spec), 0)
        loader = Loader(images, Order(len(images), STEP_IMAGES, STEP_IMAGES, 0), workers)
        self.batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())

    def step(self) -> None:
        """Load, forward, backward, optimizer."""
        pixels, labels = next(self.batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            loss, _ = self.learner(pixels, labels, False)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> float:
        """A step's time, after the images that workers prepared in advance are used up."""
        torch.set_num_threads(self.threads)
        for _ in range(PREFETCH + 1 if self.workers else 1):
            self.step()
        return seconds(lambda: [self.step() for _ in range(STEPS)]) / STEPS


def cost_of_rules(resolution: int, rounds: int) -> None:
    """Print the table of one resolution: each alternative, and the rule's loss against it."""
    spec = effnet.spec("b0", resolution=resolution, num_classes=2)
    with tempfile.TemporaryDirectory() as folder:
        data = photos_of(Path(folder), resolution)
        images = Images(60_000, short_side(data))  # enough for workers to pay off
        chosen = choose_execution(spec, Recipe(batch=STEP_IMAGES), Settings(), images, world=1)
        rule = chosen.precision, chosen.workers, chosen.threads
        cores = this_machine().cores
        shares = dict.fromkeys(((0, cores), (0, 1), (1, max(1, cores - 1))))
        ways = [(precision, *share) for precision in ("fp32", "bf16") for share in shares]
        alternatives = {way: Alternative(data, spec, *way) for way in dict.fromkeys((rule, *ways))}
        times = [{way: each.seconds() for way, each in alternatives.items()} for _ in range(rounds)]
    medians = {way: statistics.median(turn[way] for turn in times) for way in alternatives}
    rows = [
        (
            f"{precision}, workers {workers}, threads {threads}{' (rule)' if way == rule else ''}",
            f"{1000 * medians[way]:.1f}",
            f"{100 * (medians[rule] / medians[way] - 1):+.0f} %",
        )
        for way in alternatives
        for precision, workers, threads in [way]
    ]
    title = f"B0 at {resolution} px, files of {images.side} px, {STEP_IMAGES} images a step"
    note = f"{this_machine()}; torch {torch.__version__}; medians of {rounds} rounds; load average {load_average():.1f}"
    console.table(("<", "ms a step", "the rule loses"), rows, title=title, note=note)


def show(row: str, lines: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table of a row."""
    table = [
        (
            f"{line['contestant']}, {line['allocator']}",
            *(f"{line[key]:.2f}" for key in ("time", "kept", "peak")),
            f"{line['ms']:.0f}",
            f"{line['kept_mb']:.1f}",
            f"{line['peak_mib']:.0f}",
        )
        for line in lines
    ]
    columns = "<contestant, allocator", "time", "kept", "peak", "ms", "kept, MB an image", "peak, MiB"
    machine = f"{this_machine()}; kernels: {training_instruction_set()}; {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    rule = f"medians of {options.rounds} rounds; the fastest rival = 1, for kept and peak the fastest in fp32"
    console.table(columns, table, title=f"A training step, {Row.parse(row)}", note=f"{machine}; {versions}\n{rule}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=("rivals", "rules", "child"), default="rivals")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="b0@224x16")
    parser.add_argument("--allocator", nargs="+", choices=ALLOCATORS, default=ALLOCATORS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--px", type=int, nargs="+", default=[224, 64, 32])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode == "child":
        print(json.dumps(child(options.task)))
    elif options.mode == "rules":
        for px in options.px:
            cost_of_rules(px, options.rounds)
    else:
        for row in options.rows:
            lines = compare(row, options)
            if options.json:
                sys.stdout.write(console.json_line({"row": row, "machine": str(this_machine()), "lines": lines}))
            else:
                show(row, lines, options)
