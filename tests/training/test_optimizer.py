"""Optimizers against timm's RMSpropTF and a formula; which parameters decay; schedules whose end a budget moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import RMSpropTF
from torch import nn

import effnet
from effnet.training.optimizer import ENDING, Horizon, RMSPropTF, TimeBudget, make_optimizer, parameter_groups, set_rate
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


def test_progress_is_even_without_changes() -> None:
    horizon = Horizon.of(8)
    assert [horizon.progress(step) for step in (0, 2, 8)] == [0, 0.25, 1]


def test_a_moved_end_never_jumps() -> None:
    horizon = Horizon.of(100).moved(50, 75)
    assert horizon.progress(50) == Horizon.of(100).progress(50) == 0.5
    assert horizon.progress(62.5) == pytest.approx(0.75)  # type: ignore[arg-type]  # halfway between steps
    assert horizon.progress(75) == 1
    assert horizon.total == 75


@given(st.integers(1, 200), st.lists(st.tuples(st.integers(1, 300), st.integers(0, 400)), max_size=4))
def test_progress_grows_to_one(total: int, moves: list[tuple[int, int]]) -> None:
    horizon = Horizon.of(total)
    for step, end in sorted(moves):
        if step < horizon.total:
            horizon = horizon.moved(step, end)
    shares = [horizon.progress(step) for step in range(horizon.total + 1)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(1)


def test_a_budget_pays_for_validation_and_the_end() -> None:
    budget = TimeBudget(100 + ENDING, steps_per_epoch=10, validation_steps=4, final_steps=10)
    # 100 - 10 - 15 s of final evaluation - 6 s of validation, for steps of 1.5 s and a tenth of a validation
    assert budget.steps(used=10, per_step=1.5) == int(69 / 2.1)
    timed = dataclasses.replace(budget, validation=1.0)
    assert timed.steps(used=10, per_step=1.5) == int(74 / 1.6)


def test_small_drifts_are_left_alone() -> None:
    budget = TimeBudget(100 + ENDING, 1000, 0, 0, 0.0)
    horizon = Horizon.of(100)
    assert budget.replan(horizon, 50, used=50.5, per_step=1.0) is horizon
    assert budget.replan(horizon, 50, used=50, per_step=2.0).total == 75
    assert budget.replan(horizon, 50, used=200, per_step=2.0).total == 50
