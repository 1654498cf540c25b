"""torch's files without torch: the same values as torch reads, no code is run, and no byte outside is read."""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from effnet.errors import CheckpointError
from effnet.weights.files import DAMAGED, open_weights
from effnet.weights.pickles import MAGIC, PROTOCOL, read_torch
from effnet.weights.registry import LITE, REGISTRY, fetch

OLD = pytest.mark.parametrize("old", [False, True], ids=["zip", "older"])
KINDS = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8
BASE = torch.arange(60.0)


def saved(path: Path, content: object, old: bool = False, protocol: int = 2) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not old, pickle_protocol=protocol)
    return path


def same(found: object, expected: object) -> bool:
    """Whether it is what torch reads, with arrays in place of tensors."""
    if isinstance(expected, torch.Tensor):
        expected = expected.detach()
        expected = expected.float() if expected.is_floating_point() else expected
        return isinstance(found, np.ndarray) and torch.equal(torch.from_numpy(found.copy()), expected)
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return type(found) is type(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


@OLD
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "content",
    [
        {f"{kind}": BASE[:6].reshape(2, 3).to(kind) for kind in (*KINDS, torch.uint8, torch.bool)},
        nn.BatchNorm2d(3).state_dict(),
        dict(nn.Conv2d(2, 3, 3).named_parameters()),
        [BASE[7:19].reshape(3, 4).t(), BASE[::2], BASE[:1].expand(5), BASE.reshape(1, 3, 4, 5)[:, 1:, 2:]],
        {"a": torch.empty(0, 3), "b": torch.tensor(3.0), "c": torch.zeros(2, 3, 4, 4, requires_grad=True)},
        {"a": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)},
        {"epoch": 3, 7: [1, -2, 2**40, -(2**70), 0.5, None, True, "ä" * 300], "t": ((), (1,), (1, 2, 3, 4))},
        {f"{number}": torch.tensor(number) for number in range(300)},
    ],
)
def test_what_torch_wrote_is_read(tmp_path: Path, content: object, old: bool, protocol: int) -> None:
    path = saved(tmp_path / "a.pth", content, old, protocol)
    assert same(read_torch(path), torch.load(path, weights_only=True) if protocol == 2 else content)


@pytest.mark.parametrize("name", LITE)
def test_published_files(name: str) -> None:
    path = fetch(REGISTRY[name])
    found, expected = read_torch(path), torch.load(path, weights_only=True)
    assert same(found, dict(expected))
    assert isinstance(found, dict)
    assert all(array.flags.aligned and array.flags.writeable for array in found.values())


def test_tensors_of_one_storage_share_it(tmp_path: Path) -> None:
    found = read_torch(saved(tmp_path / "a.pth", [BASE, BASE[5:]]))
    assert isinstance(found, list)
    assert np.shares_memory(*found)


@OLD
def test_other_things_of_torch_are_passed_over(tmp_path: Path, old: bool) -> None:
    beside = {"size": torch.Size([3]), "device": torch.device("cpu"), "kind": torch.float16, "layout": torch.strided}
    marked = nn.Parameter(torch.ones(2))
    marked.note = "kept"  # type: ignore[attr-defined]
    if not old:
        beside |= {"complex": torch.ones(2, dtype=torch.complex64), "sparse": torch.eye(2).to_sparse()}
    counts = collections.Counter("aab")
    found = read_torch(saved(tmp_path / "a.pth", {"w": BASE, "p": marked, "set": {1}, "counts": counts, **beside}, old))
    assert isinstance(found, dict)
    assert same(found["w"], BASE)
    assert same(found["p"], torch.ones(2))
    assert [key for key, value in found.items() if isinstance(value, np.ndarray)] == ["w", "p"]


# --- files that torch.save did not write


class Runs:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> object:
        return self.call


@dataclass(frozen=True)
class Storage:
    key: str


