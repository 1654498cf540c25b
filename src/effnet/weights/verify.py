"""The logit check: a network of ours beside the library that a file belongs to, on the same input.

The library builds its own network and loads the file's own tensors, strictly, so the check sees every mistake in names,
shapes, transpositions, padding and batch normalisation. Where the library is not installed, or does not build such a
network, a round trip takes its place: to the library's names and back. It sees less, and the result says so.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from effnet.arch.spec import NetworkSpec
from effnet.errors import CheckpointError
from effnet.models.efficientnet import EfficientNet
from effnet.weights.convert import COUNTER, foreign_state, native_state, read_checkpoint
from effnet.weights.files import WeightFile, open_weights
from effnet.weights.layouts import baseline_of, detect, layout_of, policy_of, published
from effnet.weights.load import build
from effnet.weights.writers import TORCHVISION_NAMES, hf_config

LARGEST = 300  # pixels; a larger network is compared at a smaller size
PARITY = 32  # sizes that differ by it give every strided layer an input of the same parity, so the same padding
PACKAGES = {  # distribution of each source
    "torchvision": "torchvision",
    "timm": "timm",
    "timm-tf": "timm",
    "lukemelas": "efficientnet-pytorch",
    "hf": "transformers",
    "keras": "keras",
}

BASELINE_NAMES = {"mobilenetv2": "mobilenet_v2", "resnet50": "resnet50", "mobilenetv1": "mobilenetv1_100"}


class _NotBuiltError(Exception):
    """The library has no network like this one; the message says what it lacks."""


@dataclass(frozen=True)
class LogitDifference:
    """How far the logits of two networks are apart on the same input."""

    against: str  # "torchvision 0.29.1" or "round trip"
    size: int  # height and width in pixels of what both saw
    absolute: float  # the largest difference
    relative: float  # the same as a share of the largest logit
    note: str = ""  # why a round trip, why another size

    def __str__(self) -> str:
        """The result for a person."""
        words = f"against {self.against} at {self.size} px: logits differ by at most {self.absolute:.2g}"
        return f"{words} ({self.relative:.1e} of the largest)" + (f"; {self.note}" if self.note else "")


def logit_difference(path: str | Path, source: str, network: EfficientNet | None = None) -> LogitDifference:
    """Compare a network with the library `source`, which loads the file or folder `path`.

    Args:
        path: a checkpoint as it was found, or as `write_checkpoint` wrote it.
        source: the library, one of SOURCES; "bundle" and "tutorial" have none.
        network: what was written; None compares what `read_checkpoint` makes of `path`.

    Raises:
        CheckpointError: `path` cannot be read, or the library refuses its tensors.
    """
    file = open_weights(Path(path))
    if detect(file.tensors).written_by != layout_of(source).name:
        raise CheckpointError(f"{path} does not have the keys of {source}")
    ours = network or _as_read(file, source)
    # What is written for transformers is for the size that the InputSpec says.
    resolution = (file.config.get("image_size") if network and source == "hf" else None) or ours.spec.resolution
    size = check_size(resolution)
    notes = [f"{size} px pads as {resolution} px does"] if size != resolution else []
    against, theirs = "round trip", cast(Any, None)
    try:
        if builder := _BUILDERS.get(source):
            theirs = builder(file, dataclasses.replace(ours.spec, resolution=size))
            if isinstance(theirs, nn.Module):
                theirs.eval().load_state_dict(_tensors(file, ours, source, complete=network is not None), strict=True)
            against = f"{PACKAGES[source]} {version(PACKAGES[source])}"
    except ImportError:
        notes.append(f"{PACKAGES[source]} is not installed")
    except _NotBuiltError as error:
        notes.append(str(error))
    except RuntimeError as error:
        raise CheckpointError(f"{PACKAGES[source]} refuses {path}: {error}") from error
    if against == "round trip":
        theirs = _as_read(file, source) if network else _there_and_back(file, ours, source)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, ours.spec.in_channels, size, size, generator=generator)
    training = ours.training
    with torch.inference_mode():
        a, b = ours.eval()(images), theirs(images)
    ours.train(training)
    b = getattr(b, "logits", b)  # transformers wraps them
    # Not a number differs from everything: it must not slip below a threshold.
    absolute, largest = (a - b).abs().nan_to_num(math.inf).max().item(), a.abs().nan_to_num(0, posinf=0).max().item()
    return LogitDifference(against, size, absolute, absolute / largest if largest else absolute, "; ".join(notes))


def check_size(resolution: int) -> int:
    """The size at which a network of this resolution is compared: its own up to 300, else one that pads alike."""
    return resolution - max(0, -(-(resolution - LARGEST) // PARITY)) * PARITY


def _as_read(file: WeightFile, source: str) -> EfficientNet:
    """The network that `read_checkpoint` makes of a file; a missing classifier starts fresh, with one output."""
    headless = not any(key.startswith(("classifier.", "_fc.", "fc.", "predictions/", "dense/")) for key in file.tensors)
    return build(read_checkpoint(file.path, source=source, num_classes=1 if headless else None))


def _there_and_back(file: WeightFile, ours: EfficientNet, source: str) -> EfficientNet:
    layout = layout_of(source, ours.spec)
    foreign = foreign_state(ours.state_dict(), ours.spec, layout)
    state, _ = native_state(WeightFile(file.path, foreign), layout, ours.spec)
    again = EfficientNet(ours.spec, policy=ours.policy)
    again.load_state_dict(state, strict=source != "keras")  # Keras counts no batches
    return again.eval()


def _tensors(file: WeightFile, ours: EfficientNet, source: str, *, complete: bool) -> dict[str, Tensor]:
    """The file's tensors of the network; an incomplete one may lack counters of batches and the classifier."""
    state = foreign_state(ours.state_dict(), ours.spec, layout_of(source, ours.spec))
    classifier = list(state)[-2:]
    fill = {key for key in state if not complete and (key.endswith(COUNTER) or key in classifier)}
    return {key: file.tensors.get(key, state[key]) for key in state if key in file.tensors or key in fill}


