"""Training by the compiled kernels gives what torch's modules give in float64, as nearly as torch itself does."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import effnet
from effnet.arch.blocks import BlockSpec
from effnet.arch.spec import NetworkSpec, NumericPolicy, StageSpec
from effnet.models import native
from effnet.models.blocks import ConvNormAct, MBConv, SeparableConv, batch_norm
from effnet.models.efficientnet import EfficientNet
from effnet.native import CHOSEN, instruction_set, instruction_sets, training_instruction_set

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="nothing was compiled")

ROWS = (StageSpec(1, 3, 1, 16, 1), StageSpec(6, 5, 2, 24, 2), StageSpec(4, 7, 1, 24, 1), StageSpec(3, 3, 2, 40, 2))
SMALL = NetworkSpec("small", ROWS, resolution=24, num_classes=5, head=48, dropout=0, drop_connect=0.2)
SPECS = {  # SiLU in all of them: where a rounded number crosses a kink of ReLU, a deep network's gradients jump
    "b0": SMALL,
    "separable": replace(effnet.spec("mobilenetv1", width=0.25, resolution=32, num_classes=5), activation="silu"),
    "bottleneck": replace(
        effnet.spec("resnet50", width=0.125, depth=0.5, resolution=32, num_classes=5), activation="silu"
    ),
}
FP32 = 5e-5  # relative error that is always allowed


@dataclass
class Result:
    """Of a training step."""

    output: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def shake(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)


def step(module: nn.Module, x: Tensor, gradient: Tensor, *, low: bool = False, torchs: bool = False) -> Result:
    """A step of a copy, by torch's modules or as it comes."""
    module = copy.deepcopy(module)
    for each in module.modules():
        if torchs and hasattr(type(each), "native"):
            vars(each)["native"] = False
    x = x.detach().clone().requires_grad_(x.requires_grad)
    torch.manual_seed(3)  # of stochastic depth
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        output = module(x)
    output.backward(gradient.to(output.dtype))
    gradients = {name: weight.grad for name, weight in module.named_parameters()}
    if x.requires_grad:
        gradients["x"] = x.grad
    return Result(output.detach(), gradients, dict(module.named_buffers()))


def in_float64(module: nn.Module, x: Tensor, gradient: Tensor) -> Result:
    inner = x.detach().double().requires_grad_(x.requires_grad)
    return step(copy.deepcopy(module).double(), inner, gradient.double())


def errors(found: Result, exact: Result) -> dict[str, float]:
    """Of each tensor, relative to it, or to what it would be like where it nearly vanishes."""
    largest = max(float(value.norm()) for value in exact.gradients.values())
    result = {"output": float((found.output - exact.output).norm() / exact.output.norm())}
    for name, value in found.gradients.items():
        truth = exact.gradients[name]
        result[f"gradient of {name}"] = float((value - truth).norm() / truth.norm().clamp_min(largest / 100))
    for name, value in found.buffers.items():
        truth = exact.buffers[name].double()
        least = 0.1 * truth.numel() ** 0.5 if name.endswith("mean") else 0.0  # momentum times a usual deviation
        result[name] = float((value - truth).norm() / truth.norm().clamp_min(least))
    return result


def together(found: Result, exact: Result) -> float:
    """The error of all gradients together."""
    wrong = sum(
        float((value.double() - exact.gradients[name]).square().sum()) for name, value in found.gradients.items()
    )
    return (wrong / sum(float(value.square().sum()) for value in exact.gradients.values())) ** 0.5


def assert_as_exact(found: Result, torchs: Result, exact: Result) -> None:
    theirs = errors(torchs, exact)
    for name, error in errors(found, exact).items():
        assert error <= max(2 * theirs[name], FP32), f"{name}: {error:.1e}, torch {theirs[name]:.1e}"


