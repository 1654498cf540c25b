"""effnet's own engine: a network's numbers and weights in the order in which the kernels of native/ read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from effnet.arch.blocks import Activation
from effnet.arch.spec import NetworkSpec, Padding
from effnet.runtime.graph import PIXEL, Network, fold, pads_of

ACTIVATIONS = {name: number for number, name in enumerate(get_args(Activation), start=1)}  # as in native/network.h
LARGEST_KERNEL = 63


def unsupported(spec: NetworkSpec) -> str | None:
    """Why the kernels cannot run a network; None where they can."""
    if kinds := {block.op for block in spec.blocks} - {"mbconv"}:
        return f"has no {' and '.join(sorted(kinds))} blocks"
    if spec.stem_pool:
        return "has no pooling behind the stem"
    if max(spec.stem_kernel, *(block.kernel_size for block in spec.blocks)) > LARGEST_KERNEL:
        return f"has no filters beyond {LARGEST_KERNEL} pixels"
    return None


def numbers(spec: NetworkSpec, padding: Padding) -> list[int]:
    """A network's sizes, as native/layout.cpp reads them."""
    shape = spec.shape
    stem_pad, _ = pads_of(spec.stem_kernel, spec.stem_stride, spec.resolution, padding)
    found = [spec.resolution, spec.in_channels, spec.stem_kernel, spec.stem_stride, stem_pad, shape.stem_channels]
    found += [ACTIVATIONS[spec.activation], shape.head_channels if shape.head else 0, spec.num_classes, len(spec.blocks)]
    for block in spec.blocks:
        pad, _ = pads_of(block.kernel_size, block.stride, block.input_size, padding)
        found += [block.in_channels, block.expanded_channels, block.out_channels, block.kernel_size, block.stride, pad]
        found += [block.squeeze_channels, block.has_shortcut, block.expand_ratio != 1]
    return found


def arrays(network: Network) -> Iterator[NDArray[np.float32]]:
    """A network's weights, normalisation folded into them, in the same order."""
    spec, pixels, weights = network.spec, network.input, network.weights
    yield np.array(pixels.mean, np.float32) * np.float32(PIXEL)
    filters, bias = fold(network, "stem")
    yield (filters / (PIXEL * np.array(pixels.std))[:, None, None]).astype(np.float32)
    yield bias.astype(np.float32)
    for block in spec.blocks:
        for layer in block.layers:
            if block.squeeze_channels and layer == block.path[-1]:
                for name in ("squeeze.weight", "squeeze.bias", "excite.weight", "excite.bias"):
                    yield np.asarray(weights[f"{block.name}.se.{name}"], np.float32)
            for array in fold(network, f"{block.name}.{layer.name}"):
                yield array.astype(np.float32)
    if spec.head:
        for array in fold(network, "head"):
            yield array.astype(np.float32)
    yield np.asarray(weights["classifier.weight"], np.float32)
    yield np.asarray(weights["classifier.bias"], np.float32)
