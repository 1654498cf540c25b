"""A foreign state -> a native state and a report, and back.

The layout is read from the keys, the network (a custom width and depth too) from the shapes, and the numeric policy
from the source. Nothing is loaded in part without a word: the report says what matched, what starts fresh, what was
left over and what was assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.variants import spec
from effnet.errors import AmbiguousSourceError, CheckpointError, MismatchError, UnknownNameError
from effnet.weights.context import KERAS_INPUT, assumed_input, class_names, timm_source, told_by_config
from effnet.weights.files import WeightFile, open_weights
from effnet.weights.layouts import NATIVE, SOURCES, Layout, detect, layout_of, walk
from effnet.weights.shapes import infer_spec

COUNTER = ".num_batches_tracked"  # training's bookkeeping: absent from older files and from Keras


@dataclass(frozen=True)
class Report:
    """What reading a file of weights found and assumed."""

    path: Path
    source: str
    layout: str
    spec: NetworkSpec
    policy: NumericPolicy
    input: InputSpec
    matched: int  # tensors taken over
    fresh: tuple[str, ...] = ()  # native names that the file does not give and that start anew
    adapted: tuple[str, ...] = ()  # native names whose tensor was brought to another shape
    left_over: tuple[str, ...] = ()  # the file's names that no step of the network uses
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report for a person."""
        policy, see = self.policy, self.input
        lines = [
            f"{self.path.name}: {self.spec.name} from {self.source} ({self.layout} keys), "
            f"{self.matched} tensors matched",
            f"computes with: BN eps {policy.bn_eps:g}, momentum {policy.bn_momentum:g}, {policy.padding} padding",
            f"sees: {see.size} x {see.size} px, {see.fit}"
            + (f" from {see.resize}" if see.fit == "crop" else "")
            + f", {see.interpolation}, mean {_short(see.mean)}, std {_short(see.std)}",
        ]
        for words, names in (("start fresh", self.fresh), ("adapted", self.adapted), ("left over", self.left_over)):
            if names:
                lines.append(
                    f"{words}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
                )
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights in native terms."""

    state: dict[str, Tensor]
    report: Report
    classes: tuple[str, ...] | None = None


def read_checkpoint(
    path: str | Path,
    network: str | NetworkSpec | None = None,
    *,
    source: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> Checkpoint:
    """Read a file or hub folder of weights.

    Args:
        path: a .pth, .pt, .bin, .safetensors, .h5 or .keras file, or a hub folder of timm or transformers.
        network: the network that is expected; None takes the one that the shapes tell.
        source: the library that wrote it, one of SOURCES; needed where keys alone cannot tell (timm).
        num_classes: another number of classes than the file's lets the classifier start fresh.
        in_channels: another number of channels than the file's adapts the stem.

    Raises:
        AmbiguousSourceError: timm's keys without a word on which of its two kinds of network they are for.
        MismatchError: the file holds another network, or does not hold all of it.
        CheckpointError: the file cannot be read, or is for a network that computes something else.
    """
    file = open_weights(Path(path))
    layout = detect(file.tensors)
    source = _source(file, layout, source)
    shapes = {key: tuple(tensor.shape) for key, tensor in file.tensors.items()}
    held, policy, doubts = told_by_config(file, source, infer_spec(shapes, layout, file.path, num_classes))
    target = held if network is None else _expected(network, held, source, file.path)
    target = spec(target, num_classes=num_classes, in_channels=in_channels)
    if target.num_classes != held.num_classes and num_classes is None:
        raise MismatchError(
            f"{path} has a classifier for {held.num_classes} classes, and {target.name} was asked for with "
            f"{target.num_classes}; give num_classes={target.num_classes} to let a fresh one take its place"
        )

    state, missing = native_state(file, layout, held)
    optional = COUNTER if num_classes is None else (COUNTER, "classifier.weight", "classifier.bias")
    if lost := [key for native, key in missing.items() if not native.endswith(optional)]:
        raise MismatchError(
            f"{path} lacks {len(lost)} of {held.name}'s tensors: {', '.join(lost[:6])}{', ...' * (len(lost) > 6)}"
        )
    fresh, adapted = _retarget(state, held, target)
    matched = len(state) - len(adapted)
    state |= {native: torch.zeros((), dtype=torch.long) for native in missing if native.endswith(COUNTER)}
    used = {*layout.shapes(held), *KERAS_INPUT}
    see, assumption = assumed_input(file, source, target)
    report = Report(
        path=file.path,
        source=source,
        layout=layout.name,
        spec=target,
        policy=policy,
        input=see,
        matched=matched,
        fresh=fresh,
        adapted=adapted,
        left_over=tuple(key for key in file.tensors if key not in used) + file.beside,
        notes=(*file.notes, *doubts, *assumption),
    )
    return Checkpoint(state, report, None if fresh else class_names(file, target))


def foreign_state(state: Mapping[str, Tensor], spec: NetworkSpec, layout: Layout) -> dict[str, Tensor]:
    """A native state under the names of `layout`."""
    return {
        foreign: state[native]
        for step in walk(spec)
        for (native, _), (foreign, _) in zip(NATIVE.keys(step), layout.keys(step), strict=False)
    }


def native_state(file: WeightFile, layout: Layout, held: NetworkSpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors under native names, in float32, and what it lacks: native names, and in its own words."""
    state, missing = dict[str, Tensor](), dict[str, str]()
    for step in walk(held):
        theirs = dict(zip((key for key, _ in NATIVE.keys(step)), layout.keys(step), strict=False))
        for native, _ in NATIVE.keys(step):
            key, shape = theirs.get(native, ("", ()))
            tensor = file.tensors.get(key)
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


