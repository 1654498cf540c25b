"""Lightning's Fabric without torchmetrics, since checking its version imports all of it and its optional packages."""

from __future__ import annotations

from effnet.errors import without
from effnet.process import unchanged

with unchanged(), without("torchmetrics"):
    from lightning_fabric import Fabric as Fabric
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
    from lightning_fabric.strategies.ddp import DDPStrategy as DDPStrategy
    from lightning_fabric.strategies.single_device import SingleDeviceStrategy as SingleDeviceStrategy
