"""effnet's own engine computes what torch computes, on every instruction set that this machine has."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effnet
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy, StageSpec
from effnet.errors import ArgumentError
from effnet.models.efficientnet import EfficientNet
from effnet.native import NativeNetwork, instruction_sets
from effnet.runtime.graph import network_of
from effnet.runtime.native import NativeGraph, arrays, memory, numbers, unsupported
from effnet.runtime.select import open_session, select
from effnet.weights.bundle import Bundle, BundleConfig

ISAS = instruction_sets()
ALLOWED = {"fp32": 1e-5, "bf16": 0.05}  # largest difference from torch in float64, as a share of the largest logit


def bundle_of(spec: NetworkSpec, padding: str = "symmetric") -> Bundle:
    """A network of random weights, small enough that it does not amplify differences as chaotic ones do."""
    policy = NumericPolicy(padding=padding)
    network = EfficientNet(spec, policy=policy)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.uniform_(0.7, 1.3)
            for values in (module.bias.data, module.running_mean):
                values.normal_(0, 0.1)
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.normal_(module.weight, 0, 1.3 / module.weight[0].numel() ** 0.5)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, 0, 0.1)
    pixels = InputSpec(spec.resolution, spec.resolution).with_channels(spec.in_channels)
    return Bundle.from_network(network.eval(), BundleConfig(spec, policy, pixels))


def pixels_of(spec: NetworkSpec, images: int) -> np.ndarray:
    shape = images, spec.resolution, spec.resolution, spec.in_channels
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@torch.inference_mode()
def expected(bundle: Bundle, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and the map before pooling (N, H, W, C), as torch computes them in float64."""
    network, given = copy.deepcopy(bundle.network).double(), bundle.config.input
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (given.mean, given.std))
    maps = []
    network.pool.register_forward_hook(lambda _, inputs, __: maps.append(inputs[0]))
    logits = network((torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255 - mean) / std)
    return logits.numpy(), maps[0].permute(0, 2, 3, 1).numpy()


def error(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(found - right).max() / np.abs(right).max())


