"""How each library names the tensors of this network: one walk over the blocks, one naming rule per library.

`walk` visits the steps that hold tensors in the order of computation, which is also the order of the state dicts. A
Layout turns a step into the names of its convolution and its normalisation, so the same rule reads and writes. Sources
add what keys cannot tell: batch normalisation's constants and the kind of padding belong to the library that trained.

Read from: tutorial (WZMIAOMIAO's code), torchvision 0.29, timm 1.0, efficientnet-pytorch 0.7 (lukemelas),
transformers 5 (hf), Keras 3 (layers by name in older files, by number in newer ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from effnet.arch.blocks import BlockSpec
from effnet.arch.spec import NetworkSpec, NumericPolicy
from effnet.arch.variants import B0, BASELINES, VARIANTS
from effnet.arch.variants import spec as make_spec
from effnet.errors import CheckpointError


@dataclass(frozen=True)
class LayoutStep:
    """A convolution or fully connected layer, with its normalisation or its bias."""

    role: str  # stem, head, classifier, or within a block squeeze, excite or the name of a layer of arch/blocks.py
    shape: tuple[int, ...]  # of the weight, as torch has it: (out, in / groups, kernel, kernel) or (out, in)
    block: BlockSpec | None = None
    number: int = 0  # of the block, counted through the network from 0
    convs: int = 0  # convolutions before this one, depthwise ones apart
    norms: int = 0  # normalisations before this one
    dropout: bool = True  # whether the network has a dropout rate above 0; the tutorial's classifier moves without

    @property
    def has_norm(self) -> bool:
        """A normalisation follows; the other steps have a bias."""
        return self.role not in ("squeeze", "excite", "classifier")

    @property
    def place(self) -> BlockSpec:
        """The block that this step is part of."""
        assert self.block is not None, self.role
        return self.block


@dataclass(frozen=True)
class Layout:
    """A library's naming rule: `names` gives a step's prefixes, of its convolution and of its normalisation (or "")."""

    name: str
    names: Callable[[LayoutStep], tuple[str, str]]
    weight: tuple[str, str] = (".weight", ".bias")
    norm: tuple[str, ...] = (".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked")
    baseline: str = ""  # the only network that is named so, one of variants.BASELINES; "": EfficientNets
    own_key: str = ""  # a key that only this layout has, where it is not the weight of the stem
    other_key: str = ""  # a key of another layout that has `mark` as well

    @property
    def library(self) -> str:
        """Whose naming rule it is."""
        return self.name.removesuffix("-numbered").removesuffix(f"-{self.baseline}")

    @property
    def mark(self) -> str:
        """The key that identifies the layout."""
        return self.own_key or self.names(LayoutStep("stem", ()))[0] + self.weight[0]

    def keys(self, step: LayoutStep) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The keys of a step in order, each with its shape."""
        conv, norm = self.names(step)
        outputs = step.shape[:1]
        yield conv + self.weight[0], step.shape
        if step.has_norm:
            for leaf in self.norm:
                yield norm + leaf, () if leaf == ".num_batches_tracked" else outputs
        else:
            yield conv + self.weight[1], outputs

    def shapes(self, spec: NetworkSpec) -> dict[str, tuple[int, ...]]:
        """All keys of a network in order, each with its shape."""
        return {key: shape for step in walk(spec) for key, shape in self.keys(step)}


def walk(spec: NetworkSpec) -> Iterator[LayoutStep]:
    """The steps of `spec` that hold tensors, in the order of computation."""
    convs = norms = 0
    for role, shape, block, number in _steps(spec):
        step = LayoutStep(role, shape, block, number, convs, norms, spec.dropout > 0)
        yield step
        convs += role != "depthwise"
        norms += step.has_norm


