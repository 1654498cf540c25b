"""What this computer can do: its processor, cores, memory, and the number formats that it multiplies fast.

What is fast on one processor is slow on another, so the rules of training and inference start from these facts.
Needs no torch; only a question about a GPU loads it.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from effnet.errors import ArgumentError, UnknownNameError, optional_import
from effnet.fields import write_count

Precision = Literal["fp32", "bf16"]
StepPrecision = Literal["bf16", "fp16", "tf32", "fp32"]  # of a training step; fp16 and tf32 are for GPUs

CPUINFO = Path("/proc/cpuinfo")
GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
DEVICES = ("cpu", "cuda", "mps")
# Of a CUDA GPU: Ampere, the first generation with bf16 and TF32; Volta, the first that multiplies fp16 in tiles
BF16_CAPABILITY, FP16_CAPABILITY = (8, 0), (7, 0)
# Instructions that matter to a network, as Linux and macOS name them; the widest first.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON", "advsimd": "NEON"}
BF16 = {"amx_bf16": "bf16 (AMX)", "avx512_bf16": "bf16 (AVX-512)", "bf16": "bf16 (ARM)"}
INT8 = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp", "dotprod")


@dataclass(frozen=True)
class Machine:
    """What a computer can do."""

    processor: str
    cores: int  # that this process may use
    memory_bytes: int | None  # all that a container and ulimit leave to this process, used or not; None: unknown
    features: tuple[str, ...]  # of VECTORS, BF16 and INT8, in that order

    @property
    def bf16(self) -> bool:
        """Whether the processor has instructions that multiply bf16; without them it is emulated, and slow."""
        return any(feature in BF16 for feature in self.features)

    @property
    def fast_bf16(self) -> bool:
        """Whether networks run faster in bf16 than in fp32.

        AMX and AMD's AVX-512 BF16 multiply at least twice as many numbers as fp32. Intel's AVX-512 BF16 multiplies as
        many (one instruction a cycle in place of two): B0 took 1.3 of fp32's time. ARM was not measured.
        """
        intel = self.processor.startswith("Intel")
        return "amx_bf16" in self.features or ("avx512_bf16" in self.features and not intel)

    @property
    def int8(self) -> bool:
        """Whether the processor has instructions for dot products of int8."""
        return any(feature in INT8 for feature in self.features)

    def to_dict(self) -> dict[str, Any]:
        """The facts under the names of the attributes."""
        return dataclasses.asdict(self) | {"features": list(self.features), "bf16": self.bf16, "int8": self.int8}

    def __str__(self) -> str:
        pieces = [self.processor, write_count(self.cores, "core")]
        pieces += [VECTORS[feature] for feature in self.features if feature in VECTORS][:1]
        pieces += [BF16[feature] for feature in self.features if feature in BF16][:1] or ["no bf16"]
        return ", ".join(pieces)


@cache
def this_machine() -> Machine:
    """The computer that this runs on, asked once."""
    name, features = read_processor(_description())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(name or platform.processor() or platform.machine() or "unknown", usable, _memory(), features)


def choose_precision(
    device: str = "cpu", machine: Machine | None = None, *, kernels: bool = False
) -> tuple[StepPrecision, str]:
    """The number format in which a training step is fast, and why; weights, optimizer and statistics stay fp32.

    Args:
        device: "cpu", "cuda" or "mps", with an index or not, such as "cuda:1". A CUDA GPU is asked through torch.
        machine: another computer than this one.
        kernels: whether effnet's compiled kernels compute the step, not torch's modules.

    Raises:
        UnknownNameError: there is no such kind of device.
        MissingExtraError: a GPU is asked about, and torch is not installed.
    """
    kind, _, index = device.partition(":")
    if kind not in DEVICES or not (index or "0").isdecimal():
        raise UnknownNameError("device", device, DEVICES)
    if kind == "cuda":
        return _precision_of_gpu(int(index or 0))
    if kind != "cpu":
        return "fp32", f"bf16 was not measured on {kind}"
    machine = machine or this_machine()
    features = machine.features
    if "amx_bf16" in features:
        return "bf16", "the processor multiplies bf16 in tiles; a step of B0 took 0.71 of fp32's time (Xeon, AMX)"
    if kernels and "avx512f" in features:
        return "bf16", "the kernels' maps are half as large; a step of B0 took 0.84 of fp32's time (Xeon, AVX-512)"
    if "avx512_bf16" in features and not machine.fast_bf16:
        return "fp32", "without AMX this processor multiplies bf16 no faster than fp32 (inference, Xeon)"
    if "avx512_bf16" in features:
        return "bf16", "the processor multiplies bf16; a step of B0 took 0.82 of fp32's time (EPYC Zen 5)"
    if "bf16" in features:
        return "fp32", "the processor multiplies bf16, but training in it was not measured on ARM"
    return "fp32", "the processor has no bf16 instructions; a step of B0 took 15 times fp32's time (EPYC Zen 3, AVX2)"


def check_device(device: str, kinds: Sequence[str] | None = None) -> None:
    """Check that torch can compute on a device: "cpu", "cuda" (the first of them), "cuda:1" or "mps".

    Raises:
        ArgumentError: it is not of these `kinds` (None: DEVICES), or not on this machine; the message names what is
            there.
        MissingExtraError: it is not the processor, and torch is not installed.
    """
    if device == "cpu":
        return
    torch, there = _import_torch(), ["cpu"]
    for kind in (each for each in kinds or DEVICES if each != "cpu"):
        there += [f"{kind}:{index}" for index in range(torch.get_device_module(kind).device_count())]
    if device not in there and f"{device}:0" not in there:
        raise ArgumentError("device", device, f"is not one that torch can use here: {', '.join(there)}.")


def device_memory(device: str) -> int | None:
    """All the memory of a CUDA GPU in bytes, used or not; None for other devices."""
    kind, _, index = device.partition(":")
    return _import_torch().cuda.get_device_properties(int(index or 0)).total_memory if kind == "cuda" else None


def load_average() -> float | None:
    """Programs that were running or waiting for a core, on average over the last minute; None on Windows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cache_folder() -> Path:
    """Where measurements are kept: $EFFNET_CACHE, or `effnet` in the user's cache folder.

    A user without a home, as in a container or under cron, has one in the folder of temporary files.
    """
    if chosen := os.environ.get("EFFNET_CACHE"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "effnet"
    try:
        return Path.home() / ".cache" / "effnet"
    except RuntimeError:
        import tempfile

        return Path(tempfile.gettempdir()) / f"effnet-{os.getuid()}"


def read_processor(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and features of the processor that Linux's /proc/cpuinfo or macOS's sysctl describes; "" for no name."""
    parts = (line.partition(":") for line in text.splitlines())
    lines = [(key.strip(), value.strip()) for key, colon, value in parts if colon]
    first = dict(reversed(lines))  # cpuinfo repeats itself for every core
    flags = set(f"{first.get('flags', '')} {first.get('Features', '')}".lower().split())
    # Apple: hw.optional.arm.FEAT_BF16: 1, hw.optional.avx2_0: 1
    flags |= {
        key.rpartition(".")[2].lower().removeprefix("feat_").removesuffix("_0")
        for key, value in lines
        if key.startswith("hw.optional") and value == "1"
    }
    name = first.get("model name") or first.get("machdep.cpu.brand_string") or ""
    return " ".join(name.split()), tuple(feature for feature in (*VECTORS, *BF16, *INT8) if feature in flags)


def _description() -> str:
    """The system's description of its processor, or nothing."""
    if CPUINFO.exists():
        return CPUINFO.read_text(errors="replace")
    if platform.system() != "Darwin":
        return ""
    import subprocess

    command = ["/usr/sbin/sysctl", "machdep.cpu.brand_string", "hw.optional"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout


def _memory() -> int | None:
    """The machine's memory, or less where a container or ulimit gives this process less."""
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):  # Windows, or a system without these names
        return None
    with suppress(ImportError, AttributeError, OSError):  # AttributeError: a system without one of the limits
        import resource

        limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        found += [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return min([*found, *_group_limits()])


def _group_limits() -> list[int]:
    """The limits of the process's control group and of those that it is part of: version 2, and version 1."""
    found = list[int]()
    with suppress(OSError):
        for line in GROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top, name = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
            own = top / path.lstrip("/")  # in a container it may not be there: what is there is its own
            for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):
                with suppress(OSError, ValueError):  # no limit: "max"
                    found.append(int((folder / name).read_text()))
    return found


def _precision_of_gpu(index: int) -> tuple[StepPrecision, str]:
    torch = _import_torch()
    if not torch.cuda.is_available():
        return "fp32", "torch sees no CUDA GPU"
    capability = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)} has compute capability {'.'.join(map(str, capability))}"
    if capability >= BF16_CAPABILITY:
        return "bf16", f"{name}, which multiplies bf16; not measured here"
    if capability >= FP16_CAPABILITY:
        return "fp16", f"{name}: fp16, and bf16 begins with {'.'.join(map(str, BF16_CAPABILITY))}; not measured here"
    return "fp32", f"{name}, and fast fp16 begins with {'.'.join(map(str, FP16_CAPABILITY))}; not measured here"


def _import_torch() -> Any:
    # By name, because a test forbids an import of torch here: this module works where torch is not installed.
    with optional_import("asking a GPU"):
        return import_module("torch")


def resident_memory() -> int:
    """Bytes that this process holds now; only Linux reports them, elsewhere the most that it has held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """The most bytes that this process has held, since `forget_peak` where that works; 0 on Windows."""
    with suppress(OSError, ValueError, StopIteration):  # getrusage counts on Linux what the parent held when it forked
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let `peak_memory` start again; only Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
