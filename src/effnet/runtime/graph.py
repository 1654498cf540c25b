"""A trained network as an engine's graph: one walk over its blocks, for every engine.

The graph takes pixels, (N, H, W, C) uint8, and returns logits (N, K) float32. Optimisations that engines would do
themselves are done here, in float64, so that every engine starts from the same few nodes:

- Batch normalisation is folded into its convolution.
- The InputSpec's division by 255 and by std are folded into the stem's filters. Its mean is subtracted first, because
  the stem pads with the mean colour.
- SAME padding, which torch computes per image, is a constant: an artifact has one image size.

Every node is named after its layer, such as stages.3.0.expand.convolution, so that layers can be identified.

Needs no torch: weights are numpy arrays under native names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from effnet.arch.blocks import OPS, Activation, BlockSpec, Layer
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy, Padding
from effnet.runtime.session import Linear
from effnet.weights.bundle import Bundle

Array = NDArray[np.float32]
Weights = Mapping[str, NDArray[Any]]  # native names
Pads = tuple[int, int]  # before and after, the same for height and width

PIXEL = 255.0  # the largest value of a byte
INPUT, OUTPUT = "images", "logits"  # names of an artifact's input and output


class Builder(Protocol):
    """Makes the nodes of an engine's graph, each named after its layer and its type."""

    layer: str = ""  # of the nodes that follow; it has one node of each type

    def pixels(self, batch: int | None, size: int, channels: int, mean: Array) -> Any:
        """The input (N, size, size, C) uint8 as (N, C, size, size) float32, less `mean` (C); None: any batch."""

    def convolve(self, x: Any, filters: Array, bias: Array, stride: int, pads: Pads, depthwise: bool) -> Any:
        """A convolution; filters (out, in, k, k), or (C, 1, k, k) of a depthwise one; bias (out)."""

    def activate(self, x: Any, kind: Activation) -> Any:
        """silu, relu6 or relu."""

    def sigmoid(self, x: Any) -> Any:
        """The logistic function."""

    def max_pool(self, x: Any) -> Any:
        """3x3 pixels, stride 2, a pixel of padding around."""

    def average(self, x: Any) -> Any:
        """(N, C, H, W) -> (N, C, 1, 1)."""

    def multiply(self, x: Any, y: Any) -> Any:
        """Element by element, y repeated over the map."""

    def add(self, x: Any, y: Any) -> Any:
        """Element by element."""

    def classify(self, x: Any, weight: Array, bias: Array) -> Any:
        """(N, C, 1, 1) -> logits (N, K); weight (K, C)."""


@dataclass(frozen=True)
class Network:
    """The source of a graph."""

    spec: NetworkSpec  # at the resolution of `input`
    policy: NumericPolicy
    input: InputSpec
    weights: Weights


def network_of(bundle: Bundle) -> Network:
    """The source of a bundle's graph."""
    config = bundle.config
    return Network(config.spec, config.policy, config.input, bundle.weights)


def linear_of(bundle: Bundle) -> Linear:
    """The classifier of a bundle's network."""
    weight, bias = (np.asarray(bundle.weights[f"classifier.{name}"], np.float32) for name in ("weight", "bias"))
    return Linear(weight, bias)