def _steps(spec: NetworkSpec) -> Iterator[tuple[str, tuple[int, ...], BlockSpec | None, int]]:
    yield "stem", (spec.stem_channels, spec.in_channels, spec.stem_kernel, spec.stem_kernel), None, 0
    for number, block in enumerate(spec.blocks):
        scaled, squeezed = block.scaled_channels, block.squeeze_channels
        for layer in block.layers:
            if squeezed and layer == block.path[-1]:
                yield "squeeze", (squeezed, scaled, 1, 1), block, number
                yield "excite", (scaled, squeezed, 1, 1), block, number
            yield layer.name, layer.weight_shape, block, number
    if spec.head:
        yield "head", (spec.head_channels, spec.blocks[-1].out_channels, 1, 1), None, 0
    yield "classifier", (spec.num_classes, spec.head_channels), None, 0


def _native(step: LayoutStep) -> tuple[str, str]:
    if step.role == "classifier":
        return "classifier", ""
    if step.block is None:
        return f"{step.role}.conv", f"{step.role}.norm"
    if step.has_norm:
        return f"{step.block.name}.{step.role}.conv", f"{step.block.name}.{step.role}.norm"
    return f"{step.block.name}.se.{step.role}", ""


def _tutorial(step: LayoutStep) -> tuple[str, str]:
    match step.role:
        case "classifier":
            return f"classifier.{1 if step.dropout else 0}", ""  # no dropout layer is built for a rate of 0
        case "stem" | "head":
            place = "features.stem_conv" if step.role == "stem" else "features.top"
        case role:
            letter = chr(ord("a") + step.place.index)  # the tutorial runs past z into { | } ~
            part = {"expand": "expand_conv", "depthwise": "dwconv", "project": "project_conv"}
            part |= {"squeeze": "se.fc1", "excite": "se.fc2"}
            place = f"features.{step.place.stage - 1}{letter}.block.{part[role]}"
            if not step.has_norm:
                return place, ""
    return f"{place}.0", f"{place}.1"


def _torchvision(step: LayoutStep) -> tuple[str, str]:
    match step.role:
        case "classifier":
            return "classifier.1", ""
        case "stem" | "head":
            place = "features.0" if step.role == "stem" else "features.8"
        case role:
            position = ("expand", "depthwise", "squeeze", "project").index("squeeze" if role == "excite" else role)
            position -= step.place.expand_ratio == 1
            place = f"features.{step.place.stage - 1}.{step.place.index}.block.{position}"
            if not step.has_norm:
                return f"{place}.{'fc1' if role == 'squeeze' else 'fc2'}", ""
    return f"{place}.0", f"{place}.1"


def _timm(step: LayoutStep) -> tuple[str, str]:
    match step.role:
        case "classifier":
            return "classifier", ""
        case "stem":
            return "conv_stem", "bn1"
        case "head":
            return "conv_head", "bn2"
        case "squeeze" | "excite":
            place = f"blocks.{step.place.stage - 2}.{step.place.index}.se."
            return place + ("conv_reduce" if step.role == "squeeze" else "conv_expand"), ""
        case role:
            steps = ("expand", "depthwise", "project") if step.place.expand_ratio != 1 else ("depthwise", "project")
            pointwise = "conv_pwl" if step.place.expand_ratio != 1 else "conv_pw"
            conv = {"expand": "conv_pw", "depthwise": "conv_dw", "project": pointwise}[role]
            place = f"blocks.{step.place.stage - 2}.{step.place.index}"
            return f"{place}.{conv}", f"{place}.bn{steps.index(role) + 1}"


def _lukemelas(step: LayoutStep) -> tuple[str, str]:
    match step.role:
        case "classifier":
            return "_fc", ""
        case "stem":
            return "_conv_stem", "_bn0"
        case "head":
            return "_conv_head", "_bn1"
        case "squeeze" | "excite":
            return f"_blocks.{step.number}._se_{'reduce' if step.role == 'squeeze' else 'expand'}", ""
        case role:
            conv, norm = {
                "expand": ("_expand_conv", "_bn0"),
                "depthwise": ("_depthwise_conv", "_bn1"),
                "project": ("_project_conv", "_bn2"),
            }[role]
            return f"_blocks.{step.number}.{conv}", f"_blocks.{step.number}.{norm}"


