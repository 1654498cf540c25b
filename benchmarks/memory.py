"""Training memory: forecasts against the growth of a process, and the savings and time of recompute plans.

    python benchmarks/memory.py forecast    forecast and measured growth, in a fresh process for each row
    python benchmarks/memory.py plans       memory and time of B0 with plans, compared with torch.utils.checkpoint
    python benchmarks/memory.py large       B7 at 600 px, one image: memory in a fresh process and time of a step, with
                                            and without a plan, in fp32 and bf16, compared with torch's modules

Channels_last, random weights; plans in float32, the rest also in bf16 (autocast). On a CPU the compiled kernels are
used, or torch's modules with EFFNET_NATIVE=0. The growth of a process is its peak resident memory minus its resident
memory before the network was built, with torch imported and warmed up; on a GPU it is torch's peak of allocated memory
(implemented, never measured). Times are medians of interleaved rounds in one process, relative to effnet without a
plan.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import effnet
from effnet.arch.memory import training_memory
from effnet.arch.recompute import RecomputePlan, find_plan, levels
from effnet.arch.segments import Keep, uses_kernels
from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.machine import Precision, this_machine

MIB = 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = None if DEVICE == "cpu" else False  # None: by this process's installation and environment
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16") if this_machine().bf16 else ("fp32",)
# Freed memory is returned to the system at once, so that resident memory is memory in use.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}

ODD = (
    effnet.spec("b0", width=0.5, depth=0.7, resolution=193),
    NetworkSpec(
        "no-se", (StageSpec(3, 7, 1, 24, 2), StageSpec(1, 3, 2, 40, 1), StageSpec(4, 5, 2, 96, 3)), squeeze_ratio=0.0
    ),
    NetworkSpec(
        "relu6-se", (StageSpec(6, 3, 2, 16, 3), StageSpec(6, 3, 1, 32, 2)), activation="relu6", squeeze_ratio=0.5
    ),
)
NETWORKS = (*(effnet.spec(name) for name in ("b0", "b1", "b4", "lite0", "mobilenetv1")), *ODD)


def memory_of(field: str) -> float:
    """MiB of this process: VmRSS is the resident memory, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def step(network: nn.Module, images: Tensor, labels: Tensor, precision: Precision = "fp32") -> None:
    """Forward and backward."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
        logits = network(images)
    nn.functional.cross_entropy(logits.float(), labels).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def batch_of(spec: NetworkSpec, batch: int) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    images = torch.randn(batch, spec.in_channels, spec.resolution, spec.resolution, device=DEVICE)
    labels = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    return images.contiguous(memory_format=torch.channels_last), labels


def train(spec: NetworkSpec, plan: RecomputePlan | None, batch: int, steps: int, precision: Precision) -> None:
    """Train with RMSProp with momentum, and a moving average of the weights."""
    network = effnet.EfficientNet(spec).to(DEVICE, memory_format=torch.channels_last)
    network.recompute(plan)
    average = copy.deepcopy(network)
    optimizer = torch.optim.RMSprop(network.parameters(), momentum=0.9)
    images, labels = batch_of(spec, batch)
    for _ in range(steps):
        optimizer.zero_grad()
        step(network, images, labels, precision)
        optimizer.step()
        with torch.no_grad():
            for mean, new in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(new, 0.1)


def grow(spec: NetworkSpec, plan: RecomputePlan | None, batch: int, steps: int, precision: Precision) -> float:
    """MiB that training takes in this fresh process. A tiny network goes first, since torch loads libraries on use."""
    train(effnet.spec("b0", width=0.25, depth=0.4, resolution=32), None, 2, 2, precision)
    if DEVICE == "cuda":
        before_cuda = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(spec, plan, batch, steps, precision)
        return (torch.cuda.max_memory_allocated() - before_cuda) / MIB
    before = memory_of("VmRSS")
    train(spec, plan, batch, steps, precision)
    return memory_of("VmHWM") - before


def measured(spec: NetworkSpec, plan: RecomputePlan | None, batch: int, precision: Precision = "fp32") -> float:
    """`grow` in a fresh process, after two steps."""
    task = {"spec": spec.to_dict(), "plan": plan and plan.to_dict(), "batch": batch, "precision": precision}
    command = [sys.executable, __file__, "child", json.dumps(task)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def child(task: dict[str, Any]) -> None:
    """The work of the fresh process."""
    plan = task["plan"] and RecomputePlan({name: Keep[level.upper()] for name, level in task["plan"].items()})
    print(grow(NetworkSpec.from_dict(task["spec"]), plan, task["batch"], 2, task["precision"]))


def forecast() -> None:
    """Print forecasts and measurements, with and without a plan."""
    print("| network | px | batch | precision | plan | forecast, MiB | measured, MiB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for spec, precision in itertools.product(NETWORKS, PRECISIONS):
        batch = 16 if spec.resolution < 300 else 8
        for plan in (None, RecomputePlan.uniform(spec, Keep.BOTTLENECKS)):
            said = training_memory(spec, batch, precision=precision, plan=plan, kernels=KERNELS).peak / MIB
            found = measured(spec, plan, batch, precision)
            sizes = f"{said:.0f}", f"{found:.0f}", f"{said / found:.3f}"
            print(
                "|", *(f"{cell} |" for cell in (spec.name, spec.resolution, batch, precision, plan or "none", *sizes))
            )


def large(rounds: int = 3) -> None:
    """B7 at its own resolution; the base is the process with network, optimizer state and image."""
    spec = effnet.spec("b7")
    held = training_memory(spec, 1, kernels=KERNELS)
    base = (held.weights + held.optimizer + held.ema + held.images) / MIB
    network = effnet.EfficientNet(spec).to(DEVICE, memory_format=torch.channels_last)
    images, labels = batch_of(spec, 1)
    ways = [*itertools.product(PRECISIONS, (None, RecomputePlan.uniform(spec, Keep.BOTTLENECKS)))]
    times: list[list[float]] = [[] for _ in range(len(ways) + 1)]
    for _, (taken, way) in itertools.product(range(rounds), enumerate([("fp32", None), *ways])):
        network.native(on=taken > 0)  # the first step is by torch's modules
        network.recompute(way[1])
        network.zero_grad()
        started = time.perf_counter()
        step(network, images, labels, way[0])
        times[taken].append(time.perf_counter() - started)
    del network
    plain, *medians = map(statistics.median, times)
    print(f"B7 at 600 px, one image; a step by torch's modules in fp32 takes {plain:.1f} s\n")
    print("| precision | plan | over the base, MiB | forecast | time of a step |\n|---|---|---|---|---|")
    for (precision, plan), taken in zip(ways, medians, strict=True):
        said = training_memory(spec, 1, plan=plan, precision=precision, kernels=KERNELS).peak / MIB - base
        over = measured(spec, plan, 1, precision) - base
        print(f"| {precision} | {plan or 'none'} | {over:.0f} | {said:.0f} | {taken / plain:.2f} |")


class Checkpointed(nn.Module):
    """The rival: torch.utils.checkpoint around every block."""

    def __init__(self, network: effnet.EfficientNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        x = self.network.stem(images)
        for stage in self.network.stages.values():
            for block in stage:
                x = checkpoint(block, x, use_reentrant=False)
        return self.network.classifier(self.network.dropout(self.network.pool(self.network.head(x)).flatten(1)))


def plans(batch: int = 16, rounds: int = 9) -> None:
    """B0 at 224 px: memory per image (forecast of the activations at their peak) against time."""
    spec = effnet.spec("b0")
    plain = training_memory(spec, batch, kernels=KERNELS)
    fixed = plain.weights + plain.optimizer + plain.ema + plain.images
    chosen: dict[str, RecomputePlan | None] = {"none": None}
    chosen |= {keep.name.lower(): RecomputePlan.uniform(spec, keep) for keep in levels(spec, KERNELS)}
    for share in (0.8, 0.65) if uses_kernels(spec, KERNELS) else (0.75, 0.5, 0.32):
        limit = int(fixed + share * (plain.peak - fixed))
        chosen[f"find_plan {share}x"] = find_plan(spec, limit, batch, kernels=KERNELS)
    network = effnet.EfficientNet(spec).to(DEVICE, memory_format=torch.channels_last)
    images, labels = batch_of(spec, batch)
    contestants: dict[str, nn.Module] = {}
    for name, plan in chosen.items():
        contestants[name] = copy.deepcopy(network)
        contestants[name].recompute(plan)
    contestants["torch.utils.checkpoint, each block"] = Checkpointed(copy.deepcopy(network))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, contestant in contestants.items():
            contestant.zero_grad()
            started = time.perf_counter()
            step(contestant, images, labels)
            if turn:
                times[name].append(time.perf_counter() - started)
    base = statistics.median(times["none"])
    print("| plan | levels | measured over weights, MiB per image | ratio | time |\n|---|---|---|---|---|")
    alone = None
    for name, taken in times.items():
        plan = chosen.get(name)
        ratio = statistics.median(taken) / base
        if name in chosen:
            over = (measured(spec, plan, batch) - fixed / MIB) / batch
            alone = alone or over
            print(f"| {name} | {plan or 'everything'} | {over:.1f} | {over / alone:.2f} | {ratio:.2f} |")
        else:
            print(f"| {name} | | | | {ratio:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(json.loads(sys.argv[2]))
    elif sys.argv[1:] and sys.argv[1] in ("forecast", "plans", "large"):
        computed = "kernels" if uses_kernels(effnet.spec("b0"), KERNELS) else "torch's modules"
        print(f"{this_machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {computed}\n")
        {"forecast": forecast, "plans": plans, "large": large}[sys.argv[1]]()
    else:
        sys.exit(__doc__)
