"""Conversion of any library's weight file to a native state with a report, and back.

The keys determine the layout, the shapes the network (even with a custom width and depth), the source the numeric
policy, and a config.json the rest. No tensor is dropped silently: the report lists tensors that start fresh, were
adapted or are not used, and assumptions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

import numpy as np

from effnet.arch.blocks import DepthRounding, round_channels
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.variants import B0, LITE0, VARIANTS
from effnet.arch.variants import spec as make_spec
from effnet.errors import AmbiguousSourceError, CheckpointError, MismatchError, UnknownNameError
from effnet.weights.arrays import AnyArray
from effnet.weights.bundle import default_input
from effnet.weights.files import WeightFile, check_unread, name_classifier, open_weights
from effnet.weights.hub import hf_input, hf_network, timm_input, timm_policy, timm_source
from effnet.weights.keras import INPUT_KEYS, check_layers, has_order, keras_input, keras_policy
from effnet.weights.layouts import (
    COUNTER,
    NATIVE,
    SOURCES,
    Layout,
    LayoutStep,
    detect,
    first_block_shortcuts,
    layout_of,
    list_names,
    policy_of,
    walk,
)
from effnet.weights.registry import assume_input, imagenet_classes

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Values = TypeVar("Values", AnyArray, "Tensor")
Shapes = Mapping[str, tuple[int, ...]]

STEM, CLASSIFIER = "stem.conv.weight", ("classifier.weight", "classifier.bias")
IMAGENET_CLASSES = 1000
LARGEST = 12  # the largest width and depth of the search; L2, the largest network ever trained, has 4.3 and 5.3


@dataclass(frozen=True)
class Checkpoint:
    """A weight file under native names, with findings and assumptions."""

    file: WeightFile = field(repr=False)  # as it was opened
    state: dict[str, AnyArray] = field(repr=False)
    source: str
    layout: Layout
    spec: NetworkSpec
    policy: NumericPolicy
    input: InputSpec
    classes: tuple[str, ...] | None
    matched: int  # number of tensors used
    fresh: tuple[str, ...] = ()  # native names of tensors missing from the file
    adapted: tuple[str, ...] = ()  # native names of tensors whose shape was changed
    left_over: tuple[str, ...] = ()  # the file's names that the network does not use
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Tensors that were not used unchanged, and assumptions."""
        lists = {"start fresh": self.fresh, "adapted": self.adapted, "not used": self.left_over}
        return (*(f"{title}: {list_names(names)}" for title, names in lists.items() if names), *self.notes)

    def __str__(self) -> str:
        """A summary for the user."""
        policy, images = self.policy, self.input
        crop = f" from {images.resize}" if images.fit == "crop" else ""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (images.mean, images.std))
        lines = (
            f"{self.file.path.name}: {self.spec.name} from {self.source} ({self.layout.name} keys), "
            f"{self.matched} tensors matched",
            f"policy: BN eps {policy.bn_eps:g}, momentum {policy.bn_momentum:g}, {policy.padding} padding",
            f"input: {images.size} px, {images.fit}{crop}, {images.interpolation}, mean {mean}, std {std}",
        )
        return "\n".join((*lines, *self.warnings))


