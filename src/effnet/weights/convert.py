"""A weight file of any library -> a native state and a report, and back.

The layout is read from the keys, the network (a custom width and depth too) from the shapes, the numeric policy from
the source, and what a config.json says comes on top. No tensor is dropped silently: the report lists what matched, what
starts fresh, what was adapted, what was left over and what was assumed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from effnet.arch.blocks import Activation
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy, Padding
from effnet.arch.variants import spec as make_spec
from effnet.errors import AmbiguousSourceError, CheckpointError, MismatchError, UnknownNameError
from effnet.weights.bundle import default_input
from effnet.weights.files import KERAS_INPUT, WeightFile, open_weights, stated_input
from effnet.weights.layouts import (
    NATIVE,
    SOURCES,
    Layout,
    detect,
    layout_of,
    lone_shortcuts,
    policy_of,
    squarely_padded,
    walk,
)
from effnet.weights.registry import assumed_for, imagenet_classes
from effnet.weights.shapes import infer_spec

T = TypeVar("T")

COUNTER = ".num_batches_tracked"  # training's bookkeeping: absent from older files and from Keras
CLASSIFIER = ("classifier.weight", "classifier.bias")
IMAGENET_CLASSES = 1000
HF_ACTIVATIONS: dict[str, Activation] = {"swish": "silu", "silu": "silu", "relu6": "relu6"}
TIMM_DEFAULTS = {  # arguments of timm's that change the network, with the value that does not
    **dict.fromkeys(("act_layer", "norm_layer", "aa_layer", "se_layer"), None),
    "global_pool": "avg",
    "output_stride": 32,
}


@dataclass(frozen=True)
class Report:
    """What reading a weight file found and assumed."""

    path: Path
    source: str
    layout: str
    spec: NetworkSpec
    policy: NumericPolicy
    input: InputSpec
    matched: int  # tensors taken over
    fresh: tuple[str, ...] = ()  # native names that the file does not hold and that start anew
    adapted: tuple[str, ...] = ()  # native names whose tensor was brought to another shape
    left_over: tuple[str, ...] = ()  # the file's names that the network does not use
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report for a person."""
        policy, images = self.policy, self.input
        crop = f" from {images.resize}" if images.fit == "crop" else ""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (images.mean, images.std))
        lists = (("start fresh", self.fresh), ("adapted", self.adapted), ("left over", self.left_over))
        return "\n".join(
            [
                f"{self.path.name}: {self.spec.name} from {self.source} ({self.layout} keys), "
                f"{self.matched} tensors matched",
                f"computes with: BN eps {policy.bn_eps:g}, momentum {policy.bn_momentum:g}, {policy.padding} padding",
                f"sees: {images.size} x {images.size} px, {images.fit}{crop}, {images.interpolation}, "
                f"mean {mean}, std {std}",
                *(f"{title}: {listed(names)}" for title, names in lists if names),
                *self.notes,
            ]
        )


@dataclass(frozen=True)
class Checkpoint:
    """A weight file in native terms."""

    state: dict[str, Tensor]
    report: Report
    file: WeightFile  # as it was opened, for what else is done with its tensors
    classes: tuple[str, ...] | None = None


