"""effnet predict: photos in, names out."""

from __future__ import annotations

import sys
import time
from typing import Any, Literal

from effnet import console
from effnet.arch.spec import FitMode
from effnet.arch.variants import VARIANTS
from effnet.console import FINDING, OK, STDIN, Flag, Whole
from effnet.errors import ArgumentError, ImageError


def predict(
    *sources: str,
    model: str = "lite0",
    topk: Whole = 5,
    batch: Whole | None = None,
    fit: FitMode | None = None,
    source: str | None = None,
    engine: Literal["auto", "torch", "openvino", "onnxruntime"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto",
    threads: Whole | None = None,
    decode: Literal["fast", "exact"] = "fast",
    json: Flag = False,
    csv: Flag = False,
) -> int:
    """Name what is in photos. Every file gets exactly one answer, in order.

    Args:
        sources: Files, folders (at any depth), patterns such as 'photos/*.jpg', or - for a list on standard input
            (answered once two batches of it were read, or all of it).
        model: Registered weights (lite0, b0 ...), a bundle, an artifact of effnet export, another library's file or
            folder, timm/NAME, hf:ORG/NAME.
        topk: How many classes to name for each photo.
        batch: Photos that are read and named together; by default as many as take a second, at most 16.
        fit: How a photo is made square, in place of the weights' own way: crop its sides, pad it, or squash it.
        source: The library that wrote a file of weights, where its keys cannot tell: timm or timm-tf.
        engine: What runs the network: torch, openvino or onnxruntime. By default the fastest that is installed,
            measured once; an artifact is run by what knows its format.
        precision: What it computes with: fp32, or bf16, which is OpenVINO's. By default bf16 where it is faster and
            names photos as fp32 does; an artifact's own.
        threads: How many the engine and the decoding may use; by default one for each core.
        decode: fast: large JPEGs are halved while they are decoded, as long as they stay four times as large as the
            network sees them. exact: decoded in full.
        json: One JSON object a line.
        csv: CSV, one line for each class.
    """
    from effnet.data.paths import expand
    from effnet.predicting import formats

    if not sources:
        raise ArgumentError("sources", "", "must name a file, a folder, a pattern, or - for a list on standard input.")
    if json and csv:
        raise ArgumentError("csv", csv, "excludes --json: choose one form of output.")
    named = ["-" if source == STDIN else source for source in sources]
    form = formats.PredictionJson() if json else formats.PredictionCsv() if csv else formats.PredictionTable()
    started, photos, unreadable = time.perf_counter(), 0, 0
    with console.Display(f"opening {model}"):
        from effnet.runtime.classifier import load

        how: Any = {"engine": engine, "precision": precision, "threads": threads, "decode": decode}
        classifier = load(model, source=source, fit=fit, batch=batch, **how)
    answers = classifier.stream(expand(named, sys.stdin), topk=topk, batch=batch)
    sys.stdout.write(form.begin())
    for photo, answer in answers:
        photos, unreadable = photos + 1, unreadable + isinstance(answer, ImageError)
        sys.stdout.write(form.answer(str(photo), answer))
        sys.stdout.flush()
    seconds = time.perf_counter() - started
    console.remark(
        f"{photos:,} photo{'' if photos == 1 else 's'}, {unreadable} unreadable, {seconds:.1f} s with {model}\n"
        f"{classifier.selection}"
    )
    console.remark(f"Next: effnet info {classifier.spec.name if classifier.spec.name in VARIANTS else ''}".rstrip())
    return FINDING if unreadable else OK
