"""From a step's gradients to new weights: sanity checks, optimizer, learning rate, loss scaling, moving average.

Also parameter groups, and RMSProp as TensorFlow computes it.

Reading a number from a GPU waits until it is computed, and meanwhile the next step cannot be queued. So on a GPU a
step's numbers stay on the device, and LOOK steps are checked together.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from effnet.errors import TrainingError
from effnet.machine import StepPrecision
from effnet.models.efficientnet import EfficientNet
from effnet.training.recipe import Recipe

DECAY = 0.9  # of RMSProp's mean square (paper, section 5.2)
EPSILON = 1e-3  # of RMSProp (official code)
CHECKED = 100  # first steps; later, loss and gradients only have to be finite
CONSTANT = 1e-6  # spread of the outputs over a batch, relative to their size, that counts as constant
PATIENCE = 5  # steps in a row with constant outputs, or with gradients of zero
RECENT = 20  # steps that the loss is averaged over
LOOK = 20  # steps on a GPU that are checked together
OVERFLOWS = 24  # fp16 steps in a row with infinite gradients: by then the loss is scaled by 2^16 / 2^24
DIVERGED = "the learning rate is probably too high: try a tenth of it with --lr"


class RMSPropTF(torch.optim.Optimizer):
    """RMSProp as in TensorFlow 1, which trained the paper's networks; torch's differs in three ways.

    Here the mean square starts at 1, not 0, so the first steps are small; epsilon is added inside the square root; and
    the learning rate is part of the momentum, so a change of rate affects new gradients only.

    With torch's GradScaler, a step with non-finite gradients changes nothing, as decided on the device.
    """

    _step_supports_amp_scaling = True  # the scaler sets `found_inf` and need not wait for the device

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """One step; `closure` computes the gradients and returns the loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        overflow: Tensor | None = getattr(self, "found_inf", None)
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
            before = [*squares, *momenta, *params]
            kept = [] if overflow is None else [each.clone() for each in before]
            # square += (1 - decay) * (grad^2 - square)
            torch._foreach_mul_(squares, DECAY)
            torch._foreach_addcmul_(squares, grads, grads, 1 - DECAY)
            roots = torch._foreach_add(squares, EPSILON)
            torch._foreach_sqrt_(roots)
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_addcdiv_(momenta, grads, roots, group["lr"])
            torch._foreach_sub_(params, momenta)
            if overflow is not None:
                for new, old in zip(before, kept, strict=True):
                    new.copy_(torch.where(overflow > 0, old, new))
        return loss


def make_optimizer(network: EfficientNet, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters; each group has its `share` of the learning rate.

    torch's optimizers are fused, one pass over each tensor: AdamW took 7 instead of 23 ms for B0 (Xeon, one thread).
    """
    groups = parameter_groups(network, recipe)
    lr, decay = recipe.scaled_lr, recipe.weight_decay
    if recipe.optimizer == "rmsprop":
        return RMSPropTF(groups, lr, momentum=recipe.momentum, weight_decay=decay)
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return torch.optim.SGD(groups, lr, momentum=recipe.momentum, weight_decay=decay, nesterov=nesterov, fused=True)
    return torch.optim.AdamW(groups, lr, betas=(recipe.momentum, 0.999), weight_decay=decay, fused=True)


def parameter_groups(network: EfficientNet, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups by body or classifier, with decay or without: norms never decay, biases if the recipe says so."""
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
        {"params": params, "share": 1.0 if is_head else recipe.body_lr} | ({"weight_decay": 0.0} if spared else {})
        for (is_head, spared), params in groups.items()
    ]


