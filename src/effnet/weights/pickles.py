"""torch's files (.pth, .pt, .bin) without torch: tensors become numpy arrays, and no code of a file is ever run.

Both formats are a pickle that describes tensors, and their numbers as raw bytes:

    zip     NAME/data.pkl, and NAME/data/KEY for each storage
    older   five pickles (a magic number, the protocol, the system, the content, the storages' keys), then the storages

The pickle is interpreted here, and only opcodes that build tensors and plain values are supported. Settings beside the
tensors (argparse.Namespace, numpy scalars, dtypes) are replaced by an empty object. Every size, offset and stride is
checked against the available bytes before an array is created.
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from effnet.errors import CheckpointError
from effnet.weights.arrays import DTYPES, AnyArray, open_zip, to_array

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # at the beginning of an older file
ZIP = b"PK\3\4"
COUNT = 8  # bytes in front of its storages, each: how many numbers follow
LOCAL_HEADER, NAME_SIZE = 30, 26  # of a zip file's member: its length, and where it has those of its name and extra
LONGEST_NAME = 500  # of a class
STORAGES = {  # torch's names of storages: those of arrays.DTYPES
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
# What holds no tensors of a network, or tensors of kinds that no network here has
PASSED_OVER = re.compile(
    r"torch\.(\w+\.)*\w*(Tensor|Storage)|torch\._utils\._rebuild_\w+|torch\.nn\.parameter\.Parameter|"
    r"torch\.(q?u?int|b?float|b?complex|bits|bool|per_)\w*|torch\.(device|Size|serialization\._get_layout)|"
    r"(builtins|__builtin__)\.(set|frozenset|bytearray|complex)|collections\.Counter|_codecs\.encode|"
    r"argparse\.Namespace|types\.SimpleNamespace|datetime\.(datetime|date|timedelta|timezone)|"
    r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path|"
    r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)"
)
ADVICE = "If you trust it, save only its state dict: torch.save(model.state_dict(), path)"


class PassedOver:
    """Replaces an object that is skipped, of which nothing is built or kept."""

    def __init__(self, *_: object) -> None:
        pass


class _UnknownStepError(ValueError):
    """A byte that is not an opcode of torch's pickles."""


class _ForeignObjectError(Exception):
    """A class whose objects would be built by running code; the message is its name."""


def read_torch(path: Path) -> object:
    """Read a file of torch.save: dictionaries, lists and plain values, with arrays instead of tensors.

    Raises:
        CheckpointError: torch.save did not write it, or opening it would run code.
        ValueError, TypeError, LookupError, AttributeError, OSError and others of files.DAMAGED: it is damaged.
    """
    with path.open("rb", buffering=0) as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        read = _read_zip if content[: len(ZIP)] == ZIP else _read_older
        try:
            return read(path, content, _Storages(file, len(content)))
        except _UnknownStepError as error:
            raise CheckpointError(f"{path} is damaged, or neither torch.save nor safetensors wrote it") from error
        except _ForeignObjectError as error:
            reason = f"{path} holds Python objects ({error}), and opening it would run their code"
            raise CheckpointError(f"{reason}. {ADVICE}") from error


