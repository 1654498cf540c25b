"""Batch normalisation over all processes, on any device; torch's own runs on GPUs alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from effnet.models.blocks import ConvNormAct
from effnet.models.efficientnet import EfficientNet


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch statistics are those of all processes together; every process has as many images."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        wide = x.float()
        sums = torch.stack((wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))))
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean, square = all_reduce(sums) / count  # type: ignore[no-untyped-call]  # torch left it untyped
        variance = (square - mean.square()).clamp(min=0)
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift.view(1, -1, 1, 1), wide, scale.view(1, -1, 1, 1)).to(x.dtype)


def synchronise(network: EfficientNet) -> None:
    """Replace every BatchNorm2d by one over all processes, with the same tensors."""
    for module in network.modules():
        if isinstance(module, ConvNormAct) and type(module.norm) is nn.BatchNorm2d:
            old = module.norm
            module.norm = SyncBatchNorm2d(old.num_features, old.eps, old.momentum)
            module.norm.load_state_dict(old.state_dict())