class Case:
    """A segment, what goes through it, and by what."""

    def __init__(self, isa: str, threads: int, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        self.isa, self.threads, self.module, self.x, self.gradient = isa, threads, module, x, gradient

    def __repr__(self) -> str:
        return f"{self.isa}, {self.threads} threads, {tuple(self.x.shape)}: {self.module}"


@st.composite
def cases(draw: Any, even: bool = False) -> Case:
    """Blocks and layers of every kind; `even`: with even numbers of channels."""
    channels = st.integers(1, 20).map(lambda count: 2 * count) if even else st.integers(1, 40)
    kind = draw(st.sampled_from(["mbconv", "mbconv", "separable", "layer", "stem"]))
    inputs, outputs = draw(channels), draw(channels)
    stride, kernel = draw(st.sampled_from([1, 2])), draw(st.sampled_from([3, 5, 7]))
    n, height, width = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 13)), draw(st.integers(1, 13))
    how: dict[str, Any] = {"norm": batch_norm(1e-3, 0.1), "padding": draw(st.sampled_from(["symmetric", "same"]))}
    how["activation"] = draw(st.sampled_from(["silu", "relu6", "relu"]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    if kind in ("mbconv", "separable"):
        expand = draw(st.sampled_from([1, 3, 6])) if kind == "mbconv" else 1
        squeeze = draw(st.integers(0, 6)) if kind == "mbconv" else 0
        outputs = inputs if draw(st.booleans()) else outputs
        drop = draw(st.sampled_from([0.0, 0.3]))
        block = BlockSpec("block", 2, 0, inputs, outputs, kernel, stride, expand, squeeze, drop, input_size=height)
        module: nn.Module = (MBConv if kind == "mbconv" else SeparableConv)(block, **how)
    elif kind == "layer":
        stride = 1
        module = ConvNormAct((inputs, outputs), **how | {"activation": draw(st.sampled_from(["silu", None]))})
    else:
        inputs = draw(st.sampled_from([1, 3, 4]))
        module = ConvNormAct((inputs, outputs), kernel, stride=stride, **how)
    small = -(-height // stride), -(-width // stride)
    assume(n * small[0] * small[1] > 1)
    shake(module)
    x = torch.randn(n, inputs, height, width)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    isa, threads = draw(st.sampled_from(instruction_sets() or ("",))), draw(st.integers(1, 3))
    return Case(isa, threads, module.train(), x.requires_grad_(kind != "stem"), torch.randn(n, outputs, *small))


@contextmanager
def computed_by(isa: str, threads: int) -> Iterator[None]:
    """By that instruction set and so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with patch.dict(os.environ, {CHOSEN: isa}):
            yield
    finally:
        torch.set_num_threads(before)


def apart_from_kinks(case: Case) -> float:
    """How far the nearest activation's input is from 0 and 6, where slopes of ReLU and ReLU6 jump."""
    distance = [1.0]

    def measure(_: nn.Module, __: Any, z: Tensor) -> None:
        distance.append(float(torch.minimum(z.abs(), (z - 6).abs()).min()))

    twin = copy.deepcopy(case.module).double()
    for layer in twin.modules():
        if isinstance(layer, ConvNormAct) and isinstance(getattr(layer, "act", None), nn.ReLU | nn.ReLU6):
            layer.norm.register_forward_hook(measure)
    with torch.no_grad():
        twin(case.x.double())
    return min(distance)


@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
@given(cases())
def test_a_segments_step_in_float32(case):
    assume(apart_from_kinks(case) > 1e-5)
    assert native.covers(case.module)
    given = case.module, case.x, case.gradient
    with computed_by(case.isa, case.threads):
        found = step(*given)
    assert_as_exact(found, step(*given, torchs=True), in_float64(*given))


def test_segments_steps_in_bfloat16():
    """No worse than torch by and large; a single rounded number that crosses a kink of ReLU shows in a small map."""
    ratios = []

    @settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(cases(even=True))
    def check(case: Case) -> None:
        shortcut = getattr(case.module, "has_shortcut", False)
        x = case.x.detach().bfloat16().requires_grad_(case.x.requires_grad) if shortcut else case.x
        exact = in_float64(case.module, x, case.gradient)
        with computed_by(case.isa, case.threads):
            found = step(case.module, x, case.gradient, low=True)
        torchs = step(case.module, x, case.gradient, low=True, torchs=True)
        assert found.output.dtype is torch.bfloat16
        error, theirs = together(found, exact), together(torchs, exact)
        assert error <= max(4 * theirs, 0.1)
        ratios.append(error / theirs)

    check()
    assert median(ratios) <= 1


def network(name: str, padding: str = "symmetric") -> tuple[EfficientNet, Tensor, Tensor]:
    spec = SPECS[name]
    made = EfficientNet(spec, policy=NumericPolicy(padding=padding)).train()
    shake(made)
    images = torch.randn(4, spec.in_channels, spec.resolution, spec.resolution + 5)
    return made, images, torch.randn(4, spec.num_classes) / 10


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("name", SPECS)
def test_a_networks_step(name, padding):
    given = network(name, padding)
    exact = in_float64(*given)
    assert together(step(*given), exact) <= max(2 * together(step(*given, torchs=True), exact), FP32)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_a_networks_step_in_bfloat16(padding):
    given = network("b0", padding)
    exact = in_float64(*given)
    assert together(step(*given, low=True), exact) <= together(step(*given, low=True, torchs=True), exact)


@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa):
    given = network("b0")
    exact = in_float64(*given)
    with computed_by(isa, 2):
        assert instruction_set() == isa
        found, low = step(*given), step(*given, low=True)
    assert together(found, exact) <= max(2 * together(step(*given, torchs=True), exact), FP32)
    assert together(low, exact) <= 1.2 * together(step(*given, low=True, torchs=True), exact)
    best = training_instruction_set()
    alike = best == "avx2" and "EFFNET_KERNELS" in os.environ  # compiled for the sanitizers, AVX2 adds as portable code
    if not (isa.startswith("avx512") or isa == best or alike):  # AVX-512 has the float32 kernels of AVX-512 BF16
        with computed_by(str(best), 2):
            assert not torch.equal(step(*given).output, found.output)


@pytest.mark.parametrize("low", [False, True])
def test_same_bits_with_the_same_threads_and_nearly_with_others(low):
    given = network("b0")
    exact, found = in_float64(*given), {}
    for count in (1, 2, 3):
        with computed_by(instruction_sets()[0], count):
            found[count], again = step(*given, low=low), step(*given, low=low)
        assert torch.equal(found[count].output, again.output)
        for kind in ("gradients", "buffers"):
            first, second = getattr(found[count], kind), getattr(again, kind)
            assert all(torch.equal(value, second[name]) for name, value in first.items())
    apart = [together(each, exact) for each in found.values()]
    assert max(apart) < (0.5 if low else 1e-4)


def test_running_statistics_and_counters():
    given = network("b0")
    found, exact = step(*given), in_float64(*given)
    for name, value in found.buffers.items():
        torch.testing.assert_close(value.double(), exact.buffers[name].double(), rtol=1e-5, atol=1e-7, msg=name)
    assert int(found.buffers["head.norm.num_batches_tracked"]) == 1


def test_stochastic_depth_drops_the_same_images():
    made, images, gradient = network("b0")
    for module in made.modules():
        if hasattr(module, "rate"):
            module.rate = 0.5
    given = made, images, gradient
    exact = in_float64(*given)
    assert together(step(*given), exact) < 1e-4
    assert errors(step(*given), exact)["output"] < 1e-5
    for module in made.modules():
        if hasattr(module, "rate"):
            module.eval()
    assert errors(step(*given), exact)["output"] > 0.01
    assert together(step(*given), in_float64(*given)) < 1e-4


@pytest.mark.parametrize("low", [False, True])
def test_memory_that_nobody_wrote_is_not_read(low, monkeypatch):
    """Where torch is deterministic it fills new tensors with NaN, or with the largest number."""
    given = network("b0")
    expected = step(*given, low=low)
    torch.use_deterministic_algorithms(True)
    try:
        found = step(*given, low=low)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.output, expected.output)
    assert all(torch.equal(value, expected.gradients[name]) for name, value in found.gradients.items())
