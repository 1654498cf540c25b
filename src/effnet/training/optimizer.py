"""The optimizer of a recipe, and how far a run is in its schedule, also where a time budget moves its end.

Which parameters decay and which learn slower stands here, and RMSProp as TensorFlow computes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnet.models.efficientnet import EfficientNet
from effnet.training.recipe import Recipe

DECAY = 0.9  # of RMSProp's mean square (paper, section 5.2)
EPSILON = 1e-3  # of RMSProp (official code)
SLACK = 0.02  # of the time budget: a smaller drift of the expected end is left alone
FORWARD = 1 / 3  # of a training step's time: the backward pass takes twice as long as the forward pass
ENDING = 8.0  # seconds for pictures and files


class RMSPropTF(torch.optim.Optimizer):
    """RMSProp as in TensorFlow 1, which trained the paper's networks; torch's own differs in three places.

    The mean square starts at 1 and not at 0, so the first steps are small; epsilon is added below the root; and the
    learning rate goes into the momentum, so a change of rate acts on new gradients only.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        decay: float = DECAY,
        momentum: float = 0.9,
        eps: float = EPSILON,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """One step from the gradients that are there; `closure` computes them anew and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param] = {"square": torch.ones_like(param), "momentum": torch.zeros_like(param)}
            squares = [self.state[param]["square"] for param in params]
            momenta = [self.state[param]["momentum"] for param in params]
            grads = [param.grad for param in params]
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            # square += (1 - decay) * (grad^2 - square)
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
            roots = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_addcdiv_(momenta, grads, roots, group["lr"])
            torch._foreach_sub_(params, momenta)
        return loss


def make_optimizer(network: EfficientNet, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters that learn; each group has its `share` of the learning rate."""
    groups = parameter_groups(network, recipe)
    lr, decay = recipe.scaled_lr, recipe.weight_decay
    if recipe.optimizer == "rmsprop":
        return RMSPropTF(groups, lr, momentum=recipe.momentum, weight_decay=decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, momentum=recipe.momentum, weight_decay=decay, nesterov=recipe.momentum > 0)
    return torch.optim.AdamW(groups, lr, betas=(recipe.momentum, 0.999), weight_decay=decay)


def parameter_groups(network: EfficientNet, recipe: Recipe) -> list[dict[str, Any]]:
    """Body and classifier, decayed and not: normalisation never decays, biases where the recipe says so."""
    undecayed = set()
    for module in network.modules():
        for name, param in module.named_parameters(recurse=False):
            norm = isinstance(module, nn.modules.batchnorm._NormBase) or (param.ndim == 1 and name == "weight")
            if norm or (name == "bias" and not recipe.decay_biases):
                undecayed.add(param)
    head = set(network.classifier.parameters())
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for param in network.parameters():
        if param.requires_grad:
            groups.setdefault((param in head, param in undecayed), []).append(param)
    return [
        {
            "params": params,
            "share": 1.0 if is_head else recipe.body_lr,
            **({"weight_decay": 0.0} if spared else {}),
        }
        for (is_head, spared), params in groups.items()
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


@dataclass(frozen=True)
class Horizon:
    """The planned end of a run, and the steps at which the plan was changed.

    The share of the schedule that is done grows evenly between two changes, so a changed end never makes it jump.
    """

    marks: tuple[tuple[int, int], ...]  # (step from which it holds, steps in all)

    @classmethod
    def of(cls, total: int) -> Horizon:
        """A run of `total` steps."""
        return cls(((0, max(1, total)),))

    @property
    def total(self) -> int:
        """Steps in all, by the latest plan."""
        return self.marks[-1][1]

    def progress(self, step: int) -> float:
        """The share of the schedule that is done before step `step`: 0 at the first, 1 behind the last."""
        if step >= self.total:
            return 1.0
        done = 0.0
        ends = [start for start, _ in self.marks[1:]] + [max(step, self.marks[-1][0])]
        for (start, total), end in zip(self.marks, ends, strict=True):
            done += (1 - done) * (min(step, end) - start) / max(1, total - start) if step > start else 0.0
        return min(1.0, done)

    def moved(self, step: int, total: int) -> Horizon:
        """The same with another end, from step `step` on; what is done stays done."""
        return dataclasses.replace(self, marks=(*self.marks, (step, max(total, step))))


@dataclass(frozen=True)
class TimeBudget:
    """A time budget, and what has to fit into it besides the steps: every epoch and the end are validated."""

    seconds: float
    steps_per_epoch: int
    validation_steps: float  # training steps that take as long as one validation, until one was timed
    final_steps: float  # training steps that take as long as the evaluation of the best weights
    validation: float | None = None  # seconds that the last one took

    def steps(self, used: float, per_step: float) -> int:
        """How many more steps of `per_step` seconds fit when `used` seconds are gone, perhaps none."""
        validation = self.validation_steps * per_step if self.validation is None else self.validation
        left = self.seconds - used - ENDING - self.final_steps * per_step - validation
        return max(0, int(left / (per_step + validation / self.steps_per_epoch)))

    def replan(self, horizon: Horizon, step: int, used: float, per_step: float) -> Horizon:
        """The horizon after `step` steps, moved where it would miss the budget by more than SLACK of it."""
        total = step + self.steps(used, per_step)
        if abs(total - horizon.total) * per_step <= SLACK * self.seconds:
            return horizon
        return horizon.moved(step, total)