def described(*numbers: object, kind: str = "FloatStorage", size: object = 4, keys: Sequence[str] = "0") -> bytes:
    """The pickle of tensors: offset, shape and strides of storages that are said to have `size` numbers."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> object:
            return ("storage", getattr(torch, kind), thing.key, "cpu", size) if isinstance(thing, Storage) else None

    file = io.BytesIO()
    rest = (*numbers, False, collections.OrderedDict())
    tensors = {key: Runs(torch._utils._rebuild_tensor_v2, Storage(key), *rest) for key in keys}
    Pickler(file, 2).dump({"conv_stem.weight" if key == "0" else key: tensor for key, tensor in tensors.items()})
    return file.getvalue()


def zipped(pickled: bytes, data: bytes = bytes(16), kind: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", data)
        for name, content in more.items():
            archive.writestr(f"a/{name}", content)
    return file.getvalue()


def older(pickled: bytes, data: bytes = bytes(16), count: int = 4, keys: object = ("0",), little: bool = True) -> bytes:
    system = {"protocol_version": PROTOCOL, "little_endian": little}
    parts = [pickle.dumps(thing, 2) for thing in (MAGIC, PROTOCOL, system)]
    return b"".join([*parts, pickled, pickle.dumps(list(keys), 2), struct.pack("<q", count), data])  # type: ignore[call-overload]


RIGHT = described(0, (2, 2), (2, 1))
SHAPES = {
    "offset beyond the storage": described(4, (1,), (1,)),
    "end beyond the storage": described(1, (2, 2), (2, 1)),
    "negative offset": described(-1, (2,), (1,)),
    "negative stride": described(3, (4,), (-1,)),
    "negative shape": described(0, (-1,), (1,)),
    "huge shape": described(0, (2**40, 2**40), (2, 1)),
    "huge expanded shape": described(0, (2**40,), (0,)),
    "huge stride": described(0, (2,), (2**62,)),
    "huge offset": described(2**80, (2,), (1,)),
    "too few strides": described(0, (2, 2), (1,)),
    "no number": described(0, ("2",), (1,)),
    "half a number": described(0.0, (2,), (1,)),
    "true": described(True, (2,), (1,)),
    "no shape": described(0, None, None),
    "huge empty shape": described(0, (0, 2**63), (1, 1)),
    "many dimensions": described(0, (1,) * 100, (1,) * 100),
    "larger storage": described(0, (8,), (1,), size=8),
    "huge storage": described(0, (2,), (1,), size=2**61),
    "negative storage": described(0, (0,), (1,), size=-4),
    "wider numbers": described(0, (4,), (1,), kind="DoubleStorage"),
    "no size": described(0, (2,), (1,), size=None),
}


def refused(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_are_checked(tmp_path: Path) -> None:
    for wrap in (zipped, older):
        (tmp_path / "a.pth").write_bytes(wrap(RIGHT))
        assert open_weights(tmp_path / "a.pth").tensors["conv_stem.weight"].shape == (2, 2)
        for name, pickled in SHAPES.items():
            refused(tmp_path / f"{name}.pth", wrap(pickled), "is damaged or not a weight file")


CONTAINERS = {
    "short storage": zipped(RIGHT, bytes(15)),
    "compressed": zipped(RIGHT, bytes(16), zipfile.ZIP_DEFLATED),
    "no storage": zipped(RIGHT).replace(b"a/data/0", b"a/data/1"),
    "other order": zipped(RIGHT, byteorder=b"big"),
    "short pickle": zipped(RIGHT[:-3]),
    "older, short storage": older(RIGHT, bytes(15)),
    "older, other count": older(RIGHT, bytes(32), count=8),
    "older, negative count": older(RIGHT, count=-4),
    "older, no keys": older(RIGHT, keys=()),
    "older, other keys": older(RIGHT, keys=("1",)),
    "older, keys twice": older(RIGHT, bytes(16) + struct.pack("<q", 4) + bytes(16), keys=("0", "0")),
    "older, odd keys": older(RIGHT, keys=([],)),
    "older, other order": older(RIGHT, little=False),
    "older, cut": older(RIGHT)[:-30],
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_checked(tmp_path: Path, name: str) -> None:
    refused(tmp_path / "a.pth", CONTAINERS[name], "is damaged or not a weight file")


@pytest.mark.parametrize("checksums", [True, False])
def test_a_changed_number_is_noticed(tmp_path: Path, checksums: bool) -> None:
    """By the crc32 that the zip file has of it; torch compares none. torch can be told to write none."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        path = saved(tmp_path / "a.pth", {"conv_stem.weight": BASE})
    finally:
        torch.serialization.set_crc32_options(before)
    assert np.array_equal(open_weights(path).tensors["conv_stem.weight"], BASE.numpy())
    content = path.read_bytes()
    changed = content.replace(BASE.numpy().tobytes(), (BASE + 1).numpy().tobytes())
    assert changed != content
    if checksums:
        refused(path, changed, r"is damaged or not a weight file .*data/0 .*crc32")
    else:
        path.write_bytes(changed)
        assert np.array_equal(open_weights(path).tensors["conv_stem.weight"], BASE.numpy() + 1)