def read_checkpoint(
    path: str | Path,
    network: str | NetworkSpec | None = None,
    *,
    source: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> Checkpoint:
    """Read a .pth, .pt, .bin, .safetensors, .h5 or .keras file, a bundle, or a hub folder of timm or transformers.

    See `load.create` for the arguments; without a `network`, the shapes determine it.

    Raises:
        AmbiguousSourceError: timm's keys fit two networks, and nothing tells which one wrote them.
        MismatchError: the file contains another network, or an incomplete one.
        CheckpointError: the file cannot be read, or is for a network that effnet does not support.
        BundleError, MissingExtraError: the bundle was changed or cut short; h5py for a Keras file is not installed.
    """
    file = open_weights(Path(path))
    layout = detect(file.tensors)
    file = name_classifier(file, layout, num_classes)
    source = _source(file, layout, source)
    held, policy, doubts = _network(file, layout, source, num_classes)
    target = held if network is None else _expected(network, held, source, file.path)
    target = make_spec(target, num_classes=num_classes, in_channels=in_channels)
    if target.num_classes != held.num_classes and num_classes is None:
        wanted = f"{target.name} has {target.num_classes}; num_classes={target.num_classes} starts with a fresh one"
        raise MismatchError(f"{path} has a classifier for {held.num_classes} classes, but {wanted}")

    state, missing = native_state(file.tensors, layout, held)
    optional = (COUNTER,) if num_classes is None else (COUNTER, *CLASSIFIER)
    if lost := [key for native, key in missing.items() if not native.endswith(optional)]:
        raise MismatchError(f"{path} lacks {len(lost)} of {held.name}'s tensors: {list_names(lost)}")
    fresh = CLASSIFIER if target.num_classes != held.num_classes or not state.keys() >= set(CLASSIFIER) else ()
    adapted = (STEM,) if target.in_channels != held.in_channels else ()
    state = {key: tensor for key, tensor in state.items() if key not in fresh}
    matched = len(state) - len(adapted)
    state |= {key: adapt_stem(state[key], target.in_channels) for key in adapted}
    state |= {native: np.zeros((), np.int64) for native in missing if native.endswith(COUNTER)}
    used = {*layout.shapes(held), *INPUT_KEYS}
    unread = {key: tensor for key, tensor in file.tensors.items() if key not in used}
    check_unread(file, held, unread, fresh=bool(fresh))
    input_spec, assumption = _input(file, source, target)
    return Checkpoint(
        file=file,
        state=state,
        source=source,
        layout=layout,
        spec=target,
        policy=policy,
        input=input_spec,
        classes=None if fresh else class_names(file, target.num_classes),
        matched=matched,
        fresh=fresh,
        adapted=adapted,
        left_over=tuple(unread | file.beside),
        notes=(*file.notes, *doubts, *assumption),
    )


def foreign_state(state: Mapping[str, T], spec: NetworkSpec, layout: Layout) -> dict[str, T]:
    """A native state under the names of `layout`."""
    return {
        foreign: state[native]
        for step in walk(spec)
        for (native, _), (foreign, _) in zip(NATIVE.keys(step), layout.keys(step), strict=False)
    }


def native_state(
    tensors: Mapping[str, AnyArray], layout: Layout, spec: NetworkSpec
) -> tuple[dict[str, AnyArray], dict[str, str]]:
    """Tensors of `layout` under native names, in float32, and the missing ones: native names with the layout's."""
    state, missing = dict[str, AnyArray](), dict[str, str]()
    for step in walk(spec):
        theirs = dict(zip((key for key, _ in NATIVE.keys(step)), layout.keys(step), strict=False))
        for native, _ in NATIVE.keys(step):
            key, shape = theirs.get(native, ("", ()))
            tensor = tensors.get(key)
            if tensor is None:
                missing[native] = key
                continue
            is_number = tensor.dtype.kind == "f" or native.endswith(COUNTER)
            if tensor.shape == shape and is_number:
                state[native] = tensor if native.endswith(COUNTER) else np.asarray(tensor, np.float32, order="C")
            else:
                wrong = f"shape {tensor.shape}, not {shape}" if is_number else f"{tensor.dtype}, not float32"
                missing[native] = f"{key} ({wrong})"
    return state, missing


def adapt_stem(weight: Values, in_channels: int) -> Values:
    """Adapt a stem's weight (out, in, 3, 3), an array or a tensor, to another number of input channels.

    One channel: the sum over the old ones, so that a grey image gives the same as its three equal channels. More: the
    old ones repeated, scaled so that an input of equal channels gives the same sum.
    """
    old = weight.shape[1]
    adapted: Values = weight.sum(1)[:, None]
    if in_channels > 1:
        adapted = weight[:, [channel % old for channel in range(in_channels)]] * (old / in_channels)
    return adapted


def infer_spec(shapes: Shapes, layout: Layout, path: Path, num_classes: int | None = None) -> NetworkSpec:
    """The network whose tensors have these names and shapes, at its published resolution or else at 224 pixels.

    Published variants are tried first. Then width and depth are searched on a grid of tenths, hundredths and
    thousandths: the head's 1280 channels change every .00625 of width, so thousandths distinguish all networks, and the
    roundest number that gives the same network is taken as the intended one.

    `path` names the file in errors; with `num_classes` the classifier may be missing. Raises MismatchError if no width
    and depth of the family gives these shapes.
    """
    stem, head, classifier = (shapes.get(key, ()) for key in _ends(shapes, layout))
    if len(stem) != 4 or (len(head) != 4 and not layout.baseline) or len(classifier) not in (0, 2):
        raise MismatchError(f"{path} has no stem or no head of {layout.name}: it is cut short or incomplete")
    if not classifier and num_classes is None:
        raise MismatchError(f"{path} has no classifier; give `num_classes` to start with a fresh one")
    dropout = 0.0 if "classifier.0.weight" in shapes and layout.name == "tutorial" else None
    for candidate in [make_spec(layout.baseline)] if layout.baseline else _candidates(shapes, stem[0], head):
        found = make_spec(candidate, num_classes=(*classifier, num_classes)[0], in_channels=stem[1], dropout=dropout)
        if _fits(found, shapes, layout):
            return found
    family = f"a {layout.baseline}" if layout.baseline else "an EfficientNet of any width and depth"
    raise MismatchError(f"{path} is not {family}: its {layout.name} tensors do not fit")


def class_names(file: WeightFile, num_classes: int) -> tuple[str, ...] | None:
    """The class names from the file's config; otherwise ImageNet's for 1000 classes, or None."""
    if file.bundle:
        return file.bundle.classes
    labels = file.config.get("id2label")
    if isinstance(labels, dict) and len(labels) == num_classes and "LABEL_0" not in labels.values():
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
    names = file.config.get("label_names") or file.timm_config.get("label_names")
    if isinstance(names, list) and len(names) == num_classes:
        return tuple(str(name) for name in names)
    return imagenet_classes() if num_classes == IMAGENET_CLASSES else None


def _source(file: WeightFile, layout: Layout, source: str | None) -> str:
    """The source that keys and config.json imply, or `source` if it fits them."""
    library = layout.library
    implied = {"native": "bundle", "timm": timm_source(file)}.get(layout.name, library)
    if source is None and not implied:
        choice = "efficientnet_* (source timm) and tf_efficientnet_* (source timm-tf), which compute different logits"
        raise AmbiguousSourceError(f"{file.path} has timm's keys, which fit {choice}. Choose with `source`.")
    if source is None or source == implied:
        return implied
    if source not in SOURCES:
        raise UnknownNameError("source", source, SOURCES)
    if implied or layout_of(source).name != library:
        raise CheckpointError(f"{file.path} was written by {implied or library}, not by {source}")
    return source


def _network(
    file: WeightFile, layout: Layout, source: str, num_classes: int | None
) -> tuple[NetworkSpec, NumericPolicy, tuple[str, ...]]:
    """The network that the tensors and config.json describe, its numeric policy, and doubts."""
    if file.bundle:
        return file.bundle.spec, file.bundle.policy, ()
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    held = infer_spec(shapes, layout, file.path, num_classes)
    policy = policy_of(source, held)
    if source in ("hf", "lukemelas") and (lone := first_block_shortcuts(held)):
        reason = "has no shortcut in the first block of a stage, but the official code and effnet have"
        raise CheckpointError(f"{file.path}: {source} {reason}, as in {lone[0]}")
    if source == "bundle":
        return held, policy, ("native keys do not state the numeric policy: a fresh network's was assumed",)
    if source in ("timm", "timm-tf"):
        *_, size = file.timm_config.get("input_size", (None,))
        return make_spec(held, resolution=size), timm_policy(file, policy), ()
    if source == "hf" and file.config:
        return hf_network(file, held, policy)
    if file.layers is not None:
        held_classifier = layout.weight_key(LayoutStep("classifier", ())) in shapes
        fresh = num_classes not in (None, held.num_classes) or not held_classifier
        try:
            check_layers(file.layers, file.tensors, held, classifier=not fresh)
            policy = keras_policy(file.layers, policy, held) if has_order(file.layers) else policy
        except MismatchError as error:
            raise MismatchError(f"{file.path}: {error}") from None
    if source == "keras" and not has_order(file.layers):
        assumed = f"{held.activation}, and behind the classifier softmax or nothing"
        return held, policy, (f"what its layers compute is not described: Keras' own network was assumed ({assumed})",)
    return held, policy, ()


def _input(file: WeightFile, source: str, spec: NetworkSpec) -> tuple[InputSpec, tuple[str, ...]]:
    """The preprocessing that the file states or that is assumed, and notes."""
    if file.bundle:
        return file.bundle.input.with_channels(spec.in_channels), ()
    stated: InputSpec | None
    try:
        if file.timm_config:
            return timm_input(file.timm_config).with_channels(spec.in_channels), ()
        if file.preprocessor:
            stated, notes = hf_input(file.preprocessor)
        else:
            stated, notes = keras_input(file.tensors, file.layers, spec)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: cannot read how it prepares images ({error})") from error
    if stated is None and (stated := assume_input(source, spec)):
        notes = (f"the file does not state its input: that of {source}'s {spec.name} was assumed",)
    elif stated is None:
        stated = default_input(spec)
        notes = ("the file does not state its input: ImageNet's mean and std and a crop of 7/8 were assumed",)
    return stated.with_channels(spec.in_channels), notes


def _expected(network: str | NetworkSpec, held: NetworkSpec, source: str, path: Path) -> NetworkSpec:
    """The expected network; one given by name gets the file's resolution, classes and channels.

    Native keys do not determine the activation, so any is accepted.
    """
    wanted = make_spec(network)
    comparable = make_spec(wanted, num_classes=held.num_classes, in_channels=held.in_channels)
    if NATIVE.shapes(comparable) != NATIVE.shapes(held):
        raise MismatchError(f"{path} holds a {held.name}, not a {wanted.name}")
    if wanted.activation != held.activation and source != "bundle":
        raise MismatchError(f"{path} is for a network with {held.activation}, not {wanted.activation} as {wanted.name}")
    return wanted if isinstance(network, NetworkSpec) else make_spec(comparable, resolution=held.resolution)


def _candidates(shapes: Shapes, stem: int, head: tuple[int, ...]) -> Iterator[NetworkSpec]:
    """Networks with the stem, head and number of blocks of `shapes`; published ones first."""
    blocks = sum(len(shape) == 4 and shape[1] == 1 and shape[0] > 1 and shape[2] > 1 for shape in shapes.values())
    counts = (blocks, blocks - 1)  # a grey network's stem looks like a depthwise convolution
    for row in VARIANTS.values():
        if len(row.spec.blocks) in counts and row.spec.head_channels == head[0]:
            yield row.spec
    for baseline in (B0, LITE0):
        for width in _widths(baseline, stem, head):
            for depth, rounding in (pair for count in counts for pair in _depths(baseline, count)):
                scaled = make_spec(baseline, width=width, depth=depth, depth_rounding=rounding)
                if scaled.head_channels != head[0]:  # torchvision rounds 4 * 320 channels, not the official 1280
                    channels = head[0] if scaled.fixed_ends else max(1, round(head[0] / scaled.width))
                    scaled = dataclasses.replace(scaled, head=channels)
                yield scaled


def _depths(baseline: NetworkSpec, blocks: int) -> Iterator[tuple[float, DepthRounding]]:
    """The roundest depths that give this number of blocks, one rounded up and one to the nearest."""
    for rounding in get_args(DepthRounding):
        for depth in _grid():
            if sum(baseline.scaled_layers(depth, rounding)) == blocks:
                yield depth, rounding
                break


def _widths(baseline: NetworkSpec, stem: int, head: tuple[int, ...]) -> list[float]:
    """The roundest width of each network with this stem and last stage; those with this head come first."""
    fit, misfit = dict[tuple[int, ...], float](), dict[tuple[int, ...], float]()
    for width in _grid():
        stems = baseline.stem if baseline.fixed_ends else round_channels(baseline.stem * width)
        if stems != stem or round_channels(baseline.stages[-1].channels * width) != head[1]:
            continue
        channels = tuple(round_channels(row.channels * width) for row in baseline.stages)
        heads = baseline.head if baseline.fixed_ends else round_channels(baseline.head * width)
        (fit if heads == head[0] else misfit).setdefault(channels, width)
    return [*fit.values(), *misfit.values()]


def _grid() -> Iterator[float]:
    for per_unit in (10, 100, 1000):
        yield from (step / per_unit for step in range(1, LARGEST * per_unit + 1) if per_unit == 10 or step % 10)


def _ends(shapes: Shapes, layout: Layout) -> Iterator[str]:
    dropout = "classifier.0.weight" not in shapes  # only the tutorial's names depend on it
    for role in ("stem", "head", "classifier"):
        convs = 0
        if role == "head":  # in Keras' numbered layout, the last convolution
            numbers = (re.fullmatch(r"conv2d_(\d+)/0", key) for key in shapes)
            convs = max((int(number[1]) for number in numbers if number), default=0)
        yield layout.weight_key(LayoutStep(role, (), dropout=dropout, convs=convs))


def _fits(candidate: NetworkSpec, shapes: Shapes, layout: Layout) -> bool:
    """Whether `shapes` has exactly the candidate's convolutions; the classifier may be missing."""
    steps = 0
    for step in walk(candidate):
        key, shape = next(layout.keys(step))
        if shapes.get(key) != shape and not (step.role == "classifier" and key not in shapes):
            return False
        steps += len(shape) == 4
    return steps == sum(len(shape) == 4 for shape in shapes.values())
