"""Malicious files that try to run code, read other files, or exhaust memory: one function per kind of file.

Any code that runs would write the canary, a file that must never appear.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import operator
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Trick = tuple[str, Path]  # the kind of the file for opener.py, and where it is

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join(9 * [f'*{before}'])}]\n" for before, after in itertools.pairwise("abcdefghijkl")
)


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made


def tricks(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """Write every trick into `folder`; `sound` is the folder with the files of opener.py."""
    for number, content in enumerate(_pickles(canary)):
        for name, wrapped in _wrapped(content).items():
            yield "model", _write(folder / f"pickle-{number}-{name}", wrapped)
    for number, content in enumerate(_hostile_steps()):
        for name, wrapped in _wrapped(content).items():
            yield "model", _write(folder / f"steps-{number}-{name}", wrapped)
    for each in (_zips, _yamls, _keras, _onnx, _openvino, _programs, _safetensors, _folders, _shards):
        yield from each(folder, sound, canary)


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _pickles(canary: Path) -> Iterator[bytes]:
    """Pickled calls, in every protocol and with every opcode that looks up a name or calls."""
    code = f"open({str(canary)!r}, 'w').close()"
    calls = (
        *((os.system, f"touch {canary}"), (eval, code), (exec, code), (open, str(canary), "w")),
        *(
            (subprocess.call, ["touch", str(canary)]),
            (runpy.run_path, str(_write(canary.with_name("run.py"), code.encode()))),
        ),
        *((functools.partial, open, str(canary), "w"), (operator.methodcaller, "touch"), (Path.touch, canary)),
        (pickle.loads, pickle.dumps(Call(eval, code))),
    )
    for call in calls:
        for protocol in (0, 2, 4):
            yield pickle.dumps({"state_dict": {"conv_stem.weight": Call(*call)}}, protocol)
    shell = f"touch {canary}".encode()
    text, short = b"X" + struct.pack("<I", len(shell)) + shell, b"\x8c" + bytes([len(shell)]) + shell
    yield b"cos\nsystem\n" + b"(" + text + b"tR."  # GLOBAL, REDUCE
    yield b"(ios\nsystem\n" + text + b"."  # INST, its argument too late
    yield b"(S'" + shell + b"'\nios\nsystem\n."  # INST
    yield b"(cos\nsystem\n" + text + b"o."  # OBJ
    yield b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94" + short + b"\x85R."  # STACK_GLOBAL
    yield b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x01h\x00\x93" + short + b"\x85R."  # its names from the memo
    yield b"\x80\x04\x8c\x05posix\x940\x8c\x06system\x940h\x00h\x01\x93\x94" + short + b"\x85\x94R\x94."
    yield b"\x80\x04cbuiltins\ngetattr\n(cos\nsystem\nX\x08\0\0\0__call__tR" + text + b"\x85R."
    yield b"\x80\x04ccollections\nOrderedDict\n)R}X\x0a\0\0\0__reduce__cos\nsystem\nsb" + text + b"\x85R."  # BUILD
    yield b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN" + text + b"\x85NtR."
    yield b"\x80\x02ctorch._utils\n_rebuild_parameter\n(cos\nsystem\nNNtR" + text + b"\x85R."
    yield b"\x80\x02cargparse\nNamespace\n)\x81}X\x09\0\0\0__class__cos\nsystem\nsb."
    yield b"\x80\x02Pos.system\n."  # PERSID
    yield b"\x80\x02" + text + b"Q."  # BINPERSID
    yield b"\x80\x02\x82\x01."  # EXT1
    yield b"\x80\x04cos\nsystem\n" + text + b"\x85}\x92."  # NEWOBJ_EX
    yield b"\x80\x02cnumpy\n_core.multiarray._reconstruct\n(cos\nsystem\nK\0tR."
    yield b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n(cos\nsystem\nK\0\x85C\x01btR."
    yield b"\x80\x02ctorch.storage\n_load_from_bytes\n(C" + bytes([len(shell)]) + shell + b"tR."


def _hostile_steps() -> Iterator[bytes]:
    """Pickles that would exhaust memory or never end."""
    yield b"\x80\x02" + b"(" * 2_000_000
    yield b"\x80\x02" + b"]" * 2_000_000 + b"."
    yield b"\x80\x02K\0" + b"0K\0" * 100_000 + b"."
    yield b"\x80\x02Nr\xff\xff\xff\x7f."  # a memo of 2^31
    yield b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x01" * 100  # a number of 2 GB
    yield b"\x80\x04\x95" + b"\xff" * 8 + b"}."
    yield b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a."
    doubled = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(60))
    yield b"\x80\x04)\x94" + doubled + b"."
    nested = b"".join(b"}\x94X\x01\0\0\0ah" + bytes([n]) + b"sX\x01\0\0\0bh" + bytes([n]) + b"s" for n in range(60))
    yield b"\x80\x04" + b"}\x94" + nested + b"."
    yield b"\x80\x04}\x94X\x01\0\0\0ah\0s."  # it holds itself
    yield b"\x80\x04]\x94h\0a."
    big = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu\x8a\x05"
        + struct.pack("<Q", 1 << 38)[:5]
    )
    yield b"\x80\x02" + big + b"tQK\0\x8a\x05" + struct.pack("<Q", 1 << 38)[:5] + b"\x85K\x01\x85\x89NtR."


def _wrapped(content: bytes) -> dict[str, bytes]:
    """A plain pickle, and torch's formats: legacy, zip, and the oldest, tar."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    zipped, tar = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name, part in (("data.pkl", content), ("byteorder", b"little"), ("data/0", bytes(16)), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", part)
    with tarfile.open(fileobj=tar, mode="w") as members:
        for name in ("sys_info", "pickle", "storages", "tensors", "../../canary"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            members.addfile(info, io.BytesIO(content))
    older = head + content + pickle.dumps([], 2)
    return {
        "raw.pth": content,
        "older.pt": older,
        "zip.pth": zipped.getvalue(),
        "tar.pth": tar.getvalue(),
        "raw.bin": content,
    }


def _zips(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """Nested zip files, bombs, duplicate members, and names that lead elsewhere."""
    evil = pickle.dumps(Call(open, str(canary), "w"), 2)

    def packed(name: str, members: list[tuple[str, bytes]], packing: int = zipfile.ZIP_STORED) -> Path:
        with warnings.catch_warnings(), zipfile.ZipFile(folder / name, "w", packing) as archive:
            warnings.simplefilter("ignore")  # of names that are there twice
            for member, content in members:
                archive.writestr(member, content)
        return folder / name

    yield "model", packed("bomb.pth", [("a/data.pkl", bytes(300_000_000))], zipfile.ZIP_DEFLATED)
    yield (
        "model",
        packed("bomb.keras", [("model.weights.h5", bytes(300_000_000)), ("config.json", b"{}")], zipfile.ZIP_DEFLATED),
    )
    yield "model", packed("bomb.pt2", [("a/extra/effnet", bytes(300_000_000))], zipfile.ZIP_DEFLATED)
    inner = packed("inner.pth", [("a/data.pkl", evil)]).read_bytes()
    yield "model", packed("nested.pth", [("a/data.pkl", inner)])
    yield "model", packed("nested2.pth", [("a/data.pkl", pickle.dumps({"a": 1}, 2)), ("a/data/0", inner)])
    yield "model", packed("twice.pth", [("a/data.pkl", evil), ("a/data.pkl", pickle.dumps({}, 2))])
    yield "model", packed("slip.pth", [("../../a/data.pkl", evil), ("/data.pkl", evil), ("a/../data.pkl", evil)])
    yield (
        "model",
        packed("script.pth", [("a/data.pkl", evil), ("a/constants.pkl", evil), ("a/code/a.py", b"import os")]),
    )
    yield "model", _write(folder / "behind.pth", b"MZ" * 500 + inner)
    yield "model", packed("arrays.npz", [("a.npy", _object_array(evil))])
    yield "model", _write(folder / "array.npy", _object_array(evil))
    yield "model", _write(folder / "array.pth", _object_array(evil))


def _object_array(evil: bytes) -> bytes:
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + evil


def _yamls(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """Tags that create objects, and texts that expand when read."""
    texts = (
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"name: !!python/object/apply:builtins.open ['{canary}', 'w']",
        f"alpha: !!python/object/new:os.system ['touch {canary}']\nbeta: 1\ngamma: 1",
        "name: !!python/name:os.system\nalpha: !!python/module:os",
        f"!!python/object/apply:eval [\"open('{canary}','w')\"]",
        LAUGHS + "stages: *l\nname: *l\nalpha: *l\nbeta: *l\ngamma: *l\nbase: *l\nversions: *l\ndata: *l\n",
        "[" * 20_000,
        "{" * 20_000,
        "a: " * 5_000 + "1",
        "- " * 20_000,
        "name: " + "9" * 100_000 + "\nalpha: " + "9" * 5000 + "\nbeta: 1e999\ngamma: .nan",
        "alpha: .inf\nbeta: -.inf\ngamma: .nan\nstages: [{op: mbconv}]",
        "&a [*a]",
        "stages: &a [*a]\nalpha: *a",
        "? {a: 1}\n: 2\n? [1]\n: 3",
        "<<: [{a: 1}]\nalpha: 1\nbeta: 1\ngamma: 2",
        "alpha: 2021-99-99\nbeta: 12:30:45\ngamma: 0x10",
        "stages:\n- {op: mbconv, channels: 100000000, repeats: 1000000000, kernel: 3, stride: 1, expansion: 1}\n",
        "stages:\n- {op: mbconv, channels: 8, repeats: 100000000000000000000, kernel: 3, stride: 1, expansion: 1}\n",
        "stages: [{op: mbconv, channels: 8, repeats: 2, kernel: 3, stride: 1, expansion: 1}]\nresolution: 100000000000",
    )
    for number, text in enumerate(texts):
        for kind in ("spec", "rule", "recipe"):
            yield kind, _write(folder / f"{kind}-{number}.yaml", text.encode())
        yield "model", folder / f"spec-{number}.yaml"
        shutil.copytree(sound / "run", folder / f"run-{number}", symlinks=True)
        yield "run", _write(folder / f"run-{number}" / "args.yaml", text.encode()).parent
        whole = (sound / "run" / "args.yaml").read_text()
        shutil.copytree(sound / "run", folder / f"run-{number}b", symlinks=True)
        yield "run", _write(folder / f"run-{number}b" / "args.yaml", (whole + "\n" + text).encode()).parent
    shutil.copytree(sound / "run", folder / "run-pickle", symlinks=True)
    for payload in (
        pickle.dumps(Call(open, str(canary), "w")),
        _wrapped(pickle.dumps(Call(open, str(canary), "w"), 2))["zip.pth"],
    ):
        mark = (sound / "run" / "last.ckpt").read_bytes()[:20]  # effnet checkpoint N, and a blank
        mark += hashlib.sha256(payload).hexdigest().encode() + b"\n"
        for name in ("last.ckpt", "previous.ckpt"):
            _write(folder / "run-pickle" / name, mark + payload)
        yield "run", folder / "run-pickle"


def _keras(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """Layers with code, numbers in other files, endless numbers."""
    import h5py

    code = {"class_name": "Lambda", "config": {"name": "l", "function": ["4wEAAAA=", None, None], "module": "os"}}
    other = {
        "module": "os",
        "class_name": "system",
        "config": {"command": f"touch {canary}"},
        "registered_name": "os>system",
    }
    for number, layer in enumerate((code, other)):
        config = {
            "class_name": "Functional",
            "config": {"name": "m", "layers": [layer], "output_layers": [["l", 0, 0]]},
        }
        file = folder / f"layers-{number}.h5"
        shutil.copy(sound / "keras.h5", file)
        with h5py.File(file, "a") as opened:
            opened.attrs["model_config"] = json.dumps(config)
        yield "model", file
        with zipfile.ZipFile(folder / f"layers-{number}.keras", "w") as archive:
            archive.write(sound / "keras.h5", "model.weights.h5")
            archive.writestr("config.json", json.dumps(config))
        yield "model", folder / f"layers-{number}.keras"
    with h5py.File(folder / "zeros.h5", "w") as file:
        file.create_dataset("stem_conv/kernel", (1_000_000, 50_000), "f4", chunks=(1000, 1000))
    yield "model", folder / "zeros.h5"
    with h5py.File(folder / "elsewhere.h5", "w") as file:
        file.create_dataset("stem_conv/kernel", (4,), "f4", external=[("/etc/passwd", 0, 16)])
    yield "model", folder / "elsewhere.h5"
    with h5py.File(folder / "endless.h5", "w") as file:
        file.create_dataset("stem_conv/kernel", (1 << 30,), "f4", external=[("/dev/zero", 0, 1 << 32)])
    yield "model", folder / "endless.h5"
    with h5py.File(folder / "links.h5", "w") as file:
        file["loop"], file["other"] = h5py.SoftLink("/loop"), h5py.ExternalLink("/etc/passwd", "/")
        file["itself"] = file["/"]
    yield "model", folder / "links.h5"


def _onnx(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """Weights in other files, inside and outside the folder."""
    import onnx

    for number, place in enumerate(("../../../../../../etc/passwd", "/etc/passwd", "/dev/zero", "weights.bin")):
        model = onnx.load(sound / "model.onnx")
        del model.metadata_props[1:]
        tensor = next(each for each in model.graph.initializer if len(each.raw_data) >= 256)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)
        _write(folder / "weights.bin", bytes(1 << 20))
        yield "model", _write(folder / f"external-{number}.onnx", model.SerializeToString())


def _openvino(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """Entities that expand or read files, and weights beyond the end; without the export's crc32."""
    whole = (sound / "openvino" / "model.xml").read_text()
    whole = whole[: whole.rindex("<!-- effnet")]
    head, _, rest = whole.partition("?>")
    laughs = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True))
    named = rest.replace("<rt_info>", "<rt_info>&j;", 1)
    for number, text in enumerate(
        (
            f'{head}?><!DOCTYPE net [<!ENTITY a "ha">{laughs}]>{named}',
            f'{head}?><!DOCTYPE net [<!ENTITY j SYSTEM "file:///etc/passwd">]>{named}',
            whole.replace('offset="', 'offset="9', 3),
            whole.replace('size="', 'size="99', 3),
            whole.replace('type="Convolution" version="opset1"', 'type="Evil" version="extension"', 1),
            head + "?>" + "<a>" * 100_000,
        )
    ):
        shutil.copytree(sound / "openvino", folder / f"openvino-{number}")
        yield "model", _write(folder / f"openvino-{number}" / "model.xml", text.encode()).parent


def _programs(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """torch.export files that name code that torch would evaluate or load."""
    code = f"lambdify.__globals__['builtins'].open({str(canary)!r}, 'w')"

    def hostile(name: str, change: Callable[[str, bytes], bytes], more: dict[str, bytes] | None = None) -> Trick:
        with zipfile.ZipFile(sound / "model.pt2") as old, zipfile.ZipFile(folder / name, "w") as new:
            for member in old.namelist():
                new.writestr(member, change(member, old.read(member)))
            for member, content in (more or {}).items():
                new.writestr(f"{old.namelist()[0].partition('/')[0]}/{member}", content)
        return "model", folder / name

    def program(edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
        def change(member: str, content: bytes) -> bytes:
            if not member.endswith("models/model.json"):
                return content
            values = json.loads(content)
            edit(values)
            return json.dumps(values).encode()

        return change

    def size(values: Any) -> None:
        first = next(iter(values["graph_module"]["graph"]["tensor_values"].values()))
        first["sizes"][0] = {"as_expr": {"expr_str": code, "hint": None}}

    def escaped(member: str, content: bytes) -> bytes:
        return program(size)(member, content).replace(b"expr_str", b"expr\\u005fstr")

    yield hostile("size.pt2", program(size))
    yield hostile("escaped.pt2", escaped)
    yield hostile("guards.pt2", program(lambda values: values.update(guards_code=[code])))
    yield hostile(
        "call.pt2", program(lambda values: values["graph_module"]["graph"]["nodes"][0].update(target="torch.os.system"))
    )
    yield hostile("library.pt2", lambda _, content: content, {"data/aotinductor/model/a.so": b"\x7fELF"})
    yield hostile(
        "object.pt2",
        lambda _, content: content,
        {"data/constants/custom_obj_0": pickle.dumps(Call(open, str(canary), "w"))},
    )
    yield hostile(
        "weights.pt2",
        lambda member, content: (
            pickle.dumps(Call(open, str(canary), "w"))
            if "data/weights/weight_" in member or member.endswith("model.pt")
            else content
        ),
    )
    yield hostile(
        "pickled.pt2",
        lambda member, content: (
            content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if member.endswith(".json")
            else pickle.dumps(Call(open, str(canary), "w"))
            if "weight_" in member
            else content
        ),
    )


def _safetensors(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """Headers with wrong lengths or tensors, or too deeply nested."""

    def file(header: bytes, data: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    entry = b'{"dtype": "F32", "shape": [%s], "data_offsets": [%d, %d]}'
    for number, content in enumerate(
        (
            struct.pack("<Q", 1 << 62) + b"{}",
            struct.pack("<Q", 0),
            file(b"[" * 100_000),
            file(b'{"a": ' * 100_000),
            file(b'{"a": ' + entry % (b"4", 0, 16) + b', "b": ' + entry % (b"4", 0, 16) + b"}", bytes(16)),
            file(b'{"a": ' + entry % (b"4", 16, 32) + b"}", bytes(32)),
            file(b'{"a": ' + entry % (b"4", 0, 16) + b"}", bytes(32)),
            file(b'{"a": ' + entry % (b"-4", 0, 16) + b"}", bytes(16)),
            file(b'{"a": ' + entry % (b"1e3", 0, 16) + b"}", bytes(16)),
            file(b'{"a": ' + entry % (b"9223372036854775807, 2", 0, 16) + b"}", bytes(16)),
            file(b'{"a": ' + entry % (b", ".join([b"1"] * 5000), 0, 4) + b"}", bytes(4)),
            file(b"{" + b", ".join(b'"%d": ' % n + entry % (b"0", 0, 0) for n in range(50_000)) + b"}"),
        )
    ):
        yield "model", _write(folder / f"header-{number}.safetensors", content)


def _folders(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """Bundles and hub folders whose files lead elsewhere, or contain a pickle instead of tensors."""
    for name in ("bundle", "hub"):
        for number, target in enumerate(("/dev/zero", "/etc/passwd", "model.safetensors", "/")):
            place = folder / f"{name}-{number}"
            shutil.copytree(sound / name, place)
            (place / "model.safetensors").unlink()
            (place / "model.safetensors").symlink_to(target)
            yield "model", place
        place = folder / f"{name}-pickle"
        shutil.copytree(sound / name, place)
        yield "model", _write(place / "model.safetensors", pickle.dumps(Call(open, str(canary), "w"))).parent
        place = folder / f"{name}-index"
        shutil.copytree(sound / name, place)
        (place / "model.safetensors").unlink()
        shards = {"weight_map": {"a": "../../../../etc/passwd", "b": "/etc/passwd", "c": str(canary)}}
        yield "model", _write(place / "model.safetensors.index.json", json.dumps(shards).encode()).parent
        place = folder / f"{name}-config"
        shutil.copytree(sound / name, place)
        yield "model", _write(place / "config.json", b'{"format": ' + b"[" * 100_000).parent


def _shards(folder: Path, sound: Path, canary: Path) -> Iterator[Trick]:
    """Indexes and lists that name other files, or positions outside the shard."""
    described = json.loads((sound / "shards" / "shards.json").read_text())
    name = described["shards"][0]["name"]
    lines = (sound / "shards" / name).with_suffix(".index").read_bytes().splitlines()
    first = lines[0].split(b"\t")
    indexes = (
        b"../../canary\t0\t10\t0\t0\n",
        b"/etc/passwd\t0\t10\t0\t0\n",
        b"\t".join([first[0], b"-1", *first[2:]]),
        b"\t".join([first[0], first[1], b"-1", *first[3:]]),
        b"\t".join([first[0], b"9" * 30, *first[2:]]),
        b"\t".join([first[0], first[1], b"9" * 15, *first[3:]]),
        b"\t".join(first[:3]),
        b"a",
        b"\t\t\t\t",
        b"\xff\xfe\0\n" * 100,
        b"".join(b"%d\tx\ty\tz\t0\n" % number for number in range(100)),
    )
    for number, index in enumerate(indexes):
        for fits in (False, True):
            place = folder / f"shards-{number}-{fits}"
            shutil.copytree(sound / "shards", place)
            _write(place / name.replace(".tar", ".index"), index)
            if fits:
                told = json.loads(json.dumps(described))
                told["shards"][0]["index_crc32"] = zlib.crc32(b"".join(line + b"\n" for line in index.splitlines()))
                _write(place / "shards.json", json.dumps(told).encode())
            yield "data", place
    for number, other in enumerate(("../../../../etc/passwd", "/etc/passwd", "../shards", "", "a\0b", "/dev/zero")):
        place = folder / f"list-{number}"
        shutil.copytree(sound / "shards", place)
        told = json.loads(json.dumps(described))
        told["shards"][0]["name"] = other
        yield "data", _write(place / "shards.json", json.dumps(told).encode()).parent
    for number, paths in enumerate(
        (("/dev/zero", "/dev/urandom"), ("/dev/tty", "/proc/self/mem"), ("../../../etc/passwd", "a\0b"))
    ):
        rows = "".join(f"{path},{label}\n" for path, label in zip(paths, "ab", strict=True))
        yield "data", _write(folder / f"devices-{number}.csv", f"path,label\n{rows}".encode())
