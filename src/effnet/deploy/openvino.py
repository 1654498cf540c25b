"""OpenVINO: a network's graph as its two files, and its CPU engine, which runs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.arch.shape import Activation
from effnet.deploy.graph import Array, Network, Pads, build
from effnet.errors import ArtifactError, MissingExtraError
from effnet.weights.folders import MARK

HINTS = {"fp32": "f32", "bf16": "bf16"}  # what it computes with, whatever its own default for the processor


def make(network: Network, batch: int | None, about: Mapping[str, Any]) -> Any:
    """The network as an OpenVINO model that says what `about` says.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    ov = _openvino()
    builder = OpenVinoBuilder()
    logits = build(network, builder, batch)
    model = ov.Model([logits], [builder.parameter], network.spec.name)
    model.set_rt_info(json.dumps(about), [MARK])
    return model


def write(model: Any, file: Path) -> None:
    """Write a model as `file` (.xml) and its weights beside it (.bin)."""
    _openvino().save_model(model, file, compress_to_fp16=False)


class OpenVinoBuilder:
    """Nodes of an OpenVINO model."""

    def __init__(self) -> None:
        self.ops = _openvino().opset13
        self.parameter: Any = None

    def pixels(self, batch: int | None, size: int, channels: int, mean: Array) -> Any:
        """See Builder, as with all that follows."""
        self.parameter = self.ops.parameter([-1 if batch is None else batch, size, size, channels], np.uint8, "images")
        x = self.ops.convert(self.parameter, np.float32)
        x = self.ops.subtract(x, mean)
        return self.ops.transpose(x, np.array([0, 3, 1, 2]))

    def convolve(self, x: Any, filters: Array, bias: Array, stride: int, pads: Pads, depthwise: bool) -> Any:
        """A convolution, or one of as many groups as there are channels, and a sum."""
        convolution = self.ops.group_convolution if depthwise else self.ops.convolution
        filters = filters[:, None] if depthwise else filters
        begin, end = ([pad, pad] for pad in pads)
        return self.add(convolution(x, filters, [stride, stride], begin, end, [1, 1]), bias.reshape(1, -1, 1, 1))

    def activate(self, x: Any, kind: Activation) -> Any:
        """Swish is SiLU."""
        if kind == "silu":
            return self.ops.swish(x)
        return self.ops.relu(x) if kind == "relu" else self.ops.clamp(x, 0.0, 6.0)

    def sigmoid(self, x: Any) -> Any:
        """Sigmoid."""
        return self.ops.sigmoid(x)

    def max_pool(self, x: Any) -> Any:
        """Max pooling; its second output, the places, is not used."""
        return self.ops.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)

    def average(self, x: Any) -> Any:
        """The mean of each map."""
        return self.ops.reduce_mean(x, np.array([2, 3]), keep_dims=True)

    def multiply(self, x: Any, y: Any) -> Any:
        """Element by element."""
        return self.ops.multiply(x, y)

    def add(self, x: Any, y: Any) -> Any:
        """Element by element."""
        return self.ops.add(x, y)

    def classify(self, x: Any, weight: Array, bias: Array) -> Any:
        """A matrix product and a sum."""
        flat = self.ops.reshape(x, np.array([0, -1]), special_zero=True)
        return self.ops.add(self.ops.matmul(flat, weight, False, True), bias)


class OpenVinoSession:
    """A network in OpenVINO, compiled for this processor.

    Args:
        model: a model, or its .xml file.
        threads: how many it may use; None: as many as there are cores.

    Raises:
        ArtifactError: it is no such file.
        MissingExtraError: OpenVINO is not installed.
    """

    def __init__(self, model: Any, threads: int | None = None) -> None:
        core = _openvino().Core()
        try:
            model = core.read_model(model) if isinstance(model, Path) else model
        except RuntimeError as error:
            raise ArtifactError(f"{model} cannot be read by OpenVINO: {str(error).strip().splitlines()[-1]}") from error
        self.about: str = str(model.get_rt_info(MARK).value) if model.has_rt_info([MARK]) else ""
        hints: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        hints["INFERENCE_PRECISION_HINT"] = HINTS[_precision(self.about)]
        if threads:
            hints["INFERENCE_NUM_THREADS"] = threads
        self._request = core.compile_model(model, "CPU", hints).create_infer_request()

    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Logits (N, K) of pixels (N, size, size, C), as many as its batch."""
        logits: Array = self._request.infer([pixels], share_inputs=True)[0]
        return logits


def require() -> None:
    """Raise MissingExtraError unless a network can be written and run."""
    _openvino()


def _precision(about: str) -> str:
    """What an artifact computes with; whether its words make sense is for artifact.py to say."""
    try:
        precision = json.loads(about)["form"]["precision"]
    except (ValueError, KeyError, TypeError):
        return "fp32"
    return precision if precision in HINTS else "fp32"


def _openvino() -> Any:
    try:
        return import_module("openvino")
    except ImportError as error:
        raise MissingExtraError("OpenVINO", "openvino") from error
