"""A process that gives effnet's own engine extreme weights, and wrong sizes, counts and lengths.

    python -m attacks.engine_user < NUMBERS      (in drills/) a line of JSON for each line of standard input

It runs with a sanitized library (see drills/engine.py), which ends the process at the first access outside an array. It
does not need torch.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy, StageSpec
from effnet.errors import ArgumentError
from effnet.native import NativeNetwork, instruction_sets, sizes
from effnet.runtime.graph import Network
from effnet.runtime.native import arrays, numbers
from effnet.weights.layouts import COUNTER, NATIVE

MOST = 50_000_000  # bytes of a network that is run, at most
# bits of float32: zeros, the smallest and largest numbers, infinities, and several NaNs
BITS = (0, 0x80000000, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000)
NANS = (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)
NUMBERS = (-(2**31), -1, 0, 1, 2, 3, 5, 7, 63, 64, 255, 4096, 1 << 20, (1 << 20) + 1, 2**31 - 1)
Array = NDArray[np.float32]


def draw_spec(draw: random.Random) -> NetworkSpec:
    """A small random network with any options of MBConv blocks."""
    stages = tuple(
        StageSpec(
            draw.choice((1, 2, 6)),
            draw.choice((1, 3, 5, 7, 9)),
            draw.choice((1, 2)),
            draw.choice((8, 16, 24, 40)),
            draw.choice((1, 2)),
            squeeze_ratio=draw.choice((None, 0.0, 0.7)),
        )
        for _ in range(draw.randint(1, 3))
    )
    return NetworkSpec(
        "drawn",
        stages,
        resolution=draw.randint(1, 41),
        num_classes=draw.randint(1, 20),
        in_channels=draw.randint(1, 5),
        activation=draw.choice(("silu", "relu6", "relu")),
        squeeze_ratio=draw.choice((0.0, 0.25)),
        stem=draw.choice((8, 16)),
        head=draw.choice((0, 8, 72)),
        stem_stride=draw.choice((1, 2)),
        stem_kernel=draw.choice((1, 3, 5)),
    )


def draw_network(draw: random.Random) -> tuple[Network, list[str]]:
    """A network with ordinary weights, and the names of the weights that affect its output."""
    spec, source = draw_spec(draw), np.random.default_rng(draw.getrandbits(32))
    weights: dict[str, Any] = {}
    for name, shape in NATIVE.shapes(spec).items():
        if name.endswith("running_var"):
            weights[name] = source.uniform(0.5, 2, shape).astype(np.float32)
        elif not name.endswith(COUNTER):
            weights[name] = source.normal(0, 0.3, shape).astype(np.float32)
    input_spec = InputSpec(spec.resolution, spec.resolution).with_channels(spec.in_channels)
    return Network(spec, NumericPolicy(), input_spec, weights), [name for name in weights if ".se." not in name]


def poison(values: Array, bits: int, draw: random.Random) -> None:
    """Set some of the values to these bits."""
    flat = values.reshape(-1).view(np.uint32)
    for _ in range(draw.choice((1, 1, 5, flat.size))):
        flat[draw.randrange(flat.size)] = bits


def run(described: Sequence[int], held: Sequence[Array], draw: random.Random) -> Array:
    """Logits of random images, with random precision and threads; the network is closed afterwards."""
    precision, threads, images = draw.choice(("fp32", "bf16")), draw.randint(1, 3), draw.randint(0, 3)
    network = NativeNetwork(described, held, precision, threads)
    try:
        side, channels = described[0], described[1]
        pixels = np.frombuffer(draw.randbytes(images * side * side * channels), np.uint8)
        pixels = pixels.reshape(images, side, side, channels)
        features = np.empty((images, *network.map_shape), np.float32) if draw.random() < 0.5 else None
        return network(pixels, features)
    finally:
        network.close()


def try_weights(draw: random.Random) -> str:
    """Run extreme weights: with a NaN, the output must not be finite. Returns what is wrong, or ""."""
    network, counting = draw_network(draw)
    name, bits = draw.choice(sorted(network.weights)), draw.choice((*BITS, *NANS))
    poison(network.weights[name], bits, draw)
    with np.errstate(all="ignore"):
        held = [*arrays(network)]
    logits = run(numbers(network.spec, "symmetric"), held, draw)
    poisoned = network.weights[name]
    if poisoned.ndim == 4:  # on a small map, only the centre of a filter is sure to meet more than padding
        poisoned = poisoned[..., poisoned.shape[2] // 2, poisoned.shape[3] // 2]
    if name in counting and np.isnan(poisoned).any() and len(logits) and np.isfinite(logits).all():
        return f"answers with finite numbers where {name} holds a NaN ({bits:#x}) in {network.spec.activation}"
    return ""


def try_sizes(draw: random.Random) -> str:
    """Try invalid numbers and lengths: they must be refused, or run within their arrays."""
    network, _ = draw_network(draw)
    described, held = numbers(network.spec, draw.choice(("symmetric", "same"))), [*arrays(network)]
    for _ in range(draw.choice((0, 1, 1, 3))):
        place = draw.randrange(len(described))
        change = draw.choice(("set", "set", "near", "drop", "repeat"))
        if change == "set":
            described[place] = draw.choice(NUMBERS)
        elif change == "near":
            described[place] += draw.choice((-1, 1))
        elif change == "drop":
            del described[place]
        else:
            described.insert(place, described[place])
        described = described or [0]
    if draw.random() < 0.5:
        place = draw.randrange(len(held))
        held[place] = held[place].reshape(-1)[: draw.randrange(held[place].size + 1)].copy()
    if draw.random() < 0.2:
        del held[draw.randrange(len(held))]
    try:
        if sum(sizes(described, "fp32")) < MOST and described[0] ** 2 * described[1] < MOST:
            run(described, held, draw)
    except ArgumentError as error:
        return "" if "\n" not in str(error) else f"is refused in several lines: {error}"
    return ""


def main() -> None:
    """Do the tries that standard input names."""
    isas = instruction_sets()
    print(json.dumps({"isas": isas}), flush=True)
    for line in sys.stdin:
        seed, number = json.loads(line)
        draw = random.Random(f"engine {seed} {number}")
        os.environ["EFFNET_ISA"] = draw.choice(isas)
        try:
            wrong = (try_weights if draw.random() < 0.5 else try_sizes)(draw)
        except Exception as error:
            wrong = f"raises {type(error).__name__}: {error}"
        print(json.dumps({"wrong": wrong and f"{os.environ['EFFNET_ISA']}: {wrong}"}), flush=True)


if __name__ == "__main__":
    main()
