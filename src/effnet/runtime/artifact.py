"""Artifacts: exported files that carry their preprocessing, their class names and where they came from.

| format | what it is | engines |
|---|---|---|
| openvino | a folder with model.xml and model.bin | OpenVINO |
| onnx | a file .onnx | ONNX Runtime, OpenVINO |
| torch | a file .pt2, a torch.export program | torch |

The metadata is JSON under the name effnet, where each format has a place for it. It is read here without an engine:
opening ONNX Runtime or OpenVINO only to read it takes 0.2 to 0.4 s for B0, and a plain install has neither.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from effnet.errors import ArgumentError, ArtifactError
from effnet.fields import one_of, positive_int, read_fields
from effnet.files import MARK
from effnet.runtime.session import EngineName, EnginePrecision
from effnet.version import __version__
from effnet.weights.bundle import Bundle, BundleConfig, parse_config

Format = Literal["openvino", "onnx", "torch"]

FORMAT = 1  # raised whenever an older effnet would misread an artifact
SUFFIXES: dict[str, Format] = {".xml": "openvino", ".onnx": "onnx", ".pt2": "torch"}
ENGINES: dict[Format, tuple[EngineName, ...]] = {  # the format's own first
    "openvino": ("openvino",),
    "onnx": ("onnxruntime", "openvino"),
    "torch": ("torch",),
}
OPENVINO_FILE = "model.xml"
# In protobuf: the field of a model's metadata_props; the types of fields, and the bytes of those of fixed size.
METADATA, NUMBER, LENGTH, FIXED = 14, 0, 2, {1: 8, 5: 4}


@dataclass(frozen=True)
class Int8:
    """How an int8 artifact was calibrated, and what it lost against fp32 on images that it was not trained on."""

    calibration_images: int
    kept: tuple[str, ...]  # parts of the network that stay in float
    drop: float  # points of top-1 below fp32; negative: above
    low: float  # the drop's interval at 95 %
    high: float
    val_images: int  # on which the drop was counted
    attempts: int  # versions that were evaluated on these images; this is the last

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is outside its range.
        """
        for name in ("calibration_images", "val_images", "attempts"):
            positive_int(name, getattr(self, name))
        if not isinstance(self.kept, (list, tuple)) or not all(isinstance(name, str) for name in self.kept):
            raise ArgumentError("kept", self.kept, "must be names of parts.")
        object.__setattr__(self, "kept", tuple(self.kept))  # JSON has only lists
        for name in ("drop", "low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 100:
                raise ArgumentError(name, value, "must be points of top-1, from -100 to 100.")


@dataclass(frozen=True)
class Form:
    """How an artifact was exported."""

    format: Format
    precision: EnginePrecision  # what it computes with
    batch: int | None  # images of its graph; None: any number
    int8: Int8 | None = None  # for precision int8

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is unknown or outside its range.
        """
        one_of("format", self.format, Format)
        one_of("precision", self.precision, EnginePrecision)
        if self.batch is not None:
            positive_int("batch", self.batch)
        if (self.precision == "int8") != (self.int8 is not None):
            rule = "must be given for precision int8 and for no other."
            raise ArgumentError("int8", self.int8, rule)


@dataclass(frozen=True)
class Artifact:
    """What an artifact says of itself. `effnet.runtime.select.open_session` opens it."""

    path: Path  # the file to open
    config: BundleConfig
    form: Form


Model = Bundle | Artifact  # what can be run


def artifact_path(model: str | Path) -> Path | None:
    """The file to open where MODEL is an artifact: MODEL itself, or a file in this folder; None where it is not one."""
    path = Path(model)
    if path.is_dir() and (path / OPENVINO_FILE).exists():
        return path / OPENVINO_FILE
    return path if path.suffix.lower() in SUFFIXES else None


def metadata(config: BundleConfig, form: Form) -> dict[str, Any]:
    """What an artifact says of itself."""
    how = {name: value for name, value in dataclasses.asdict(form).items() if (name, value) != ("int8", None)}
    return {"format": FORMAT, MARK: __version__, "form": how, **dataclasses.asdict(config)}


def read_artifact(model: str | Path) -> Artifact:
    """What an artifact says of itself.

    Args:
        model: the file, or OpenVINO's folder.

    Raises:
        ArtifactError: it is damaged, or effnet did not write it.
        ArgumentError: it is not an artifact.
    """
    path = artifact_path(model)
    if path is None:
        raise ArgumentError("model", str(model), f"must be a file {', '.join(SUFFIXES)} or OpenVINO's folder.")
    if not path.is_file():
        raise ArtifactError(f"{path} {'is a folder, not a file' if path.exists() else 'does not exist'}")
    format = SUFFIXES[path.suffix.lower()]
    try:
        text = _READERS[format](path)
    except (ValueError, IndexError, KeyError, ElementTree.ParseError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} cannot be read as {format}: {error}") from error
    return Artifact(path, *_parse(text, path))


def _parse(text: str, path: Path) -> tuple[BundleConfig, Form]:
    if not text:
        raise ArtifactError(
            f"{path} was not exported by effnet: it does not say how images are prepared and what its classes are. "
            "Export it with: effnet export MODEL"
        )
    try:
        values = json.loads(text)
        written = values["format"]
        if written == FORMAT:
            rest = {name: value for name, value in values.items() if name not in ("format", "form", MARK)}
            how = dict(values["form"])
            if "int8" in how:
                how["int8"] = read_fields(Int8, how["int8"])
            return parse_config(rest), read_fields(Form, how)
    except (ArgumentError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} was changed: {error}") from error
    raise ArtifactError(f"{path} has format {written}; this effnet reads {FORMAT}: upgrade")


def _read_openvino(file: Path) -> str:
    """An attribute of an element near the end of the XML file."""
    found = ElementTree.parse(file).find(f"rt_info/{MARK}")
    return "" if found is None else found.get("value", "")


def _read_torch(file: Path) -> str:
    """A member of the zip file, which is written as NAME/extra/effnet."""
    with zipfile.ZipFile(file) as archive:
        found = [name for name in archive.namelist() if name.endswith(f"/extra/{MARK}")]
        return archive.read(found[0]).decode() if found else ""


def _read_onnx(file: Path) -> str:
    """A pair of a key and a value in metadata_props, field 14 of the protobuf message. The weights are not read."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for number, start, end in _fields(content, 0, len(content)):
            if number == METADATA:
                pair = {part: content[first:last] for part, first, last in _fields(content, start, end)}
                if pair.get(1) == MARK.encode():
                    return pair[2].decode()
    return ""


def _fields(content: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that has a length, from `place` to `end` of a protobuf message."""

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = content[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < end:
        key = varint()
        number, kind = key >> 3, key & 7
        if kind not in (NUMBER, LENGTH, *FIXED):
            raise ValueError(f"byte {place} does not begin a field")
        size = FIXED[kind] if kind in FIXED else varint()
        if kind == NUMBER:
            continue
        if place + size > end:
            raise ValueError("it was cut short")
        if kind == LENGTH:
            yield number, place, place + size
        place += size


_READERS = {"openvino": _read_openvino, "onnx": _read_onnx, "torch": _read_torch}