def check(bundle: Bundle, precisions: tuple[str, ...] = ("fp32", "bf16"), images: int = 3, threads: int = 2) -> None:
    """Compare logits and the last map with torch's, on every instruction set."""
    spec, policy = bundle.config.spec, bundle.config.policy
    pixels = pixels_of(spec, images)
    logits, maps = expected(bundle, pixels)
    weights = [*arrays(network_of(bundle))]
    for isa in ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EFFNET_ISA", isa)
            for precision in precisions:
                network = NativeNetwork(numbers(spec, policy.padding), weights, precision, threads)
                features = np.empty(maps.shape, np.float32)
                found = network(pixels, features)
                assert error(found, logits) < ALLOWED[precision], (isa, precision, spec)
                assert error(features, maps) < 10 * ALLOWED[precision], (isa, precision, spec)
                np.testing.assert_array_equal(network(pixels[:1]), found[:1])
                network.close()


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        ("b0", 224),
        ("b0", 97),
        ("b1", 65),
        ("b2", 64),
        ("b3", 75),
        ("b4", 61),
        ("lite0", 224),
        ("lite2", 71),
    ],
)
def test_every_variant(name: str, resolution: int, padding: str) -> None:
    check(bundle_of(effnet.spec(name, resolution=resolution), padding), images=1 if resolution == 224 else 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b5", "b6", "b7", "b8", "lite1", "lite3", "lite4"])
def test_every_large_variant(name: str) -> None:
    check(bundle_of(effnet.spec(name, resolution=49)), ("fp32",), images=1)


@st.composite
def specs(draw: st.DrawFn) -> NetworkSpec:
    """Small networks of everything that a spec of MBConv blocks can say."""
    stages = tuple(
        StageSpec(
            expand_ratio=draw(st.sampled_from([1, 2, 3, 6])),
            kernel_size=draw(st.sampled_from([1, 3, 5, 7, 9])),
            stride=draw(st.integers(1, 2)),
            channels=draw(st.sampled_from([8, 16, 24, 40, 88])),
            layers=draw(st.integers(1, 2)),
            squeeze_ratio=draw(st.sampled_from([None, None, 0.0, 0.7])),
        )
        for _ in range(draw(st.integers(1, 3)))
    )
    return NetworkSpec(
        "drawn",
        stages,
        resolution=draw(st.integers(1, 49)),
        num_classes=draw(st.integers(4, 20)),  # fewer logits may all be sums near zero: 1 in 25 of a single one is
        in_channels=draw(st.integers(1, 5)),
        activation=draw(st.sampled_from(["silu", "relu6", "relu"])),
        squeeze_ratio=draw(st.sampled_from([0.0, 0.1, 0.25])),
        stem=draw(st.sampled_from([8, 16, 24])),
        head=draw(st.sampled_from([0, 8, 72])),
        stem_stride=draw(st.integers(1, 2)),
        stem_kernel=draw(st.sampled_from([1, 3, 5])),
    )


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes(classes: int) -> None:
    check(bundle_of(effnet.spec("b0", width=0.25, depth=0.5, resolution=32, num_classes=classes)))


@settings(max_examples=60, deadline=None)
@given(specs(), st.sampled_from(["symmetric", "same"]), st.integers(1, 5), st.integers(1, 3))
def test_every_spec_of_mbconv_blocks(spec: NetworkSpec, padding: str, images: int, threads: int) -> None:
    check(bundle_of(spec, padding), images=images, threads=threads)


@settings(max_examples=15, deadline=None)
@given(specs(), st.integers(1, 4), st.integers(1, 9))
def test_threads_and_batches_change_no_bit(spec: NetworkSpec, threads: int, images: int) -> None:
    bundle, pixels = bundle_of(spec), pixels_of(spec, images)
    one, several = (NativeGraph(network_of(bundle), "fp32", count) for count in (1, threads))
    np.testing.assert_array_equal(one(pixels), several(pixels))


def test_what_it_cannot_run() -> None:
    spec = effnet.spec("b0")
    bottleneck = dataclasses.replace(spec, stages=(StageSpec(4, 3, 1, 64, 1, op="bottleneck"),), squeeze_ratio=0.0)
    assert unsupported(spec) is None
    assert "bottleneck" in str(unsupported(bottleneck))
    assert "pooling" in str(unsupported(dataclasses.replace(spec, stem_pool=True)))
    assert "63" in str(unsupported(dataclasses.replace(spec, stem_kernel=65)))
    assert memory(bottleneck) == (0, 0)
    found = select(bottleneck, installed=("native", "openvino", "torch"))
    assert found.backend.engine == "openvino"
    assert "native has no bottleneck blocks" in found.reason
    small = bundle_of(dataclasses.replace(bottleneck, resolution=32))
    with pytest.raises(ArgumentError, match=r"`engine` \(='native'\) has no bottleneck blocks"):
        open_session(small, select(small.config.spec, engine="native"))(pixels_of(small.config.spec, 1))


def test_memory_is_the_spec_s() -> None:
    weights, work = memory(effnet.spec("b0"))
    assert 4 * effnet.cost(effnet.spec("b0")).params <= weights + 4 * 42_016 + 4096  # statistics are folded away
    assert weights < 1.2 * 4 * effnet.cost(effnet.spec("b0")).params
    assert memory(effnet.spec("b0"), "bf16")[1] < work
    assert memory(effnet.spec("b0", resolution=448))[1] > 3 * work


@pytest.mark.parametrize("changes", [{"resolution": 2**32 + 224}, {"resolution": 60000}, {"num_classes": 2**32 + 10}])
def test_a_network_too_large_for_the_kernels_has_no_memory_there(changes: dict[str, int]) -> None:
    """Its numbers are not cut to 32 bits, which would make another network of it."""
    assert memory(effnet.spec("b0", **changes)) == (0, 0)


def test_weights_that_are_not_numbers_are_noticed() -> None:
    bundle = bundle_of(effnet.spec("b0", width=0.25, depth=0.5, resolution=32))
    for activation in ("silu", "relu6"):
        spec = dataclasses.replace(bundle.config.spec, activation=activation)
        weights = dict(bundle.weights)
        weights["stages.3.0.expand.conv.weight"] = weights["stages.3.0.expand.conv.weight"] * np.nan
        broken = Bundle(dataclasses.replace(bundle.config, spec=spec), weights)
        for isa in ISAS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("EFFNET_ISA", isa)
                assert np.isnan(NativeGraph(network_of(broken), "fp32", 1)(pixels_of(spec, 1))).all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("name", ["expand.conv.weight", "expand.norm.bias", "project.norm.running_mean"])
def test_no_kind_of_nan_becomes_a_number(name: str, bits: int) -> None:
    """Where bf16 is rounded by adding to the bits, a NaN of which all are set would become 0."""
    bundle = bundle_of(effnet.spec("b0", width=0.25, depth=0.5, resolution=32))
    weights = {key: np.array(value) for key, value in bundle.weights.items()}
    weights[f"stages.3.0.{name}"].reshape(-1).view(np.uint32)[:] = bits
    broken = Bundle(bundle.config, weights)
    for isa in ISAS:
        with pytest.MonkeyPatch.context() as patch, np.errstate(invalid="ignore"):  # of a NaN that signals
            patch.setenv("EFFNET_ISA", isa)
            for precision in ("fp32", "bf16"):
                assert np.isnan(NativeGraph(network_of(broken), precision, 1)(pixels_of(bundle.config.spec, 1))).all()


def test_two_classifiers_answer_at_once() -> None:
    bundle = bundle_of(effnet.spec("b0", width=0.5, depth=0.5, resolution=64))
    graphs = [NativeGraph(network_of(bundle), "fp32", 2) for _ in range(2)]
    pixels = pixels_of(bundle.config.spec, 3)
    right = graphs[0](pixels)
    with ThreadPoolExecutor(6) as pool:  # three callers of each
        found = [*pool.map(lambda number: graphs[number % 2](pixels), range(60))]
    assert all((each == right).all() for each in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only systems that fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_it_survives_a_fork() -> None:
    bundle = bundle_of(effnet.spec("b0", width=0.25, depth=0.5, resolution=32))
    graph, pixels = NativeGraph(network_of(bundle), "fp32", 2), pixels_of(bundle.config.spec, 3)
    right = graph(pixels)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def answer() -> None:
        theirs.send(graph(pixels))
        graph._network.close()

    child = context.Process(target=answer)
    child.start()
    assert ours.poll(60)
    np.testing.assert_array_equal(ours.recv(), right)
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_array_equal(graph(pixels), right)


@pytest.mark.parametrize("isa", ISAS)
def test_a_filter_of_the_stem_keeps_its_sum_in_bf16(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of one colour times the sum of a filter that cancels itself out; the block adds nothing to it."""
    monkeypatch.setenv("EFFNET_ISA", isa)
    stage = StageSpec(expand_ratio=1, kernel_size=1, stride=1, channels=16, layers=1)
    options = {"resolution": 6, "num_classes": 2, "squeeze_ratio": 0.0, "stem": 16, "head": 0, "activation": "relu"}
    spec = NetworkSpec("flat", (stage,), stem_stride=1, **options)
    filters = np.random.default_rng(0).normal(size=(16, 3, 3, 3)).astype(np.float32)
    filters += 0.5 / 27 - filters.mean((1, 2, 3), keepdims=True)
    one, none = np.ones(16), np.zeros(16)
    weights = [np.zeros(3), filters, one, none, one, one, none, np.zeros((16, 16)), one, none]
    weights += [np.zeros((2, 16)), np.zeros(2)]
    network = NativeNetwork(numbers(spec, "symmetric"), [np.float32(each) for each in weights], "bf16", 1)
    features = np.empty((1, 6, 6, 16), np.float32)
    network(np.full((1, 6, 6, 3), 64, np.uint8), features)
    np.testing.assert_allclose(features[0, 2, 2], 32, atol=0.5)


def test_an_unknown_instruction_set_is_refused_when_the_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of(effnet.spec("b0", width=0.25, depth=0.5, resolution=32))
    monkeypatch.setenv("EFFNET_ISA", "avx9")
    with pytest.raises(ArgumentError, match="EFFNET_ISA"):
        open_session(bundle, select(bundle.config.spec, engine="native", precision="fp32"))


_KEPT = """
import numpy as np
import effnet
from effnet.arch.spec import InputSpec
from effnet.runtime.graph import network_of
from effnet.runtime.native import NativeGraph
from effnet.weights.bundle import Bundle, BundleConfig

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

module = effnet.EfficientNet(effnet.spec("b0", num_classes=10))
network = network_of(Bundle.from_network(module, BundleConfig(module.spec, module.policy, InputSpec(224, 224))))
np.ones(30_000_000, np.uint8)  # malloc takes from its heap what has fewer bytes, once these were freed
before = resident()
for _ in range(3):
    graph = NativeGraph(network, "fp32", 1)
    graph(np.zeros((1, 224, 224, 3), np.uint8))
    del graph
print(resident() - before)
"""


@pytest.mark.slow  # under a sanitizer, too, which keeps what was freed
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_released_network_leaves_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _KEPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8_000_000  # its weights have 16 MB
