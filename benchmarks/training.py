"""A training step of B0 against its rivals, at the sizes of big photos and of small ones.

    python benchmarks/training.py [--rounds 9] [--threads 2] [--layout channels_last] [--px 224 64 32] [--json]

Every contestant has the same random weights and runs in this process, in turn, round by round: forward, backward and an
SGD step, float32, eager. Figures are medians; x is against the faster rival of the same rounds. Before that, logits and
gradients are compared with torchvision's in eval mode, where nothing is random.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from networks import contestants, training_step
from torch import Tensor, nn

from effnet import console
from effnet.arch.memory import Keep
from effnet.arch.recompute import RecomputePlan
from effnet.metrics.timing import LAYOUTS, Conditions, Timing, random_images, seconds
from effnet.models.depthwise import DepthwiseConv2d
from effnet.runtime.torch import torch_threads

BATCHES = {224: 16, 128: 32, 96: 64, 64: 128, 32: 128}  # images a step, by pixels
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--px", type=int, nargs="+", choices=BATCHES, default=[224, 64, 32])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
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
