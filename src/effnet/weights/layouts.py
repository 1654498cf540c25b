"""Tensor names of each library: one walk over the blocks, one table of names per library.

`walk` visits the steps that hold tensors in the order of computation, which is also the order of the state dicts. A
Layout turns a step into the names of its convolution and its normalisation, for reading and writing. A source adds what
keys do not determine: batch normalisation's constants and the padding depend on the library that trained.

Read from: tutorial (WZMIAOMIAO's code), torchvision 0.29, timm 1.0, efficientnet-pytorch 0.7 (lukemelas),
transformers 5 (hf), Keras 3 (layers by name in older files, by number in newer ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from effnet.arch.blocks import BlockSpec
from effnet.arch.spec import NetworkSpec, NumericPolicy
from effnet.arch.variants import B0, BASELINES, VARIANTS
from effnet.arch.variants import spec as make_spec
from effnet.errors import CheckpointError

COUNTER = ".num_batches_tracked"  # training's bookkeeping: absent from older files and from Keras


@dataclass(frozen=True)
class LayoutStep:
    """A convolution or fully connected layer, with its normalisation or its bias."""

    role: str  # stem, head, classifier, or within a block squeeze, excite or the name of a layer of arch/blocks.py
    shape: tuple[int, ...]  # of the weight, as torch has it: (out, in / groups, kernel, kernel) or (out, in)
    block: BlockSpec | None = None
    number: int = 0  # of the block, counted through the network from 0
    convs: int = 0  # convolutions before this one, depthwise ones apart
    norms: int = 0  # normalisations before this one
    dropout: bool = True  # whether the network has a dropout rate above 0

    @property
    def has_norm(self) -> bool:
        """A normalisation follows; the other steps have a bias."""
        return self.role not in ("squeeze", "excite", "classifier")

    @property
    def fields(self) -> dict[str, object]:
        """The values of a layout's templates."""
        counts = {"_convs": self.convs, "_norms": self.norms, "_number": self.number}  # Keras writes no 0
        fields: dict[str, object] = {name: f"_{count}" if count else "" for name, count in counts.items()}
        fields |= {"role": self.role, "dropout": str(int(self.dropout))}
        if (block := self.block) is None:
            return fields
        expands = block.expand_ratio != 1
        return fields | {
            "block": block.name,
            "number": self.number,
            "number1": self.number + 1,
            "stage0": block.stage - 2,  # stages with blocks, counted from 0
            "stage1": block.stage - 1,  # and from 1
            "index": block.index,
            "letter": chr(ord("a") + block.index),  # runs on past z into { | } ~
            "l": "l" if expands else "",  # timm's conv_pwl, where a conv_pw was before
            **{f"at{place}": place - (not expands) for place in (1, 2, 3)},  # in blocks whose expansion is at 0
        }


