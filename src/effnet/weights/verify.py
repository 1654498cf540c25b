"""The logit check: effnet's network against that of a file's own library, on the same input.

The library builds its own network and loads the file's own tensors strictly, so the check finds every mistake in names,
shapes, transpositions, padding and batch normalisation. If the library is not installed or has no such network, the
check is a round trip to the library's names and back, which finds less; the result says so.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from effnet.arch.spec import NetworkSpec
from effnet.errors import CheckpointError
from effnet.models.efficientnet import EfficientNet
from effnet.process import unchanged
from effnet.weights.bundle import to_tensors
from effnet.weights.convert import Checkpoint, foreign_state, native_state
from effnet.weights.hub import hf_config
from effnet.weights.layouts import baseline_of, policy_of, published_name
from effnet.weights.writers import TORCHVISION_NAMES

LARGEST = 300  # pixels; a larger network is compared at a smaller size
PARITY = 32  # sizes that differ by it give every strided layer an input of the same parity, so the same padding
BASELINE_NAMES = {"mobilenetv2": "mobilenet_v2", "resnet50": "resnet50", "mobilenetv1": "mobilenetv1_100"}


class _NotBuiltError(Exception):
    """The library has no such network; the message tells what it lacks."""


@dataclass(frozen=True)
class LogitDifference:
    """The difference of two networks' logits on the same input."""

    against: str  # "torchvision 0.29.1" or "round trip"
    size: int  # pixels, height and width of the input
    absolute: float  # the largest difference
    relative: float  # the same as a share of the largest logit
    note: str = ""  # the reason for a round trip or another size

    def __str__(self) -> str:
        """The result in one line."""
        text = f"against {self.against} at {self.size} px: logits differ by at most {self.absolute:.2g}"
        return f"{text} ({self.relative:.1e} of the largest)" + (f"; {self.note}" if self.note else "")


