"""Inference: effnet's own choice against tuned scripts of torch, ONNX Runtime and OpenVINO.

    python benchmarks/inference.py [--rows b0@224x1,b0@224x32,...] [--rounds 9] [--engines] [--compile b0] [--json FILE]
                                  [--parts 1,2,4]
    EFFNET_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/inference.py --engines     native and OpenVINO with AVX2

A row is a variant, its resolution and its batch. All contestants have the same weights: random, but as confident on two
photos as a trained network (see rows.py); those of torchvision's network, or of effnet's for the Lites, which
torchvision lacks. effnet loads them from a file and is called through `classifier.logits` with engine and precision
"auto", and also with its own engine in fp32 and bf16. effnet and OpenVINO normalise uint8 pixels themselves; for the
others normalisation is not timed. All use every core. `--engines` skips torch; if OpenVINO's instruction set is
limited, ONNX Runtime is skipped, since it cannot be limited.

All outputs are first compared with torchvision's in fp32, by the largest difference of a logit relative to the largest
logit. If a contestant that claims fp32 differs by more than 1e-4, the run fails.

`--parts`: OpenVINO and ONNX Runtime also get a batch in parts of this many images, one part per core at a time, which
is their best setting for batches.

In each round the contestants take turns, in reverse order every second round. Before each turn there is a pause, in
which the previous contestant's threads stop spinning (torch's, OpenMP's and ONNX Runtime's wait actively for a while).
The first call of a turn wakes threads and fills caches and is not timed; then calls are timed for a tenth of a second,
at least one. A turn's time is the median of its calls, and a contestant's the median of its turns. "of ours" compares
turns of the same round; above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rows import MEAN, STD, Pixels, Row, network_of, normalised, photo_pixels, untrained
from torch import Tensor, nn

import effnet
from effnet.machine import this_machine
from effnet.models.efficientnet import EfficientNet
from effnet.native import instruction_set
from effnet.runtime.select import Selection, installed_engines, open_session
from effnet.runtime.session import TITLES, Backend
from effnet.weights.load import open_model

ROWS = "b0@224x1,b0@224x32,b4@380x1,b4@380x8,lite0@224x1,lite0@224x32,b0@192x1,b0@240x1,b0@260x1"
SAME = 1e-4  # largest difference in fp32, relative to the largest logit
BASE = "torch, NCHW"
LIMIT = os.environ.get("ONEDNN_MAX_CPU_ISA", "")  # instruction set of OpenVINO
OPENVINO_BF16 = this_machine().bf16 and not LIMIT
TARGET = 0.97  # relative to the best rival's speed
PAUSE, TURN = 0.05, 0.1  # seconds of the pause before a turn, and of its timed calls
LIBRARIES = ("torch", "torchvision", "timm", "onnxruntime", "openvino")

Figures = dict[str, Any]
Call = Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class Contestant:
    """A way to get the logits of a batch, ready to be called."""

    name: str
    precision: str
    call: Call


def torch_call(network: nn.Module, images: Tensor, layout: torch.memory_format, dtype: torch.dtype) -> Call:
    """A call of an eager or compiled module."""
    network, images = network.to(dtype, memory_format=layout), images.to(dtype, memory_format=layout)

    @torch.no_grad()  # freezing needs this one; inference_mode is no faster
    def call() -> NDArray[np.float32]:
        logits: NDArray[np.float32] = network(images).float().numpy()
        return logits

    return call


def in_torch(row: Row, make: Callable[[], nn.Module], images: Tensor, compiled: bool) -> Iterable[Contestant]:
    """Eager, with folded batch normalisation, and compiled; `make` returns a fresh network."""
    import timm
    from torch.fx.experimental.optimization import fuse

    theirs, last, fp32 = make(), torch.channels_last, torch.float32
    yield Contestant(BASE, "fp32", torch_call(theirs, images, torch.contiguous_format, fp32))
    yield Contestant("torch, channels_last", "fp32", torch_call(make(), images, last, fp32))
    if isinstance(theirs, EfficientNet):
        return
    eps = next(module.eps for module in theirs.modules() if isinstance(module, nn.BatchNorm2d))
    third = timm.create_model(f"efficientnet_{row.variant}", bn_eps=eps).eval()
    # the state dicts hold the same tensors in the same order under other names
    third.load_state_dict(dict(zip(third.state_dict(), theirs.state_dict().values(), strict=True)))
    yield Contestant("timm, channels_last", "fp32", torch_call(third, images, last, fp32))
    yield Contestant("torch, BN folded, channels_last", "fp32", torch_call(fuse(make()), images, last, fp32))
    if this_machine().bf16:
        call = torch_call(fuse(make()), images, last, torch.bfloat16)
        yield Contestant("torch, BN folded, channels_last", "bf16", call)
    if compiled:
        import_module("torch._inductor.config").freezing = True
        network = torch.compile(make().to(memory_format=last), mode="max-autotune")
        yield Contestant("torch.compile, max-autotune, freezing", "fp32", torch_call(network, images, last, fp32))


def in_onnxruntime(network: nn.Module, images: Tensor, folder: Path) -> Iterable[Contestant]:
    """torch's own export with all optimisations, with ONNX Runtime's default threads or a fixed number."""
    import onnxruntime

    file, values = folder / "torchvision.onnx", images.numpy()
    torch.onnx.export(network, (images,), str(file), input_names=["images"], output_names=["logits"], dynamo=False)
    for threads in (0, this_machine().cores):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

        def call(session: onnxruntime.InferenceSession = session) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = session.run(None, {"images": values})[0]
            return logits

        yield Contestant(f"ONNX Runtime, {f'{threads} threads' if threads else 'its own threads'}", "fp32", call)


def in_openvino(network: nn.Module, pixels: Pixels) -> Iterable[Contestant]:
    """OpenVINO's own conversion, normalising pixels itself; in latency mode, and with two streams of half a batch."""
    import openvino as ov
    from openvino.preprocess import PrePostProcessor

    def model_of(batch: int) -> ov.Model:
        example = torch.zeros(batch, 3, *pixels.shape[1:3])
        model = ov.convert_model(network, example_input=example, input=list(example.shape))
        steps = PrePostProcessor(model)
        steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
        scale, mean = ([255 * value for value in values] for values in (STD, MEAN))
        steps.input().preprocess().convert_element_type(ov.Type.f32).mean(mean).scale(scale)
        steps.input().model().set_layout(ov.Layout("NCHW"))
        return steps.build()

    core, batch = ov.Core(), len(pixels)
    cores = this_machine().cores
    for precision, hint in (("fp32", "f32"), ("bf16", "bf16"))[: 1 + OPENVINO_BF16]:
        hints = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": cores}
        latency = core.compile_model(model_of(batch), "CPU", {"PERFORMANCE_HINT": "LATENCY", **hints})
        request = latency.create_infer_request()

        def one(request: ov.InferRequest = request) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = request.infer([pixels], share_inputs=True)[0]
            return logits

        yield Contestant("OpenVINO, latency", precision, one)
        if batch % 2:
            continue
        streams = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 2, **hints}
        halves = core.compile_model(model_of(batch // 2), "CPU", streams)
        requests = [halves.create_infer_request() for _ in range(2)]

        def two(requests: Sequence[ov.InferRequest] = requests) -> NDArray[np.float32]:
            for request, part in zip(requests, np.split(pixels, 2), strict=True):
                request.start_async([part], share_inputs=True)
            for request in requests:
                request.wait()
            return np.concatenate([request.get_output_tensor().data for request in requests])

        yield Contestant("OpenVINO, 2 streams of half the batch", precision, two)


def in_effnet(file: Path, pixels: Pixels) -> Iterable[Contestant]:
    """effnet's choice, and its own engine in both precisions."""
    for engine, precision in (("auto", "auto"), ("native", "fp32"), ("native", "bf16")):
        classifier = effnet.load(file, engine=engine, precision=precision, batch=len(pixels))
        print(f"effnet, {engine}, {precision}: {classifier.selection}", flush=True)
        found = classifier.selection.backend.precision
        yield Contestant(f"effnet, {engine}", found, lambda classifier=classifier: classifier.logits(pixels))


def in_parts(file: Path, pixels: Pixels, sizes: Iterable[int]) -> Iterable[Contestant]:
    """OpenVINO's and ONNX Runtime's sessions with a batch in parts of each size."""
    bundle, cores = open_model(file), this_machine().cores
    engines = [
        Backend(name) for name in installed_engines(None) if name == "openvino" or (name == "onnxruntime" and not LIMIT)
    ]
    if Backend("openvino") in engines and OPENVINO_BF16:
        engines.append(Backend("openvino", "bf16"))
    for first in engines:
        for part in (size for size in sizes if size * cores <= len(pixels)):
            backend = dataclasses.replace(first, streams=cores, part=part)
            session = open_session(bundle, Selection(backend, len(pixels), ""))
            name = f"{TITLES[backend.engine]}, {cores} streams of {part} image{'' if part == 1 else 's'}"
            yield Contestant(name, backend.precision, lambda session=session: session(pixels))


def turn(call: Call) -> float:
    """Median seconds per call, once its threads are awake."""
    time.sleep(PAUSE)
    call()
    laps = []
    while sum(laps) < TURN:
        started = time.perf_counter()
        call()
        laps.append(time.perf_counter() - started)
    return statistics.median(laps)


def rounds_of(contestants: Sequence[Contestant], rounds: int) -> list[list[float]]:
    """Seconds of each contestant, round by round."""
    times: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds):
        order = range(len(contestants))
        for place in order if number % 2 == 0 else reversed(order):
            times[place].append(turn(contestants[place].call))
    return times


def compare(row: Row, rounds: int, compiled: bool, parts: Sequence[int], engines: bool) -> Figures:
    """Measure one row."""
    pixels, network = photo_pixels(row.batch, row.px), network_of(row)
    state, images = network.state_dict(), normalised(pixels)

    def fresh() -> nn.Module:
        """Another copy of the network."""
        again = untrained(row)
        again.load_state_dict(state)
        return again.eval()

    with tempfile.TemporaryDirectory() as folder:
        os.environ["EFFNET_CACHE"] = folder  # empty, so that rules decide
        file = Path(folder) / "torchvision.pth"
        if isinstance(network, EfficientNet):
            file = effnet.save(network, Path(folder) / "bundle", input=effnet.InputSpec(row.px, row.px))
        else:
            torch.save(state, file)
            if row.px != effnet.spec(row.variant).resolution:
                theirs = open_model(file).network
                file = effnet.save(theirs, Path(folder) / "bundle", input=effnet.InputSpec(row.px, row.px))
        contestants = [
            *in_effnet(file, pixels),
            *([] if engines else in_torch(row, fresh, images, compiled)),
            *([] if LIMIT else in_onnxruntime(network, images, Path(folder))),
            *in_openvino(network, pixels),
            *in_parts(file, pixels, parts),
        ]
        with torch.no_grad():
            expected = network(images).numpy()
        largest = np.abs(expected).max()
        differences = [float(np.abs(each.call() - expected).max() / largest) for each in contestants]
        load = os.getloadavg()[0]
        times = rounds_of(contestants, rounds)
    return {
        "row": str(row),
        "load": load,
        "contestants": [
            {
                "name": each.name,
                "precision": each.precision,
                "difference": difference,
                "ms": 1e3 * statistics.median(taken),
                "images_per_s": row.batch / statistics.median(taken),
                "rounds_ms": [1e3 * each for each in taken],
            }
            for each, difference, taken in zip(contestants, differences, times, strict=True)
        ],
    }


def against(own: Figures, rivals: Sequence[Figures]) -> str:
    """effnet's speed against the fastest of `rivals`."""
    best = min(rivals, key=lambda each: each["ms"])
    ratio = of_ours(best, own)
    return f"{ratio:.2f}x the speed of {best['name']} ({best['precision']}){'' if ratio >= TARGET else ', MISSED'}"


def of_ours(rival: Figures, own: Figures) -> float:
    """How many times faster effnet is, by turns of the same round."""
    pairs = zip(rival["rounds_ms"], own["rounds_ms"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def show(report: Figures) -> bool:
    """Print a row's table and conclusions; return whether all outputs are right."""
    rows = report["contestants"]
    ours, rivals = ([each for each in rows if each["name"].startswith("effnet") is own] for own in (True, False))
    base = next((each for each in rows if each["name"] == BASE), ours[0])
    print(f"\n### {report['row']}\nLoad before: {report['load']:.1f}\n")
    print("| variant | precision | ms | images/s | x | of ours | differs by |\n|---|---|---:|---:|---:|---:|---:|")
    for each in rows:
        cells = (
            each["name"],
            each["precision"],
            f"{each['ms']:.2f}",
            f"{each['images_per_s']:.1f}",
            f"{of_ours(base, each):.2f}",
            f"{of_ours(each, ours[0]):.2f}",
            f"{each['difference']:.1e}",
        )
        print(f"| {' | '.join(cells)} |")
    print(f"\neffnet: {against(ours[0], rivals)}")
    for own in ours[1:]:
        same = [each for each in rivals if each["precision"] == own["precision"]]
        if same:
            print(f"{own['name']} in {own['precision']}, against its like: {against(own, same)}", flush=True)
    wrong = [each["name"] for each in rows if each["precision"] == "fp32" and not each["difference"] < SAME]
    if wrong:
        print(f"\nWRONG ANSWERS: {', '.join(wrong)}")
    return not wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", default="b0", help="variants that torch.compile builds too, a minute each")
    parser.add_argument("--parts", default="1,2,4", help="images of the parts of a batch in OpenVINO and ONNX Runtime")
    parser.add_argument("--engines", action="store_true", help="without torch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # from exporters
    versions = ", ".join(f"{name} {import_module(name).__version__}" for name in LIBRARIES)
    isas = f"native {instruction_set()}, OpenVINO {LIMIT or 'all that the processor has'}"
    conditions = f"{this_machine()}; {torch.get_num_threads()} threads; {isas}; {versions}; {options.rounds} rounds"
    print(conditions)
    reports, right, parts = [], True, [int(part) for part in options.parts.split(",") if part]
    for row in map(Row.parse, options.rows.split(",")):
        reports.append(compare(row, options.rounds, row.variant in options.compile.split(","), parts, options.engines))
        right &= show(reports[-1])
        if options.json:
            options.json.write_text(json.dumps({"conditions": conditions, "rows": reports}, indent=1))
    sys.exit(0 if right else 1)