def test_members_that_overlap_do_not_fill_the_memory(tmp_path: Path) -> None:
    """A zip file may list the same bytes many times."""
    keys = [str(number) for number in range(50)]
    path, data = tmp_path / "a.pth", bytes(4000)
    path.write_bytes(zipped(described(0, (1000,), (1,), size=1000, keys=keys), data))
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("a/data/0")
        for key in keys[1:]:
            other = copy.copy(first)
            other.filename = f"a/data/{key}"
            archive.filelist.append(other)
        archive.writestr("a/version", "3")  # so that the list is written anew
    refused(path, path.read_bytes(), "is damaged or not a weight file")


@OLD
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Runs(os.system, "touch ran"), r"(posix|nt)\.system"),
        (Runs(eval, "open('ran', 'w')"), "eval"),
        (Runs(getattr, "a", "upper"), "getattr"),
        (Runs(torch.load, "x"), r"torch\.serialization\.load"),
        (Runs(torch._utils._rebuild_parameter, Runs(exec, "open('ran', 'w')"), True, {}), "exec"),
        (nn.Linear(2, 2), "Linear"),
    ],
)
def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thing: object, name: str, old: bool) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.pth", {"conv_stem.weight": BASE, "x": thing}, old)
    refused(path, path.read_bytes(), rf"holds Python objects \(.*{name}\), .*run their code.*state_dict")
    assert not (tmp_path / "ran").exists()


def test_steps_of_a_pickle_that_do_not_fit(tmp_path: Path) -> None:
    """Builders get only what they can build from, and only builders are called."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for steps in (
        b"}}R.",  # calls a dictionary
        b"K\1)R.",  # calls a number
        call + b")R.",
        call + b"(K\1K\1K\1K\1tR.",
        call + b"(NK\0(K\1tNK\0(K\1tt\x81.",
        b"ccollections\nOrderedDict\n}\x85R.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(K\1K\1K\1K\1tR.",
        b"ctorch\nFloatStorage\n)R.",
        b"}]]s.",  # a key that cannot be hashed
        b"K\1K\2a.",
        b"(K\1e.",
        b"]u.",
        b"0.",
        b".",
        b"h\7.",
        b"j\xff\xff\xff\xff.",
        b"X\xff\xff\xff\xff.",
        b"\x8d" + b"\xff" * 8 + b".",
        b"\x8b\xff\xff\xff\xff.",
        b"X\1\0\0\0\xff.",
        b"cabc",
        b"(" * 50,
        b"K\1Q.",
        b"(K\1K\1K\1K\1K\1tQ.",
    ):
        for wrap in (zipped, older):
            refused(tmp_path / "a.pth", wrap(b"\x80\2" + steps), "is damaged|no named tensors")


def test_a_large_number_of_a_memo_costs_nothing(tmp_path: Path) -> None:
    """Python's own unpickler would make room for four thousand million entries."""
    (tmp_path / "a.pth").write_bytes(zipped(b"\x80\2}r\xff\xff\xff\xff."))
    assert read_torch(tmp_path / "a.pth") == {}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3), st.integers(0, 400))
def test_no_change_raises_anything_else(tmp_path: Path, old: bool, changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(older(RIGHT) if old else zipped(RIGHT))
    for position, value in changes:
        content[position % len(content)] = value
    (tmp_path / "a.pth").write_bytes(content[: len(content) - cut] if cut < 100 else content)
    with contextlib.suppress(CheckpointError):
        open_weights(tmp_path / "a.pth")


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_pickle_raises_anything_else(tmp_path: Path, steps: bytes) -> None:
    for wrap in (zipped, older):
        (tmp_path / "a.pth").write_bytes(wrap(steps))
        with contextlib.suppress(CheckpointError, *DAMAGED):
            read_torch(tmp_path / "a.pth")
