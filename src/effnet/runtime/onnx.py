"""ONNX: a network's graph as a file, and ONNX Runtime, which runs it.

Writing needs the package onnx, running needs onnxruntime alone.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.arch.blocks import Activation
from effnet.errors import ArtifactError, MissingExtraError
from effnet.files import MARK
from effnet.machine import this_machine
from effnet.runtime.engines import in_parts
from effnet.runtime.graph import Array, Network, Pads, build

OPSET, IR = 17, 9  # what ONNX Runtime 1.16 and every later one read
INPUT, OUTPUT = "images", "logits"
# In protobuf: the field of a model's metadata_props; the kinds of fields, and the bytes of those of fixed size.
METADATA, NUMBER, LENGTH, FIXED = 14, 0, 2, {1: 8, 5: 4}


def make(network: Network, batch: int | None, about: Mapping[str, Any]) -> bytes:
    """The network as an ONNX file's bytes, which say what `about` says.

    Raises:
        MissingExtraError: the package onnx is not installed.
    """
    onnx = _package("onnx", "writing ONNX")
    builder = OnnxBuilder()
    logits = build(network, builder, batch)
    see, images = network.input, "batch" if batch is None else batch
    pixels = (images, see.size, see.size, see.channels)
    value, uint8, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [*builder.nodes, onnx.helper.make_node("Identity", [logits], [OUTPUT])],
        network.spec.name,
        [value(INPUT, uint8, pixels)],
        [value(OUTPUT, float32, (images, network.spec.num_classes))],
        builder.tensors,
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR, producer_name=MARK)
    onnx.helper.set_model_props(model, {MARK: json.dumps(about)})
    content: bytes = model.SerializeToString()
    return content


class OnnxBuilder:
    """Nodes of an ONNX graph; a node is the name of its output."""

    def __init__(self) -> None:
        self.onnx = _package("onnx", "writing ONNX")
        self.layer = ""
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def begin(self, layer: str) -> None:
        """See Builder, as with all that follows."""
        self.layer = layer

    def pixels(self, batch: int | None, size: int, channels: int, mean: Array) -> str:
        """Transpose, Cast and Sub: of a mean for each plane, for one of each pixel's channels takes milliseconds."""
        x = self._node("Transpose", INPUT, perm=(0, 3, 1, 2))
        x = self._node("Cast", x, to=self.onnx.TensorProto.FLOAT)
        return self._node("Sub", x, self._tensor(mean.reshape(-1, 1, 1)))

    def convolve(self, x: str, filters: Array, bias: Array, stride: int, pads: Pads, depthwise: bool) -> str:
        """Conv."""
        how = {"strides": (stride, stride), "pads": (pads[0], pads[0], pads[1], pads[1])}
        groups = len(filters) if depthwise else 1
        return self._node("Conv", x, self._tensor(filters), self._tensor(bias), group=groups, **how)

    def activate(self, x: str, kind: Activation) -> str:
        """SiLU has no node of its own: it is x sigmoid(x)."""
        if kind == "silu":
            return self.multiply(x, self.sigmoid(x))
        if kind == "relu":
            return self._node("Relu", x)
        return self._node("Clip", x, self._tensor(np.array(0, np.float32)), self._tensor(np.array(6, np.float32)))

    def sigmoid(self, x: str) -> str:
        """Sigmoid."""
        return self._node("Sigmoid", x)

    def max_pool(self, x: str) -> str:
        """MaxPool."""
        return self._node("MaxPool", x, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))

    def average(self, x: str) -> str:
        """GlobalAveragePool."""
        return self._node("GlobalAveragePool", x)

    def multiply(self, x: str, y: str) -> str:
        """Mul."""
        return self._node("Mul", x, y)

    def add(self, x: str, y: str) -> str:
        """Add."""
        return self._node("Add", x, y)

    def classify(self, x: str, weight: Array, bias: Array) -> str:
        """Flatten and Gemm."""
        return self._node("Gemm", self._node("Flatten", x), self._tensor(weight), self._tensor(bias), transB=1)

    def _node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.layer}.{kind.lower()}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def _tensor(self, values: NDArray[np.float32]) -> str:
        name = f"weights_{len(self.tensors)}"
        self.tensors.append(self.onnx.numpy_helper.from_array(values, name))
        return name


def words_in(file: Path) -> str:
    """What an ONNX file says of itself; "" where effnet did not write it. Nothing else of it is read.

    The file is a protobuf message; its field 14, metadata_props, holds pairs of a key and a value.

    Raises:
        ArtifactError: it is no ONNX file.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for number, start, end in _fields(content, 0, len(content)):
                if number == METADATA:
                    pair = {part: content[first:last] for part, first, last in _fields(content, start, end)}
                    if pair.get(1) == MARK.encode():
                        return pair[2].decode()
    except (ValueError, IndexError, KeyError) as error:
        raise ArtifactError(f"{file} cannot be read as ONNX: {error}") from error
    return ""


def _fields(content: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that has a length, between two places of a protobuf message."""

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = content[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < end:
        key = varint()
        number, kind = key >> 3, key & 7
        if kind not in (NUMBER, LENGTH, *FIXED):
            raise ValueError(f"byte {place} begins no field")
        size = FIXED[kind] if kind in FIXED else varint()
        if kind == NUMBER:
            continue
        if place + size > end:
            raise ValueError("it was cut short")
        if kind == LENGTH:
            yield number, place, place + size
        place += size


class OnnxSession:
    """An ONNX file in ONNX Runtime.

    Args:
        file: the ONNX file, or its bytes.
        threads: how many it may use; None: as many as there are cores.
        images: that go together where the file takes any number; None: all.
        streams: runs side by side, each by a thread of its own; they share the threads that are left over.
        recording: whether it remembers how long each node took, which costs time.

    Raises:
        ArtifactError: it is no ONNX file.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        file: Path | bytes,
        threads: int | None = None,
        *,
        images: int | None = None,
        streams: int = 1,
        recording: bool = False,
    ) -> None:
        runtime = _package("onnxruntime", "running ONNX files")
        options = runtime.SessionOptions()
        if streams > 1:
            threads = max(1, (threads or this_machine().cores) - streams + 1)  # the streams' own are among them
        options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
        self._folder = tempfile.TemporaryDirectory() if recording else None
        if self._folder:
            options.enable_profiling, options.profile_file_prefix = True, f"{self._folder.name}/nodes"
        try:
            self._session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions have no common kind
            name = file if isinstance(file, Path) else "the network"
            raise ArtifactError(f"{name} cannot be read by ONNX Runtime: {str(error).splitlines()[0]}") from error
        own = self._session.get_inputs()[0].shape[0]
        self._images = own if isinstance(own, int) else images
        self._pool = ThreadPoolExecutor(streams) if streams > 1 else None

    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Logits (N, K) of pixels (N, size, size, C), N a multiple of its own number of images."""
        return in_parts(self._run, pixels, self._images, self._pool)

    def _run(self, pixels: NDArray[np.uint8]) -> Array:
        logits: Array = self._session.run([OUTPUT], {INPUT: pixels})[0]
        return logits

    def recorded(self) -> list[list[tuple[str, float]]]:
        """For each call its nodes in order, and their seconds; nothing is recorded afterwards."""
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


def require() -> None:
    """Raise MissingExtraError unless a network can be written and run."""
    for name in ("onnxruntime", "onnx"):
        _package(name, "ONNX Runtime")


def _package(name: str, what: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(what, {"onnx": "export", "onnxruntime": "onnx"}[name]) from error
