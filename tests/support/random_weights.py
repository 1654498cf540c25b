"""Random weights that tell mistakes apart: drawn from their names, or shaken until no tensor is trivial."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


def golden(key: str, shape: Sequence[int]) -> torch.Tensor:
    """The tensor that stands under `key`: random, but the same everywhere, and about as large as a trained one."""
    random = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_var"):
        values = random.uniform(0.5, 2, shape)
    elif key.endswith("running_mean"):
        values = random.normal(0, 0.2, shape)
    elif len(shape) == 1 and key.endswith("weight"):
        values = random.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        values = random.normal(0, 0.2, shape)
    else:
        values = random.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape)
    return torch.from_numpy(values.astype(np.float32))


def shaken(network: nn.Module, size: int = 96, images: int = 8) -> nn.Module:
    """Weights as stable as trained ones: statistics are those of real maps, then disturbed.

    Drawn at random, the statistics would let the maps grow or vanish, and the logits would hardly tell what came in.
    """
    torch.manual_seed(0)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    convs = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    momenta = {norm: norm.momentum for norm in norms}
    for module in (*norms, *convs):
        if module in momenta:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = 1
        else:
            nn.init.normal_(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
        if module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.2)
    with torch.no_grad():
        network.train()(torch.randn(images, convs[0].in_channels, size, size))
    for norm, momentum in momenta.items():
        norm.momentum = momentum
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 2)
    return network.eval()
