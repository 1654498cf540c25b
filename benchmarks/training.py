"""A training step of B0 against its rivals, at the sizes of big photos and of small ones.

    python benchmarks/training.py [--rounds 9] [--threads 2] [--layout channels_last] [--px 224 64 32] [--json]
    python benchmarks/training.py rules [--rounds 3] [--px 224 64 32]     about a minute a size

Every contestant has the same random weights and runs in this process, in turn, round by round: forward, backward and an
SGD step, float32, eager. Figures are medians; x is against the faster rival of the same rounds. Before that, logits and
gradients are compared with torchvision's in eval mode, where nothing is random.

`rules` says what the rules of effnet.training cost: steps of a run as the rules compute it and with other precisions,
workers and threads, in turn, with the loading of images from files. More than 10 % lost is a wrong rule.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from networks import contestants, training_step
from PIL import Image
from torch import Tensor, nn

import effnet
from effnet import console
from effnet.arch.memory import Keep
from effnet.arch.recompute import RecomputePlan
from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.dataset import Dataset, read_data
from effnet.data.loader import PREFETCH, Loader, Order, TrainingImages
from effnet.machine import load_average, this_machine
from effnet.metrics.timing import LAYOUTS, Conditions, Timing, random_images, seconds
from effnet.models.depthwise import DepthwiseConv2d
from effnet.runtime.torch import torch_threads
from effnet.training.execution import Images, choose_execution
from effnet.training.initial_network import short_side
from effnet.training.learner import Learner, augment_of
from effnet.training.optimizer import make_optimizer
from effnet.training.recipe import Recipe
from effnet.training.settings import Settings

BATCHES = {224: 16, 128: 32, 96: 64, 64: 128, 32: 128}  # images a step, by pixels
STEP_IMAGES, STEPS = 8, 4  # of `rules`: a step's images, and steps that are timed together
SAME = 1e-3  # of the largest gradient of a tensor: float32, summed in other orders


def networks_of(layout: str) -> dict[str, nn.Module]:
    """The rivals, and effnet as it comes, under a plan, and with torch's own depthwise convolutions."""
    named = {name.split()[0]: network for name, network in contestants("b0").items() if name.endswith(layout)}
    planned, plain = copy.deepcopy(named["effnet"]), copy.deepcopy(named["effnet"])
    planned.recompute(RecomputePlan.uniform(planned.spec, Keep.ACTIVATIONS))
    for module in plain.modules():
        if isinstance(module, DepthwiseConv2d):
            module.__class__ = nn.Conv2d
    return named | {"plan: activations": planned, "torch's kernels": plain}


def difference(network: nn.Module, reference: nn.Module, images: Tensor) -> float:
    """The largest difference of a gradient from the reference's, as a share of that tensor's largest.

    Both have the same tensors in the same order.
    """
    gradients = []
    for each in (network.eval(), reference.eval()):
        each.zero_grad()
        nn.functional.cross_entropy(each(images), torch.arange(len(images))).backward()
        gradients.append([weight.grad for weight in each.parameters()])
    pairs = zip(*gradients, strict=True)
    return max(float((found - right).abs().max() / right.abs().max().clamp_min(1e-12)) for found, right in pairs)


def rounds_of(networks: dict[str, nn.Module], images: Tensor, rounds: int) -> dict[str, Timing]:
    """Steps in turn; the first round warms up."""
    steps: dict[str, Callable[[], object]] = {
        name: lambda network=network: training_step(network, images) for name, network in networks.items()
    }
    laps = [[seconds(step) for step in steps.values()] for _ in range(rounds + 1)]
    return {name: Timing(tuple(taken)) for name, taken in zip(networks, zip(*laps[1:], strict=True), strict=True)}


def compare(resolution: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """One size: the rows of its table."""
    batch = BATCHES[resolution]
    networks = networks_of(options.layout)
    images = random_images(batch, resolution, layout=options.layout)
    reference = networks["torchvision"]
    differences = {name: difference(network, reference, images[:4]) for name, network in networks.items()}
    if wrong := {name: value for name, value in differences.items() if not value < SAME}:
        sys.exit(f"gradients differ from torchvision's: {wrong}")
    times = rounds_of(networks, images, options.rounds)
    best = min(times[name].median_ms for name in ("torchvision", "timm"))
    return [
        {"network": name, "px": resolution, "batch": batch, "ratio": time.median_ms / best}
        | {"gradients_differ_by": differences[name]}
        | time.to_dict()
        for name, time in times.items()
    ]


def photos_of(folder: Path, resolution: int) -> Dataset:
    """Files as they are usual at that resolution: 28 px and 64 px PNG, 320 x 240 JPEG."""
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
        """A step's time, once the images that workers prepared ahead are used up."""
        torch.set_num_threads(self.threads)
        for _ in range(PREFETCH + 1 if self.workers else 1):
            self.step()
        return seconds(lambda: [self.step() for _ in range(STEPS)]) / STEPS


def cost_of_rules(resolution: int, rounds: int) -> None:
    """The table of one resolution: each alternative, and what the rule loses against it."""
    spec = effnet.spec("b0", resolution=resolution, num_classes=2)
    with tempfile.TemporaryDirectory() as folder:
        data = photos_of(Path(folder), resolution)
        images = Images(60_000, short_side(data))  # as many as make workers worth their start
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=("rivals", "rules"), default="rivals")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--px", type=int, nargs="+", choices=BATCHES, default=[224, 64, 32])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.mode == "rules":
        for px in options.px:
            cost_of_rules(px, options.rounds)
        sys.exit()
    with torch_threads(options.threads):
        for px in options.px:
            conditions = Conditions.now(BATCHES[px], options.layout, "torchvision", "timm")
            rows = compare(px, options)
            if options.json:
                sys.stdout.write(console.json_line({"conditions": conditions.to_dict(), "rows": rows}))
                continue
            lines = [
                (
                    row["network"],
                    f"{row['ratio']:.2f}",
                    *(f"{row[key]:.0f}" for key in ("median_ms", "p10_ms", "p90_ms")),
                )
                for row in rows
            ]
            columns = "<network", "x", "ms", "10 %", "90 %"
            title = f"A training step of B0 at {px} px, {BATCHES[px]} images"
            console.table(
                columns, lines, title=title, note=f"{conditions}\n{options.rounds} rounds; x: faster rival = 1"
            )