def _hf(step: LayoutStep) -> tuple[str, str]:
    block = f"efficientnet.encoder.blocks.{step.number}"
    match step.role:
        case "classifier":
            return "classifier", ""
        case "stem":
            return "efficientnet.embeddings.convolution", "efficientnet.embeddings.batchnorm"
        case "head":
            return "efficientnet.encoder.top_conv", "efficientnet.encoder.top_bn"
        case "squeeze" | "excite":
            return f"{block}.squeeze_excite.{'reduce' if step.role == 'squeeze' else 'expand'}", ""
        case role:
            conv, norm = {
                "expand": ("expansion.expand_conv", "expansion.expand_bn"),
                "depthwise": ("depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"),
                "project": ("projection.project_conv", "projection.project_bn"),
            }[role]
            return f"{block}.{conv}", f"{block}.{norm}"


def _keras(step: LayoutStep) -> tuple[str, str]:
    match step.role:
        case "classifier":
            return "predictions", ""
        case "stem" | "head":
            place = "stem" if step.role == "stem" else "top"
            return f"{place}_conv", f"{place}_bn"
        case role:
            block = f"block{step.place.stage - 1}{chr(ord('a') + step.place.index)}_"
            conv, norm = {
                "expand": ("expand_conv", "expand_bn"),
                "depthwise": ("dwconv", "bn"),
                "squeeze": ("se_reduce", ""),
                "excite": ("se_expand", ""),
                "project": ("project_conv", "project_bn"),
            }[role]
            return block + conv, norm and block + norm


def _keras_numbered(step: LayoutStep) -> tuple[str, str]:
    def numbered(kind: str, number: int) -> str:
        return f"{kind}_{number}" if number else kind

    norm = numbered("batch_normalization", step.norms)
    if step.role == "classifier":
        return "dense", ""
    if step.role == "depthwise":
        return numbered("depthwise_conv2d", step.number), norm
    return numbered("conv2d", step.convs), norm


def _torchvision_mobilenetv2(step: LayoutStep) -> tuple[str, str]:
    match step.role:
        case "classifier":
            return "classifier.1", ""
        case "stem" | "head":
            place = "features.0" if step.role == "stem" else "features.18"
            return f"{place}.0", f"{place}.1"
        case role:
            place, narrow = f"features.{step.number + 1}.conv", step.place.expand_ratio == 1
            if role == "project":
                return f"{place}.{2 - narrow}", f"{place}.{3 - narrow}"
            place = f"{place}.{1 - narrow if role == 'depthwise' else 0}"
            return f"{place}.0", f"{place}.1"


def _torchvision_resnet50(step: LayoutStep) -> tuple[str, str]:
    match step.role:
        case "classifier":
            return "fc", ""
        case "stem":
            return "conv1", "bn1"
        case role:
            place = f"layer{step.place.stage - 1}.{step.place.index}"
            if role == "shortcut":
                return f"{place}.downsample.0", f"{place}.downsample.1"
            number = ("reduce", "conv", "widen").index(role) + 1
            return f"{place}.conv{number}", f"{place}.bn{number}"


def _timm_mobilenetv1(step: LayoutStep) -> tuple[str, str]:
    match step.role:
        case "classifier":
            return "classifier", ""
        case "stem":
            return "conv_stem", "bn1"
        case role:
            place = f"blocks.{step.place.stage - 2}.{step.place.index}"
            return (f"{place}.conv_dw", f"{place}.bn1") if role == "depthwise" else (f"{place}.conv_pw", f"{place}.bn2")


_KERAS_NORM = ("/gamma", "/beta", "/moving_mean", "/moving_variance")

NATIVE = Layout("native", _native)
LAYOUTS = {
    layout.name: layout
    for layout in (
        NATIVE,
        Layout("tutorial", _tutorial),
        Layout("torchvision", _torchvision),
        Layout("timm", _timm),
        Layout("lukemelas", _lukemelas),
        Layout("hf", _hf),
        Layout("keras", _keras, ("/kernel", "/bias"), _KERAS_NORM),
        Layout("keras-numbered", _keras_numbered, ("/0", "/1"), ("/0", "/1", "/2", "/3")),
    )
}
BASELINE_LAYOUTS = {
    f"{library}-{network}": Layout(f"{library}-{network}", names, baseline=network, own_key=own, other_key=other)
    for library, network, names, own, other in (
        ("torchvision", "mobilenetv2", _torchvision_mobilenetv2, "features.1.conv.0.0.weight", ""),
        ("torchvision", "resnet50", _torchvision_resnet50, "layer1.0.downsample.0.weight", ""),
        # an EfficientNet's block has an expansion there
        ("timm", "mobilenetv1", _timm_mobilenetv1, "blocks.1.0.conv_dw.weight", "blocks.1.0.conv_pwl.weight"),
    )
}

