"""Time per layer of B0 at 224 px in OpenVINO, compared with this processor's limits.

    python benchmarks/layers.py [--batches 1 32] [--runs 60] [--write benchmarks/results/PROCESSOR.md]

The graph is effnet's own. OpenVINO's counters give the time of each node; figures are medians over the runs. The
counters take time themselves, so the sum is shown next to a run without them. Work follows from the network's spec:
multiply-adds (MAC), and bytes as if each layer read its input and weights and wrote its output once, in the named
precision.

The ceilings are measured with the same threads: multiply-adds per second of a chain of wide 1x1 convolutions in
OpenVINO, in fp32, bf16 and int8; bytes per second, read and written, of a copy that fits the cache and of one that does
not. A layer's floor is the longer of the times for its multiply-adds and for its bytes (from the cache if they fit). A
depthwise convolution's floor uses the fp32 ceiling: it has no sums over channels, which bf16 and int8 instructions
accelerate. The floor of fused blocks counts the same multiply-adds, but only the bytes of a block's input, weights and
output, and the depthwise convolution's output written once and read once, since SE's gate needs all of it before the
projection starts. No floor includes SiLU, whose cost is measured by replacing it with ReLU in the same graph.

--write replaces the text between the two markers of a page.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from rows import Row, network_of, photo_pixels

from effnet.arch.blocks import BlockSpec
from effnet.arch.spec import NetworkSpec
from effnet.machine import this_machine
from effnet.runtime.graph import Network
from effnet.runtime.graph import network_of as graph_network_of
from effnet.runtime.openvino import HINTS, core, make
from effnet.weights.load import open_model

MARKERS = "<!-- benchmarks/layers.py: begin -->\n", "<!-- benchmarks/layers.py: end -->"
KINDS = {  # by the suffix of a layer's name
    "stem": "stem",
    "expand": "expand, 1x1",
    "depthwise": "depthwise",
    "se.pool": "SE, pooling",
    "se.squeeze": "SE, gate",
    "se.excite": "SE, gate",
    "se.scale": "SE, product",
    "project": "project, 1x1",
    "head": "head, 1x1",
    "classifier": "classifier",
    "other": "input, reorders",
}
GATE = "squeeze", "excite"
SIZES = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes per number
CACHED, UNCACHED = 2**20, 2**24  # numbers of 4 bytes in a copy: 4 and 64 MiB, read and written
WIDE, ACROSS, DEEP = 512, 28, 4  # the convolutions of a ceiling, a few milliseconds: channels, map, number


@dataclass(frozen=True)
class Work:
    """The work of a layer for a batch."""

    macs: int = 0
    maps: int = 0  # numbers read and written, without weights
    weights: int = 0
    single: int = 0  # the macs of depthwise convolutions

    def __add__(self, other: Work) -> Work:
        fields = "macs", "maps", "weights", "single"
        return Work(*(getattr(self, name) + getattr(other, name) for name in fields))


@dataclass(frozen=True)
class Ceilings:
    """The processor's best rates."""

    macs: dict[str, float]  # per second, by precision
    cached: float  # bytes per second
    uncached: float

    def seconds(self, work: Work, precision: str) -> float:
        """The shortest time for some work."""
        size = SIZES[precision] * (work.maps + work.weights)
        rate = self.cached if size <= 2 * 4 * CACHED else self.uncached
        dense = (work.macs - work.single) / self.macs[precision]
        return max(dense + work.single / self.macs["fp32"], size / rate)


def work_of(spec: NetworkSpec, batch: int) -> dict[str, Work]:
    """The work of every layer by its name."""
    stem, pixels, last = spec.shape.stem_channels, spec.resolution**2, spec.shape.final_size**2
    head, features = spec.shape.head_channels, spec.shape.features
    out = stem * spec.shape.stem_size**2
    filters = stem * spec.in_channels * spec.stem_kernel**2
    works = {"stem": Work(filters * spec.shape.stem_size**2, spec.in_channels * pixels + out, filters)}
    for block in spec.blocks:
        for layer in block.layers:
            inputs = 1 if layer.depthwise else layer.inputs
            filters = inputs * layer.outputs * layer.kernel_size**2
            maps = layer.inputs * layer.input_size**2 + layer.elements
            shortcut = layer.elements if layer.name == "project" and block.has_shortcut else 0
            macs = filters * layer.output_size**2
            single = macs if layer.depthwise else 0
            works[f"{block.name}.{layer.name}"] = Work(macs, maps + shortcut, filters, single)
        wide, size = block.expanded_channels, block.output_size**2
        gate = wide * block.squeeze_channels
        works[f"{block.name}.se.pool"] = Work(0, wide * size)
        works |= {f"{block.name}.se.{name}": Work(gate, wide + block.squeeze_channels, gate) for name in GATE}
        works[f"{block.name}.se.scale"] = Work(0, 2 * wide * size)
    works["head"] = Work(features * head * last, (features + head) * last, features * head)
    classes = head * spec.num_classes
    works["classifier"] = Work(classes, head * last + head + spec.num_classes, classes)
    return {
        name: Work(batch * each.macs, batch * each.maps, each.weights, batch * each.single)
        for name, each in works.items()
    }


