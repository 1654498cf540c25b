"""effnet export: a network as a file that an engine runs."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from effnet import console
from effnet.console import OK
from effnet.errors import ArgumentError, DataError, MissingExtraError

if TYPE_CHECKING:
    from effnet.exporting.export import Exported
    from effnet.exporting.int8 import Guard
    from effnet.weights.bundle import Bundle


def export(
    model: str,
    data: str | None = None,
    *,
    format: Literal["openvino", "onnx", "torch"] = "openvino",
    precision: Literal["fp32", "bf16", "int8"] = "fp32",
    max_drop: float | None = None,
    batch: str = "1",
    out: Path | None = None,
    source: str | None = None,
) -> int:
    """Write a network as an artifact: its graph, how images are prepared and what its classes are called.

    Its answers are compared with the network's on photos and on noise; where they differ, nothing is written. In int8
    they always differ a little: its accuracy is compared with fp32's on val images, and where it drops too far, the
    parts that lose most go back to float until it holds, or nothing is written.

    Args:
        model: Registered weights (lite0, b0 ...), a bundle, another library's file or folder, timm/NAME, hf:ORG/NAME.
        data: For int8 the images that the model was trained on, as in effnet train: its training images calibrate, its
            val images judge, its test images stay unseen.
        format: openvino (a folder), onnx (a file .onnx) or torch (a torch.export program, .pt2).
        precision: What it computes with: fp32, or bf16 or int8, which are OpenVINO's alone.
        max_drop: Points of top-1 that int8 may have less than fp32 on the val images; by default 0.5. The drop counted
            there has to hold it; its interval is shown.
        batch: Images that it takes at once, or dynamic for any number, which some engines run more slowly.
        out: Where to; by default named after the model, in the working folder.
        source: The library that wrote a file of weights, where its keys cannot tell: timm or timm-tf.
    """
    if batch != "dynamic" and not (batch.isdecimal() and int(batch)):
        raise ArgumentError("batch", batch, "must be a positive whole number or dynamic.")
    if precision == "int8" and data is None:
        raise ArgumentError("data", data, f"must be named for int8: effnet export {model} DATA --precision int8")
    for option, value in (("data", data), ("max_drop", max_drop)):
        if value is not None and precision != "int8":
            raise ArgumentError(option, value, "is for --precision int8 alone.")
    from effnet.runtime.artifact import artifact_path

    if artifact_path(model) is not None:
        raise ArgumentError("model", model, "is an artifact already; name the network that it was exported from.")
    with console.Display(f"opening {model}"):
        try:
            from effnet.exporting.export import export as write
            from effnet.weights.load import open_model
        except ImportError as error:
            raise MissingExtraError("exporting", "export") from error
        bundle = open_model(model, source=source)
    suffix = {"openvino": "-openvino", "onnx": ".onnx", "torch": ".pt2"}[format]
    named = Path(model).resolve().name if Path(model).is_dir() else Path(model).stem
    target = out or Path(f"{named}{suffix}")
    taken = None if batch == "dynamic" else int(batch)
    wrote = f"wrote {target}: {format}, {precision}, batch {batch}"
    if data is None:
        with console.Display(f"writing {target} and comparing its answers"):
            made = write(bundle, target, format=format, precision=precision, batch=taken)
        sys.stdout.write(f"{wrote}, {console.size(made.bytes)}\nagainst the network in torch: {made}\n")
        console.remark(f"Next: effnet predict photo.jpg --model {shlex.quote(str(made.path))}")
        return OK
    guard, notes = _guard(model, bundle, data, max_drop)
    made = write(bundle, target, format=format, precision=precision, batch=taken, guard=guard)
    sys.stdout.write(f"{wrote}, {console.size(made.bytes)}\n")
    _show(made, guard)
    for note in notes:
        console.remark(f"Note: {note}.")
    console.remark(f"Next: effnet val {shlex.join((model, str(made.path), data))} --split test")
    return OK


def _guard(model: str, bundle: Bundle, data: str, max_drop: float | None) -> tuple[Guard, tuple[str, ...]]:
    """The images that calibrate int8 and those that judge it, and what there is to say of them."""
    from effnet.data.dataset import match_classes, read_data
    from effnet.data.held_out import train_and_val
    from effnet.exporting.int8 import MAX_DROP, Guard
    from effnet.weights.bundle import read_parts

    with console.Display(f"reading {data}"):
        classes = bundle.config.classes
        if classes is None:
            raise DataError(f"{model} does not name its outputs, so int8 cannot be judged on images with known classes")
        dataset = match_classes(read_data(data), classes, f"{model}'s")
        found = train_and_val(dataset, model, read_parts(model, dataset))
    watch = partial(console.counting, every=1)
    return Guard(found.train, found.val, MAX_DROP if max_drop is None else max_drop, watch), found.notes


def _show(made: Exported, guard: Guard) -> None:
    """fp32 and int8 side by side, then what the difference says."""
    beside, said = made.beside, made.form.int8
    if beside is None or said is None:
        return
    last = beside.attempts[-1]
    rows = [
        (name, f"{top1.value:.2%}", f"{top1.low:.2%} to {top1.high:.2%}", console.size(size), f"{ms:.2f}")
        for name, top1, size, ms in (
            ("fp32", last.found.accuracy_a, beside.bytes, beside.fp32_ms),
            ("int8", last.found.accuracy_b, made.bytes, beside.int8_ms),
        )
    ]
    many = f"{beside.timed} image{'s' * (beside.timed > 1)}"
    console.paragraphs((f"OpenVINO on the {last.found.n:,} val images; ms: median for {many}, in turn",))
    console.table(("<", "top-1", "95 % interval", "size", "ms"), rows)
    low, high = last.bounds
    lines = [
        f"int8 loses {last.drop:+.2f} points of top-1 ({low:+.2f} to {high:+.2f}); the limit is {guard.max_drop:g}. "
        f"Both name the same class for {last.agreement.value:.1%} of the images ({last.agreement.low:.1%} to "
        f"{last.agreement.high:.1%}).",
        f"Calibrated on {said.calibration_images:,} training images. {beside.eight_bits} of {beside.layers} layers "
        f"have weights in 8 bits; parts sent back to float: {', '.join(said.kept) or 'none'}.",
    ]
    if len(beside.attempts) > 1:
        tried = "; ".join(str(attempt) for attempt in beside.attempts)
        lines.append(
            f"{len(beside.attempts)} versions were judged on the same images, which flatters the last: {tried}."
        )
    if high > guard.max_drop:
        lines.append(f"Images like these may show a drop beyond the limit: its interval ends at {high:.2f}.")
    if beside.unreadable:
        lines.append(f"{beside.unreadable:,} val images cannot be read and are not counted.")
    console.paragraphs(lines)
