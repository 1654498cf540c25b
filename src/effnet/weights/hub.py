"""The configs of hub folders, read and written: timm's config.json, transformers' with a preprocessor_config.json.

They state what tensors do not show: the activation, batch normalisation's constants, the padding, the preprocessing
and the class names. A config that changes the network to one that effnet does not support is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from effnet.arch.blocks import Activation
from effnet.arch.spec import FitMode, InputSpec, Interpolation, NetworkSpec, NumericPolicy, Padding
from effnet.arch.variants import spec as make_spec
from effnet.errors import CheckpointError
from effnet.weights.files import WeightFile
from effnet.weights.layouts import evenly_padded_blocks, policy_of, published_name
from effnet.weights.registry import crop_input

TIMM_CROP = 0.875  # default of timm's configs: the share of the resized image that is kept
TIMM_FITS: dict[str, FitMode] = {"center": "crop", "squash": "squash", "border": "pad"}
TIMM_DEFAULTS = {  # arguments of timm's that change the network, with the value that does not
    **dict.fromkeys(("act_layer", "norm_layer", "aa_layer", "se_layer"), None),
    "global_pool": "avg",
    "output_stride": 32,
}
HF_ACTIVATIONS: dict[str, Activation] = {"swish": "silu", "relu6": "relu6", "silu": "silu"}
HF_RESAMPLE: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic")  # by Pillow's numbers
HF_PROCESSOR: dict[str, Any] = {  # the defaults of EfficientNetImageProcessor
    "do_resize": True,
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


def timm_source(file: WeightFile) -> str:
    """The source, timm or timm-tf, by the architecture in config.json; "" if there is none."""
    architecture = str(file.config.get("architecture", ""))
    if architecture and not re.match(r"(tf_)?efficientnet_(b\d|l2|lite\d)(\.|$)|tinynet_", architecture):
        raise CheckpointError(f"{file.path} is timm's {architecture}, which is not an EfficientNet-B, -L2 or -Lite")
    return architecture and ("timm-tf" if architecture.startswith("tf_") else "timm")


def timm_policy(file: WeightFile, policy: NumericPolicy) -> NumericPolicy:
    """The policy as changed by timm's arguments; raises CheckpointError if they change the network."""
    arguments = {"global_pool": file.config.get("global_pool"), **(file.config.get("model_args") or {})}
    if odd := [key for key, default in TIMM_DEFAULTS.items() if arguments.get(key) not in (None, default)]:
        raise CheckpointError(f"{file.path}: config.json changes timm's network by its {', '.join(odd)}")
    padding: Padding = "same" if arguments.get("pad_type") == "same" else "symmetric"
    return NumericPolicy(
        arguments.get("bn_eps", policy.bn_eps),
        arguments.get("bn_momentum", policy.bn_momentum),
        padding if "pad_type" in arguments else policy.padding,
    )


def timm_input(config: Mapping[str, Any]) -> InputSpec:
    """The preprocessing of timm's pretrained_cfg."""
    result = crop_input(
        int(config["input_size"][-1]),
        config.get("crop_pct", TIMM_CROP),
        tuple(config.get("mean", InputSpec.mean)),
        tuple(config.get("std", InputSpec.std)),
        config.get("interpolation", "bicubic"),
    )
    return dataclasses.replace(result, fit=TIMM_FITS.get(config.get("crop_mode", "center"), "crop"))


def timm_config(
    spec: NetworkSpec, policy: NumericPolicy, source: str, input_spec: InputSpec, classes: Sequence[str] | None
) -> dict[str, Any]:
    """The config.json of a network that timm has a name for; `source` is timm or timm-tf."""
    ours, theirs = vars(policy), vars(policy_of(source, spec))
    arguments = {name: ours[name] for name in ("bn_eps", "bn_momentum") if ours[name] != theirs[name]}
    return {
        "architecture": f"{'tf_' if source == 'timm-tf' else ''}efficientnet_{published_name(spec)}",
        "num_classes": spec.num_classes,
        "global_pool": "avg",
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "input_size": [spec.in_channels, input_spec.size, input_spec.size],
            "interpolation": input_spec.interpolation,
            "crop_pct": _crop_fraction(input_spec) if input_spec.fit == "crop" else 1.0,
            "crop_mode": next(mode for mode, fit in TIMM_FITS.items() if fit == input_spec.fit),
            "mean": input_spec.mean,
            "std": input_spec.std,
            "num_classes": spec.num_classes,
            "first_conv": "conv_stem",
            "classifier": "classifier",
            **({"label_names": list(classes)} if classes else {}),
        },
    }