# What a library computes with its weights. torchvision: see `policy_of`.
POLICIES = {
    # source: eps, momentum in torch's terms, padding
    "bundle": NumericPolicy(),
    "tutorial": NumericPolicy(1e-3, 0.1, "symmetric"),
    "timm": NumericPolicy(1e-5, 0.1, "symmetric"),
    "timm-tf": NumericPolicy(1e-3, 0.1, "same"),
    "lukemelas": NumericPolicy(1e-3, 0.01, "same"),
    "hf": NumericPolicy(1e-3, 0.01, "same"),  # transformers hands TensorFlow's .99 to torch, where .01 is meant
    "keras": NumericPolicy(1e-3, 0.01, "same"),
}
SOURCES = ("bundle", "tutorial", "torchvision", "timm", "timm-tf", "lukemelas", "hf", "keras")


def policy_of(source: str, spec: NetworkSpec) -> NumericPolicy:
    """What the library `source` computes with a network like `spec`."""
    if source != "torchvision":
        return POLICIES[source]
    if published(spec) in ("b5", "b6", "b7"):  # torchvision builds these, and no other, with TensorFlow's constants
        return NumericPolicy(1e-3, 0.01, "symmetric")
    return NumericPolicy(1e-5, 0.1, "symmetric")


def published(spec: NetworkSpec) -> str | None:
    """The published network with the same layers, whatever its name, its resolution and its number of classes."""
    if spec.stem_stride != B0.stem_stride:
        return None
    shapes = NATIVE.shapes(spec)
    for row in VARIANTS.values():
        theirs = make_spec(row.spec, num_classes=spec.num_classes, in_channels=spec.in_channels)
        if (theirs.stages, theirs.activation, theirs.layers) == (spec.stages, spec.activation, spec.layers) and (
            NATIVE.shapes(theirs) == shapes
        ):
            return row.name
    return None


def squarely_padded(spec: NetworkSpec) -> list[int]:
    """The strided blocks whose input has an odd size at the spec's resolution: there SAME pads all sides alike.

    transformers does not compute this from the size that arrives: its config lists them as `depthwise_padding`.
    """
    return [number for number, block in enumerate(spec.blocks) if block.stride == 2 and block.input_size % 2]


def lone_shortcuts(spec: NetworkSpec) -> list[str]:
    """First blocks of a stage whose input is added to their output; transformers and lukemelas leave these out."""
    return [block.name for block in spec.blocks if block.index == 0 and block.has_shortcut]


def layout_of(source: str, spec: NetworkSpec | None = None) -> Layout:
    """The naming rule of a source, for `spec` or for the family.

    timm's networks with TensorFlow's weights are named as its own.
    """
    name = {"bundle": "native", "timm-tf": "timm"}.get(source, source)
    own = f"{name}-{baseline_of(spec)}" if spec is not None else ""
    return BASELINE_LAYOUTS.get(own) or LAYOUTS[name]


def baseline_of(spec: NetworkSpec) -> str | None:
    """The name of the baseline beside B0 that has the same rows, at any scale."""
    return next((name for name, network in BASELINES.items() if network.stages == spec.stages), None)


def detect(keys: Mapping[str, object]) -> Layout:
    """The layout that `keys` belong to.

    Raises:
        CheckpointError: none is.
    """
    for layout in (*BASELINE_LAYOUTS.values(), *LAYOUTS.values()):
        if layout.mark in keys and layout.other_key not in keys:
            return layout
    some = ", ".join(list(keys)[:4]) or "nothing"
    raise CheckpointError(
        f"no EfficientNet of {', '.join(SOURCES)} has these tensors: {some}{', ...' if len(keys) > 4 else ''}"
    )