@torch.random.fork_rng(())
def logit_difference(checkpoint: Checkpoint, network: EfficientNet) -> LogitDifference:
    """Compare a network that was read from a file, or written to it, with that of the file's library.

    The library computes with the file's own tensors, and with the network's if the file has none, as for a fresh
    classifier. Raises CheckpointError if it refuses them, or if a bundle describes another network.
    """
    file, source, spec = checkpoint.file, checkpoint.source, network.spec
    stated = file.config.get("image_size") if source == "hf" else None  # transformers' padding is fixed for one size
    resolution = (stated if isinstance(stated, int) else stated[0]) if stated else spec.resolution
    size = check_size(resolution)
    notes = [f"{size} px pads as {resolution} px does"] if size != resolution else []
    tensors = _library_tensors(checkpoint, network)
    package, build = LIBRARIES.get(source, ("", None))
    against, theirs = "round trip", None
    try:
        if build:
            theirs = build(checkpoint, network, dataclasses.replace(spec, resolution=size))
            if isinstance(theirs, nn.Module):
                theirs.eval().load_state_dict(tensors, strict=True)
            against = f"{package} {version(package)}"
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        notes.append(f"{package} is not installed" if missing else f"{package} cannot be loaded: {error}")
    except _NotBuiltError as error:
        notes.append(str(error))
    except RuntimeError as error:
        raise CheckpointError(f"{package} refuses {file.path}: {error}") from error
    theirs = theirs or _round_trip(checkpoint, network, tensors)

    images = torch.randn(2, spec.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    training = network.training
    with torch.inference_mode():
        a, b = network.eval()(images), theirs(images)
    network.train(training)
    b = getattr(b, "logits", b)  # transformers wraps them
    absolute = (a - b).abs().nan_to_num(math.inf).max().item()  # NaN would pass every threshold
    largest = a.abs().nan_to_num(0, posinf=0).max().item()
    return LogitDifference(against, size, absolute, absolute / largest if largest else absolute, "; ".join(notes))


def check_size(resolution: int) -> int:
    """The size at which a network of this resolution is compared: its own up to 300, else one with equal padding."""
    return resolution - max(0, -(-(resolution - LARGEST) // PARITY)) * PARITY


def _library_tensors(checkpoint: Checkpoint, network: EfficientNet) -> dict[str, Tensor]:
    """The file's tensors of the network, and the network's own where the file holds none that fits."""
    state, theirs = network.state_dict(), to_tensors(checkpoint.file.tensors)
    native = foreign_state({name: name for name in state}, network.spec, checkpoint.layout)
    ours = {*checkpoint.fresh, *checkpoint.adapted}
    return {key: state[name] if name in ours else theirs.get(key, state[name]) for key, name in native.items()}


def _round_trip(checkpoint: Checkpoint, network: EfficientNet, tensors: dict[str, Tensor]) -> EfficientNet:
    """A copy of the network with tensors of the file's layout and the file's policy."""
    file, spec = checkpoint.file, network.spec
    if file.bundle and dataclasses.replace(checkpoint.spec, resolution=spec.resolution) != spec:
        raise CheckpointError(f"{file.path} describes another network")
    arrays = {key: tensor.detach().cpu().numpy() for key, tensor in tensors.items()}
    state, _ = native_state(arrays, checkpoint.layout, spec)
    result = copy.deepcopy(network)
    result.use_policy(checkpoint.policy)
    result.load_state_dict(network.state_dict() | to_tensors(state))
    return result.eval()


def _torchvision(checkpoint: Checkpoint, network: EfficientNet, spec: NetworkSpec) -> Any:
    models = import_module("torchvision.models")
    row = import_module("torchvision.models.efficientnet").MBConvConfig
    if spec.in_channels != 3:
        raise _NotBuiltError(f"torchvision builds no stem for {spec.in_channels} channels")
    if (baseline := baseline_of(spec)) in BASELINE_NAMES:
        return getattr(models, BASELINE_NAMES[baseline])(num_classes=spec.num_classes)
    if (name := published_name(spec)) in TORCHVISION_NAMES:
        return getattr(models, f"efficientnet_{name}")(num_classes=spec.num_classes)
    starts = zip((block for block in spec.blocks if block.index == 0), spec.layers, strict=True)
    rows = [row(b.expand_ratio, b.kernel_size, b.stride, b.in_channels, b.out_channels, layers) for b, layers in starts]
    return models.EfficientNet(rows, spec.dropout, num_classes=spec.num_classes, last_channel=spec.head_channels)


def _timm(checkpoint: Checkpoint, network: EfficientNet, spec: NetworkSpec) -> Any:
    timm, file = import_module("timm"), checkpoint.file
    # timm itself opens a folder that it can read: one with a config, and without a prefix in the keys
    if "architecture" in file.config and file.config.get("num_classes") and not file.notes:
        return timm.create_model(f"local-dir:{file.path}", pretrained=True, num_classes=spec.num_classes)
    name = BASELINE_NAMES.get(baseline_of(spec) or "")
    if not name and (variant := published_name(spec)):
        name = f"{'tf_' if checkpoint.source == 'timm-tf' else ''}efficientnet_{variant}"
    if not name:
        raise _NotBuiltError("timm builds only its named networks")
    return timm.create_model(name, num_classes=spec.num_classes, in_chans=spec.in_channels)


def _lukemelas(checkpoint: Checkpoint, network: EfficientNet, spec: NetworkSpec) -> Any:
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


def _hf(checkpoint: Checkpoint, network: EfficientNet, spec: NetworkSpec) -> Any:
    library = import_module("transformers")
    if not spec.squeeze_ratio:
        raise _NotBuiltError("transformers builds no network without squeeze-and-excitation")
    config = library.EfficientNetConfig.from_dict(checkpoint.file.config or hf_config(spec, policy_of("hf", spec)))
    config.num_labels = spec.num_classes
    return library.EfficientNetForImageClassification(config)


def _keras(checkpoint: Checkpoint, network: EfficientNet, spec: NetworkSpec) -> Any:
    """Keras opens the file itself, and gets the pixels that its own preprocessing turns into `images`."""
    with unchanged():
        os.environ.setdefault("KERAS_BACKEND", "torch")  # torch is here, TensorFlow need not be
        keras = import_module("keras")
    build = getattr(keras.applications, f"EfficientNet{(published_name(spec) or '').upper()}", None)
    if build is None:
        raise _NotBuiltError("Keras builds only B0-B7")
    classifier = next(checkpoint.file.tensors.get(key) for key in reversed(checkpoint.layout.shapes(spec)))
    if classifier is None:
        raise _NotBuiltError("the file has no classifier, and Keras' networks have one")
    theirs = build(
        weights=None,
        input_shape=(spec.resolution, spec.resolution, spec.in_channels),
        classes=len(classifier),
        classifier_activation=None,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each layer of a network inside another
            theirs.load_weights(str(checkpoint.file.path))
    except Exception as error:  # of Keras and h5py, by the type of file
        raise _NotBuiltError(f"Keras does not load it as it is ({type(error).__name__})") from error
    mean, variance, *_ = next(layer.get_weights() for layer in theirs.layers if type(layer).__name__ == "Normalization")
    classify = network.classifier if checkpoint.fresh else nn.Identity()
    if checkpoint.fresh:
        theirs = keras.Model(theirs.input, theirs.layers[-2].output)

    def logits(images: Tensor) -> Tensor:
        normalised = images.permute(0, 2, 3, 1)
        pixels = (normalised * torch.from_numpy(variance).sqrt() + torch.from_numpy(mean)) * 255
        result: Tensor = classify(torch.as_tensor(theirs(pixels.numpy(), training=False)))
        return result

    return logits


LIBRARIES: dict[str, tuple[str, Callable[[Checkpoint, EfficientNet, NetworkSpec], Any]]] = {
    # source: package on PyPI, what builds its network
    "torchvision": ("torchvision", _torchvision),
    "timm": ("timm", _timm),
    "timm-tf": ("timm", _timm),
    "lukemelas": ("efficientnet-pytorch", _lukemelas),
    "hf": ("transformers", _hf),
    "keras": ("keras", _keras),
}
