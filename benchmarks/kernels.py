"""Cost of the rule that selects the depthwise weight gradient's kernel, relative to the fastest kernel of each layer.

    python benchmarks/kernels.py [--rounds 9] [--threads 2] [--layout channels_last] [--px 32 64 128 224]

The kernels take turns at the weight gradient of each depthwise layer of B0 on random maps, round by round; figures are
medians. `loss` is the extra time of the rule's kernel in percent of the fastest. The last rows give the total of all
layers, and its loss as a share of a whole training step of the network, which is timed as well.

ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 in the environment approximate a processor without AVX-512.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter
from functools import partial

import torch
from networks import training_step

import effnet
from effnet import console
from effnet.machine import this_machine
from effnet.metrics.timing import LAYOUTS, random_images, seconds
from effnet.models.depthwise import KERNELS, DepthwiseConv2d, Filter, select_kernel, weight_gradient
from effnet.runtime.torch import torch_threads

AVX2 = os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2"
FEATURES = ("avx2",) if AVX2 else this_machine().features
BATCHES = {32: 128, 64: 128, 128: 32, 224: 16}  # images per step, by resolution
Layer = tuple[int, int, Filter]  # channels, height and width of the map, geometry of the filter


def layers_of(pixels: int) -> Counter[Layer]:
    """The distinct depthwise layers of B0 with their counts."""
    spec = effnet.spec("b0", resolution=pixels)
    return Counter(
        (layer.inputs, layer.input_size, Filter(block.kernel_size, block.stride, block.kernel_size // 2))
        for block in spec.blocks
        for layer in block.layers
        if layer.depthwise
    )


def medians(layer: Layer, batch: int, layout: str, rounds: int) -> tuple[dict[str, float], str]:
    """Milliseconds of each kernel, and the rule's choice."""
    channels, size, filter = layer
    x = random_images(batch, size, channels=channels, layout=layout)
    conv = DepthwiseConv2d(channels, filter.size, filter.stride, filter.padding)
    with torch.no_grad():
        grad = torch.randn_like(conv(x))
    tasks = {name: partial(weight_gradient, name, x, grad, filter) for name in KERNELS}
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            took = seconds(task)
            if turn:  # the first is a warm-up
                taken[name].append(1e3 * took)
    return {name: statistics.median(values) for name, values in taken.items()}, select_kernel(x, filter, FEATURES)


def step_ms(pixels: int, layout: str, rounds: int) -> float:
    """Milliseconds of a training step of the network with default settings."""
    network = effnet.EfficientNet(effnet.spec("b0", resolution=pixels))
    if layout == "channels_last":
        network = network.to(memory_format=torch.channels_last)
    images = random_images(BATCHES[pixels], pixels, layout=layout)
    training_step(network, images)
    return 1e3 * statistics.median(seconds(lambda: training_step(network, images)) for _ in range(rounds))


def show(pixels: int, options: argparse.Namespace) -> None:
    """Print the table of one image size."""
    batch, rows = BATCHES[pixels], []
    total, best = 0.0, 0.0
    for (channels, size, filter), count in layers_of(pixels).items():
        times, chosen = medians((channels, size, filter), batch, options.layout, options.rounds)
        fastest = min(times, key=times.__getitem__)
        total, best = total + count * times[chosen], best + count * times[fastest]
        name = f"{count} x {channels} channels, {size} px, {filter.size}x{filter.size}, stride {filter.stride}"
        figures = (f"{times[kernel]:.2f}" for kernel in KERNELS)
        rows.append((name, *figures, chosen, fastest, f"{100 * (times[chosen] / times[fastest] - 1):.0f}"))
    step = step_ms(pixels, options.layout, min(options.rounds, 5))
    rows.append(("all", *["" for _ in KERNELS], f"{total:.1f}", f"{best:.1f}", f"{100 * (total / best - 1):.0f}"))
    rows.append((f"of a step of {step:.0f} ms", *["" for _ in KERNELS], "", "", f"{100 * (total - best) / step:.1f}"))
    columns = "<layer", *KERNELS, "rule", "fastest", "loss %"
    title = f"Depthwise weight gradients of B0 at {pixels} px, {batch} images, ms"
    settings = f"{torch.get_num_threads()} threads; {options.layout}; fp32; torch {torch.__version__}"
    note = f"{this_machine()}{' held to AVX2' if AVX2 else ''}; {settings}; {options.rounds} rounds"
    console.table(columns, rows, title=title, note=note)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--px", type=int, nargs="+", choices=BATCHES, default=list(BATCHES))
    options = parser.parse_args()
    with torch_threads(options.threads):
        for pixels in options.px:
            show(pixels, options)
