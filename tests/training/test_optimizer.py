"""Optimizers against timm's RMSpropTF and a formula; which parameters decay."""

from __future__ import annotations

import pytest
import torch
from timm.optim import RMSpropTF
from torch import nn

import effnet
from effnet.training.optimizer import RMSPropTF, make_optimizer, parameter_groups, set_rate
from effnet.training.recipe import RECIPES, Recipe


def walk(optimizer: torch.optim.Optimizer, weight: nn.Parameter, rates: list[float]) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        weight.grad = torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_is_timms(decay: float, momentum: float) -> None:
    start = torch.randn(5, 4, dtype=torch.float64)
    rates = [0.0, 0.1, 0.2, 0.05, 0.05]
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = walk(RMSPropTF([mine], 0.1, momentum=momentum, weight_decay=decay), mine, rates)
    other = RMSpropTF([theirs], 0.1, alpha=0.9, eps=1e-3, momentum=momentum, weight_decay=decay, decoupled_decay=False)
    torch.testing.assert_close(ours, walk(other, theirs, rates), rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours, start)


def test_rmsprop_is_tensorflows_formula() -> None:
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = RMSPropTF([weight], 0.1)
    square, moment, value = 1.0, 0.0, 2.0
    for grad in (0.5, -3.0):
        weight.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        square = 0.9 * square + 0.1 * grad**2
        moment = 0.9 * moment + 0.1 * grad / (square + 1e-3) ** 0.5
        value -= moment
    assert weight.item() == pytest.approx(value, rel=1e-12)


def test_the_official_code_decays_all_but_normalisation() -> None:
    network = effnet.create("b0", num_classes=5)
    decayed = {
        param
        for group in parameter_groups(network, RECIPES["paper"])
        if "weight_decay" not in group
        for param in group["params"]
    }
    named = dict(network.named_parameters())
    spared = {name for name, param in named.items() if param not in decayed}
    assert spared == {name for name in named if ".norm." in name}
    assert any(name.endswith("se.squeeze.bias") for name, param in named.items() if param in decayed)
    spared = {
        name
        for group in parameter_groups(network, Recipe())
        if group.get("weight_decay") == 0
        for name, param in named.items()
        if any(param is each for each in group["params"])
    }
    assert spared == {name for name in named if ".norm." in name or name.endswith("bias")}


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_every_parameter_learns_once_at_its_share(name: str) -> None:
    network = effnet.create("lite0", num_classes=5)
    network.stem.requires_grad_(False)
    optimizer = make_optimizer(network, Recipe(optimizer=name, body_lr=0.1))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(params) == len(set(params)) == sum(param.requires_grad for param in network.parameters())
    set_rate(optimizer, 2.0)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {2.0, 0.2}
    head = {group["lr"] for group in optimizer.param_groups for p in group["params"] if p is network.classifier.weight}
    assert head == {2.0}
