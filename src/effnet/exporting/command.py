"""effnet export: a network as a file that an engine runs."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from effnet import console
from effnet.console import OK
from effnet.errors import ArgumentError, DataError
from effnet.runtime.artifact import SERVER_FORMATS, Format, ModelServer, artifact_path
from effnet.runtime.options import EnginePrecision

if TYPE_CHECKING:
    from effnet.data.held_out import TrainVal
    from effnet.exporting.int8 import Int8Exported
    from effnet.weights.bundle import Bundle


@dataclass(frozen=True)
class ExportOptions:
    """What is written."""

    format: Format | None = None
    """openvino (a folder), onnx (a file .onnx) or torch (a torch.export program, .pt2). Default: openvino, or what the
    server reads."""
    precision: EnginePrecision = "fp32"
    """What it computes with; bf16 and int8 need OpenVINO."""
    max_drop: float | None = None
    """Points of top-1 that int8 may lose against fp32 on the val images. Default: 0.5. The loss counted there has to
    keep within it; its interval is shown."""
    batch: str | None = None
    """Images that it takes at once, or dynamic for any number, which some engines run more slowly. Default: 1; dynamic
    with --server."""
    server: ModelServer | None = None
    """Write the folder of a model for Triton (triton: ONNX) or OpenVINO Model Server (ovms): a numbered version, its
    configuration and its labels; the export of another network adds a version."""

    def __post_init__(self) -> None:
        """Raise ArgumentError if values exclude each other."""
        server = self.server
        if server is not None:
            if self.format not in (None, SERVER_FORMATS[server]):
                raise ArgumentError("format", self.format, f"must be {SERVER_FORMATS[server]} for --server {server}.")
            if self.precision == "int8":
                why = "is not for --server: export int8 alone, and move its files to the folder of a version."
                raise ArgumentError("precision", self.precision, why)


def export(
    model: str,
    data: str | None = None,
    *,
    options: Annotated[ExportOptions, Parameter(name="*")] = ExportOptions(),
    out: Path | None = None,
    source: str | None = None,
) -> int:
    """Write a network as an artifact: its graph, how images are prepared and what its classes are called.

    Its answers are compared with the network's on photos and on noise; where they differ, nothing is written. In int8
    they always differ a little: its accuracy is compared with fp32's on val images, and where it drops too far, the
    parts that lose most go back to float until it holds, or nothing is written.

    Args:
        model: Registered weights (lite0, b0 ...), a bundle, another library's file or folder, timm/NAME, hf:ORG/NAME.
        data: For int8, the images that the model was trained on, as for effnet train: its training images calibrate,
            its val images decide, its test images are not used.
        options: What is written.
        out: The file or folder to write. Default: named after the model, in the working folder.
        source: The library that wrote a file of weights, where its keys cannot tell: timm or timm-tf.
    """
    precision, max_drop, server = options.precision, options.max_drop, options.server
    format = options.format or (SERVER_FORMATS[server] if server else "openvino")
    batch = options.batch or ("dynamic" if server else "1")
    if batch != "dynamic" and not (batch.isdecimal() and int(batch)):
        raise ArgumentError("batch", batch, "must be a positive whole number or dynamic.")
    if precision == "int8":
        if data is None:
            rule = f"must be given for int8: effnet export {shlex.quote(model)} DATA --precision int8"
            raise ArgumentError("data", data, rule)
        if format != "openvino":
            raise ArgumentError("precision", precision, f"needs format openvino; {format} would not be faster in it.")
    for option, value in (("data", data), ("max_drop", max_drop)):
        if value is not None and precision != "int8":
            raise ArgumentError(option, value, "is only for --precision int8.")
    if artifact_path(model) is not None:
        raise ArgumentError("model", model, "is an artifact already; name the network that it was exported from.")
    with console.Display(f"opening {model}") as progress:
        from effnet.exporting.export import export as write
        from effnet.exporting.int8 import MAX_DROP, export_int8
        from effnet.exporting.repository import write_repository
        from effnet.weights.load import open_model

        bundle = open_model(model, source=source, progress=progress)
    suffix = {"openvino": "-openvino", "onnx": ".onnx", "torch": ".pt2"}[format] if server is None else f"-{server}"
    target = out or Path(f"{Path(model).resolve().name if Path(model).is_dir() else Path(model).stem}{suffix}")
    images = None if batch == "dynamic" else int(batch)
    wrote = f"wrote {target}: {format}, {precision}, batch {batch}"
    if precision != "int8":
        with console.Display(f"writing {target} and comparing its answers"):
            if server is not None:
                made = write_repository(bundle, target, server, precision=precision, batch=images)
            else:
                made = write(bundle, target, format=format, precision=precision, batch=images)
        done = f"wrote {made.path}" if made.is_new else f"{made.path} holds this already, to the byte"
        what = f"{done}: {format}, {precision}, batch {batch}"
        sys.stdout.write(f"{what}, {console.size(made.bytes)}\n{made.parity}\n")
        quoted = shlex.quote(str(target))
        following = {
            None: f"effnet predict photo.jpg --model {quoted}",
            "triton": f"tritonserver --model-repository={shlex.quote(str(target.parent))}",
            "ovms": f"ovms --model_name {shlex.quote(target.name)} --model_path {quoted} --rest_port 8000",
        }
        console.remark(f"Next: {following[server]}")
        return OK
    limit = MAX_DROP if max_drop is None else max_drop
    with console.Display(f"quantising {model}") as progress:
        held_out = _read_images(model, bundle, str(data))
        small = export_int8(bundle, target, held_out, max_drop=limit, batch=images, progress=progress)
    sys.stdout.write(f"{wrote}, {console.size(small.bytes)}\n")
    _show(small, limit)
    for note in held_out.notes:
        console.remark(f"Note: {note}.")
    console.remark(f"Next: effnet val {shlex.join((model, str(target), str(data)))} --split test")
    return OK


def _read_images(model: str, bundle: Bundle, data: str) -> TrainVal:
    """The training and val images of a model in DATA."""
    from effnet.data.dataset import read_data
    from effnet.data.held_out import train_and_val
    from effnet.weights.bundle import find_splits
    from effnet.weights.registry import match_outputs

    if bundle.config.classes is None:
        raise DataError(f"{model} does not name its outputs, so int8 cannot be evaluated on images with known classes")
    dataset = match_outputs(read_data(data), bundle.config.classes, f"{model}'s")
    return train_and_val(dataset, model, find_splits(model, dataset))


def _show(made: Int8Exported, limit: float) -> None:
    """fp32 and int8 side by side, then what the difference means."""
    last, int8 = made.attempts[-1], made.form.int8
    assert int8 is not None
    rows = [
        (name, f"{top1.value:.2%}", f"{top1.low:.2%} to {top1.high:.2%}", console.size(size))
        for name, top1, size in (
            ("fp32", last.found.accuracy_a, made.fp32_bytes),
            ("int8", last.found.accuracy_b, made.bytes),
        )
    ]
    console.paragraphs((f"OpenVINO on the {last.found.n:,} val images",))
    console.table(("<", "top-1", "95 % interval", "size"), rows)
    drop, same = last.drop, last.agreement
    lines = [
        f"int8 loses {drop.value:+.2f} points of top-1 ({drop.low:+.2f} to {drop.high:+.2f}); the limit is {limit:g}. "
        f"Both name the same class for {same.value:.1%} of the images ({same.low:.1%} to {same.high:.1%}).",
        f"Calibrated on {int8.calibration_images:,} training images; parts in float: {', '.join(int8.kept) or 'none'}.",
    ]
    if len(made.attempts) > 1:
        tried = "; ".join(str(attempt) for attempt in made.attempts)
        count = len(made.attempts)
        lines.append(f"{count} versions were evaluated on the same images, which flatters the last: {tried}.")
    if drop.high > limit:
        lines.append(f"Images like these may show a drop beyond the limit: its interval ends at {drop.high:.2f}.")
    if made.unreadable:
        lines.append(f"{made.unreadable:,} val images cannot be read and are not counted.")
    console.paragraphs(lines)
