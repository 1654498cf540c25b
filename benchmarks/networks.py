"""The torch module compared with torchvision's and timm's on this machine: one image, a batch, and a training step.

    python benchmarks/networks.py [--variant b0] [--rounds 9]

All contestants have the same random weights and take turns in this process, round by round; figures are medians over
the rounds, and x is relative to torchvision in NCHW. Float32, eager, torch's default threads. Logits are first compared
with torchvision's.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torchvision
from torch import nn

import effnet
from effnet.arch.spec import NumericPolicy
from effnet.machine import this_machine


def contestants(variant: str) -> dict[str, nn.Module]:
    """The same weights in three libraries' modules, each in both memory formats."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"efficientnet_{variant}")().eval()
    eps = next(module.eps for module in theirs.modules() if isinstance(module, nn.BatchNorm2d))
    ours = effnet.EfficientNet(effnet.spec(variant), policy=NumericPolicy(bn_eps=eps)).eval()
    third = timm.create_model(f"efficientnet_{variant}", drop_path_rate=0.2, bn_eps=eps).eval()
    # the state dicts hold the same tensors in the same order under other names
    for network in (ours, third):
        network.load_state_dict(dict(zip(network.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs(images)
        for network in (ours, third):
            torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-6)
    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    named = {"torchvision": theirs, "timm": third, "effnet": ours}
    return {
        f"{name} {layout}": copy.deepcopy(network).to(memory_format=formats[layout])
        for layout in formats
        for name, network in named.items()
    }


def inference(network: nn.Module, images: torch.Tensor) -> None:
    """One batch in eval mode."""
    network.eval()
    with torch.inference_mode():
        network(images)


def training_step(network: nn.Module, images: torch.Tensor) -> None:
    """Forward, backward and an SGD step."""
    network.train()
    network.zero_grad()
    nn.functional.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.long)).backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 1e-6 * parameter.grad


def compare(title: str, step: Callable[[nn.Module, torch.Tensor], None], batch: int, size: int, rounds: int) -> None:
    """Time `step` for every contestant, interleaved, and print medians and ratios."""
    images = torch.randn(batch, 3, size, size)
    laid = {name: images.contiguous(memory_format=_format(name)) for name in NETWORKS}
    times: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, network in NETWORKS.items():
            started = time.perf_counter()
            step(network, laid[name])
            if turn:
                times[name].append(time.perf_counter() - started)
    base = statistics.median(times["torchvision NCHW"])
    print(f"\n{title}, batch {batch}, {size} px")
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"  {name:<26} {1000 * median:9.1f} ms  {base / median:5.2f}x  (min {1000 * min(taken):.1f})")


def _format(name: str) -> torch.memory_format:
    return torch.channels_last if name.endswith("channels_last") else torch.contiguous_format


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="b0", choices=[f"b{i}" for i in range(8)])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    NETWORKS = contestants(options.variant)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    print(f"{options.variant}, {this_machine()}, {torch.get_num_threads()} threads, float32, {versions}")
    px = effnet.spec(options.variant).resolution
    compare("inference", inference, 1, px, options.rounds)
    compare("inference", inference, 16, px, options.rounds)
    compare("training step", training_step, 8, px, options.rounds)