@dataclass(frozen=True)
class Layout:
    """A library's names: of each role a convolution and a normalisation, as templates of LayoutStep.fields."""

    name: str
    roles: Mapping[str, str]  # "conv norm" by role, or "conv"; within a block behind the prefix "block"
    weight: tuple[str, str] = (".weight", ".bias")
    norm: tuple[str, ...] = (".weight", ".bias", ".running_mean", ".running_var", COUNTER)
    baseline: str = ""  # the only network that is named so, one of variants.BASELINES; "": EfficientNets
    own_key: str = ""  # a key that only this layout has, where it is not the weight of the stem
    other_key: str = ""  # a key of another layout that has `mark` as well

    @property
    def library(self) -> str:
        """The library whose names these are."""
        return self.name.partition("-")[0]

    @property
    def mark(self) -> str:
        """The key that identifies the layout."""
        return self.own_key or self.weight_key(LayoutStep("stem", ()))

    def prefixes(self, step: LayoutStep) -> tuple[str, str]:
        """The prefixes of a step's convolution and of its normalisation, which is "" where it has none."""
        block = self.roles["block"] if step.block else ""
        conv, _, norm = (self.roles.get(step.role) or self.roles.get("layer", "")).partition(" ")
        fields = step.fields
        return (block + conv).format_map(fields), norm and (block + norm).format_map(fields)

    def weight_key(self, step: LayoutStep) -> str:
        """The key of a step's weight."""
        return self.prefixes(step)[0] + self.weight[0]

    def keys(self, step: LayoutStep) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The keys of a step in order, each with its shape."""
        conv, norm = self.prefixes(step)
        outputs = step.shape[:1]
        yield conv + self.weight[0], step.shape
        if step.has_norm:
            for leaf in self.norm:
                yield norm + leaf, () if leaf == COUNTER else outputs
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


# Convolution and normalisation of each role; "layer" stands for all layers of a block without a role here.
_ROLES = {
    "native": {
        "stem": "stem.conv stem.norm",
        "head": "head.conv head.norm",
        "classifier": "classifier",
        "block": "{block}.",
        "squeeze": "se.squeeze",
        "excite": "se.excite",
        "layer": "{role}.conv {role}.norm",
    },
    "tutorial": {
        "stem": "features.stem_conv.0 features.stem_conv.1",
        "head": "features.top.0 features.top.1",
        "classifier": "classifier.{dropout}",  # no dropout layer is built for a rate of 0
        "block": "features.{stage1}{letter}.block.",
        "expand": "expand_conv.0 expand_conv.1",
        "depthwise": "dwconv.0 dwconv.1",
        "squeeze": "se.fc1",
        "excite": "se.fc2",
        "project": "project_conv.0 project_conv.1",
    },
    "torchvision": {
        "stem": "features.0.0 features.0.1",
        "head": "features.8.0 features.8.1",
        "classifier": "classifier.1",
        "block": "features.{stage1}.{index}.block.",
        "expand": "0.0 0.1",
        "depthwise": "{at1}.0 {at1}.1",
        "squeeze": "{at2}.fc1",
        "excite": "{at2}.fc2",
        "project": "{at3}.0 {at3}.1",
    },
    "timm": {
        "stem": "conv_stem bn1",
        "head": "conv_head bn2",
        "classifier": "classifier",
        "block": "blocks.{stage0}.{index}.",
        "expand": "conv_pw bn1",
        "depthwise": "conv_dw bn{at2}",
        "squeeze": "se.conv_reduce",
        "excite": "se.conv_expand",
        "project": "conv_pw{l} bn{at3}",
    },
    "lukemelas": {
        "stem": "_conv_stem _bn0",
        "head": "_conv_head _bn1",
        "classifier": "_fc",
        "block": "_blocks.{number}.",
        "expand": "_expand_conv _bn0",
        "depthwise": "_depthwise_conv _bn1",
        "squeeze": "_se_reduce",
        "excite": "_se_expand",
        "project": "_project_conv _bn2",
    },
    "hf": {
        "stem": "efficientnet.embeddings.convolution efficientnet.embeddings.batchnorm",
        "head": "efficientnet.encoder.top_conv efficientnet.encoder.top_bn",
        "classifier": "classifier",
        "block": "efficientnet.encoder.blocks.{number}.",
        "expand": "expansion.expand_conv expansion.expand_bn",
        "depthwise": "depthwise_conv.depthwise_conv depthwise_conv.depthwise_norm",
        "squeeze": "squeeze_excite.reduce",
        "excite": "squeeze_excite.expand",
        "project": "projection.project_conv projection.project_bn",
    },
    "keras": {
        "stem": "stem_conv stem_bn",
        "head": "top_conv top_bn",
        "classifier": "predictions",
        "block": "block{stage1}{letter}_",
        "expand": "expand_conv expand_bn",
        "depthwise": "dwconv bn",
        "squeeze": "se_reduce",
        "excite": "se_expand",
        "project": "project_conv project_bn",
    },
    "keras-numbered": {
        "classifier": "dense",
        "block": "",
        "depthwise": "depthwise_conv2d{_number} batch_normalization{_norms}",
        "layer": "conv2d{_convs} batch_normalization{_norms}",
    },
}
_LEAVES = {  # of weight and bias, and of a normalisation, where they are not torch's
    "keras": (("/kernel", "/bias"), ("/gamma", "/beta", "/moving_mean", "/moving_variance")),
    "keras-numbered": (("/0", "/1"), ("/0", "/1", "/2", "/3")),
}
_MOBILENETV2 = {"head": "features.18.0 features.18.1", "block": "features.{number1}.conv.", "project": "{at2} {at3}"}
_MOBILENETV1 = {"depthwise": "conv_dw bn1", "pointwise": "conv_pw bn2"}
_RESNET50 = {
    "stem": "conv1 bn1",
    "classifier": "fc",
    "block": "layer{stage1}.{index}.",
    "reduce": "conv1 bn1",
    "conv": "conv2 bn2",
    "widen": "conv3 bn3",
    "shortcut": "downsample.0 downsample.1",
}

LAYOUTS = {name: Layout(name, roles, *_LEAVES.get(name, ())) for name, roles in _ROLES.items()}
NATIVE = LAYOUTS["native"]
BASELINE_LAYOUTS = (
    Layout(
        "torchvision-mobilenetv2",
        _ROLES["torchvision"] | _MOBILENETV2,
        baseline="mobilenetv2",
        own_key="features.1.conv.0.0.weight",
    ),
    Layout("torchvision-resnet50", _RESNET50, baseline="resnet50", own_key="layer1.0.downsample.0.weight"),
    Layout(
        "timm-mobilenetv1",
        _ROLES["timm"] | _MOBILENETV1,
        baseline="mobilenetv1",
        own_key="blocks.1.0.conv_dw.weight",
        other_key="blocks.1.0.conv_pwl.weight",  # of an EfficientNet's block
    ),
)

POLICIES = {  # source: eps, momentum in torch's terms, padding
    "bundle": NumericPolicy(),
    "tutorial": NumericPolicy(1e-3, 0.1, "symmetric"),
    "torchvision": NumericPolicy(1e-5, 0.1, "symmetric"),  # its B5-B7: see `policy_of`
    "timm": NumericPolicy(1e-5, 0.1, "symmetric"),
    "timm-tf": NumericPolicy(1e-3, 0.1, "same"),
    "lukemelas": NumericPolicy(1e-3, 0.01, "same"),
    "hf": NumericPolicy(1e-3, 0.01, "same"),  # transformers hands TensorFlow's .99 to torch, where .01 is meant
    "keras": NumericPolicy(1e-3, 0.01, "same"),
}
SOURCES = tuple(POLICIES)


def policy_of(source: str, spec: NetworkSpec) -> NumericPolicy:
    """The numeric policy of the library `source` for a network like `spec`."""
    if source == "torchvision" and published_name(spec) in ("b5", "b6", "b7"):  # built with TensorFlow's constants
        return NumericPolicy(1e-3, 0.01, "symmetric")
    return POLICIES[source]


def published_name(spec: NetworkSpec) -> str | None:
    """The published network with the same layers, at any resolution and for any classes."""
    if spec.stem_stride != B0.stem_stride:
        return None
    shapes, table = NATIVE.shapes(spec), (spec.stages, spec.activation, spec.layers)
    for row in VARIANTS.values():
        theirs = make_spec(row.spec, num_classes=spec.num_classes, in_channels=spec.in_channels)
        if (theirs.stages, theirs.activation, theirs.layers) == table and NATIVE.shapes(theirs) == shapes:
            return row.name
    return None


def evenly_padded_blocks(spec: NetworkSpec) -> list[int]:
    """The strided blocks whose input has an odd size, where SAME pads all sides alike: transformers lists them."""
    return [number for number, block in enumerate(spec.blocks) if block.stride == 2 and block.input_size % 2]


def first_block_shortcuts(spec: NetworkSpec) -> list[str]:
    """The first blocks of stages that have a shortcut; transformers and lukemelas leave it out."""
    return [block.name for block in spec.blocks if block.index == 0 and block.has_shortcut]


def layout_of(source: str) -> Layout:
    """The names of a source's EfficientNets."""
    return LAYOUTS[{"bundle": "native", "timm-tf": "timm"}.get(source, source)]


def baseline_of(spec: NetworkSpec) -> str | None:
    """The name of the baseline other than B0 that has the same rows, at any scale."""
    return next((name for name, network in BASELINES.items() if network.stages == spec.stages), None)


def detect(keys: Mapping[str, object]) -> Layout:
    """The layout that `keys` belong to; raises CheckpointError if there is none."""
    for layout in (*BASELINE_LAYOUTS, *LAYOUTS.values()):
        if layout.mark in keys and layout.other_key not in keys:
            return layout
    raise CheckpointError(f"no EfficientNet of {', '.join(SOURCES)} has these tensors: {list_names(tuple(keys))}")


def list_names(names: Sequence[str]) -> str:
    """The first six names, and how many more there are."""
    return (", ".join(names[:6]) or "none") + (f" and {len(names) - 6} more" if len(names) > 6 else "")
