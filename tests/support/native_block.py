"""A small block and a small network, and a training step of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnet.arch.blocks import BlockSpec
from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.models.blocks import MBConv, batch_norm

ROWS = (StageSpec(1, 3, 1, 16, 1), StageSpec(6, 5, 2, 24, 2))
SPEC = NetworkSpec("small", ROWS, resolution=16, num_classes=5, head=32, stem=16, dropout=0)
SEGMENTS = 5  # of that network
BLOCK, LAYER = 13, 3  # parameters


def block(channels: int = 8, expand: int = 4) -> MBConv:
    spec = BlockSpec("block", 2, 0, channels, channels, 3, 1, expand, 2, 0.2, input_size=6)
    return MBConv(spec, norm=batch_norm(1e-3, 0.1), activation="silu", padding="symmetric").train()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16)


def learn(module: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """The gradients, the output and the buffers of a step."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    module.zero_grad()
    torch.manual_seed(1)
    y = module(x) if run is None else run(x)
    y.square().sum().backward()
    found = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    if x.grad is not None:
        found["x"] = x.grad
    return {**found, "y": y.detach(), **{name: value.clone() for name, value in module.named_buffers()}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = 2e-5 * max(1, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=atol, msg=name)


def x_of(module: MBConv, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, module.project.conv.out_channels, 6, 6, dtype=dtype, requires_grad=True)
