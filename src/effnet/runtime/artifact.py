"""Artifacts: exported files that include their preprocessing, class names and origin.

| format | what it is | engines |
|---|---|---|
| openvino | a folder with model.xml and model.bin | OpenVINO |
| onnx | a file .onnx | ONNX Runtime, OpenVINO |
| torch | a file .pt2, a torch.export program | torch |

The metadata is JSON under the name effnet, in each format's own metadata. It is read without an engine: importing one
takes 0.2 to 0.4 s, a plain install has none, and an ONNX file may run in either of two.
"""

from __future__ import annotations

import dataclasses
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from effnet.errors import ArgumentError, ArtifactError
from effnet.fields import check_fields, one_of, positive_int, read_fields, set_field
from effnet.files import MARK, parse_json
from effnet.runtime.options import EngineName, EnginePrecision
from effnet.runtime.seal import check_seal
from effnet.version import __version__, is_newer, newer_file, newer_format
from effnet.weights.bundle import Bundle, BundleConfig, entries_of, parse_config

Format = Literal["openvino", "onnx", "torch"]
ModelServer = Literal["triton", "ovms"]  # other servers, with the artifact in the folder layout that they expect

FORMAT = 1  # raised whenever an older effnet would misread an artifact
SERVER_FORMATS: dict[ModelServer, Format] = {"triton": "onnx", "ovms": "openvino"}
SUFFIXES: dict[str, Format] = {".xml": "openvino", ".onnx": "onnx", ".pt2": "torch"}
ENGINES: dict[Format, tuple[EngineName, ...]] = {  # the format's own first
    "openvino": ("openvino",),
    "onnx": ("onnxruntime", "openvino"),
    "torch": ("torch",),
}
OPENVINO_FILE = "model.xml"
# In protobuf a string follows its tag and its length: bytes of seven bits, the lowest first, all but the last with
# CONTINUED added. The key is field 1 of a pair, the value field 2.
ONNX_KEY, CONTINUED = b"\x0a" + bytes([len(MARK)]) + MARK.encode() + b"\x12", 128


