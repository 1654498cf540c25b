"""The optimizer of a recipe: which parameters decay, which learn slower, and RMSProp as TensorFlow computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from effnet.models.efficientnet import EfficientNet
from effnet.training.recipe import Recipe

DECAY = 0.9  # of RMSProp's mean square (paper, section 5.2)
EPSILON = 1e-3  # of RMSProp (official code)


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