def _source(file: WeightFile, layout: Layout, source: str | None) -> str:
    """The source that was given, if it fits the keys and config.json, or the one that they tell."""
    written_by = layout.written_by
    told = {"native": "bundle"}.get(written_by, written_by)
    if layout.name == "timm":
        told = timm_source(file)
    if source is None and not told:
        raise AmbiguousSourceError(
            f"{file.path} has the keys of timm, which fit two networks that compute different things: "
            "efficientnet_* (source timm) and tf_efficientnet_* (source timm-tf). Say which one with `source`."
        )
    if source is None or source == told:
        return told
    if source not in SOURCES:
        raise UnknownNameError("source", source, SOURCES)
    if told or layout_of(source).name != written_by:
        raise CheckpointError(f"{file.path} was written by {told or written_by}, not by {source}")
    return source


def _expected(network: str | NetworkSpec, held: NetworkSpec, source: str, path: Path) -> NetworkSpec:
    """The network that was asked for; one asked for by name has the file's resolution, classes and channels.

    Keys of our own do not tell the activation, so there the one that was asked for counts.
    """
    asked = spec(network)
    comparable = spec(asked, num_classes=held.num_classes, in_channels=held.in_channels)
    if NATIVE.shapes(comparable) != NATIVE.shapes(held):
        raise MismatchError(f"{path} holds a {held.name}, but {asked.name} was asked for")
    if asked.activation != held.activation and source != "bundle":
        raise MismatchError(f"{path} is for a network with {held.activation}, not {asked.activation} as {asked.name}")
    return asked if isinstance(network, NetworkSpec) else spec(comparable, resolution=held.resolution)


def _retarget(
    state: dict[str, Tensor], held: NetworkSpec, target: NetworkSpec
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fit a state to another number of classes and channels; the names that start fresh, and those adapted."""
    fresh: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    classifier = ("classifier.weight", "classifier.bias")
    if target.num_classes != held.num_classes or not state.keys() >= set(classifier):
        fresh = classifier
        for key in fresh:
            state.pop(key, None)
    if target.in_channels != held.in_channels:
        adapted = ("stem.conv.weight",)
        state["stem.conv.weight"] = adapt_stem(state["stem.conv.weight"], target.in_channels)
    return fresh, adapted


def _short(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
