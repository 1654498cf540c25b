"""Number formats and safetensors files, compared with what the safetensors package and torch read."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from effnet.files import read_bytes
from effnet.weights.arrays import MALFORMED, read_safetensors, to_array

VALUES = torch.tensor([[0.0, -1.5, 3.140625], [65504.0, 2.0**-14, -0.0]])


def content(blob: bytes) -> np.ndarray:
    return np.frombuffer(blob, np.uint8)


def written(header: object, data: bytes = b"") -> np.ndarray:
    text = json.dumps(header).encode()
    return content(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floating_point_numbers_become_float32(dtype: torch.dtype) -> None:
    held = VALUES.to(dtype)
    read = read_safetensors(content(save({"a": held}, {"format": "pt"})))["a"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, held.float().numpy())
    assert np.signbit(read[1, 2])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_whole_numbers_stay_as_they_are(dtype: torch.dtype) -> None:
    state = {"a": torch.tensor([0, 1, 100]).to(dtype), "b": torch.tensor(1, dtype=dtype), "c": torch.empty(0, 3)}
    read = read_safetensors(content(save(state)))
    assert {name: array.shape for name, array in read.items()} == {"a": (3,), "b": (), "c": (0, 3)}
    for name in "ab":
        assert torch.equal(torch.from_numpy(read[name].copy()), state[name])


def test_float32_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(save({"a": VALUES, "n": torch.tensor(3)}))
    blob = read_bytes(tmp_path / "a")
    for array in read_safetensors(blob).values():
        assert np.shares_memory(array, blob)
        assert array.flags.writeable, "torch warns of arrays that are not"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_forked_process_has_a_copy_of_a_file_s_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    code = """
import os, sys
from pathlib import Path
from effnet.files import read_bytes
content = read_bytes(Path(sys.argv[1]))
if not (child := os.fork()):
    content[0] = 0
    os._exit(0)
os.waitpid(child, 0)
print(bytes(content))
"""
    assert subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "a")], text=True) == "b'abc'\n"


def test_an_empty_file_has_no_content(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert bytes(read_bytes(tmp_path / "a")) == b""


def test_arrays_are_aligned() -> None:
    """Headers of other writers may have any length."""
    for padding in range(8):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        read = read_safetensors(written({"a": entry, "__metadata__": {"x": " " * padding}}, b"\0\0\x80?\0\0\0@"))["a"]
        assert read.flags.aligned
        assert read.tolist() == [1, 2]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WRONG = {
    "beyond the end": {"data_offsets": [4, 12]},
    "before the beginning": {"data_offsets": [-8, 8]},
    "backwards": {"data_offsets": [8, 0]},
    "half a place": {"data_offsets": [0, 8.0]},
    "too small": {"shape": [3]},
    "too large": {"shape": [1]},
    "negative": {"shape": [-1, -2]},
    "huge": {"shape": [2**62, 2**62]},
    "not a shape": {"shape": ["2"]},
    "no format": {"dtype": "F8_E4M3"},
    "no entry": {"dtype": None, "data_offsets": 3},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_sizes_are_checked(changes: dict[str, object]) -> None:
    assert read_safetensors(written({"a": ENTRY}, bytes(8)))["a"].shape == (2,)
    with pytest.raises(MALFORMED):
        read_safetensors(written({"a": ENTRY | changes}, bytes(8)))


@pytest.mark.parametrize("offsets", [(4, 20), (0, 8), (8, 20), (12, 24)])
def test_every_byte_belongs_to_one_tensor(offsets: tuple[int, int]) -> None:
    """A changed offset, of which the sizes of all tensors say nothing, would make one read another's numbers."""
    start, end = offsets
    other = {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
    with pytest.raises(ValueError, match=r"overlap|gap|end at"):
        read_safetensors(written({"a": ENTRY, "b": other}, bytes(24)))


def test_tensors_that_overlap_do_not_fill_the_memory() -> None:
    with pytest.raises(ValueError, match="overlap"):
        read_safetensors(written({f"{number}": ENTRY for number in range(50)}, bytes(8)))


@pytest.mark.parametrize("blob", [b"", b"\1", bytes(8), b"\xff" * 8, bytes([200]) + bytes(20)])
def test_headers_are_checked(blob: bytes) -> None:
    with pytest.raises(ValueError, match="header"):
        read_safetensors(content(blob))
    for header in ([1], 3, {"a": 3}, {"a": []}):
        with pytest.raises(MALFORMED):
            read_safetensors(written(header))


@given(st.binary(max_size=80))
def test_no_bytes_raise_anything_else(blob: bytes) -> None:
    for damaged in (blob, len(blob).to_bytes(8, "little") + blob):
        with contextlib.suppress(MALFORMED):
            read_safetensors(content(damaged))


def test_a_float64_beyond_float32_is_infinite() -> None:
    np.testing.assert_array_equal(to_array(content(np.array([1e300]).tobytes()), "F64", (1,)), [np.inf])
