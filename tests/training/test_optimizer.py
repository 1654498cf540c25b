"""Optimizers against timm's RMSpropTF; which parameters decay; the average; what stops a run early."""

from __future__ import annotations

import math

import pytest
import torch
from timm.optim import RMSpropTF
from tiny import tiny_spec
from torch import nn

import effnet
from effnet.errors import TrainingError
from effnet.training.optimizer import (
    CHECKED,
    OVERFLOWS,
    Average,
    RMSPropTF,
    SanityChecks,
    Updater,
    parameter_groups,
)
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


def test_the_official_code_decays_all_but_normalisation() -> None:
    network = effnet.create(tiny_spec())
    named = dict(network.named_parameters())

    def spared(recipe: Recipe) -> set[str]:
        groups = [group for group in parameter_groups(network, recipe) if group.get("weight_decay") == 0]
        params = {param for group in groups for param in group["params"]}
        return {name for name, param in named.items() if param in params}

    assert spared(RECIPES["paper"]) == {name for name in named if ".norm." in name}
    assert spared(Recipe()) == {name for name in named if ".norm." in name or name.endswith("bias")}
    assert any(name.endswith("se.squeeze.bias") for name in named)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_every_parameter_learns_once_at_its_share(name: str) -> None:
    network = effnet.create(tiny_spec())
    network.stem.requires_grad_(False)
    updater = Updater(network, Recipe(optimizer=name, body_lr=0.1, head_first=0.0, warmup=0.0, lr=2.0))
    params = [param for group in updater.optimizer.param_groups for param in group["params"]]
    assert len(params) == len(set(params)) == sum(param.requires_grad for param in network.parameters())
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert updater.update(0, 0.0, loss=torch.tensor(1.5), spread=torch.tensor(1.0)) == [1.5]
    rates = {param: group["lr"] for group in updater.optimizer.param_groups for param in group["params"]}
    head = set(network.classifier.parameters())
    assert all(rate == pytest.approx(2.0 if param in head else 0.2) for param, rate in rates.items())


def test_the_average_by_its_formula() -> None:
    network = effnet.create(tiny_spec())
    average = Average(network)
    start = network.classifier.weight.detach().clone()
    with torch.no_grad():
        network.classifier.weight.add_(1)
        network.stem.norm.running_mean.fill_(2)
        network.stem.norm.num_batches_tracked.fill_(7)
    average.update(network, 0.75)
    torch.testing.assert_close(average.network.classifier.weight, start + 0.25)
    assert average.network.stem.norm.running_mean[0].item() == pytest.approx(0.5)  # statistics are averaged, too
    assert average.network.stem.norm.num_batches_tracked.item() == 7
    assert not average.network.classifier.weight.requires_grad


def feed(steps: int, *, loss: float = 1.0, spread: float = 0.1, gradient: float = 1.0, start: int = 0) -> None:
    checks = SanityChecks(10)
    for step in range(start, start + steps):
        checks.check(step, loss, spread, gradient)


def test_learning_and_guessing_go_on() -> None:
    feed(CHECKED, loss=1.0)
    feed(CHECKED, loss=math.log(10) + 0.5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss": math.nan}, "the loss is nan at step 0.*learning rate"),
        ({"loss": math.inf}, "the loss is inf"),
        ({"gradient": math.nan}, "gradients are not finite"),
        ({"gradient": 0.0}, "gradients and all activations are zero.*damaged"),
        ({"spread": 0.0}, "same answer to every image"),
        ({"loss": math.log(10) + 2}, r"after 100 steps the loss is 4.30, and guessing gives ln\(K\) = 2.30"),
    ],
)
def test_what_cannot_come_to_anything_stops(values: dict[str, float], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        feed(CHECKED, **values)


def test_a_scaled_loss_may_overflow_for_a_while() -> None:
    checks = SanityChecks(10, scaled=True)
    for step in range(OVERFLOWS - 1):
        checks.check(step, 1.0, 0.1, math.inf)
    again = SanityChecks(10, scaled=True)  # of a resumed run
    again.restore(checks.state())
    with pytest.raises(TrainingError, match=f"gradients are not finite at step {OVERFLOWS - 1}"):
        again.check(OVERFLOWS - 1, 1.0, 0.1, math.nan)
    checks.check(OVERFLOWS - 1, 1.0, 0.1, 1.0)
    checks.check(OVERFLOWS, 1.0, 0.1, math.inf)
    with pytest.raises(TrainingError, match="the loss is nan"):
        checks.check(OVERFLOWS + 1, math.nan, 0.1, math.inf)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_a_step_that_overflows_changes_nothing_but_the_scale(name: str) -> None:
    torch.manual_seed(0)
    network = effnet.create(tiny_spec())
    recipe = Recipe(optimizer=name, head_first=0.0, warmup=0.0, lr=0.1, ema=0.0)
    updater = Updater(network, recipe, "fp16")

    def step(number: int, factor: float) -> None:
        loss = network(torch.randn(2, 3, 32, 32)).square().mean()
        updater.scaler.scale(loss * factor).backward()
        updater.update(number, 0.0, loss.detach(), torch.tensor(1.0))

    def state() -> list[torch.Tensor]:
        states = [each for found in updater.optimizer.state.values() for each in found.values()]
        return [each.clone() for each in (*network.parameters(), *states) if isinstance(each, torch.Tensor)]

    step(0, 1.0)
    before, scale = state(), updater.scaler.get_scale()
    step(1, math.inf)
    assert all(map(torch.equal, state(), before))
    assert updater.scaler.get_scale() == scale / 2
    step(2, 1.0)
    assert not any(map(torch.equal, list(network.parameters()), before[:1]))
    assert all(each.isfinite().all() for each in state())


def test_later_only_numbers_that_are_none_stop() -> None:
    feed(200, spread=0.0, gradient=0.0, loss=99, start=CHECKED)
    with pytest.raises(TrainingError, match="nan at step 500"):
        feed(1, loss=math.nan, start=500)
