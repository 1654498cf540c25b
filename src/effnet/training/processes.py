"""Several processes that train one network, as started by torchrun, and how all of them end if one dies.

Fabric averages the gradients (torch's DistributedDataParallel). Rank 0 decides whatever depends on a clock, a file or a
random draw, and writes the run's folder.
"""

from __future__ import annotations

import atexit
import logging
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from effnet import machine
from effnet.errors import ProcessLostError
from effnet.training.fabric import DDPStrategy, Fabric, SingleDeviceStrategy
from effnet.training.run_folder import LAST
from effnet.training.settings import Settings

SHARED_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # "True": torchrun reuses one store of addresses for all restarts


class _TerminatedError(RuntimeError):
    """torchrun ends this process."""


def make_fabric(settings: Settings) -> Fabric:
    """The Fabric with a run's processes and device."""
    world, local = (int(os.environ.get(name) or 0) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))  # set by torchrun
    world, local = world or 1, local or world or 1
    machine.check_device(settings.device)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) and os.environ.get(SHARED_STORE) == "True":
        why = "processes that torchrun restarts may find the addresses of their predecessors and wait forever"
        raise ProcessLostError(f"{why}: run the command again yourself, with --resume, or see docs/scale.md")
    kind, _, index = settings.device.partition(":")
    several = DDPStrategy(
        process_group_backend="cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        timeout=timedelta(days=7),  # only rank 0 splits the data and evaluates, while the others wait
    )
    one = SingleDeviceStrategy(torch.device(kind) if kind == "cpu" else torch.device(kind, int(index or 0)))
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.WARNING)  # it logs a line for each process
    fabric = Fabric(
        accelerator=kind,
        devices=local if world > 1 else [int(index)] if index else 1,
        num_nodes=max(1, world // local),
        strategy=several if world > 1 else one,
    )
    fabric.launch()
    logger.setLevel(level)
    if world > 1:

        def leave() -> None:  # a process group's thread that outlives Python aborts the process at exit
            if dist.is_initialized():
                dist.destroy_process_group()

        atexit.register(leave)
    return fabric


@contextmanager
def together(fabric: Fabric, folder: Path | None = None) -> Iterator[None]:
    """Around collective work of several processes: if one of them is gone, each of the others raises an error.

    torchrun sends SIGTERM to the remaining ones, which raises the same error wherever a process is; once the error is
    raised, the signal is ignored, so that the error can still be printed.

    Args:
        fabric: of the training.
        folder: of the run, if it has begun.

    Raises:
        ProcessLostError: a process is gone, or torchrun ended this one.
    """
    if fabric.world_size == 1:
        yield
        return

    def end(*_: object) -> NoReturn:
        raise _TerminatedError

    signals = threading.current_thread() is threading.main_thread()  # only the main thread receives them
    before: Any = signal.signal(signal.SIGTERM, end) if signals else None
    try:
        yield
    except RuntimeError as error:
        ended = isinstance(error, _TerminatedError)
        if not (ended or isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        before = signal.SIG_IGN
        if signals:
            signal.signal(signal.SIGTERM, before)
        many = f"the {fabric.world_size} processes"
        why = f"torchrun ended {many}" if ended else f"one of {many} is gone, so all end"
        again = "nothing was trained yet"
        if folder is not None and (folder / LAST).exists():
            again = f"torchrun ... -m effnet train --resume {shlex.quote(str(folder))}"
            again = f"the last checkpoint is whole; go on with {again}"
        raise ProcessLostError(f"{why}: {again}") from error
    finally:
        if signals:
            signal.signal(signal.SIGTERM, before)


def take_over(network: nn.Module, fabric: Fabric) -> None:
    """Copy rank 0's weights and statistics to the network of every process."""
    if fabric.world_size > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
