"""Writes a network as a file or hub folder that another library loads.

    tutorial, torchvision   a state dict: .pth, .pt or .safetensors
    timm, timm-tf           a folder for timm.create_model("local-dir:FOLDER", pretrained=True)
    hf                      a folder for EfficientNetForImageClassification.from_pretrained(FOLDER)

A network that the library would compute differently is refused, with the reason. A config.json states BN's eps; in a
state dict the difference to the library's own eps moves into the running variances.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from effnet.arch.blocks import round_channels
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.variants import B0
from effnet.errors import ArgumentError
from effnet.files import FILE_SUFFIXES, MARK, write_file, write_folder
from effnet.models.efficientnet import EfficientNet, unwrap_network
from effnet.version import __version__
from effnet.weights.convert import foreign_state
from effnet.weights.hub import hf_config, hf_processor, timm_config
from effnet.weights.layouts import (
    NATIVE,
    first_block_shortcuts,
    layout_of,
    policy_of,
    published_name,
)

TARGETS = ("tutorial", "torchvision", "timm", "timm-tf", "hf")
FILE_TARGETS = ("tutorial", "torchvision")  # a file; the others are folders
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
        network: what to write, in float32; of DataParallel, AveragedModel and torch.compile the network inside.
        to: the library, one of TARGETS.
        out: the file or folder, which appears whole or not at all. One that effnet wrote is replaced; a folder with
            anything else in it is refused.
        input_spec: how images are prepared, for a folder's configs.
        classes: the names of the outputs in order, for a folder's config.

    Returns:
        Notes for the reader of the file, such as how to build the network there.

    Raises:
        ArgumentError: the library is not written or cannot compute this network, or `out` is taken or misnamed.
    """
    network = unwrap_network(network)
    if to not in TARGETS:
        raise ArgumentError("to", to, f"cannot be written; choose from {', '.join(TARGETS)}.")
    if classes is not None and len(classes) != network.spec.num_classes:
        raise ArgumentError("classes", f"{len(classes)} names", f"must be {network.spec.num_classes} names.")
    if reason := next(_obstacles(network, to, input_spec), None):
        raise ArgumentError("to", to, f"cannot hold this network ({network.spec.name}): {reason}")

    target, spec, policy = Path(out), network.spec, network.policy
    input_spec = input_spec.with_channels(spec.in_channels)
    state = {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    if to in FILE_TARGETS and target.suffix not in FILE_SUFFIXES:
        raise ArgumentError("out", str(out), f"must end in {', '.join(FILE_SUFFIXES)} for {to}.")
    if to in FILE_TARGETS and (eps := policy_of(to, spec).bn_eps) != policy.bn_eps:
        state = change_eps(state, policy.bn_eps, eps)
    foreign = {key: tensor.contiguous() for key, tensor in foreign_state(state, spec, layout_of(to)).items()}
    if to in FILE_TARGETS:
        with write_file(target) as temporary:
            save_file(foreign, temporary) if target.suffix == ".safetensors" else torch.save(foreign, temporary)
        return _file_notes(spec, policy, to)

    if to == "hf":
        config = hf_config(dataclasses.replace(spec, resolution=input_spec.size), policy, classes)
        configs = {"config.json": config, "preprocessor_config.json": hf_processor(input_spec)}
    else:
        config = timm_config(spec, policy, to, input_spec, classes)
        configs = {"config.json": config}
    config[MARK] = __version__
    with write_folder(target, "hub") as temporary:
        save_file(foreign, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, values in configs.items():
            (temporary / name).write_text(json.dumps(values, indent=2) + "\n")
    if to == "hf" and input_spec.fit == "pad":
        return ("transformers' processor does not pad: it squashes images to the size instead",)
    return ()


def change_eps(state: Mapping[str, Tensor], old: float, new: float) -> dict[str, Tensor]:
    """A native state whose logits with batch normalisation's eps `new` are those with `old`, in eval mode.

    Normalising divides by sqrt(variance + eps), so the difference moves into the running variances. Where one would
    become negative it is 0, and the layer's weight compensates the rest.
    """
    moved = dict(state)
    for key, variance in state.items():
        if key.endswith(".running_var"):
            moved[key] = (variance + (old - new)).clamp(min=0)
            weight = key.replace(".running_var", ".weight")
            rest = ((moved[key] + new) / (variance + old)).sqrt()
            moved[weight] = torch.where(moved[key] > 0, state[weight], state[weight] * rest)
    return moved


def _obstacles(network: EfficientNet, to: str, input_spec: InputSpec) -> Iterator[str]:
    """Reasons why a library cannot compute this network's logits, each with what to write instead."""
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
    if to in ("timm", *FILE_TARGETS) and policy.padding == "same":
        yield f"it pads as TensorFlow (SAME), and {to} pads all sides alike. Write timm-tf{hf} or a bundle."
    if to in ("timm", "timm-tf"):
        if published_name(spec) is None:
            others = "hf" if to == "timm-tf" else "torchvision, tutorial"
            yield f"timm builds only its named networks, B0-B8, L2 and Lite0-4. Write {others} or a bundle."
        return
    tf = "timm-tf" if policy.padding == "same" else "timm"
    if not spec.squeeze_ratio:
        yield f"it has no squeeze-and-excitation, which {to} always builds. Write {tf} or a bundle."
    if to in FILE_TARGETS:
        if spec.activation != "silu":
            yield f"its activation is {spec.activation}, and {to}'s SiLU. Write a bundle."
        if any(block.squeeze_channels != block.in_channels // 4 for block in spec.blocks):
            yield f"its squeeze_ratio is {spec.squeeze_ratio:g}, and {to}'s 0.25. Write a bundle."
        if spec.in_channels != 3:
            yield f"it has {spec.in_channels} input channels, and {to}'s stem 3. Write {tf} or a bundle."
    if to in ("tutorial", "hf") and not (official_stem and official_head):
        yield "its stem or head does not have the official number of channels. Write torchvision or a bundle."
    if to == "tutorial" and _official_depth(spec) is None:
        yield "its depth is not rounded up, as the tutorial's is. Write torchvision or a bundle."
    if to == "hf" and input_spec.size % 2:
        yield f"transformers pads odd sizes wrongly, and its input has {input_spec.size} px. Write timm-tf or a bundle."
    if to == "hf" and (lone := first_block_shortcuts(spec)):
        yield f"transformers has no shortcut in the first block of a stage, as in {lone[0]}. Write a bundle."


def _official_depth(spec: NetworkSpec) -> float | None:
    """The depth coefficient that gives these layers when rounded up; the spec's own where it does."""
    depths = (spec.depth, *(hundredths / 100 for hundredths in range(1, 1201)))
    return next((depth for depth in depths if B0.scaled_layers(depth, "ceil") == spec.layers), None)


def _file_notes(spec: NetworkSpec, policy: NumericPolicy, to: str) -> tuple[str, ...]:
    """What a state dict cannot state."""
    theirs, notes = policy_of(to, spec), []
    if to == "tutorial":
        notes.append(f"build it with width_coefficient={spec.width:g}, depth_coefficient={_official_depth(spec):g}")
    elif published_name(spec) not in TORCHVISION_NAMES:
        layers = ", ".join(map(str, spec.layers))
        use = (
            f"torchvision.models.EfficientNet, MBConvConfig rows of {layers} layers, last_channel={spec.head_channels}"
        )
        notes.append(f"torchvision has no function that builds it; use {use}")
    if policy.bn_eps != theirs.bn_eps:
        change = f"BN's eps changed from {policy.bn_eps:g} to {theirs.bn_eps:g}"
        notes.append(f"{change}; the running variances make up for it, exactly in eval mode")
    if policy.bn_momentum != theirs.bn_momentum:
        notes.append(f"{to} would train with BN momentum {theirs.bn_momentum:g}, not {policy.bn_momentum:g}")
    return tuple(notes)
