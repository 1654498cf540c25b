"""Graphs compute what the network computes, for every kind of block and padding, in every engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from random_weights import shaken

import effnet
from effnet.arch.spec import InputSpec, NumericPolicy
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.graph import Network
from effnet.runtime.onnx import OnnxGraph
from effnet.runtime.onnx import make as make_onnx
from effnet.runtime.openvino import OpenVinoGraph
from effnet.runtime.openvino import make as make_openvino
from effnet.runtime.torch import compile_network

BASELINES = Path(__file__).parents[2] / "examples" / "baselines"
SPECS = [
    ("b0", {"resolution": 33, "stem_stride": 1, "width": 0.5, "depth": 0.5}),
    ("b0", {"resolution": 48, "in_channels": 1, "depth": 0.5}),
    ("lite0", {"resolution": 65, "width": 0.5}),
    ("mobilenetv1", {"resolution": 64, "width": 0.25}),
    ("mobilenetv2", {"resolution": 64, "width": 0.5}),
    ("resnet50", {"resolution": 64, "width": 0.25}),  # a pooled stem, strided 1x1 convolutions on even maps
    (str(BASELINES / "mbconv.yaml"), {}),
    (str(BASELINES / "separable.yaml"), {"resolution": 15}),
]


def describe(network: EfficientNet) -> Network:
    spec = network.spec
    input_spec = InputSpec(spec.resolution, spec.resolution).with_channels(spec.in_channels)
    weights = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    return Network(spec, network.policy, input_spec, weights)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(("name", "changes"), SPECS, ids=[f"{Path(name).stem}-{more}" for name, more in SPECS])
def test_it_computes_what_the_network_computes(name: str, changes: dict, padding: str) -> None:
    spec = effnet.spec(name, num_classes=7, **changes)
    network = shaken(EfficientNet(spec, policy=NumericPolicy(padding=padding)))
    description = describe(network)
    size = 2, spec.resolution, spec.resolution, spec.in_channels
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    expected = compile_network(network, description.input)(pixels)
    graph = make_onnx(description, 2, {})
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    for session in (OnnxGraph(graph, 1), OpenVinoGraph(make_openvino(description, 2, {}), 1)):
        assert np.abs(session(pixels) - expected).max() <= 5e-5 * np.abs(expected).max()


def test_nodes_are_called_by_their_layers() -> None:
    """Each convolution and the classifier by the name of its module; no two nodes have one name."""
    spec = effnet.spec("b0", num_classes=7, resolution=64)
    network = EfficientNet(spec)
    layers = [
        name.removesuffix(".conv")
        for name, module in network.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    description = describe(network)
    nodes = {
        "onnx": [(node.name, node.op_type) for node in onnx.load_from_string(make_onnx(description, 1, {})).graph.node],
        "openvino": [
            (op.get_friendly_name(), op.get_type_name())
            for op in make_openvino(description, 1, {}).get_ordered_ops()
            if op.get_type_name() != "Constant"
        ],
    }
    for found in nodes.values():
        names = [name for name, _ in found]
        assert len(set(names)) == len(names)
        computing = [
            name.rpartition(".")[0]
            for name, kind in found
            if kind in ("Conv", "Gemm", "MatMul") or "Convolution" in kind
        ]
        assert sorted(computing) == sorted(layers)


def test_nothing_is_left_to_find_out() -> None:
    """No normalisation, no padding, no shape arithmetic: what SAME padding needs is a constant of a convolution."""
    spec = effnet.spec("b0", num_classes=7, resolution=64)
    network = EfficientNet(spec, policy=NumericPolicy(padding="same"))
    description = describe(network)
    model = onnx.load_from_string(make_onnx(description, 1, {}))
    kinds = {node.op_type for node in model.graph.node}
    assert " ".join(sorted(kinds)) == "Add Cast Conv Flatten Gemm GlobalAveragePool Identity Mul Sigmoid Sub Transpose"
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    assert convolutions == sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    ops = make_openvino(description, 1, {}).get_ops()
    assert {op.get_type_name() for op in ops}.isdisjoint({"BatchNormInference", "Pad", "ShapeOf"})
    assert sum("Convolution" in op.get_type_name() for op in ops) == convolutions