def build(network: Network, builder: Builder, batch: int | None) -> Any:
    """Build a graph for `batch` images, or any number, and return the node of its logits."""
    spec, pixels = network.spec, network.input
    mean, std = (np.array(values, np.float64) for values in (pixels.mean, pixels.std))
    builder.layer = "pixels"
    x = builder.pixels(batch, pixels.size, pixels.channels, (PIXEL * mean).astype(np.float32))

    # stage 1: convolution
    builder.layer = "stem"
    filters, bias = fold(network, "stem")
    pads = pads_of(spec.stem_kernel, spec.stem_stride, pixels.size, network.policy.padding)
    x = _convolve(builder, x, (filters / (PIXEL * std)[:, None, None], bias), spec.stem_stride, pads)
    x = builder.activate(x, spec.activation)
    if spec.stem_pool:
        x = builder.max_pool(x)

    # stages 2-8: blocks
    for block in spec.blocks:
        x = _block(network, builder, x, block)

    # stage 9: 1x1 convolution, pooling, fully connected layer
    if spec.head:
        builder.layer = "head"
        x = builder.activate(_convolve(builder, x, fold(network, "head")), spec.activation)
    builder.layer = "classifier"
    x = builder.average(x)
    weight, shift = (np.asarray(network.weights[f"classifier.{name}"], np.float32) for name in ("weight", "bias"))
    return builder.classify(x, weight, shift)


def _block(network: Network, builder: Builder, x: Any, block: BlockSpec) -> Any:
    """Its layers in order, then the sum with its input or the output of its shortcut layer."""
    spec, given, entered = network.spec, x, x
    for layer in block.layers:
        if layer.shortcut:
            entered = _layer(network, builder, entered, block, layer)
            continue
        if block.squeeze_channels and layer == block.path[-1]:
            x = builder.multiply(x, _gate(network, builder, x, block))
        x = _layer(network, builder, x, block, layer)
        if layer.activation:
            x = builder.activate(x, spec.activation)
    if block.has_shortcut or entered is not given:
        builder.layer = block.name
        x = builder.add(entered, x)
    return builder.activate(x, spec.activation) if OPS[block.op].activates_sum else x


def _layer(network: Network, builder: Builder, x: Any, block: BlockSpec, layer: Layer) -> Any:
    builder.layer = f"{block.name}.{layer.name}"
    stride = 1 if layer.output_size == layer.input_size else block.stride
    pads = pads_of(layer.kernel_size, stride, layer.input_size, network.policy.padding)
    return _convolve(builder, x, fold(network, f"{block.name}.{layer.name}"), stride, pads, layer.depthwise)


def _gate(network: Network, builder: Builder, x: Any, block: BlockSpec) -> Any:
    builder.layer = f"{block.name}.se.pool"
    x = builder.average(x)
    for name in ("squeeze", "excite"):
        builder.layer = f"{block.name}.se.{name}"
        filters, bias = (
            np.asarray(network.weights[f"{block.name}.se.{name}.{part}"], np.float64) for part in ("weight", "bias")
        )
        x = _convolve(builder, x, (filters, bias))
        x = builder.activate(x, network.spec.activation) if name == "squeeze" else builder.sigmoid(x)
    return x


def _convolve(
    builder: Builder,
    x: Any,
    folded: tuple[NDArray[np.float64], NDArray[np.float64]],
    stride: int = 1,
    pads: Pads = (0, 0),
    depthwise: bool = False,
) -> Any:
    filters, bias = (np.ascontiguousarray(part, np.float32) for part in folded)
    return builder.convolve(x, filters, bias, stride, pads, depthwise)


def fold(network: Network, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Filters (out, in / groups, k, k) and bias (out) of a convolution with its normalisation folded in."""
    scale, bias = normalisation(network, name)
    return np.asarray(network.weights[f"{name}.conv.weight"], np.float64) * scale[:, None, None, None], bias


def normalisation(network: Network, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The factor and the offset of each output of a convolution's normalisation."""
    weight, bias, mean, var = (
        np.asarray(network.weights[f"{name}.norm.{part}"], np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(var + network.policy.bn_eps)
    return scale, bias - mean * scale


def pads_of(kernel_size: int, stride: int, size: int, padding: Padding) -> Pads:
    """Pixels of padding of a convolution whose input has this height and width."""
    if padding == "symmetric" or stride == 1:
        return (kernel_size - 1) // 2, (kernel_size - 1) // 2
    missing = max(0, kernel_size - stride + size % stride)
    return missing // 2, missing - missing // 2