def read_checkpoint(
    path: str | Path,
    network: str | NetworkSpec | None = None,
    *,
    source: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> Checkpoint:
    """Read a weight file, a bundle or a hub folder; it is opened once.

    Args:
        path: a .pth, .pt, .bin, .safetensors, .h5 or .keras file, a bundle, or a hub folder of timm or transformers.
        network: the network that is expected; None takes the one that the shapes imply.
        source: the library that wrote it, one of SOURCES; needed where keys cannot tell (timm).
        num_classes: another number of classes than the file's lets the classifier start fresh.
        in_channels: another number of channels than the file's adapts the stem.

    Raises:
        AmbiguousSourceError: timm's keys, and nothing says which of its two kinds of network they are for.
        MismatchError: the file holds another network, or does not hold all of it.
        CheckpointError: the file cannot be read, or is for a network that computes something else.
        BundleError: a bundle that was changed or cut short.
    """
    file = open_weights(Path(path))
    layout = detect(file.tensors)
    source = _source(file, layout, source)
    held, policy, doubts = _network(file, layout, source, num_classes)
    target = held if network is None else _expected(network, held, source, file.path)
    target = make_spec(target, num_classes=num_classes, in_channels=in_channels)
    if target.num_classes != held.num_classes and num_classes is None:
        raise MismatchError(
            f"{path} has a classifier for {held.num_classes} classes, and {target.name} was asked for with "
            f"{target.num_classes}; give num_classes={target.num_classes} to let a fresh one take its place"
        )

    state, missing = native_state(file.tensors, layout, held)
    optional = (COUNTER,) if num_classes is None else (COUNTER, *CLASSIFIER)
    if lost := [key for native, key in missing.items() if not native.endswith(optional)]:
        raise MismatchError(
            f"{path} lacks {len(lost)} of {held.name}'s tensors: {', '.join(lost[:6])}{', ...' * (len(lost) > 6)}"
        )
    fresh, adapted = _retarget(state, held, target)
    matched = len(state) - len(adapted)
    state |= {native: torch.zeros((), dtype=torch.long) for native in missing if native.endswith(COUNTER)}
    used = {*layout.shapes(held), *KERAS_INPUT}
    input_spec, assumption = _input(file, source, target)
    report = Report(
        path=file.path,
        source=source,
        layout=layout.name,
        spec=target,
        policy=policy,
        input=input_spec,
        matched=matched,
        fresh=fresh,
        adapted=adapted,
        left_over=tuple(key for key in file.tensors if key not in used) + file.beside,
        notes=(*file.notes, *doubts, *assumption),
    )
    return Checkpoint(state, report, file, None if fresh else class_names(file, target.num_classes))


def foreign_state(state: Mapping[str, T], spec: NetworkSpec, layout: Layout) -> dict[str, T]:
    """A native state under the names of `layout`."""
    return {
        foreign: state[native]
        for step in walk(spec)
        for (native, _), (foreign, _) in zip(NATIVE.keys(step), layout.keys(step), strict=False)
    }


def native_state(
    tensors: Mapping[str, Tensor], layout: Layout, spec: NetworkSpec
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of `layout` under native names, in float32, and what is missing: native names with the layout's."""
    state, missing = dict[str, Tensor](), dict[str, str]()
    for step in walk(spec):
        theirs = dict(zip((key for key, _ in NATIVE.keys(step)), layout.keys(step), strict=False))
        for native, _ in NATIVE.keys(step):
            key, shape = theirs.get(native, ("", ()))
            tensor = tensors.get(key)
            if tensor is not None and tuple(tensor.shape) == shape:
                state[native] = tensor if native.endswith(COUNTER) else tensor.float()
            else:
                missing[native] = key if tensor is None else f"{key} (shape {tuple(tensor.shape)}, not {shape})"
    return state, missing


def with_eps(state: Mapping[str, Tensor], old: float, new: float) -> dict[str, Tensor]:
    """A native state that computes with batch normalisation's eps `new` what it computed with `old`, in eval mode.

    Normalising divides by sqrt(variance + eps), so the difference moves into the running variances. Where one would
    become negative it is 0, and the layer's weight makes up for the rest.
    """
    moved = dict(state)
    for key, variance in state.items():
        if key.endswith(".running_var"):
            moved[key] = (variance + (old - new)).clamp(min=0)
            weight = key.replace(".running_var", ".weight")
            rest = ((moved[key] + new) / (variance + old)).sqrt()
            moved[weight] = torch.where(moved[key] > 0, state[weight], state[weight] * rest)
    return moved


def adapt_stem(weight: Tensor, in_channels: int) -> Tensor:
    """A stem's weight (out, in, 3, 3) for another number of input channels.

    One channel: the sum over the old ones, so that a grey picture gives what its three equal channels gave. More: the
    old ones repeated, scaled so that an input of equal channels gives the same sum.
    """
    old = weight.shape[1]
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-in_channels // old), 1, 1)[:, :in_channels] * (old / in_channels)


def class_names(file: WeightFile, num_classes: int) -> tuple[str, ...] | None:
    """The names of the classes: those that stand beside the tensors, ImageNet's for 1000 classes, or None."""
    if file.bundle:
        return file.bundle.classes
    labels = file.config.get("id2label")
    if isinstance(labels, dict) and len(labels) == num_classes and "LABEL_0" not in labels.values():
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
    names = file.config.get("label_names") or file.timm_config.get("label_names")
    if isinstance(names, list) and len(names) == num_classes:
        return tuple(str(name) for name in names)
    return imagenet_classes() if num_classes == IMAGENET_CLASSES else None


def listed(names: tuple[str, ...]) -> str:
    """The first six names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _source(file: WeightFile, layout: Layout, source: str | None) -> str:
    """The source that keys and config.json imply, or `source` if it fits them."""
    library = layout.library
    implied = {"native": "bundle", "timm": _timm_source(file)}.get(layout.name, library)
    if source is None and not implied:
        raise AmbiguousSourceError(
            f"{file.path} has the keys of timm, which fit two networks that compute different things: "
            "efficientnet_* (source timm) and tf_efficientnet_* (source timm-tf). Say which one with `source`."
        )
    if source is None or source == implied:
        return implied
    if source not in SOURCES:
        raise UnknownNameError("source", source, SOURCES)
    if implied or layout_of(source).name != library:
        raise CheckpointError(f"{file.path} was written by {implied or library}, not by {source}")
    return source


def _timm_source(file: WeightFile) -> str:
    """The source, timm or timm-tf, by the architecture that config.json names; "" where there is none."""
    architecture = str(file.config.get("architecture", ""))
    if architecture and not re.match(r"(tf_)?efficientnet_(b\d|l2|lite\d)(\.|$)|tinynet_", architecture):
        raise CheckpointError(f"{file.path} is timm's {architecture}, which is not an EfficientNet-B, -L2 or -Lite")
    return architecture and ("timm-tf" if architecture.startswith("tf_") else "timm")


def _network(
    file: WeightFile, layout: Layout, source: str, num_classes: int | None
) -> tuple[NetworkSpec, NumericPolicy, tuple[str, ...]]:
    """The network that the tensors and config.json describe, its numeric policy, and what is doubtful."""
    if file.bundle:
        return file.bundle.spec, file.bundle.policy, ()
    shapes = {key: tuple(tensor.shape) for key, tensor in file.tensors.items()}
    held = infer_spec(shapes, layout, file.path, num_classes)
    policy = policy_of(source, held)
    if source in ("hf", "lukemelas") and (lone := lone_shortcuts(held)):
        raise CheckpointError(
            f"{file.path}: {source} has no shortcut in the first block of a stage, but the official code and this "
            f"network have one where stride and channels allow it, as in {lone[0]}"
        )
    if source == "bundle":
        return held, policy, ("native keys do not tell the numeric policy: a fresh network's was assumed",)
    if source in ("timm", "timm-tf"):
        *_, size = file.timm_config.get("input_size", (None,))
        return make_spec(held, resolution=size), _timm_policy(file, policy), ()
    if source == "hf" and file.config:
        return _hf_network(file, held, policy)
    return held, policy, ()


def _timm_policy(file: WeightFile, policy: NumericPolicy) -> NumericPolicy:
    """The policy that timm's arguments change; CheckpointError where they change the network."""
    arguments = {"global_pool": file.config.get("global_pool"), **(file.config.get("model_args") or {})}
    if odd := [key for key, default in TIMM_DEFAULTS.items() if arguments.get(key) not in (None, default)]:
        raise CheckpointError(f"{file.path}: config.json changes timm's network by its {', '.join(odd)}")
    padding: Padding = "same" if arguments.get("pad_type") == "same" else "symmetric"
    return NumericPolicy(
        arguments.get("bn_eps", policy.bn_eps),
        arguments.get("bn_momentum", policy.bn_momentum),
        padding if "pad_type" in arguments else policy.padding,
    )


def _hf_network(
    file: WeightFile, held: NetworkSpec, policy: NumericPolicy
) -> tuple[NetworkSpec, NumericPolicy, tuple[str, ...]]:
    """What transformers' config.json says about a network beyond its tensors, with the policy and a doubt."""
    config: dict[str, Any] = file.config
    size, activation = config.get("image_size", held.resolution), config.get("hidden_act", "swish")
    if activation not in HF_ACTIVATIONS or config.get("pooling_type", "mean") != "mean":
        raise CheckpointError(
            f"{file.path}: config.json asks for {activation} and {config.get('pooling_type')} pooling; "
            f"this network computes {', '.join(HF_ACTIVATIONS)} and mean pooling"
        )
    spec = dataclasses.replace(
        make_spec(held, resolution=size if isinstance(size, int) else size[0]),
        activation=HF_ACTIVATIONS[activation],
        dropout=config.get("dropout_rate", held.dropout),
        drop_connect=config.get("drop_connect_rate", held.drop_connect),
    )
    momentum = config.get("batch_norm_momentum", 0.99)  # in TensorFlow's terms, unless effnet wrote the file
    momentum = round(1 - momentum, 6) if momentum > 0.5 else momentum
    policy = dataclasses.replace(policy, bn_eps=config.get("batch_norm_eps", policy.bn_eps), bn_momentum=momentum)
    # transformers pads by a list of blocks, and this network by TensorFlow's rule (SAME) for the size that arrives
    strided = {number for number, block in enumerate(spec.blocks) if block.stride == 2}
    padded = set(config.get("depthwise_padding") or ()) & strided
    if spec.resolution % 2 == 0 and padded == set(squarely_padded(spec)):
        return spec, policy, ()
    doubt = (
        f"config.json's image_size and depthwise_padding {sorted(padded)} do not go together: at {spec.resolution} px "
        "transformers pads otherwise than TensorFlow (SAME) and this network, so its logits differ"
    )
    return spec, policy, (doubt,)


def _input(file: WeightFile, source: str, spec: NetworkSpec) -> tuple[InputSpec, tuple[str, ...]]:
    """How images are prepared, as the file says or as is assumed, and a note on it."""
    result, notes = stated_input(file, spec.resolution)
    if result is None:
        silent = "the file does not say how images are prepared:"
        result = assumed_for(source, spec)
        notes = (f"{silent} as for {source}'s {spec.name} was assumed",)
    if result is None:
        result = default_input(spec)
        notes = (f"{silent} ImageNet's mean and std and a crop of 7/8 were assumed",)
    return result.with_channels(spec.in_channels), notes


def _expected(network: str | NetworkSpec, held: NetworkSpec, source: str, path: Path) -> NetworkSpec:
    """The network that was asked for; one asked for by name has the file's resolution, classes and channels.

    Native keys do not tell the activation, so there the one that was asked for counts.
    """
    wanted = make_spec(network)
    comparable = make_spec(wanted, num_classes=held.num_classes, in_channels=held.in_channels)
    if NATIVE.shapes(comparable) != NATIVE.shapes(held):
        raise MismatchError(f"{path} holds a {held.name}, but {wanted.name} was asked for")
    if wanted.activation != held.activation and source != "bundle":
        raise MismatchError(f"{path} is for a network with {held.activation}, not {wanted.activation} as {wanted.name}")
    return wanted if isinstance(network, NetworkSpec) else make_spec(comparable, resolution=held.resolution)


def _retarget(
    state: dict[str, Tensor], held: NetworkSpec, target: NetworkSpec
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fit a state to another number of classes and channels; the names that start fresh, and those adapted."""
    fresh: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    if target.num_classes != held.num_classes or not state.keys() >= set(CLASSIFIER):
        fresh = CLASSIFIER
        for key in fresh:
            state.pop(key, None)
    if target.in_channels != held.in_channels:
        adapted = ("stem.conv.weight",)
        state["stem.conv.weight"] = adapt_stem(state["stem.conv.weight"], target.in_channels)
    return fresh, adapted