def layer_of(node: Any) -> str:
    """The layer of a node of OpenVINO's runtime model: the first of those that were fused into it."""
    names = str(node.get_rt_info()["originalLayersNames"].value).split(",")
    layer = names[0].rpartition(".")[0]
    if not layer.startswith(("st", "head", "classifier")):
        return "other"
    return layer.replace("se.excite", "se.scale") if names[0].endswith("multiply") else layer


def compiled_of(model: Any, precision: str, **more: object) -> Any:
    """A model for one request on all cores."""
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": this_machine().cores, **more}
    return core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": HINTS[precision], **hints})


def profile(
    network: Network, pixels: NDArray[np.uint8], precision: str, runs: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each layer, and of whole runs without counters: of the network, and with ReLU instead of SiLU."""
    model = make(network, len(pixels), {})
    other = make(replace(network, spec=replace(network.spec, activation="relu")), len(pixels), {})
    counted = compiled_of(model, precision, PERF_COUNT=True)
    layers = {node.friendly_name: layer_of(node) for node in counted.get_runtime_model().get_ordered_ops()}
    request = counted.create_infer_request()
    plain = {"silu": compiled_of(model, precision), "relu": compiled_of(other, precision)}
    requests = {name: each.create_infer_request() for name, each in plain.items()}
    taken: dict[str, list[float]] = defaultdict(list)
    whole: dict[str, list[float]] = defaultdict(list)
    for number in range(runs + 3):  # three are warm-ups
        request.infer([pixels], share_inputs=True)
        for name, each in requests.items():
            started = time.perf_counter()
            each.infer([pixels], share_inputs=True)
            if number >= 3:
                whole[name].append(time.perf_counter() - started)
        for info in request.get_profiling_info() if number >= 3 else ():
            taken[info.node_name].append(info.real_time.total_seconds())
    found: dict[str, float] = defaultdict(float)
    for node, times in taken.items():
        found[layers.get(node, "other")] += statistics.median(times)
    return found, {name: statistics.median(times) for name, times in whole.items()}


def chain(precision: str) -> tuple[Any, int]:
    """A model of wide 1x1 convolutions, and its multiply-adds."""
    ops, rng = ov.opset13, np.random.default_rng(0)
    x = parameter = ops.parameter([1, WIDE, ACROSS, ACROSS], np.float32)
    for _ in range(DEEP):
        filters = ops.constant(rng.normal(0, WIDE**-0.5, (WIDE, WIDE, 1, 1)).astype(np.float32))
        if precision == "int8":
            low, high = np.float32(-4), np.float32(4 * 127 / 128)  # 256 levels, of which one is 0
            x = ops.fake_quantize(x, low, high, low, high, 256)
            filters = ops.fake_quantize(filters, -high, high, -high, high, 255)
        x = ops.convolution(x, filters, [1, 1], [0, 0], [0, 0], [1, 1])
    return ov.Model([ops.reduce_mean(x, np.array([2, 3]))], [parameter]), DEEP * (WIDE * ACROSS) ** 2


def quickest(function: Callable[[], object], runs: int = 200) -> float:
    """Seconds of the fastest run: a ceiling is what was reached once."""
    laps = []
    for _ in range(runs):
        started = time.perf_counter()
        function()
        laps.append(time.perf_counter() - started)
    return min(laps)


def measure_ceilings() -> Ceilings:
    """Measure the ceilings of this processor with all its cores."""
    macs = {}
    for precision in SIZES:
        model, work = chain(precision)
        request = compiled_of(model, precision).create_infer_request()
        images = np.random.default_rng(0).normal(size=(1, WIDE, ACROSS, ACROSS)).astype(np.float32)
        macs[precision] = work / quickest(lambda request=request, images=images: request.infer([images]))
    rates = []
    for count in (CACHED, UNCACHED):
        source, target = torch.ones(count), torch.zeros(count)
        rates.append(2 * 4 * count / quickest(lambda source=source, target=target: target.copy_(source)))
    return Ceilings(macs, *rates)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column of text."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def cells(
    name: str, seconds: float, total: float, work: Work, floor: float, precision: str, top: Ceilings
) -> list[str]:
    """A row for a group of layers."""
    moved = SIZES[precision] * (work.maps + work.weights)
    rate, peak = work.macs / seconds, top.macs[precision]
    return [
        name,
        f"{1e3 * seconds:.2f}",
        f"{seconds / total:.0%}",
        f"{work.macs / 1e9:.3f}",
        f"{rate / 1e9:.0f}",
        f"{rate / peak:.0%}",
        f"{moved / 1e6:.1f}",
        f"{moved / seconds / 1e9:.1f}",
        f"{1e3 * floor:.2f}",
    ]


COLUMNS = "ms", "share", "GMAC", "GMAC/s", "of ceiling", "MB", "GB/s", "floor, ms"


def together(
    groups: dict[str, list[str]], times: dict[str, float], works: dict[str, Work], precision: str, top: Ceilings
) -> list[list[str]]:
    """A row for each group of layers."""
    total = sum(times.values())
    return [
        cells(
            name,
            sum(times[layer] for layer in layers),
            total,
            sum((works.get(layer, Work()) for layer in layers), Work()),
            sum(top.seconds(works.get(layer, Work()), precision) for layer in layers),
            precision,
            top,
        )
        for name, layers in groups.items()
    ]


def part_of(layer: str) -> str:
    """The block of a layer, or its kind."""
    return ".".join(layer.split(".")[:3]) if layer.startswith("stages.") else layer


def fused_maps(block: BlockSpec, batch: int) -> int:
    """Numbers that still leave the core: input, output, and twice the map that waits for the gate."""
    waiting = 2 * block.expanded_channels if block.squeeze_channels else 0
    outputs = (waiting + block.out_channels) * block.output_size**2
    return batch * (block.in_channels * block.input_size**2 + outputs)


def fused_floor(spec: NetworkSpec, works: dict[str, Work], batch: int, precision: str, top: Ceilings) -> float:
    """Seconds of all blocks if the other maps inside a block never leave the core."""
    total = 0.0
    for block in spec.blocks:
        work = sum((each for name, each in works.items() if part_of(name) == block.name), Work())
        total += top.seconds(replace(work, maps=fused_maps(block, batch)), precision)
    return total


def section(spec: NetworkSpec, bundle: Any, batch: int, precision: str, runs: int, top: Ceilings) -> str:
    """The section for one batch size in one precision."""
    pixels = photo_pixels(batch, spec.resolution)
    times, whole = profile(graph_network_of(bundle), pixels, precision, runs)
    works, total = work_of(spec, batch), sum(times.values())
    kinds: dict[str, list[str]] = {name: [] for name in KINDS.values()}
    for layer in times:
        kinds[next(kind for end, kind in KINDS.items() if layer.endswith(end))].append(layer)
    blocks: dict[str, list[str]] = defaultdict(list)
    for layer in times:
        blocks[part_of(layer)].append(layer)
    inside = {layer: taken for layer, taken in times.items() if layer.startswith("stages.")}
    floor = sum(top.seconds(works[layer], precision) for layer in inside if layer in works)
    fused = fused_floor(spec, works, batch, precision, top)
    passes = sum(taken for layer, taken in inside.items() if layer.endswith(("se.pool", "se.scale")))
    wide = [works[layer] for layer in inside if layer.endswith(("expand", "depthwise", "project", "pool", "scale"))]
    saved = SIZES[precision] * (
        sum(work.maps for work in wide) - sum(fused_maps(block, batch) for block in spec.blocks)
    )
    cached, uncached = saved / top.cached, saved / top.uncached
    silu = whole["silu"] - whole["relu"]
    ms = [f"{1e3 * taken:.2f} ms" for taken in (sum(inside.values()), floor, fused, passes, cached, uncached, silu)]
    return f"""
### {batch} image{"" if batch == 1 else "s"}, {precision}
{1e3 * whole["silu"]:.2f} ms without counters; the nodes add up to {1e3 * total:.2f} ms.

{table(("kind of layer", *COLUMNS), together({k: v for k, v in kinds.items() if v}, times, works, precision, top))}
{table(("block", *COLUMNS), together(blocks, times, works, precision, top))}
- The blocks take {ms[0]}. Their layers, one by one, cannot take less than {ms[1]} here; fused, not less than {ms[2]};
  neither counts SiLU.
- SE's pooling and product, which a fused block does in passing, take {ms[3]}.
- SiLU takes {ms[6]}: so much less is a run with ReLU in its place, {1e3 * whole["relu"]:.2f} ms.
- Fusing keeps {saved / 1e6:.1f} MB of maps inside the core: {ms[4]} at the cache's rate, {ms[5]} at the memory's.
"""


def page(batches: Sequence[int], runs: int) -> str:
    """The whole text."""
    load, top = os.getloadavg()[0], measure_ceilings()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "torchvision.pth"
        torch.save(network_of(Row("b0", 224, 1)).state_dict(), file)
        bundle = open_model(file)
    spec = bundle.config.spec
    precisions = ["fp32", "bf16"] if this_machine().bf16 else ["fp32"]
    rates = ", ".join(f"{name} {2 * rate / 1e9:.0f}" for name, rate in top.macs.items())
    parts = [section(spec, bundle, batch, each, runs, top) for batch in batches for each in precisions]
    version = ov.__version__.split("-")[0]
    return f"""{this_machine()}; {this_machine().cores} threads; OpenVINO {version}; load before: {load:.1f}

Ceilings: {rates} GFLOP/s (two for each MAC); copies {top.cached / 1e9:.0f} GB/s in the cache (4 MiB to 4 MiB),
{top.uncached / 1e9:.0f} GB/s outside (64 MiB to 64 MiB), read and written.
{"".join(parts)}"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--write", type=Path, help="a page with the markers")
    options = parser.parse_args()
    text = page(options.batches, options.runs)
    print(text)
    if options.write:
        begin, end = MARKERS
        before, _, rest = options.write.read_text().partition(begin)
        options.write.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