def _torchvision(file: WeightFile, spec: NetworkSpec) -> Any:
    models = import_module("torchvision.models")
    row = import_module("torchvision.models.efficientnet").MBConvConfig
    if spec.in_channels != 3:
        raise _NotBuiltError(f"torchvision builds no stem for {spec.in_channels} channels")
    if (baseline := baseline_of(spec)) in BASELINE_NAMES:
        return getattr(models, BASELINE_NAMES[baseline])(num_classes=spec.num_classes)
    if (name := published(spec)) in TORCHVISION_NAMES:
        return getattr(models, f"efficientnet_{name}")(num_classes=spec.num_classes)
    rows = [
        row(block.expand_ratio, block.kernel_size, block.stride, block.in_channels, block.out_channels, layers)
        for block, layers in zip((block for block in spec.blocks if block.index == 0), spec.layers, strict=True)
    ]
    return models.EfficientNet(rows, spec.dropout, num_classes=spec.num_classes, last_channel=spec.head_channels)


def _timm(file: WeightFile, spec: NetworkSpec, *, prefix: str = "") -> Any:
    timm = import_module("timm")
    if "architecture" in file.config and file.config.get("num_classes") and not file.notes:  # timm takes no prefix off
        return timm.create_model(f"local-dir:{file.path}", pretrained=True)
    if (baseline := baseline_of(spec)) in BASELINE_NAMES:
        return timm.create_model(BASELINE_NAMES[baseline], num_classes=spec.num_classes, in_chans=spec.in_channels)
    if (name := published(spec)) is None:
        raise _NotBuiltError("timm builds its named networks alone")
    return timm.create_model(f"{prefix}efficientnet_{name}", num_classes=spec.num_classes, in_chans=spec.in_channels)


def _lukemelas(file: WeightFile, spec: NetworkSpec) -> Any:
    library = import_module("efficientnet_pytorch")
    if not spec.squeeze_ratio or spec.depth_rounding != "ceil":
        raise _NotBuiltError("efficientnet-pytorch builds no Lite, and rounds every depth up")
    return library.EfficientNet.from_name(
        "efficientnet-b0",
        in_channels=spec.in_channels,
        width_coefficient=spec.width,
        depth_coefficient=spec.depth,
        image_size=spec.resolution,  # its padding is fixed for one size
        num_classes=spec.num_classes,
    )


def _hf(file: WeightFile, spec: NetworkSpec) -> Any:
    library = import_module("transformers")
    if not spec.squeeze_ratio:
        raise _NotBuiltError("transformers builds no network without squeeze-and-excitation")
    config = library.EfficientNetConfig.from_dict(file.config or hf_config(spec, policy_of("hf", spec)))
    config.num_labels = spec.num_classes
    return library.EfficientNetForImageClassification(config)


def _keras(file: WeightFile, spec: NetworkSpec) -> Any:
    """Keras opens the file by itself; the pixels are those that its own preprocessing turns into `images`."""
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")  # torch is here, TensorFlow need not be
    applications = import_module("keras.applications")
    if (name := published(spec)) is None or not hasattr(applications, f"EfficientNet{name.upper()}"):
        raise _NotBuiltError("Keras builds B0-B7 alone")
    theirs = getattr(applications, f"EfficientNet{name.upper()}")(
        weights=None,
        input_shape=(spec.resolution, spec.resolution, spec.in_channels),
        classes=spec.num_classes,
        classifier_activation=None,
    )
    try:
        theirs.load_weights(str(file.path))
    except Exception as error:  # of Keras and h5py, by the kind of file
        raise _NotBuiltError(f"Keras does not load it as it is ({type(error).__name__})") from error
    mean, variance, *_ = next(layer.get_weights() for layer in theirs.layers if type(layer).__name__ == "Normalization")

    def logits(images: Tensor) -> Tensor:
        normalised = images.permute(0, 2, 3, 1)
        pixels = (normalised * torch.from_numpy(variance).sqrt() + torch.from_numpy(mean)) * 255
        return torch.as_tensor(theirs(pixels.numpy(), training=False))

    return logits


_BUILDERS: dict[str, Callable[[WeightFile, NetworkSpec], Any]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "timm-tf": partial(_timm, prefix="tf_"),
    "lukemelas": _lukemelas,
    "hf": _hf,
    "keras": _keras,
}