class Average:
    """The exponential moving average of a network's weights and statistics, which is evaluated and kept."""

    def __init__(self, network: EfficientNet) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.network.recompute(None)

    @torch.no_grad()
    def update(self, network: EfficientNet, decay: float) -> None:
        """Update: average = decay * average + (1 - decay) * network."""
        state, averaged = network.state_dict(), self.network.state_dict()
        names = [name for name, tensor in averaged.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([averaged[name] for name in names], [state[name] for name in names], 1 - decay)
        for name in averaged.keys() - set(names):
            averaged[name].copy_(state[name])


class SanityChecks:
    """Stops a run that cannot succeed.

    Args:
        num_classes: of the network.
        scaled: whether the loss is scaled, for fp16; infinite gradients then only skip a step and halve the scale.
    """

    def __init__(self, num_classes: int, *, scaled: bool = False) -> None:
        self.guessing = math.log(max(2, num_classes))  # the loss of a network that guesses
        self.scaled = scaled
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.constant = self.zero_gradients = self.overflows = 0

    def state(self) -> tuple[list[float], int, int, int]:
        """The state for a checkpoint."""
        return list(self.recent), self.constant, self.zero_gradients, self.overflows

    def restore(self, state: tuple[list[float], int, int, int]) -> None:
        """Restore what `state` returned."""
        recent, self.constant, self.zero_gradients, self.overflows = state
        self.recent.extend(recent)

    def check(self, step: int, loss: float, spread: float, gradient: float) -> None:
        """Check a step.

        Args:
            step: its number, from 0.
            loss: its mean loss.
            spread: standard deviation of the outputs over the images, relative to their mean absolute value.
            gradient: norm of all gradients before clipping.

        Raises:
            TrainingError: the run cannot succeed; the message gives the likely cause.
        """
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step}: {DIVERGED}")
        self.overflows = 0 if math.isfinite(gradient) else self.overflows + 1
        if self.overflows >= (OVERFLOWS if self.scaled else 1):
            raise TrainingError(f"the gradients are not finite at step {step}, the loss is {loss:.3g}: {DIVERGED}")
        if step >= CHECKED:
            return
        self.recent.append(loss)
        self.constant = self.constant + 1 if spread < CONSTANT else 0
        self.zero_gradients = self.zero_gradients + 1 if gradient == 0 else 0
        if self.constant >= PATIENCE:
            raise TrainingError(
                f"the network gives the same answer to every image at step {step}: are the images all alike or empty? "
                "Look at them with effnet check; damaged weights have the same effect"
            )
        if self.zero_gradients >= PATIENCE:
            raise TrainingError(f"the gradients and all activations are zero at step {step}: are the weights damaged?")
        if step == CHECKED - 1 and (mean := fmean(self.recent)) > self.guessing + 1:
            guessing = f"guessing gives ln(K) = {self.guessing:.2f}"
            raise TrainingError(f"after {CHECKED} steps the loss is {mean:.2f}, and {guessing}: {DIVERGED}")


class Updater:
    """Updates and averages the weights from a step's gradients by a recipe, with sanity checks.

    On a CPU a step is checked before it changes the weights. On a GPU the first step is checked, then LOOK steps
    together: call `look` before the weights are saved.

    Args:
        network: the network to train, on its device.
        recipe: optimizer, rates, clipping and average.
        precision: of the steps; with fp16, call backward on `scaler.scale(loss)`.
    """

    def __init__(self, network: EfficientNet, recipe: Recipe, precision: StepPrecision = "fp32") -> None:
        self.network, self.recipe = network, recipe
        self.device, scaled = network.classifier.weight.device, precision == "fp16"
        self.optimizer = make_optimizer(network, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.average = Average(network) if recipe.ema else None
        self.sanity_checks = SanityChecks(network.spec.num_classes, scaled=scaled)
        self.unread: list[tuple[int, Tensor]] = []  # steps, and their loss, spread and gradient
        self.most = 1  # steps that are checked together

    @property
    def averaged(self) -> EfficientNet:
        """The network to evaluate and keep: the average if there is one."""
        return self.average.network if self.average else self.network

    def update(self, step: int, progress: float, loss: Tensor, spread: Tensor) -> list[float]:
        """Update the weights and clear the gradients of step `step`, at `progress` (0 to 1) of the schedule.

        Returns:
            The losses of the steps that were checked in this call.

        Raises:
            TrainingError: `loss`, `spread` or gradients show that the run cannot succeed; see SanityChecks.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip or float("inf"))
        self.unread.append((step, torch.stack([loss, spread, norm])))
        losses = self.look() if self.device.type == "cpu" else []
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.scaled_lr * self.recipe.lr_at(progress) * group["share"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.network, self.recipe.ema_at(step))
        if len(self.unread) >= self.most:
            losses, self.most = self.look(), LOOK
        return losses

    def look(self) -> list[float]:
        """Wait for the steps that were not checked yet, check them, and return their losses.

        Raises:
            TrainingError: see `update`.
        """
        unread, self.unread = self.unread, []
        rows = torch.stack([numbers for _, numbers in unread]).cpu().tolist() if unread else []
        for (step, _), row in zip(unread, rows, strict=True):
            self.sanity_checks.check(step, *row)
        return [loss for loss, *_ in rows]

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sanity_checks": self.sanity_checks.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.network.load_state_dict(state["network"])
        if self.average:
            self.average.network.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.sanity_checks.restore(state["sanity_checks"])
