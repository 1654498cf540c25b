"""effnet export: a network as a file that an engine runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Literal

from effnet import console
from effnet.commands.arguments import OK
from effnet.errors import ArgumentError, MissingExtraError


def export(
    model: str,
    *,
    format: Literal["openvino", "onnx", "torch"] = "openvino",
    precision: Literal["fp32", "bf16"] = "fp32",
    batch: str = "1",
    out: Path | None = None,
    source: str | None = None,
) -> int:
    """Write a network as an artifact: its graph, how images are prepared and what its classes are called.

    Its answers are compared with the network's on photos and on noise; where they differ, nothing is written.

    Args:
        model: Registered weights (lite0, b0 ...), a bundle, another library's file or folder, timm/NAME, hf:ORG/NAME.
        format: openvino (a folder), onnx (a file .onnx) or torch (a torch.export program, .pt2).
        precision: What it computes with: fp32, or bf16, which is OpenVINO's alone.
        batch: Images that it takes at once, or dynamic for any number, which some engines run more slowly.
        out: Where to; by default named after the model, in the working folder.
        source: The library that wrote a file of weights, where its keys cannot tell: timm or timm-tf.
    """
    if batch != "dynamic" and not (batch.isdecimal() and int(batch)):
        raise ArgumentError("batch", batch, "must be a positive whole number or dynamic.")
    with console.status(f"opening {model}"):
        try:
            from effnet.deploy.export import export as write
            from effnet.weights.pretrained import open_model
        except ImportError as error:
            raise MissingExtraError("exporting", "export") from error
        bundle = open_model(model, source=source)
    suffix = {"openvino": "-openvino", "onnx": ".onnx", "torch": ".pt2"}[format]
    named = Path(model).resolve().name if Path(model).is_dir() else Path(model).stem
    target = out or Path(f"{named}{suffix}")
    with console.status(f"writing {target} and comparing its answers"):
        taken = None if batch == "dynamic" else int(batch)
        made = write(bundle, target, format=format, precision=precision, batch=taken)
    sys.stdout.write(
        f"wrote {made.path}: {made.form.format}, {made.form.precision}, batch {batch}, {console.size(made.bytes)}\n"
        f"against the network in torch: {made}\n"
    )
    console.remark(f"Next: effnet predict photo.jpg --model {shlex.quote(str(made.path))}")
    return OK
