"""OpenVINO: a network's graph as its two files, and its CPU engine, which runs them."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from effnet.arch.blocks import Activation
from effnet.errors import ArtifactError, without
from effnet.files import MARK
from effnet.runtime import onnx_file
from effnet.runtime.artifact import Model
from effnet.runtime.graph import INPUT, OUTPUT, Array, Builder, Network, Pads, build, linear_of, network_of
from effnet.runtime.options import EnginePrecision
from effnet.runtime.session import Backend, Compiler, Linear, Logits, Maps, Pixels
from effnet.weights.bundle import Bundle

_MAKING = threading.Lock()  # so that two threads do not create a Core each
# Its own default depends on the processor. An int8 graph names its 8-bit layers itself; the rest of it is fp32.
HINTS: dict[EnginePrecision, str] = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


def compiler(model: Model, backend: Backend, *, recording: bool = False) -> Compiler:
    """See runtime.select.compiler. The batch of an artifact is changed to the number of images."""
    compile = functools.partial(
        OpenVinoGraph, threads=backend.threads, precision=backend.precision, recording=recording
    )
    if isinstance(model, Bundle):
        core()  # raises ImportError here, not with the first image
        network = network_of(model)
        return Compiler(
            lambda images, streams: compile(make(network, images or None, {}), streams=streams),
            lambda images, streams: compile(with_maps(make(network, images or None, {})), streams=streams).maps,
            lambda: linear_of(model),
        )
    own, batch = read(model.path), model.form.batch or 0

    def sized(images: int) -> Any:
        return own if images == batch else for_batch(own, images or None)

    def linear() -> Linear:
        return onnx_file.read_linear(model.path.read_bytes()) if model.form.format == "onnx" else read_linear(own)

    return Compiler(
        lambda images, streams: compile(sized(images), streams=streams),
        lambda images, streams: compile(with_maps(sized(images)), streams=streams).maps,
        linear,
    )


def make(network: Network, batch: int | None, metadata: Mapping[str, Any]) -> Any:
    """The network as an OpenVINO model for `batch` images (None: any number), with its metadata."""
    builder = _OpenVinoBuilder()
    logits = build(network, builder, batch)
    model = _openvino().Model([logits], [builder.parameter], network.spec.name)
    _name(model)
    describe(model, metadata)
    return model


def _name(model: Any) -> None:
    """Name inputs and outputs as in the ONNX graph, and constants by their use; OpenVINO would number them."""
    for output, name in ((model.input(0), INPUT), (model.output(0), OUTPUT)):
        output.get_tensor().set_names({name})
        output.get_node().set_friendly_name(name)
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            (consumer,) = node.output(0).get_target_inputs()
            node.set_friendly_name(f"{consumer.get_node().get_friendly_name()}.{consumer.get_index()}")


def describe(model: Any, metadata: Mapping[str, Any]) -> None:
    """Give a model its metadata."""
    model.set_rt_info(json.dumps(metadata), [MARK])


def for_batch(model: Any, batch: int | None) -> Any:
    """A copy of a model that takes `batch` images; None: any number."""
    model = model.clone()
    shape = model.input(0).partial_shape
    shape[0] = -1 if batch is None else batch
    model.reshape(shape)
    return model


def with_maps(model: Any) -> Any:
    """A copy of a model whose second output is what its last mean averages: the map before the classifier.

    Raises:
        ArtifactError: it has no mean.
    """
    model = model.clone()
    model.add_outputs(_last(model, "ReduceMean").input_value(0))
    return model


def read_linear(model: Any) -> Linear:
    """The weight and the bias of a model's last product of matrices; in int8 what its 8 bits stand for.

    Raises:
        ArtifactError: it has none.
    """
    product = _last(model, "MatMul")
    (following,) = product.output(0).get_target_inputs()
    constants = [product.input_value(1), following.get_node().input_value(1)]
    found = core().compile_model(
        _openvino().Model(constants, [], "classifier"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    weight, bias = (np.array(values) for values in found([]).values())
    return Linear(weight, bias.ravel())


def _last(model: Any, kind: str) -> Any:
    """The last node of a kind: whatever the graph has of it comes before the classifier's."""
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == kind]
    if not found:
        raise ArtifactError(
            f"{model.get_friendly_name()} has no {kind}, as every graph of effnet: export the model again"
        )
    return found[-1]


def read(file: Path) -> Any:
    """The model in a file, .xml or .onnx.

    Raises:
        ArtifactError: OpenVINO cannot read it, or the .bin with the weights of an .xml is missing.
    """
    try:
        return core().read_model(file)
    except RuntimeError as error:
        reason, weights = str(error).strip().splitlines()[-1], file.with_suffix(".bin")
        if file.suffix == ".xml" and not weights.exists():
            reason = f"{weights.name} is missing, which holds its weights"
        raise ArtifactError(f"{file} cannot be read by OpenVINO: {reason}") from error


def write(model: Any, file: Path) -> None:
    """Write a model as `file` (.xml) and its weights beside it (.bin)."""
    _openvino().save_model(model, file, compress_to_fp16=False)


