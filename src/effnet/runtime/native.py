"""effnet's own engine: a network's sizes and weights in the order in which the kernels of native/ read them.

It runs every network of MBConv blocks, from its bundle, with any number of images. docs/architecture.md shows how a
block goes through the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from effnet.arch.blocks import Activation
from effnet.arch.spec import NetworkSpec, Padding
from effnet.errors import ArgumentError
from effnet.machine import this_machine
from effnet.native import KernelPrecision, NativeNetwork, instruction_set, instruction_sets, sizes
from effnet.runtime.artifact import Model
from effnet.runtime.graph import PIXEL, Network, linear_of, network_of, normalisation, pads_of
from effnet.runtime.options import EnginePrecision
from effnet.runtime.session import Backend, Compiler, Logits, Maps, Pixels
from effnet.weights.bundle import Bundle

ACTIVATIONS = {name: number for number, name in enumerate(get_args(Activation), start=1)}  # as in native/network.h
LARGEST_KERNEL = 63


def compiler(model: Model, backend: Backend, *, recording: bool = False) -> Compiler:
    """See runtime.select.compiler. One network serves any number of images, with and without their maps.

    Raises:
        ArgumentError: the kernels cannot run it, were not compiled when effnet was installed, or EFFNET_ISA is unknown.
    """
    if not isinstance(model, Bundle):
        raise ArgumentError("engine", backend.engine, "runs bundles and weights, not artifacts.")
    if reason := missing() or unsupported(model.config.spec):
        raise ArgumentError("engine", backend.engine, f"{reason}.")
    instruction_set()  # raises here, not with the first image
    network, threads = network_of(model), backend.threads or this_machine().cores
    whole = cache(lambda process: NativeGraph(network, backend.precision, threads, recording=recording))
    return Compiler(
        lambda images, streams: whole(os.getpid()),
        lambda images, streams: whole(os.getpid()).maps,
        lambda: linear_of(model),
    )


class NativeGraph:
    """A network with its weights packed for the kernels; see native.NativeNetwork.

    Args:
        network: what it is made of.
        precision: fp32 or bf16.
        threads: how many.
        recording: whether it records how long each phase took.
    """

    def __init__(self, network: Network, precision: EnginePrecision, threads: int, *, recording: bool = False) -> None:
        assert precision != "int8"  # Backend says so
        self._spec = network.spec
        self._network = NativeNetwork(
            numbers(network.spec, network.policy.padding), [*arrays(network)], precision, threads
        )
        self._recorded: list[list[tuple[str, float]]] | None = [] if recording else None

    def __call__(self, pixels: Pixels) -> Logits:
        """Logits (N, K) float32 of pixels (N, size, size, C) uint8."""
        logits = self._network(pixels)
        if self._recorded is not None:
            self._recorded.append([*zip(_phases(self._spec), self._network.phases().tolist(), strict=True)])
        return logits

    def maps(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Logits, and the last feature maps (N, C, h, w) float32."""
        maps = np.empty((len(pixels), *self._network.map_shape), np.float32)
        logits = self._network(pixels, maps)
        return logits, np.ascontiguousarray(maps.transpose(0, 3, 1, 2))

    def recorded(self) -> list[list[tuple[str, float]]]:
        """The phases of the last image of each call in order, and their seconds."""
        return self._recorded or []


def memory(spec: NetworkSpec, precision: KernelPrecision = "fp32") -> tuple[int, int]:
    """Bytes of a network's packed weights, and of the arena of each thread; 0 where the kernels cannot run it."""
    if missing() or unsupported(spec):
        return 0, 0
    try:
        return sizes(numbers(spec, "symmetric"), precision)
    except ArgumentError:  # its maps are too large
        return 0, 0


def missing() -> str | None:
    """Why there are no kernels; None if there are."""
    if instruction_sets():
        return None
    again = "pip install --force-reinstall --no-deps effnet"
    return f"was not compiled when effnet was installed: with a C++ compiler {again}, or pip install 'effnet[openvino]'"


def unsupported(spec: NetworkSpec) -> str | None:
    """Why the kernels cannot run a network; None if they can."""
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
    found += [
        ACTIVATIONS[spec.activation],
        shape.head_channels if shape.head else 0,
        spec.num_classes,
        len(spec.blocks),
    ]
    for block in spec.blocks:
        pad, _ = pads_of(block.kernel_size, block.stride, block.input_size, padding)
        found += [block.in_channels, block.expanded_channels, block.out_channels, block.kernel_size, block.stride, pad]
        found += [block.squeeze_channels, block.has_shortcut, block.expand_ratio != 1]
    return found


def arrays(network: Network) -> Iterator[NDArray[np.float32]]:
    """A network's weights in the same order, as they are; of a convolution also what its normalisation does."""
    spec, weights = network.spec, network.weights

    def read(name: str) -> NDArray[np.float32]:
        return np.asarray(weights[name], np.float32)

    def convolution(name: str) -> Iterator[NDArray[np.float32]]:
        yield read(f"{name}.conv.weight")
        yield from (each.astype(np.float32) for each in normalisation(network, name))

    mean, std = (PIXEL * np.array(values) for values in (network.input.mean, network.input.std))
    yield mean.astype(np.float32)
    filters, *rest = convolution("stem")
    yield (filters / std[:, None, None]).astype(np.float32)
    yield from rest
    for block in spec.blocks:
        for layer in block.layers:
            if block.squeeze_channels and layer == block.path[-1]:
                for name in ("squeeze.weight", "squeeze.bias", "excite.weight", "excite.bias"):
                    yield read(f"{block.name}.se.{name}")
            yield from convolution(f"{block.name}.{layer.name}")
    if spec.head:
        yield from convolution("head")
    yield read("classifier.weight")
    yield read("classifier.bias")


def _phases(spec: NetworkSpec) -> Iterator[str]:
    """What the kernels time, named after the layers."""
    yield "stem.image"
    for block in spec.blocks:
        yield f"{block.name}.expand+depthwise"
        yield f"{block.name}.se"
        yield f"{block.name}.project"
    yield "head.features"
    yield "classifier.logits"
