"""Writes a network as a file or hub folder that another library loads.

    tutorial, torchvision   a state dict: .pth, .pt or .safetensors
    timm, timm-tf           a folder for timm.create_model("local-dir:FOLDER", pretrained=True)
    hf                      a folder for EfficientNetForImageClassification.from_pretrained(FOLDER)

A network that the library would compute differently is refused, with the reason. BN's eps is stated where a config.json
can state it; elsewhere the difference to the library's own moves into the running variances.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from effnet.arch.blocks import round_channels
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.variants import B0
from effnet.errors import ArgumentError
from effnet.files import FILE_SUFFIXES, MARK, write_file, write_folder
from effnet.models.efficientnet import EfficientNet
from effnet.version import __version__
from effnet.weights.convert import foreign_state, with_eps
from effnet.weights.files import RESAMPLE, TIMM_FITS
from effnet.weights.layouts import NATIVE, layout_of, lone_shortcuts, policy_of, published, squarely_padded

WRITTEN = ("tutorial", "torchvision", "timm", "timm-tf", "hf")
FILES = ("tutorial", "torchvision")  # a file; the others are folders
TORCHVISION_NAMES = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")


def write_checkpoint(
    network: EfficientNet,
    to: str,
    out: str | Path,
    *,
    input_spec: InputSpec,
    classes: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Write a network in the form of another library.

    Args:
        network: what to write, with all its weights in float32.
        to: the library, one of WRITTEN.
        out: the file, or the folder where the library wants one; what this function wrote before is replaced, a folder
            with anything else in it is refused. Either appears whole or not at all.
        input_spec: how images are prepared; a folder states it.
        classes: the names of the outputs, in order; a folder holds them.

    Returns:
        What the reader of the file should know, such as how to build the network there.

    Raises:
        ArgumentError: the library cannot compute this network, is only read, or `out` does not suit it.
    """
    if to not in WRITTEN:
        raise ArgumentError("to", to, f"cannot be written; choose from {', '.join(WRITTEN)}.")
    if classes is not None and len(classes) != network.spec.num_classes:
        raise ArgumentError("classes", f"{len(classes)} names", f"must be {network.spec.num_classes} names.")
    if reason := next(_obstacles(network, to, input_spec), None):
        raise ArgumentError("to", to, f"cannot hold this network ({network.spec.name}): {reason}")

    target, spec, policy, input_spec = (
        Path(out),
        network.spec,
        network.policy,
        input_spec.with_channels(network.spec.in_channels),
    )
    state = {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    notes: tuple[str, ...] = ()
    if to in FILES:
        if target.suffix not in FILE_SUFFIXES:
            raise ArgumentError("out", str(out), f"must end in {', '.join(FILE_SUFFIXES)} for {to}.")
        theirs = policy_of(to, spec)
        state = with_eps(state, policy.bn_eps, theirs.bn_eps) if policy.bn_eps != theirs.bn_eps else state
        notes = _file_notes(spec, policy, to)
    foreign = {key: tensor.contiguous() for key, tensor in foreign_state(state, spec, layout_of(to)).items()}
    if to in FILES:
        with write_file(target) as temporary:
            save_file(foreign, temporary) if target.suffix == ".safetensors" else torch.save(foreign, temporary)
        return notes

    if to == "hf":
        configs = {
            "config.json": hf_config(dataclasses.replace(spec, resolution=input_spec.size), policy, classes),
            "preprocessor_config.json": _hf_preprocessor(input_spec),
        }
        if input_spec.fit == "pad":
            notes = ("transformers' processor adds no borders: it squashes photos to the size instead",)
    else:
        configs = {"config.json": _timm_config(spec, policy, to, input_spec, classes)}
    configs["config.json"][MARK] = __version__
    with write_folder(target, "hub") as temporary:
        save_file(foreign, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, values in configs.items():
            (temporary / name).write_text(json.dumps(values, indent=2) + "\n")
    return notes


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
        "depth_divisor": 8,
        "kernel_sizes": [row.kernel_size for row in spec.stages],
        "in_channels": [spec.stem, *(row.channels for row in spec.stages[:-1])],
        "out_channels": [row.channels for row in spec.stages],
        "depthwise_padding": squarely_padded(spec),
        "strides": [row.stride for row in spec.stages],
        "num_block_repeats": [row.layers for row in spec.stages] if official else list(spec.layers),
        "expand_ratios": [row.expand_ratio for row in spec.stages],
        "squeeze_expansion_ratio": spec.squeeze_ratio,
        "hidden_act": {"silu": "swish"}.get(spec.activation, spec.activation),
        "hidden_dim": spec.head_channels,
        "pooling_type": "mean",
        "batch_norm_eps": policy.bn_eps,
        "batch_norm_momentum": policy.bn_momentum,  # transformers hands it to torch: TensorFlow's .99 would be wrong
        "dropout_rate": spec.dropout,
        "drop_connect_rate": spec.drop_connect,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _obstacles(network: EfficientNet, to: str, input_spec: InputSpec) -> Iterator[str]:
    """Reasons why a library cannot compute what this network computes, each with what to do."""
    spec, policy = network.spec, network.policy
    hf, torchvision = (", hf", ", torchvision") if spec.squeeze_ratio else ("", "")
    official_stem = spec.stem_channels == round_channels(B0.stem * spec.width)
    official_head = spec.head_channels == round_channels(B0.head * spec.width)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if shapes != NATIVE.shapes(spec) or {norm.eps for norm in norms} != {policy.bn_eps}:
        yield "its normalisation is not BatchNorm2d with the eps of its policy. Write a bundle."
    if spec.stages != B0.stages:
        yield "its baseline is not EfficientNet's. Write a bundle."
    if spec.stem_stride != B0.stem_stride:
        yield f"its stem has a stride of {spec.stem_stride}, and {to}'s has {B0.stem_stride}. Write a bundle."
        return
    if to in ("timm-tf", "hf") and policy.padding != "same":
        yield f"it pads all sides alike, and {to} pads as TensorFlow (SAME). Write timm{torchvision} or a bundle."
    if to in ("timm", *FILES) and policy.padding == "same":
        yield f"it pads as TensorFlow (SAME), and {to} pads all sides alike. Write timm-tf{hf} or a bundle."
    if to in ("timm", "timm-tf"):
        if published(spec) is None:
            yield "timm builds only its named networks, B0-B8, L2 and Lite0-4. Write " + (
                "hf or a bundle." if to == "timm-tf" else "torchvision, tutorial or a bundle."
            )
        return
    tf = "timm-tf" if policy.padding == "same" else "timm"
    if not spec.squeeze_ratio:
        yield f"it has no squeeze-and-excitation, which {to} always builds. Write {tf} or a bundle."
    if to in FILES:
        if spec.activation != "silu":
            yield f"its activation is {spec.activation}, and {to}'s SiLU. Write a bundle."
        if any(block.squeeze_channels != block.in_channels // 4 for block in spec.blocks):
            yield f"it squeezes to a share of {spec.squeeze_ratio:g}, and {to} to a quarter. Write a bundle."
        if spec.in_channels != 3:
            yield f"it sees {spec.in_channels} channels, and {to} builds a stem for 3. Write {tf} or a bundle."
    if to in ("tutorial", "hf") and not (official_stem and official_head):
        yield "its stem or head has not the official number of channels. Write torchvision or a bundle."
    if to == "tutorial" and _official_depth(spec) is None:
        yield "it does not round its depth up, as the tutorial does. Write torchvision or a bundle."
    if to == "hf" and input_spec.size % 2:
        yield f"transformers pads only even sizes right, and it sees {input_spec.size} px. Write timm-tf or a bundle."
    if to == "hf" and (lone := lone_shortcuts(spec)):
        yield f"transformers has no shortcut in the first block of a stage, and it has in {lone[0]}. Write a bundle."


def _official_depth(spec: NetworkSpec) -> float | None:
    """The depth that gives these layers when rounded up, the spec's own if it does."""
    depths = (spec.depth, *(hundredths / 100 for hundredths in range(1, 1201)))
    return next((depth for depth in depths if B0.scaled_layers(depth, "ceil") == spec.layers), None)


def _file_notes(spec: NetworkSpec, policy: NumericPolicy, to: str) -> tuple[str, ...]:
    """What a state dict cannot say."""
    theirs, name = policy_of(to, spec), published(spec)
    notes = []
    if to == "tutorial":
        depth = _official_depth(spec)
        notes.append(f"build it with width_coefficient={spec.width:g}, depth_coefficient={depth:g}")
    elif name not in TORCHVISION_NAMES:
        notes.append(
            f"torchvision has no builder of this network: make torchvision.models.EfficientNet of MBConvConfig rows "
            f"with {', '.join(map(str, spec.layers))} layers and last_channel={spec.head_channels}"
        )
    if policy.bn_eps != theirs.bn_eps:
        notes.append(
            f"BN's eps {policy.bn_eps:g} is {theirs.bn_eps:g} there; the difference moved into the running variances, "
            "which is exact in eval mode"
        )
    if policy.bn_momentum != theirs.bn_momentum:
        notes.append(f"{to} would train on with BN momentum {theirs.bn_momentum:g}, not {policy.bn_momentum:g}")
    return tuple(notes)


def _timm_config(
    spec: NetworkSpec, policy: NumericPolicy, to: str, input_spec: InputSpec, classes: Sequence[str] | None
) -> dict[str, Any]:
    theirs = policy_of(to, spec)
    arguments = {
        field: getattr(policy, field)
        for field in ("bn_eps", "bn_momentum")
        if getattr(policy, field) != getattr(theirs, field)
    }
    return {
        "architecture": f"{'tf_' if to == 'timm-tf' else ''}efficientnet_{published(spec)}",
        "num_classes": spec.num_classes,
        "num_features": spec.head_channels,
        "global_pool": "avg",
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [spec.in_channels, input_spec.size, input_spec.size],
            "fixed_input_size": False,
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


def _crop_fraction(input_spec: InputSpec) -> float:
    """The shortest decimal number of which timm makes floor(size / fraction) == resize."""
    fractions = [round(input_spec.size / input_spec.resize, digits) for digits in range(3, 17)] + [
        input_spec.size / (input_spec.resize + 0.5)
    ]
    return next(fraction for fraction in fractions if fraction and int(input_spec.size / fraction) == input_spec.resize)


def _hf_preprocessor(input_spec: InputSpec) -> dict[str, Any]:
    square = {"height": input_spec.size, "width": input_spec.size}
    return {
        "image_processor_type": "EfficientNetImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": input_spec.resize} if input_spec.fit == "crop" else square,
        "resample": next(number for number, name in RESAMPLE.items() if name == input_spec.interpolation),
        "do_center_crop": input_spec.fit == "crop",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "rescale_offset": False,
        "do_normalize": True,
        "image_mean": input_spec.mean,
        "image_std": input_spec.std,
        "include_top": False,  # would divide by the std once more
    }