class _Storages:
    """The storages of a file, each read once; together they cannot be larger than the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size  # bytes
        self.taken = 0  # bytes that were reserved
        self.found: dict[str, tuple[object, int, AnyArray | None]] = {}  # kind, numbers, None: of a kind passed over

    def reserve(self, kind: object, key: str, count: int) -> AnyArray | None:
        """Room for `count` numbers, which `fill` reads."""
        if key not in self.found:
            room = None
            if isinstance(kind, str):
                self.taken += count * np.dtype(DTYPES[kind]).itemsize
                if count < 0 or self.taken > self.size:
                    raise ValueError(f"its storages do not fit into {self.size} bytes: it was cut short or damaged")
                room = np.empty(count, to_array(np.empty(0, np.uint8), kind, (0,)).dtype)
            self.found[key] = kind, count, room
        if self.found[key][:2] != (kind, count):
            raise ValueError(f"the storage {key} has two sizes")
        return self.found[key][2]

    def fill(self, key: str, at: int) -> int:
        """Read a storage from that byte of the file on; returns the byte behind it."""
        kind, count, room = self.found[key]
        if room is None or not isinstance(kind, str):
            raise ValueError(f"the storage {key} has numbers of a kind that is not read")
        length = count * np.dtype(DTYPES[kind]).itemsize
        self.file.seek(at)
        room[:] = to_array(np.fromfile(self.file, np.uint8, length), kind, (count,))
        return at + length


def _read_zip(path: Path, content: mmap.mmap, storages: _Storages) -> object:
    with open_zip(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
    root = next(iter(members), "").partition("/")[0]
    if f"{root}/constants.pkl" in members:
        raise CheckpointError(f"{path} is a TorchScript archive: opening it would run code in it. {ADVICE}")

    has_checksums = any(info.CRC for info in members.values())  # torch.serialization.set_crc32_options(False)

    def find(name: str) -> tuple[int, int]:
        """The bytes of a member, which torch never compresses."""
        info = members[f"{root}/{name}"]
        start = info.header_offset + LOCAL_HEADER
        start += sum(struct.unpack_from("<HH", content, info.header_offset + NAME_SIZE))
        end = start + info.file_size
        if info.file_size != info.compress_size or end > len(content):
            raise ValueError(f"{name} in it was cut short, or is compressed")
        if has_checksums and zlib.crc32(memoryview(content)[start:end]) != info.CRC:
            raise ValueError(f"{name} in it has other bytes than were written: its crc32 differs")
        return start, end

    if f"{root}/byteorder" in members:
        start, end = find("byteorder")
        _check_order(content[start:end] == b"little")
    start, end = find("data.pkl")
    held = _Unpickler(memoryview(content)[start:end], storages).load()
    for key, (_, _, room) in storages.found.items():
        if room is not None:
            start, end = find(f"data/{key}")
            if storages.fill(key, start) > end:
                raise ValueError(f"the storage {key} is larger than data/{key} in the file")
    return held


def _read_older(path: Path, content: mmap.mmap, storages: _Storages) -> object:
    reader = _Unpickler(memoryview(content), storages)
    try:
        opening: tuple[object, ...] = reader.load(), reader.load()
    except (ValueError, TypeError, LookupError):
        opening = ()
    if opening != (MAGIC, PROTOCOL):
        raise _unknown(path)
    system, held, keys = reader.load(), reader.load(), reader.load()
    _check_order(not isinstance(system, dict) or system.get("little_endian", True))
    if not isinstance(keys, list) or len(keys) != len(storages.found) or {*keys} != {*storages.found}:
        raise ValueError("it does not list the storages of its tensors")
    at = reader.at
    for key in keys:
        storages.file.seek(at)
        if storages.file.read(COUNT) != storages.found[key][1].to_bytes(COUNT, "little"):
            raise ValueError(f"the storage {key} is not as long as its tensors say")
        at = storages.fill(key, at + COUNT)
    return held


def _unknown(path: Path) -> Exception:
    """The error about a file that does not begin as the older format does."""
    import tarfile

    if tarfile.is_tarfile(path):
        return CheckpointError(f"{path} is of torch's oldest format: opening it would run code in it. {ADVICE}")
    return _UnknownStepError("no magic number")


def _check_order(is_little: bool) -> None:
    if not is_little:
        raise ValueError("its numbers are big-endian, which are not read")


class _Unpickler:
    """Follows the pickles of a file one after the other; the next one begins at `at`."""

    def __init__(self, content: memoryview, storages: _Storages) -> None:
        self.content, self.storages, self.at = content, storages, 0

    def load(self) -> object:
        """The object of the next pickle."""
        stack: list[Any] = []
        outer: list[list[Any]] = []  # the stacks below the marks
        memo: dict[int, Any] = {}
        while True:
            step = bytes(self.take(1))
            if step in PUTS:
                memo[self.number(PUTS[step])] = stack[-1]
            elif step in GETS:
                stack.append(memo[self.number(GETS[step])])
            elif step == pickle.MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif step in NUMBERS:
                stack.append(self.number(NUMBERS[step]))
            elif step in TEXTS:
                stack.append(str(self.take(self.number(TEXTS[step])), "utf-8", "surrogatepass"))
            elif step in BYTES:
                self.take(self.number(BYTES[step]))
                stack.append(PassedOver())
            elif step in CONSTANTS:
                stack.append(CONSTANTS[step])
            elif step in EMPTY:
                stack.append(EMPTY[step]())
            elif step in LONGS:
                stack.append(int.from_bytes(self.take(self.number(LONGS[step])), "little", signed=True))
            elif step == pickle.MARK:
                outer.append(stack)
                stack = []
            elif step in TUPLES:
                items = [stack.pop() for _ in range(TUPLES[step])]
                stack.append(tuple(reversed(items)))
            elif step == pickle.TUPLE:
                items, stack = stack, outer.pop()
                stack.append(tuple(items))
            elif step in (pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS):
                items, stack = stack, outer.pop()
                _extend(stack[-1], items, step == pickle.SETITEMS)
            elif step == pickle.APPEND:
                _extend(stack[-2], [stack.pop()], False)
            elif step == pickle.SETITEM:
                value, key = stack.pop(), stack.pop()
                _extend(stack[-1], [key, value], True)
            elif step == pickle.GLOBAL:
                stack.append(self.find(self.line(), self.line()))
            elif step == pickle.STACK_GLOBAL:
                name, module = stack.pop(), stack.pop()
                stack.append(self.find(module, name))
            elif step in (pickle.REDUCE, pickle.NEWOBJ):
                arguments = stack.pop()
                stack.append(_call(stack.pop(), None, arguments))
            elif step == pickle.BUILD:
                stack.pop()  # of a state dict its _metadata, of settings their values
            elif step == pickle.BINPERSID:
                stack.append(self.find_storage(stack.pop()))
            elif step == pickle.PROTO:
                self.take(1)
            elif step == pickle.FRAME:
                self.take(8)
            elif step == pickle.STOP:
                return stack.pop()
            else:
                raise _UnknownStepError(f"the step {step!r}")

    def take(self, length: int) -> memoryview:
        """The next bytes."""
        start, self.at = self.at, self.at + length
        if length < 0 or self.at > len(self.content):
            raise ValueError("it was cut short")
        return self.content[start : self.at]

    def number(self, form: struct.Struct) -> Any:
        """The next number."""
        return form.unpack(self.take(form.size))[0]

    def line(self) -> str:
        """The text before the next line feed."""
        text, found, _ = bytes(self.content[self.at : self.at + LONGEST_NAME]).partition(b"\n")
        self.at += len(text) + 1
        if not found:
            raise ValueError("a name in it does not end")
        return text.decode()

    def find(self, module: str, name: str) -> object:
        """What stands for a class or a function: a builder, a kind of numbers, or PassedOver."""
        path = f"{module}.{name}"
        if path in STORAGES:
            return STORAGES[path]
        if path in TENSORS:
            return self.tensor
        if path not in BUILDERS and not PASSED_OVER.fullmatch(path):
            raise _ForeignObjectError(path)
        return BUILDERS.get(path, PassedOver)

    def find_storage(self, place: Any) -> AnyArray | None:
        """The numbers that ("storage", kind, key, device, count) stands for."""
        word, kind, key, _, count, *view = place
        if word != "storage" or type(key) is not str or type(count) is not int or view not in ([], [None]):
            raise ValueError("it names a storage as torch does not")
        return self.storages.reserve(kind, key, count)

    def tensor(
        self, storage: AnyArray | None, offset: int, shape: Sequence[int], stride: Sequence[int], *_: object
    ) -> AnyArray | PassedOver:
        """A view of a storage; offset and stride count elements."""
        if storage is None:
            return PassedOver()
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, np.ndarray) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a tensor in it has no storage, or a negative size")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        # an expanded tensor has more elements than its storage
        if 0 not in shape and (last >= len(storage) or math.prod(shape) > self.storages.size):
            raise ValueError(f"a tensor of shape {tuple(shape)} is not inside its storage of {len(storage)} numbers")
        if 0 in shape:
            return np.empty(shape, storage.dtype)
        bytes_of = storage.itemsize
        return np.ndarray(
            shape, storage.dtype, storage.data, offset * bytes_of, tuple(step * bytes_of for step in stride)
        )


BYTE, SHORT, WORD, LONG = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q"))
SIGNED, FLOAT = struct.Struct("<i"), struct.Struct(">d")
# Steps with a number behind them: its format
PUTS = {pickle.BINPUT: BYTE, pickle.LONG_BINPUT: WORD}
GETS = {pickle.BINGET: BYTE, pickle.LONG_BINGET: WORD}
NUMBERS = {pickle.BININT: SIGNED, pickle.BININT1: BYTE, pickle.BININT2: SHORT, pickle.BINFLOAT: FLOAT}
# Steps with a length behind them: its format
TEXTS = {
    **{pickle.BINUNICODE: WORD, pickle.SHORT_BINUNICODE: BYTE, pickle.BINUNICODE8: LONG},
    **{pickle.BINSTRING: SIGNED, pickle.SHORT_BINSTRING: BYTE},  # Python 2's
}
BYTES = {pickle.BINBYTES: WORD, pickle.SHORT_BINBYTES: BYTE, pickle.BINBYTES8: LONG, pickle.BYTEARRAY8: LONG}
LONGS = {pickle.LONG1: BYTE, pickle.LONG4: SIGNED}
CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
EMPTY: dict[bytes, Callable[[], object]] = {
    **{pickle.EMPTY_DICT: dict, pickle.EMPTY_LIST: list, pickle.EMPTY_TUPLE: tuple},
    pickle.EMPTY_SET: PassedOver,
}
TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


def _dictionary(items: object = ()) -> dict[Any, Any]:
    """An OrderedDict; older Pythons list its items here."""
    if not isinstance(items, (list, tuple)):
        raise TypeError("an OrderedDict in it is not made of a list")
    return dict(items)


def _first(value: object, *_: object) -> object:
    return value


def _call(function: object, _: object, arguments: object, *__: object) -> object:
    """Call a builder with its arguments: no other function can come out of a pickle."""
    if not callable(function) or not isinstance(arguments, (tuple, list)):
        raise TypeError("it builds something from what is not a class")
    return function(*arguments)


def _extend(target: object, items: list[Any], is_dictionary: bool) -> None:
    if isinstance(target, dict) and is_dictionary:
        target.update(zip(items[::2], items[1::2], strict=True))
    elif isinstance(target, list) and not is_dictionary:
        target.extend(items)
    elif not isinstance(target, PassedOver):
        raise TypeError("it adds items to what is not a container")


TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
BUILDERS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _call,
}
