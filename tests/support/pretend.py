"""A pretended device for machines with only a CPU: tensors report pretend:0, the CPU computes their values.

As on a GPU, tensors of two devices do not mix. What a program would wait for on a GPU is counted, with the line of
effnet that asks for it: a number read from the device ("number"), a tensor copied from it ("download"), a tensor
copied to it from where the copy must be awaited ("upload"), and a shape that depends on values ("shape").

It shows where tensors lie and how often the device is waited for. It shows nothing about kernels, speed or memory.

    python tests/support/pretend.py LOG COMMAND ...    effnet COMMAND ... where the device exists; LOG gets the counts

Registering a device cannot be undone, so this belongs in a process of its own: see `run`. The interface is torch's
own for backends in Python, which may change with its version.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from forked import Forked
from lightning_fabric.accelerators import ACCELERATOR_REGISTRY, Accelerator
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
SHAPES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero"}
COPIES = {"_to_copy", "copy_"}
LOW = ("conv2d", "linear", "matmul", "mm", "addmm", "bmm")  # what autocast computes in few bits
SOURCE = f"{os.sep}effnet{os.sep}"

aten: Any = torch.ops.aten
waits: Counter[str] = Counter()  # by "kind file:line function", of this process
full: list[int] = []  # convolutions until memory runs out, if it is to


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        """`held` as a tensor that says that it is elsewhere."""
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: OnDevice = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=f"{NAME}:0", **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation on such tensors; in inference mode some come that consist of others."""
        if torch.is_inference_mode_enabled() and op._can_decompose():
            return op.decompose(*args, **(kwargs or {}))
        return compute(op, *args, **(kwargs or {}))


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation, by the CPU; its tensors are the device's again."""
    name = op._schema.name.partition("::")[2]
    tensors = [each for each in (*_leaves(args), *kwargs.values()) if isinstance(each, torch.Tensor)]
    ours = {id(each.held): each for each in tensors if isinstance(each, OnDevice)}
    foreign = [each for each in tensors if not isinstance(each, OnDevice) and each.dim()]  # scalars may mix
    if foreign and name not in COPIES and ours:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {NAME}:0 and the CPU")
    if full and name == "convolution":
        full[0] -= 1
        if full[0] < 0:
            raise torch.OutOfMemoryError(f"{NAME} out of memory. Tried to allocate 2.00 GiB.")
    into = kwargs.get("device")
    to_cpu = into is not None and torch.device(into).type == "cpu"
    if name == "copy_":
        to_cpu = not isinstance(args[0], OnDevice)
    note(name, args, kwargs, to_cpu=to_cpu, foreign=bool(foreign))
    found = op(*_map(_hold, args), **{name: _hold(each) for name, each in kwargs.items()})
    if name in COPIES and to_cpu:
        return args[0] if name == "copy_" else found
    return _map(lambda it: _give(it, ours), found)


def note(name: str, args: Any, kwargs: Any, *, to_cpu: bool, foreign: bool) -> None:
    """Count what a GPU would be waited for."""
    kind = ""
    if name == "_local_scalar_dense":
        kind = "number"
    elif name in SHAPES or (name.startswith("index") and _by_mask(args)):
        kind = "shape"
    elif name in COPIES and to_cpu:
        kind = "download"
    elif name in COPIES and foreign and not (kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])):
        kind = "upload"
    if kind:
        waits[f"{kind} {_place(sys._getframe(1))}"] += 1


def register() -> None:
    """Make the device known to torch, to Lightning's Fabric and to effnet."""
    from effnet import machine

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    for key, kernel in (("PrivateUse1", compute), ("AutocastPrivateUse1", torch.library.fallthrough_kernel)):
        library = torch.library.Library("_", "IMPL")
        library.fallback(kernel, key)
        _LIBRARIES.append(library)
    library = torch.library.Library("aten", "IMPL")
    for name in LOW:
        library.impl(name, _lowered(getattr(aten, name).default), "AutocastPrivateUse1")
    _LIBRARIES.append(library)
    ACCELERATOR_REGISTRY.register(NAME, _Accelerator, description="for tests")
    machine.DEVICES = (*machine.DEVICES, NAME)


def run(log: Path, code: str) -> tuple[Forked, Any]:
    """Code in a forked process, where the device may exist: how that ended, and what it wrote to `log`."""
    process = Forked(log.with_suffix(".out"), _execute, code)
    process.communicate(timeout=1800)
    return process, json.loads(log.read_text()) if log.exists() else None


def _execute(code: str) -> None:
    torch.set_num_threads(1)
    exec(code, {"__name__": "program"})


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Accelerator(Accelerator):
    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


_LIBRARIES: list[torch.library.Library] = []  # they are registered as long as they live


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """An operation's arguments or results, each by `function`; torch.utils._pytree takes three times as long."""
    if type(value) in (tuple, list):
        return type(value)([_map(function, each) for each in value])
    return function(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _map(found.append, value)
    return found


def _hold(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.held if isinstance(value, OnDevice) else value


def _give(value: Any, known: dict[int, OnDevice]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return known[id(value)] if id(value) in known else OnDevice(value)


def _by_mask(args: Any) -> bool:
    return any(isinstance(each, torch.Tensor) and each.dtype is torch.bool for each in _leaves(args[1:]))


def _place(frame: FrameType | None) -> str:
    """The innermost line of effnet's own source; autograd's threads have none."""
    while frame is not None:
        name = frame.f_code.co_filename
        if SOURCE in name:
            return f"{name.rpartition(SOURCE)[2]}:{frame.f_lineno} {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


def _lowered(op: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        low = torch.get_autocast_dtype(NAME)
        lowered = [_lower(each, low) for each in args]  # no such operation takes lists of tensors, or names them
        with torch.autocast(NAME, enabled=False):
            return op(*lowered, **kwargs)

    return call


def _lower(value: Any, low: torch.dtype) -> Any:
    wide = isinstance(value, torch.Tensor) and value.dtype is torch.float32 and value.device.type == NAME
    return value.to(low) if wide else value


if __name__ == "__main__":
    import pretend  # this file under its own name, so that there is one counter

    from effnet.cli import main

    pretend.register()
    try:
        main(sys.argv[2:])
    finally:
        Path(sys.argv[1]).write_text(json.dumps(pretend.waits))
