"""ONNX: a network's graph as a file, and ONNX Runtime, which runs it.

Writing a file needs the package onnx; running one needs only onnxruntime.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.arch.blocks import Activation
from effnet.errors import ArtifactError
from effnet.files import MARK
from effnet.machine import this_machine
from effnet.process import unchanged
from effnet.runtime.artifact import Model
from effnet.runtime.graph import INPUT, OUTPUT, Array, Builder, Network, Pads, build, linear_of, network_of
from effnet.runtime.onnx_file import read_linear, with_maps
from effnet.runtime.session import Backend, Compiler, Logits, Maps, Pixels
from effnet.weights.bundle import Bundle

OPSET, IR = 17, 9  # versions of ONNX that ONNX Runtime reads since 1.16


def compiler(model: Model, backend: Backend, *, recording: bool = False) -> Compiler:
    """See runtime.select.compiler. An artifact is compiled for the batch that it was exported for, or for any."""
    _onnxruntime()  # raises ImportError here, not with the first image
    compile = partial(OnnxGraph, threads=backend.threads, recording=recording)
    if not isinstance(model, Bundle):
        path = model.path
        whole = cache(lambda process, streams: compile(path, streams=streams))
        mapped = cache(lambda process, streams: compile(with_maps(path.read_bytes()), streams=streams))
        return Compiler(
            lambda images, streams: whole(os.getpid(), streams),
            lambda images, streams: mapped(os.getpid(), streams).maps,
            lambda: read_linear(path.read_bytes()),
        )
    import onnx  # noqa: F401

    network = network_of(model)
    return Compiler(
        lambda images, streams: compile(make(network, images or None, {}), streams=streams),
        lambda images, streams: compile(with_maps(make(network, images or None, {})), streams=streams).maps,
        lambda: linear_of(model),
    )


def make(network: Network, batch: int | None, metadata: Mapping[str, Any]) -> bytes:
    """The network as the bytes of an ONNX file for `batch` images (None: any number), with its metadata."""
    import onnx

    builder = _OnnxBuilder()
    logits = build(network, builder, batch)
    size, images = network.input.size, "batch" if batch is None else batch
    value, uint8, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [*builder.nodes, onnx.helper.make_node("Identity", [logits], [OUTPUT])],
        network.spec.name,
        [value(INPUT, uint8, (images, size, size, network.input.channels))],
        [value(OUTPUT, float32, (images, network.spec.num_classes))],
        builder.tensors,
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR, producer_name=MARK)
    onnx.helper.set_model_props(model, {MARK: json.dumps(metadata)})
    content: bytes = model.SerializeToString()
    return content


class _OnnxBuilder(Builder):
    """Nodes of an ONNX graph, as graph.Builder has them; a node is the name of its output."""

    def __init__(self) -> None:
        import onnx

        self.onnx: Any = onnx
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def pixels(self, batch: int | None, size: int, channels: int, mean: Array) -> str:
        """Transposed, then less the mean, which is faster than the reverse order."""
        x = self._node("Transpose", INPUT, perm=(0, 3, 1, 2))
        x = self._node("Cast", x, to=self.onnx.TensorProto.FLOAT)
        return self._node("Sub", x, self._tensor(mean.reshape(-1, 1, 1)))

    def convolve(self, x: str, filters: Array, bias: Array, stride: int, pads: Pads, depthwise: bool) -> str:
        how = {"strides": (stride, stride), "pads": (pads[0], pads[0], pads[1], pads[1])}
        groups = len(filters) if depthwise else 1
        return self._node("Conv", x, self._tensor(filters), self._tensor(bias), group=groups, **how)

    def activate(self, x: str, kind: Activation) -> str:
        """SiLU has no node of its own: it is x sigmoid(x)."""
        if kind == "silu":
            return self.multiply(x, self.sigmoid(x))
        if kind == "relu":
            return self._node("Relu", x)
        return self._node("Clip", x, *(self._tensor(np.array(end, np.float32)) for end in (0, 6)))

    def sigmoid(self, x: str) -> str:
        return self._node("Sigmoid", x)

    def max_pool(self, x: str) -> str:
        return self._node("MaxPool", x, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))

    def average(self, x: str) -> str:
        return self._node("GlobalAveragePool", x)

    def multiply(self, x: str, y: str) -> str:
        return self._node("Mul", x, y)

    def add(self, x: str, y: str) -> str:
        return self._node("Add", x, y)

    def classify(self, x: str, weight: Array, bias: Array) -> str:
        return self._node("Gemm", self._node("Flatten", x), self._tensor(weight), self._tensor(bias), transB=1)

    def _node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.layer}.{kind.lower()}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def _tensor(self, values: NDArray[np.float32]) -> str:
        name = f"weights_{len(self.tensors)}"
        self.tensors.append(self.onnx.numpy_helper.from_array(values, name))
        return name


class OnnxGraph:
    """An ONNX file in ONNX Runtime.

    Args:
        file: the ONNX file, or its bytes.
        threads: how many it may use; None: one for each core.
        streams: calls side by side, each in a thread of the caller; they share the other threads.
        recording: whether it records how long each node took, which costs time.

    Raises:
        ArtifactError: it is not an ONNX file.
    """

    def __init__(
        self, file: Path | bytes, threads: int | None = None, *, streams: int = 1, recording: bool = False
    ) -> None:
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        if streams > 1:
            threads = max(1, (threads or this_machine().cores) - streams + 1)  # the callers' threads compute as well
        options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
        self._folder = tempfile.TemporaryDirectory() if recording else None
        if self._folder:
            options.enable_profiling, options.profile_file_prefix = True, f"{self._folder.name}/nodes"
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            name = file if isinstance(file, Path) else "the network"
            raise ArtifactError(f"{name} cannot be read by ONNX Runtime: {str(error).splitlines()[0]}") from error

    def __call__(self, pixels: Pixels) -> Logits:
        """Logits (N, K) float32 of pixels (N, size, size, C) uint8, N as the graph has it."""
        logits: Logits = self._session.run([OUTPUT], {INPUT: pixels})[0]
        return logits

    def maps(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Logits, and the last feature maps (N, C, h, w) float32; of a file of `with_maps`."""
        logits, maps = self._session.run(None, {INPUT: pixels})
        return logits, maps

    def recorded(self) -> list[list[tuple[str, float]]]:
        """The nodes of each call in order, and their seconds; nothing is recorded afterwards."""
        if self._folder is None:
            return []
        with self._folder:
            events = json.loads(Path(self._session.end_profiling()).read_text())
        calls: list[list[tuple[str, float]]] = []
        for event in sorted(events, key=lambda event: int(event["ts"])):
            if event["name"] == "model_run":
                calls.append([])
            elif event["cat"] == "Node":
                calls[-1].append((event["name"], event["dur"] / 1e6))
        return calls


def _onnxruntime() -> Any:
    """The package, without its reports: since 1.29 it sends Microsoft the model's name and a hash of its graph."""
    with unchanged():
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by the import
        return import_module("onnxruntime")