@dataclass(frozen=True)
class Int8:
    """Calibration of an int8 artifact, and its loss against fp32 on images that it was not trained on."""

    calibration_images: int
    kept: tuple[str, ...]  # parts of the network that stay in float
    drop: float  # points of top-1 below fp32; negative: above
    low: float  # the drop's interval at 95 %
    high: float
    val_images: int  # on which the drop was measured
    attempts: int  # versions that were evaluated on these images; this is the last

    def __post_init__(self) -> None:
        check_fields(self, positive_int, "calibration_images", "val_images", "attempts")
        if not isinstance(self.kept, (list, tuple)) or not all(isinstance(name, str) for name in self.kept):
            raise ArgumentError("kept", self.kept, "must be names of parts.")
        set_field(self, "kept", tuple(self.kept))  # JSON has only lists
        for name in ("drop", "low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 100:
                raise ArgumentError(name, value, "must be points of top-1, from -100 to 100.")


@dataclass(frozen=True)
class Form:
    """How an artifact was exported."""

    format: Format
    precision: EnginePrecision  # of computing
    batch: int | None  # batch of its graph; None: any
    int8: Int8 | None = None  # for precision int8

    def __post_init__(self) -> None:
        one_of("format", self.format, Format)
        one_of("precision", self.precision, EnginePrecision)
        if self.batch is not None:
            positive_int("batch", self.batch)
        if (self.precision == "int8") != (self.int8 is not None):
            raise ArgumentError("int8", self.int8, "must be given for precision int8 and for no other.")


@dataclass(frozen=True)
class Artifact:
    """An exported file with its metadata. `effnet.runtime.select.open_session` opens it."""

    path: Path  # the file to open
    config: BundleConfig
    form: Form


Model = Bundle | Artifact  # what can be run


def artifact_path(model: str | Path) -> Path | None:
    """The file of an artifact: MODEL itself, or a file in this folder; None if MODEL is not an artifact."""
    path = Path(model)
    if path.is_dir() and (path / OPENVINO_FILE).exists():
        return path / OPENVINO_FILE
    return path if path.suffix.lower() in SUFFIXES else None


def metadata(config: BundleConfig, form: Form) -> dict[str, Any]:
    """The metadata of an artifact."""
    how = {name: value for name, value in dataclasses.asdict(form).items() if (name, value) != ("int8", None)}
    return {"format": FORMAT, MARK: __version__, "form": how, **entries_of(config)}


def read_artifact(model: str | Path) -> Artifact:
    """Read an artifact's metadata, without loading an engine.

    Args:
        model: the file, or OpenVINO's folder.

    Raises:
        ArtifactError: it is damaged (see seal.py), or effnet did not write it.
        ArgumentError: it is not an artifact.
    """
    path = artifact_path(model)
    if path is None:
        raise ArgumentError("model", str(model), f"must be a file {', '.join(SUFFIXES)} or OpenVINO's folder.")
    if not path.is_file():
        raise ArtifactError(f"{path} {'is a folder, not a file' if path.exists() else 'does not exist'}")
    format = SUFFIXES[path.suffix.lower()]
    try:
        check_seal(path)
        text = _READERS[format](path)
    except (ValueError, IndexError, KeyError, SyntaxError) as error:  # SyntaxError: of XML
        raise ArtifactError(f"{path} cannot be read as {format}: {error}") from error
    return Artifact(path, *_parse(text, path))


def _parse(text: str, path: Path) -> tuple[BundleConfig, Form]:
    if not text:
        reason = "it does not say how images are prepared and what its classes are"
        raise ArtifactError(f"{path} was not exported by effnet, or was cut short: {reason}. Use: effnet export MODEL")
    version: object = None
    try:
        values = parse_json(text)
        written, version = values.pop("format"), values.pop(MARK)
        if written > FORMAT:
            raise ArtifactError(f"{path} {newer_format(version, written, FORMAT)}")
        how = dict(values.pop("form"))
        if "int8" in how:
            how["int8"] = read_fields(Int8, how["int8"])
        return parse_config(values), read_fields(Form, how)
    except (ArgumentError, TypeError, ValueError, KeyError, AttributeError) as error:
        if is_newer(version):
            raise ArtifactError(f"{path} {newer_file(version, error)}") from error
        raise ArtifactError(f"{path} was changed: {error}") from error


def _read_openvino(file: Path) -> str:
    """An attribute of an element near the end of the XML file."""
    from xml.etree import ElementTree

    found = ElementTree.parse(file).find(f"rt_info/{MARK}")
    return "" if found is None else found.get("value", "")


def _read_torch(file: Path) -> str:
    """A member of the zip file, which is written as NAME/extra/effnet."""
    import zipfile

    try:
        with zipfile.ZipFile(file) as archive:
            found = [member for member in archive.infolist() if member.filename.endswith(f"/extra/{MARK}")]
            if found and found[0].compress_size != found[0].file_size:
                raise ValueError("its metadata is compressed, as torch does not")
            return archive.read(found[0]).decode() if found else ""
    except zipfile.BadZipFile as error:
        raise ValueError(error) from error


def _read_onnx(file: Path) -> str:
    """The value of the key effnet in metadata_props, at the end of the protobuf message; no weights are read."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.rfind(ONNX_KEY) + len(ONNX_KEY)
        if place < len(ONNX_KEY):
            return ""
        length = shift = 0
        while content[place] >= CONTINUED:
            length |= (content[place] - CONTINUED) << shift
            place, shift = place + 1, shift + 7
        length |= content[place] << shift
        value = content[place + 1 : place + 1 + length]
        if len(value) < length:
            raise ValueError("it was cut short")
        return value.decode()


_READERS = {"openvino": _read_openvino, "onnx": _read_onnx, "torch": _read_torch}
