"""Error of bf16 in effnet's own kernels and in OpenVINO, and of fp32 with each instruction set.

    python benchmarks/precision.py                                          # Lite0 of ImageNet, views of the photos
    python benchmarks/precision.py BUNDLE... --data benchmarks/data/fashion --isa avx512bf16

The reference is torch: in float64 for the views, in fp32 for the many images of --data. "rms" is the root mean square
error of all logits relative to their root mean square; "largest" the largest error relative to the largest logit;
"agreement" the share of images that get the same class as from torch. With --data, images and labels are those of its
test split, and the last column is the accuracy.

The figures for Fashion-MNIST (python benchmarks/datasets.py fashion; Debian's dataset-fashion-mnist) are of networks
trained for a minute or two: effnet train examples/fashion --resolution 64 --threads 1 --workers 0, with --model lite0
--epochs 6 and with --model b0 --recipe scratch --epochs 12. Their seed is fixed.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from effnet import console
from effnet.data.dataset import match_classes, read_data
from effnet.data.image import load_pixels, views
from effnet.machine import this_machine
from effnet.metrics.intervals import Interval, compare_top1, wilson
from effnet.native import CHOSEN, KernelPrecision, instruction_sets
from effnet.runtime.options import EngineName
from effnet.runtime.select import open_session, select, version_of
from effnet.training.learner import Normalise
from effnet.weights.bundle import Bundle
from effnet.weights.load import open_model

VIEWS, BATCH = 64, 16
COLUMNS = ("<computed by", "rms", "largest", "agreement", "accuracy")

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]
Labels = NDArray[np.int64]


def images_of(bundle: Bundle, data: Path | None) -> tuple[Pixels, Labels | None]:
    """The images to evaluate a network on, (N, size, size, C), and their labels if there are any."""
    if data is None:
        return views(bundle.config.input, VIEWS), None
    test = match_classes(read_data(data).subset("test"), bundle.config.classes or (), "the bundle")
    pixels = [load_pixels(test.file(sample), bundle.config.input) for sample in test.samples]
    return np.stack(pixels), np.array([sample.label for sample in test.samples])


@torch.inference_mode()
def right(bundle: Bundle, pixels: Pixels, dtype: torch.dtype) -> NDArray[np.float64]:
    """Logits of torch, computed in `dtype`."""
    network = copy.deepcopy(bundle.network).to(dtype)
    parts = [pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)]
    normalise = Normalise(bundle.config.input)
    logits = [network(normalise(torch.from_numpy(part)).to(dtype)).double().numpy() for part in parts]
    return np.concatenate(logits)


def computed(bundle: Bundle, pixels: Pixels, sets: Sequence[str]) -> dict[str, Logits]:
    """Logits by engine, instruction set and precision."""
    ways: list[tuple[EngineName, str, KernelPrecision]] = []
    for precision in get_args(KernelPrecision):
        ways += [("native", isa, precision) for isa in sets] + [("openvino", "", precision)]
    found = {}
    for engine, isa, precision in ways:
        if isa:
            os.environ[CHOSEN] = isa
        chosen = select(bundle.config.spec, engine=engine, precision=precision, batch=BATCH, threads=1)
        with open_session(bundle, chosen) as session:
            parts = [session(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
        found[" ".join(filter(None, (engine, precision, isa)))] = np.concatenate(parts)
    return found


def share(interval: Interval) -> str:
    """An interval in percent."""
    return f"{100 * interval.value:.2f} ({100 * interval.low:.2f} to {100 * interval.high:.2f})"


def judge(name: str, bundle: Bundle, options: argparse.Namespace) -> None:
    """Print the table of one network, and the kernels' bf16 compared with OpenVINO's."""
    pixels, labels = images_of(bundle, options.data)
    truth = right(bundle, pixels, torch.float64 if labels is None else torch.float32)
    answers = computed(bundle, pixels, options.isa)
    same = truth.argmax(1)
    rows = []
    for way, logits in answers.items():
        error = logits - truth
        rms = float(np.sqrt((error**2).mean() / (truth**2).mean()))
        agreed, n = int((logits.argmax(1) == same).sum()), len(logits)
        accuracy = "" if labels is None else share(wilson(int((logits.argmax(1) == labels).sum()), n))
        largest = float(np.abs(error).max() / np.abs(truth).max())
        rows.append((way, f"{rms:.2e}", f"{largest:.2e}", share(wilson(agreed, n)), accuracy))
    if labels is not None:
        rows.append(("torch fp32", "", "", "", share(wilson(int((same == labels).sum()), len(labels)))))
    size = bundle.config.input.size
    console.table(COLUMNS, rows, title=f"{name} at {size} px, {len(pixels):,} images")
    ours, theirs = (answers[way] for way in (f"native bf16 {options.isa[0]}", "openvino bf16"))
    print("native bf16 less OpenVINO bf16, in points:")
    for what, classes in (("agreement", same), ("accuracy", labels)):
        if classes is not None:
            found = compare_top1(theirs, ours, classes)
            print(f"  {what} {share(found.accuracy)}; {found.only_b} images only native, {found.only_a} only OpenVINO")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["lite0"], metavar="BUNDLE")
    parser.add_argument("--data", type=Path, help="judge by the test split of the data of their training")
    parser.add_argument("--isa", nargs="+", default=instruction_sets(), help="instruction sets; default: all there are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"OpenVINO {version_of('openvino')}, torch {torch.__version__}; {this_machine()}")
    for model in options.models:
        judge(str(model), open_model(model), options)
