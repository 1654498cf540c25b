"""effnet export: a network as a file for OpenVINO, ONNX Runtime, torch or a model server."""

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
    """The artifact to write."""

    format: Format | None = None
    """openvino (a folder), onnx (an .onnx file) or torch (a torch.export program, .pt2). Default: openvino, or the
    server's format."""
    precision: EnginePrecision = "fp32"
    """Precision to compute in; bf16 and int8 need OpenVINO."""
    max_drop: float | None = None
    """Points of top-1 that int8 may lose against fp32 on the val images. Default: 0.5. The limit applies
    to the measured drop; its interval is only shown."""
    batch: str | None = None
    """Images per call, or dynamic for any number, which is slower in some engines. Default: 1; dynamic with
    --server."""
    server: ModelServer | None = None
    """Write a model folder for Triton (triton: ONNX) or OpenVINO Model Server (ovms): a numbered version, its
    configuration and its labels; exporting another network adds a version."""

    def __post_init__(self) -> None:
        """Raise ArgumentError if options contradict each other."""
        server = self.server
        if server is not None:
            if self.format not in (None, SERVER_FORMATS[server]):
                raise ArgumentError("format", self.format, f"must be {SERVER_FORMATS[server]} for --server {server}.")
            if self.precision == "int8":
                why = "does not go with --server: export int8 without it, and move the files to a version folder."
                raise ArgumentError("precision", self.precision, why)


def export(
    model: str,
    data: str | None = None,
    *,
    options: Annotated[ExportOptions, Parameter(name="*")] = ExportOptions(),
    out: Path | None = None,
    source: str | None = None,
) -> int:
    """Export a network as an artifact: its graph, its preprocessing of images and its class names.

    The artifact's answers are compared with the network's on photos and noise; if they differ, nothing is written. In
    int8 they always differ a little, so its accuracy is compared with fp32's on val images. If it drops too far, the
    parts that lose most go back to float until it holds; if that is not enough, nothing is written.

    Args:
        model: Registered weights (lite0, b0 ...), a bundle, another library's file or folder, timm/NAME, hf:ORG/NAME.
        data: For int8, the images that the model was trained on, as for effnet train: the training images are for
            calibration, the val images for evaluation; test images are not used.
        options: The artifact to write.
        out: File or folder to write. Default: named after the model, in the current folder.
        source: Library that wrote a weight file, if its keys do not tell: timm or timm-tf.
    """
    precision, max_drop, server = options.precision, options.max_drop, options.server
    format = options.format or (SERVER_FORMATS[server] if server else "openvino")
    batch = options.batch or ("dynamic" if server else "1")
    if batch != "dynamic" and not (batch.isdecimal() and int(batch)):
        raise ArgumentError("batch", batch, "must be a positive whole number or dynamic.")
    if precision == "int8":
        if data is None:
            rule = f"is needed for int8: effnet export {shlex.quote(model)} DATA --precision int8"
            raise ArgumentError("data", data, rule)
        if format != "openvino":
            raise ArgumentError("precision", precision, f"needs format openvino; {format} would not be faster in int8.")
    for option, value in (("data", data), ("max_drop", max_drop)):
        if value is not None and precision != "int8":
            raise ArgumentError(option, value, "is only for --precision int8.")
    if artifact_path(model) is not None:
        raise ArgumentError("model", model, "is already an artifact; name the network that it was exported from.")
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
        done = f"wrote {made.path}" if made.is_new else f"{made.path} already holds the same bytes"
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
    """The training and val images in DATA for a model."""
    from effnet.data.dataset import read_data
    from effnet.data.held_out import train_and_val
    from effnet.weights.bundle import find_splits
    from effnet.weights.registry import match_outputs

    if bundle.config.classes is None:
        raise DataError(f"{model} does not name its outputs, so int8 cannot be evaluated on labelled images")
    dataset = match_outputs(read_data(data), bundle.config.classes, f"{model}'s")
    return train_and_val(dataset, model, find_splits(model, dataset))


def _show(made: Int8Exported, limit: float) -> None:
    """Print fp32 and int8 side by side, and what the difference means."""
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
        lines.append(f"On more images like these, the drop may exceed the limit: its interval ends at {drop.high:.2f}.")
    if made.unreadable:
        lines.append(f"{made.unreadable:,} val images cannot be read and are not counted.")
    console.paragraphs(lines)
