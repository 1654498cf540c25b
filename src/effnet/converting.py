"""effnet convert: converts a checkpoint to another library's format, or to a bundle."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from effnet import console
from effnet.console import OK
from effnet.errors import RefusedError, UnknownNameError
from effnet.files import write_file, write_folder
from effnet.weights.bundle import read_record, save

SAME = 1e-4  # difference, relative to the largest logit, below which two networks are the same


def convert(
    file: str,
    *,
    model: str | None = None,
    source: str | None = None,
    to: str = "bundle",
    out: Path | None = None,
    num_classes: int | None = None,
) -> int:
    """Convert a checkpoint to another library's format or to a bundle, and check that the logits stay the same.

    Args:
        file: A .pth, .pt, .bin, .safetensors, .h5 or .keras file, a hub folder of timm or transformers, a bundle, or
            registered weights (lite0, b0 ...).
        model: The variant that the file must hold; default: the one that its shapes imply.
        source: The library that wrote it: tutorial, torchvision, timm, timm-tf, lukemelas, hf or keras; default: the
            one that its keys imply.
        to: What to write: bundle, tutorial, torchvision, timm, timm-tf or hf.
        out: The file or folder to write; default: in the working folder, named after the input.
        num_classes: Classes of the result; if the file has another number, the classifier gets random weights.
    """
    with console.Display(f"reading {file}") as progress:
        from effnet.weights.convert import read_checkpoint
        from effnet.weights.load import build, read
        from effnet.weights.verify import logit_difference
        from effnet.weights.writers import FILE_TARGETS, TARGETS, write_checkpoint

        if to not in ("bundle", *TARGETS):
            raise UnknownNameError("to", to, ("bundle", *TARGETS))
        checkpoint = read(file, model, source=source, num_classes=num_classes, progress=progress)
        network = build(checkpoint)
    sys.stdout.write(f"{checkpoint}\n")
    with console.Display(f"comparing logits with {checkpoint.source}"):
        difference = logit_difference(checkpoint, network)
    sys.stdout.write(f"read: {difference}\n")
    if not difference.relative <= SAME:
        raise RefusedError(f"the logits differ from those of {checkpoint.source}; nothing was written")

    target = out or Path(f"{Path(file).stem}-{to}{'.pth' if to in FILE_TARGETS else ''}")
    place = write_file(target) if to in FILE_TARGETS else write_folder(target, "bundle" if to == "bundle" else "hub")
    with place as temporary, console.Display(f"writing {target} and comparing logits"):
        notes: tuple[str, ...] = ()
        if to == "bundle":
            origin = f"{file} ({checkpoint.source})"
            record = read_record(file) if checkpoint.file.bundle and num_classes is None else None
            save(network, temporary, classes=checkpoint.classes, input=checkpoint.input, source=origin, record=record)
        else:
            notes = write_checkpoint(network, to, temporary, input_spec=checkpoint.input, classes=checkpoint.classes)
        difference = logit_difference(read_checkpoint(temporary, source=to), network)
        if not difference.relative <= SAME:
            raise RefusedError(f"{target} was not written, since its logits differ: {difference}")
    sys.stdout.write("\n".join((f"wrote {target} ({to})", *notes, f"written: {difference}")) + "\n")
    console.remark(f"Next: effnet predict photo.jpg --model {shlex.quote(str(target))}")
    return OK