def hf_network(
    file: WeightFile, held: NetworkSpec, policy: NumericPolicy
) -> tuple[NetworkSpec, NumericPolicy, tuple[str, ...]]:
    """A network and its policy as transformers' config.json completes them, and doubts about its padding."""
    config = file.config
    size, activation = config.get("image_size", held.resolution), config.get("hidden_act", "swish")
    if activation not in HF_ACTIVATIONS or config.get("pooling_type", "mean") != "mean":
        found = f"config.json has {activation} and {config.get('pooling_type', 'mean')} pooling"
        raise CheckpointError(f"{file.path}: {found}; effnet has {', '.join(HF_ACTIVATIONS)} and mean pooling")
    spec = dataclasses.replace(
        make_spec(held, resolution=size if isinstance(size, int) else size[0]),
        activation=HF_ACTIVATIONS[activation],
        dropout=config.get("dropout_rate", held.dropout),
        drop_connect=config.get("drop_connect_rate", held.drop_connect),
    )
    momentum = config.get("batch_norm_momentum", 0.99)  # in TensorFlow's terms, unless effnet wrote the file
    momentum = round(1 - momentum, 6) if momentum > 0.5 else momentum
    policy = dataclasses.replace(policy, bn_eps=config.get("batch_norm_eps", policy.bn_eps), bn_momentum=momentum)
    # transformers pads the blocks that a list names; effnet pads by TensorFlow's rule (SAME), whatever size arrives
    strided = {number for number, block in enumerate(spec.blocks) if block.stride == 2}
    padded = set(config.get("depthwise_padding") or ()) & strided
    if spec.resolution % 2 == 0 and padded == set(evenly_padded_blocks(spec)):
        return spec, policy, ()
    doubt = (
        f"with the depthwise_padding {sorted(padded)} of its config.json transformers does not pad as TensorFlow (SAME)"
    )
    return spec, policy, (f"{doubt} and effnet at {spec.resolution} px, so its logits differ",)


def hf_config(spec: NetworkSpec, policy: NumericPolicy, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The config.json of transformers' EfficientNetForImageClassification for a network at the spec's resolution."""
    official = dataclasses.replace(spec, depth_rounding="ceil", fixed_ends=False).layers == spec.layers
    names = list(classes or (f"LABEL_{number}" for number in range(spec.num_classes)))
    return {
        "architectures": ["EfficientNetForImageClassification"],
        "model_type": "efficientnet",
        "dtype": "float32",
        "num_channels": spec.in_channels,
        "image_size": spec.resolution,
        "width_coefficient": spec.width,
        "depth_coefficient": spec.depth if official else 1.0,
        "kernel_sizes": [row.kernel_size for row in spec.stages],
        "in_channels": [spec.stem, *(row.channels for row in spec.stages[:-1])],
        "out_channels": [row.channels for row in spec.stages],
        "depthwise_padding": evenly_padded_blocks(spec),
        "strides": [row.stride for row in spec.stages],
        "num_block_repeats": [row.layers for row in spec.stages] if official else list(spec.layers),
        "expand_ratios": [row.expand_ratio for row in spec.stages],
        "squeeze_expansion_ratio": spec.squeeze_ratio,
        "hidden_act": next(name for name, activation in HF_ACTIVATIONS.items() if activation == spec.activation),
        "hidden_dim": spec.head_channels,
        "batch_norm_eps": policy.bn_eps,
        "batch_norm_momentum": policy.bn_momentum,  # transformers hands it to torch: TensorFlow's .99 would be wrong
        "dropout_rate": spec.dropout,
        "drop_connect_rate": spec.drop_connect,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def hf_input(processor: Mapping[str, Any]) -> tuple[InputSpec, tuple[str, ...]]:
    """How images are prepared by transformers' preprocessor_config.json, and notes.

    It computes pixels * factor - offset, minus mean, by std, and by std once more where `include_top` is set. The
    published configs set it, because they hold the square root of the std.
    """
    config = HF_PROCESSOR | dict(processor)
    factor = config["rescale_factor"] * 255 if config["do_rescale"] else 255
    offset = float(config["do_rescale"] and config["rescale_offset"])
    mean, std = config["image_mean"], config["image_std"]
    ones = [1.0] * len(std)
    first, second = (std if config["do_normalize"] else ones), (std if config["include_top"] else ones)
    mean = mean if config["do_normalize"] else [0.0] * len(std)
    result = InputSpec(
        _side(config["size"]),
        _side(config["size"]),
        tuple((value + offset) / factor for value in mean),
        tuple(a * b / factor for a, b in zip(first, second, strict=True)),
        HF_RESAMPLE[config["resample"]],
        "squash",
    )
    if not config["do_center_crop"]:
        return result, ()
    result = dataclasses.replace(result, size=_side(config["crop_size"]), fit="crop")
    if "shortest_edge" in config["size"]:
        return result, ()
    return result, ("its processor squashes images before it crops them: effnet keeps their aspect ratio",)


def hf_processor(input_spec: InputSpec) -> dict[str, Any]:
    """The preprocessor_config.json of transformers for an InputSpec; it cannot pad."""
    square = {"height": input_spec.size, "width": input_spec.size}
    return HF_PROCESSOR | {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": {"shortest_edge": input_spec.resize} if input_spec.fit == "crop" else square,
        "resample": HF_RESAMPLE.index(input_spec.interpolation),
        "do_center_crop": input_spec.fit == "crop",
        "crop_size": square,
        "image_mean": input_spec.mean,
        "image_std": input_spec.std,
        "include_top": False,  # True would divide by the std once more
    }


def _side(size: Mapping[str, int] | int) -> int:
    return size if isinstance(size, int) else size.get("height") or size["shortest_edge"]


def _crop_fraction(input_spec: InputSpec) -> float:
    """The shortest decimal fraction with floor(size / fraction) == resize, as timm computes it."""
    size, resize = input_spec.size, input_spec.resize
    fractions = [*(round(size / resize, digits) for digits in range(3, 17)), size / (resize + 0.5)]
    return next(fraction for fraction in fractions if fraction and int(size / fraction) == resize)
