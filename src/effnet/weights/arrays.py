"""Tensors in files as numpy arrays: number formats, and safetensors files. Needs no torch.

All floating-point formats become float32, the precision of the networks; integers stay unchanged. Arrays of float32 are
views of the file's bytes, so a network is in memory once. All are aligned.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from zipfile import ZipFile

AnyArray = NDArray[Any]
FileBytes = NDArray[np.uint8]  # the content of a file

DTYPES: dict[str, str] = {  # safetensors' names: numpy's, little-endian
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # the upper half of a float32; numpy has no such dtype
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
METADATA = "__metadata__"  # the only key of a safetensors header that does not name a tensor
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)  # errors from parsing damaged files
LENGTH = 8  # bytes of the length of a safetensors header


@contextmanager
def open_zip(path: Path) -> Iterator[ZipFile]:
    """Open a zip file; raises ValueError if it is damaged, or zipfile's errors."""
    import zipfile  # slow to import, and few files need it
    import zlib

    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from error


def read_safetensors(file: memoryview) -> dict[str, AnyArray]:
    """The tensors of a safetensors file by name; raises one of MALFORMED if it is not such a file."""
    content = np.frombuffer(file, np.uint8)
    length = int.from_bytes(content[:LENGTH].tobytes(), "little")
    if not 0 < length <= len(content) - LENGTH:
        raise ValueError(f"its header of {length} bytes does not fit into {len(content)} bytes")
    header = json.loads(content[LENGTH : LENGTH + length].tobytes())
    data = content[LENGTH + length :]
    entries = {name: entry for name, entry in header.items() if name != METADATA}
    places = {name: _find_place(data, name, entry) for name, entry in entries.items()}
    end = 0
    for start, stop in sorted(entry["data_offsets"] for entry in entries.values()):
        if start != end:
            raise ValueError(
                f"its tensors {'overlap' if start < end else 'leave a gap'} at byte {start} of its numbers"
            )
        end = stop
    if end != len(data):
        raise ValueError(f"its tensors end at byte {end} of {len(data)}")
    return {name: to_array(places[name], entry["dtype"], entry["shape"]) for name, entry in entries.items()}


def to_array(content: FileBytes, dtype: str, shape: Sequence[int]) -> AnyArray:
    """The bytes of one contiguous tensor as an array: float32, whole numbers or bool.

    Args:
        content: its bytes and no others.
        dtype: one of DTYPES.
        shape: not negative.

    Raises:
        ValueError: the dtype is not known, or the size is not that of the shape.
    """
    if dtype not in DTYPES:
        raise ValueError(f"numbers of the format {dtype} are not read, only {', '.join(DTYPES)}")
    kind = np.dtype(DTYPES[dtype])
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) * kind.itemsize != len(content):
        raise ValueError(f"the shape {list(shape)} of {dtype} does not fit {len(content)} bytes")
    values: AnyArray = content.view(kind)
    values = values if values.flags.aligned else values.copy()
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif kind.kind == "f" or sys.byteorder == "big":
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, as in torch
            values = values.astype(np.float32 if kind.kind == "f" else kind.newbyteorder("="), copy=False)
    return values.reshape(shape)


def _find_place(data: FileBytes, name: str, entry: Any) -> FileBytes:
    start, end = entry["data_offsets"]
    if type(start) is not int or type(end) is not int or not 0 <= start <= end <= len(data):
        raise ValueError(f"the tensor {name} is not inside the file: it was cut short or damaged")
    return data[start:end]