class _OpenVinoBuilder(Builder):
    """Nodes of an OpenVINO model, as graph.Builder has them."""

    def __init__(self) -> None:
        self.ops = _openvino().opset13
        self.parameter: Any = None

    def pixels(self, batch: int | None, size: int, channels: int, mean: Array) -> Any:
        """Converted, transposed, less the mean: in this order a single image of B0 takes two thirds of the time."""
        self.parameter = self.ops.parameter([-1 if batch is None else batch, size, size, channels], np.uint8)
        x = self._named(self.ops.convert(self.parameter, np.float32))
        x = self._named(self.ops.transpose(x, np.array([0, 3, 1, 2])))
        return self._named(self.ops.subtract(x, mean.reshape(1, -1, 1, 1)))

    def convolve(self, x: Any, filters: Array, bias: Array, stride: int, pads: Pads, depthwise: bool) -> Any:
        """A convolution, or one of as many groups as there are channels, and a sum."""
        convolution = self.ops.group_convolution if depthwise else self.ops.convolution
        filters = filters[:, None] if depthwise else filters
        begin, end = ([pad, pad] for pad in pads)
        x = self._named(convolution(x, filters, [stride, stride], begin, end, [1, 1]))
        return self.add(x, bias.reshape(1, -1, 1, 1))

    def activate(self, x: Any, kind: Activation) -> Any:
        if kind == "silu":
            return self._named(self.ops.swish(x))
        return self._named(self.ops.relu(x) if kind == "relu" else self.ops.clamp(x, 0.0, 6.0))

    def sigmoid(self, x: Any) -> Any:
        return self._named(self.ops.sigmoid(x))

    def max_pool(self, x: Any) -> Any:
        """Max pooling; its second output, the places, is not used."""
        return self._named(self.ops.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3])).output(0)

    def average(self, x: Any) -> Any:
        return self._named(self.ops.reduce_mean(x, np.array([2, 3]), keep_dims=True))

    def multiply(self, x: Any, y: Any) -> Any:
        return self._named(self.ops.multiply(x, y))

    def add(self, x: Any, y: Any) -> Any:
        return self._named(self.ops.add(x, y))

    def classify(self, x: Any, weight: Array, bias: Array) -> Any:
        flat = self._named(self.ops.reshape(x, np.array([0, -1]), special_zero=True))
        return self.add(self._named(self.ops.matmul(flat, weight, False, True)), bias)

    def _named(self, node: Any) -> Any:
        node.set_friendly_name(f"{self.layer}.{node.get_type_name().lower()}")
        return node


class OpenVinoGraph:
    """A model that OpenVINO compiled for this processor.

    Args:
        model: an OpenVINO model, for a certain number of images or any number.
        threads: how many it may use; None: one for each core.
        precision: precision of computing, unless the graph is int8.
        streams: concurrent calls, each on its share of the threads.
        recording: whether it records how long each node took, which costs time.
    """

    def __init__(
        self,
        model: Any,
        threads: int | None = None,
        *,
        precision: EnginePrecision = "fp32",
        streams: int = 1,
        recording: bool = False,
    ) -> None:
        hints: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[precision]}
        if streams > 1:
            hints |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": streams}
        if threads:
            hints["INFERENCE_NUM_THREADS"] = threads
        if recording:
            hints["PERF_COUNT"] = True
        self._recorded: list[list[tuple[str, float]]] | None = [] if recording else None
        compiled = core().compile_model(model, "CPU", hints)
        self._free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(streams):
            self._free.put(compiled.create_infer_request())

    def __call__(self, pixels: Pixels) -> Logits:
        """Logits (N, K) float32 of pixels (N, size, size, C) uint8, N as the graph has it."""
        (logits,) = self._infer(pixels, 1)
        return logits

    def maps(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Logits, and the last feature maps (N, C, h, w) float32; of a model of `with_maps`."""
        logits, maps = self._infer(pixels, 2)
        return logits, maps

    def _infer(self, pixels: Pixels, outputs: int) -> list[Array]:
        request = self._free.get()
        try:
            answer = request.infer([pixels], share_inputs=True, share_outputs=True)
            found = [np.array(answer[number]) for number in range(outputs)]
            if self._recorded is not None:
                nodes = request.get_profiling_info()
                self._recorded.append([(node.node_name, node.real_time.total_seconds()) for node in nodes])
            return found
        finally:
            self._free.put(request)

    def recorded(self) -> list[list[tuple[str, float]]]:
        """The nodes of each call in order, and their seconds."""
        return self._recorded or []


def core() -> Any:
    """This process's only Core. It is never released, because two of them can crash the process.

    A Core installs an alternate signal stack, and on destruction removes it and restores the one that it found. If two
    Cores are destroyed in the order of their creation, the second one restores the stack that the first one freed, and
    the next signal that Python handles, such as Ctrl-C, is a segmentation fault (OpenVINO 2026.4 on Linux).
    """
    with _MAKING:
        return _core()


@functools.cache
def _core() -> Any:
    """The Core, after one thread has created a first tensor and read it back.

    That fills tables in OpenVINO's binding, which releases the GIL meanwhile. Another thread that needs the same table
    would wait for it while it holds the GIL, for which the first one waits: two threads that created their first
    tensors at the same time deadlocked (OpenVINO 2026.4).
    """
    openvino = _openvino()
    np.array(openvino.Tensor(np.zeros(1, np.uint8)).data)
    return openvino.Core()


def _openvino() -> Any:
    """The package, imported without its telemetry, which sends a report at import and takes time."""
    with without("openvino_telemetry"):
        return import_module("openvino")
