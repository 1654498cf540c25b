"""Model repositories: an artifact in the folder layout of Triton or OpenVINO Model Server.

NAME/N/model.onnx      Triton: version N, in ONNX
NAME/config.pbtxt      Triton: inputs, outputs and batching
NAME/N/model.xml, .bin OpenVINO Model Server: version N
NAME/labels.txt        the classes, one per line

An export adds the next version, unless the newest one has the same bytes. File and field names follow Triton's
model_repository.md and model_configuration.md and OpenVINO Model Server's models_repository.md.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from effnet.errors import ArgumentError
from effnet.exporting.export import Exported, export
from effnet.files import write_text
from effnet.machine import Precision
from effnet.runtime.artifact import SERVER_FORMATS, ModelServer
from effnet.runtime.graph import INPUT, OUTPUT
from effnet.weights.bundle import Bundle, BundleConfig

CONFIG, LABELS = "config.pbtxt", "labels.txt"
MOST = 64  # most images that Triton may batch, if the graph takes any number


def write_repository(
    bundle: Bundle, out: Path, server: ModelServer, *, precision: Precision = "fp32", batch: int | None = None
) -> Exported:
    """Write the next version of a model, which is named after the folder `out`.

    Nothing is added if the newest version has the same bytes, so that a killed export can be repeated.

    Raises:
        ArgumentError: the folder holds a model with other inputs, outputs or classes.
        RefusedError: the answers differ from the network's; see `export`.
    """
    texts = {LABELS: "".join(f"{label}\n" for label in labels(bundle.config))}
    if server == "triton":
        texts[CONFIG] = triton_config(out.resolve().name, bundle.config, batch)
    if out.exists() and not out.is_dir():
        raise ArgumentError("out", str(out), "is a file; name a folder for the model.")
    present = {file.name for file in out.iterdir() if not file.name.startswith(".")} if out.exists() else set()
    for name, text in texts.items():
        if name not in present and present <= texts.keys():  # the first export was killed
            continue
        if not ((out / name).is_file() and (out / name).read_text(encoding="utf-8") == text):
            raise ArgumentError("out", str(out), f"holds another model: its {name} differs; choose another folder.")
    newest = max((int(name) for name in present if name.isdecimal()), default=0)
    out.mkdir(parents=True, exist_ok=True)
    # servers that watch the folder only see complete versions
    with TemporaryDirectory(prefix=f".{newest + 1}.", dir=out) as folder:
        new = Path(folder) / "new"
        target = new / "model.onnx" if server == "triton" else new
        made = export(bundle, target, format=SERVER_FORMATS[server], precision=precision, batch=batch)
        for name, text in texts.items():
            write_text(out / name, text)
        if newest and _are_same(new, out / str(newest)):
            return dataclasses.replace(made, path=out / str(newest), is_new=False)
        version = new.rename(out / str(newest + 1))
    return dataclasses.replace(made, path=version)


def _are_same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = [sorted(file.name for file in each.iterdir()) for each in (folder, other)]
    return names[0] == names[1] and all(filecmp.cmp(folder / name, other / name, shallow=False) for name in names[0])


def labels(config: BundleConfig) -> list[str]:
    """The names of the outputs, or their numbers if they have none."""
    return list(config.classes or map(str, range(config.spec.num_classes)))


def triton_config(name: str, config: BundleConfig, batch: int | None) -> str:
    """Triton's configuration: either the graph's batch is fixed, or Triton batches waiting requests."""
    pixels = [config.input.size, config.input.size, config.input.channels]
    logits = [config.spec.num_classes]
    if batch is not None:
        pixels, logits = [batch, *pixels], [batch, *logits]
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {MOST if batch is None else 0}",
        f'input [{{ name: "{INPUT}", data_type: TYPE_UINT8, dims: {pixels} }}]',
        f'output [{{ name: "{OUTPUT}", data_type: TYPE_FP32, dims: {logits}, label_filename: "{LABELS}" }}]',
    ]
    return "\n".join([*lines, *(["dynamic_batching { }"] if batch is None else [])]) + "\n"
