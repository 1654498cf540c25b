"""The one door to the compiled kernels in native/: pointers, sizes and types are checked here.

`instruction_sets()` is empty where nothing was compiled: the package was installed without a compiler. The environment
may choose: EFFNET_ISA, an instruction set in place of the best one; EFFNET_KERNELS, another library than the one beside
this file; EFFNET_NATIVE=0, torch's modules train, not the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from effnet.errors import ArgumentError
from effnet.fields import positive_int

KernelPrecision = Literal["fp32", "bf16"]

CHOSEN = "EFFNET_ISA"  # the environment's word for an instruction set
SWITCH = "EFFNET_NATIVE"  # "0": they do not train
KERNEL_SIZES, STRIDES = (3, 5, 7), (1, 2)  # of a depthwise convolution that they train
HEADER, RECORD = 10, 9  # numbers of a network, and of each of its blocks
ABI = 4  # what effnet_abi() of native/dispatch.cpp returns
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY = Path(__file__).with_name(f"_kernels{SUFFIX}")
MESSAGE = 512  # bytes


def instruction_sets() -> tuple[str, ...]:
    """The compiled instruction sets that this processor has, best first; empty where nothing was compiled."""
    found = library()
    return () if found is None else tuple(found.effnet_instruction_sets().decode().split(","))


def instruction_set() -> str | None:
    """The instruction set that the kernels use: EFFNET_ISA, or the best one; None where nothing was compiled.

    Raises:
        ArgumentError: EFFNET_ISA is not one of `instruction_sets()`.
    """
    known = instruction_sets()
    chosen = os.environ.get(CHOSEN)
    if chosen and known and chosen not in known:
        raise ArgumentError(CHOSEN, chosen, f"must be one of {', '.join(known)} on this processor.")
    return (chosen or known[0]) if known else None


def training_instruction_set() -> str | None:
    """The same for training, where the best one is not always the last that the processor has learned.

    Raises:
        ArgumentError: EFFNET_ISA is not one of `instruction_sets()`.
    """
    found = library()
    if found is None or os.environ.get(CHOSEN):
        return instruction_set()
    return str(found.effnet_training_instruction_set().decode())


def trains() -> bool:
    """Whether they may train: compiled, and not switched off by EFFNET_NATIVE=0."""
    return os.environ.get(SWITCH) != "0" and library() is not None


def sizes(numbers: Sequence[int], precision: KernelPrecision) -> tuple[int, int]:
    """Bytes of a network's packed weights, and of what each thread works in.

    Raises:
        ArgumentError: the numbers do not describe a network.
    """
    found = (ctypes.c_int64 * 3)()
    message = ctypes.create_string_buffer(MESSAGE)
    described = _int32(numbers)
    failed = _open().effnet_sizes(_isa(), precision == "bf16", described, len(described), found, message, MESSAGE)
    if failed:
        raise _error(message.value.decode())
    return found[0], found[1]


class NativeNetwork:
    """A network that the kernels keep ready: its weights are packed, its threads and memory are its own.

    Args:
        numbers: its sizes, in the order of native/layout.cpp.
        arrays: its weights, float32, in the same order.
        precision: what it computes with.
        threads: how many.

    Raises:
        ArgumentError: the numbers do not describe a network, or the arrays do not fit it.
    """

    def __init__(
        self, numbers: Sequence[int], arrays: Sequence[NDArray[np.float32]], precision: KernelPrecision, threads: int
    ) -> None:
        self._threads, self._lock = positive_int("threads", threads), threading.Lock()
        library, described = _open(), _int32(numbers)
        held = [np.ascontiguousarray(array, np.float32) for array in arrays]
        pointers = (ctypes.c_void_p * len(held))(*(array.ctypes.data for array in held))
        lengths = (ctypes.c_int64 * len(held))(*(array.size for array in held))
        message = ctypes.create_string_buffer(MESSAGE)
        sized = described, len(described), pointers, lengths, len(held)
        self._network = library.effnet_create(_isa(), precision == "bf16", threads, *sized, message, MESSAGE)
        if not self._network:
            raise _error(message.value.decode())
        self._size, self._channels, self._classes = numbers[0], numbers[1], numbers[8]
        self.map_shape = self._map_shape(numbers)  # height, width and channels of the last feature map
        self._run, self._free, self._phases = library.effnet_run, library.effnet_free, library.effnet_phases

    def __call__(self, pixels: NDArray[np.uint8], features: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Logits (N, K) float32 of pixels (N, size, size, C) uint8.

        Args:
            pixels: the images.
            features: (N, size, size, C) float32, C-contiguous: filled with the last feature map.

        Raises:
            ArgumentError: an array has another shape or type, or the network was closed.
        """
        image = self._size, self._size, self._channels
        if pixels.ndim != 4 or pixels.shape[1:] != image or pixels.dtype != np.uint8:
            raise ArgumentError("pixels", f"{pixels.shape} {pixels.dtype}", f"must be N times {image} uint8.")
        if features is not None:
            shape = len(pixels), *self.map_shape
            usual = features.flags.c_contiguous and features.flags.writeable
            if features.shape != shape or features.dtype != np.float32 or not usual:
                rule = f"must be {shape} float32, C-contiguous and writeable."
                raise ArgumentError("features", f"{features.shape} {features.dtype}", rule)
        pixels = np.ascontiguousarray(pixels)
        logits = np.empty((len(pixels), self._classes), np.float32)
        places = (None if array is None else array.ctypes.data for array in (logits, features))
        with self._lock:
            if self._network is None:
                raise ArgumentError("network", "closed", "cannot answer any more.")
            if self._run(self._network, pixels.ctypes.data, len(pixels), *places):
                raise ArgumentError("threads", self._threads, "are more than the system can start now.")
        return logits

    def phases(self) -> NDArray[np.float64]:
        """Seconds of each phase of the last image: see native/effnet.h."""
        seconds = np.zeros(self._phases(self._network, None, 0))
        self._phases(self._network, seconds.ctypes.data, len(seconds))
        return seconds

    def close(self) -> None:
        """Release its threads and memory."""
        with self._lock:  # not while it computes
            network, self._network = self._network, None
        if network is not None:
            self._free(network)

    @staticmethod
    def _map_shape(numbers: Sequence[int]) -> tuple[int, int, int]:
        """Height, width and channels of the last feature map; the numbers were checked before."""
        head, blocks = numbers[7], [numbers[start : start + RECORD] for start in range(HEADER, len(numbers), RECORD)]
        size = -(-numbers[0] // numbers[3])
        for _, _, _, _, stride, *_ in blocks:
            size = -(-size // stride)
        return size, size, head or blocks[-1][2]

    def __del__(self) -> None:
        if getattr(self, "_network", None) is not None:
            self.close()


def _isa() -> bytes:
    name = instruction_set()
    assert name is not None
    return name.encode()


def _int32(numbers: Sequence[int]) -> Any:
    if (largest := max(numbers, default=0)) >= 2**31:  # ctypes would keep the lowest bits
        raise _error(f"{largest} must be below 2^31")
    return (ctypes.c_int32 * len(numbers))(*numbers)


def _error(text: str) -> Exception:
    return (
        MemoryError(text)
        if "bad_alloc" in text
        else ArgumentError("network", text, "is not one that the kernels can run.")
    )


def _open() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise ImportError("effnet was installed without its compiled kernels", name="effnet._kernels")
    return found


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where nothing was compiled."""
    path = Path(os.environ.get("EFFNET_KERNELS") or LIBRARY)
    if not path.is_file():
        return None
    library = ctypes.CDLL(str(path))
    library.effnet_instruction_sets.restype = ctypes.c_char_p
    if library.effnet_abi() != ABI:
        return None
    pointer, number, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    text = ctypes.c_char_p
    library.effnet_sizes.argtypes = [text, whole, pointer, number, pointer, pointer, number]
    library.effnet_create.argtypes = [text, whole, whole, pointer, number, pointer, pointer, number, pointer, number]
    library.effnet_create.restype = pointer
    library.effnet_run.argtypes = [pointer, pointer, number, pointer, pointer]
    library.effnet_phases.argtypes = [pointer, pointer, number]
    library.effnet_phases.restype = number
    library.effnet_free.argtypes = [pointer]
    library.effnet_use_openmp.argtypes = [pointer, pointer, pointer]
    library.effnet_use_openmp.restype = None
    library.effnet_training_instruction_set.restype = text
    library.effnet_training_scratch.argtypes = [text, whole, whole, pointer, pointer, number]
    library.effnet_training_scratch.restype = number
    library.effnet_train.argtypes = [text, whole, whole, whole, pointer, pointer, number]
    library.effnet_free.restype = None
    return library
