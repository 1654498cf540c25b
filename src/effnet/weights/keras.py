"""Keras files (.keras, .h5, .weights.h5): their tensors, and the layers that they list.

Tensors do not show layers without any, such as max pooling or an initial rescaling. So if a file lists its layers, they
are followed from the image to the classifier, and any that an EfficientNet does not have is refused.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.errors import MismatchError, optional_import
from effnet.files import parse_json
from effnet.weights.arrays import AnyArray, open_zip
from effnet.weights.layouts import walk

SUFFIXES = (".h5", ".hdf5", ".keras")
MOST_PACKED = 64  # times a file's bytes that its numbers may take: HDF5 lists any number of zeros in a few bytes
# The layer that normalises images: mean, variance and their count, by name and by number
INPUT_KEYS = tuple(f"normalization/{leaf}" for leaf in ("mean", "variance", "count", "0", "1", "2"))
PREPARING = ("Rescaling", "Normalization")
# In inference. Where Flatten does something, pooling is missing
IDLE = re.compile(
    r"InputLayer|ZeroPadding2D|Reshape|Flatten|Identity|\w*Dropout\w*|GaussianNoise|Random\w+", re.IGNORECASE
)
# Layers without weights as Keras' own network calls them, which an older file of weights lists by name
OLDER_NAMES = {
    r"(stem_conv|block\S+_dwconv)_pad": "zeropadding2d",
    r"(stem|top|block\S+)_activation": "activation",
    r"avg_pool|block\S+_se_squeeze": "globalaveragepooling2d",
    r"block\S+_se_reshape": "reshape",
    r"block\S+_se_excite": "multiply",
    r"block\S+_drop": "dropout",
    r"block\S+_add": "add",
    r"input": "inputlayer",
    r"tf\.math\.truediv": "rescaling",
}
END = ("Softmax", "Activation, softmax", "Activation, linear")  # behind the classifier: logits are the same


@dataclass(frozen=True)
class KerasLayer:
    """A layer as the file lists it."""

    kind: str  # the name of its class
    name: str
    settings: Mapping[str, Any] | None = field(repr=False)  # None: only kinds are listed, without order or settings

    def get(self, setting: str, default: Any = None) -> Any:
        """One of its settings."""
        return (self.settings or {}).get(setting, default)


def load_keras(path: Path) -> tuple[dict[str, AnyArray], tuple[KerasLayer, ...] | None]:
    """Arrays as LAYER/LEAF, however deep the layer is nested, and the layers in order; None where none are listed.

    Layers go by name in older files, by class and number in newer ones. A newer file that has only weights has a group
    for every layer, even for one without weights, so it lists their kinds; an older one lists names.
    """
    with optional_import(f"reading {path.name}"):
        import h5py

    datasets: dict[str, AnyArray] = {}
    room = MOST_PACKED * path.stat().st_size
    groups = list[KerasLayer]()

    def visit(name: str, item: object) -> None:
        nonlocal room
        *_, parent, own = ("", *name.split("/"))
        if parent == "layers" and isinstance(item, h5py.Group):
            groups.append(KerasLayer(_kind(own), own, None))
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer"):
            room -= item.nbytes
            if room < 0 or item.external or item.is_virtual:
                raise ValueError(f"the numbers of {name} are not in the file")
            datasets[name] = np.asarray(item)

    content: Path | io.BytesIO = path
    listed = None
    if path.suffix.lower() == ".keras":
        with open_zip(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > room:
                raise ValueError(f"it unpacks to more than {room:,} bytes")
            content = io.BytesIO(archive.read("model.weights.h5"))
            listed = archive.read("config.json") if "config.json" in archive.namelist() else None
    with h5py.File(content, "r") as file:
        file.visititems(visit)
        listed = file.attrs.get("model_config", listed)
        for listing in file.attrs.get("layer_names", ()):
            own = listing.decode() if isinstance(listing, bytes) else str(listing)
            if not any(name.startswith(f"{own}/") for name in datasets):  # the tensors speak for the others
                groups.append(KerasLayer(_kind(own), own, None))
    short = {name: "/".join(_pieces(name)[-2:]) for name in datasets}
    times = Counter(short.values())
    tensors = {(key if times[key] == 1 else name): _torch_order(key, datasets[name]) for name, key in short.items()}
    return tensors, tuple(groups) or None if listed is None else tuple(_flatten(parse_json(listed)))


def keras_input(
    tensors: Mapping[str, AnyArray], layers: tuple[KerasLayer, ...] | None, spec: NetworkSpec
) -> tuple[InputSpec | None, tuple[str, ...]]:
    """How images are prepared by the layers in front of a Keras network, and notes; None where it has none.

    A file that has only weights is taken for Keras' own network, which divides by the root of the variance. Where that
    variance is ImageNet's std, a known slip in Keras' published weights, it divides by the root once more.
    """
    stated = [tensors[key].ravel().astype(np.float64) for key in INPUT_KEYS if key in tensors]
    active = (layer for layer in layers or () if not IDLE.fullmatch(layer.kind))
    front, notes = list(takewhile(lambda layer: layer.kind in PREPARING, active)), tuple[str, ...]()
    if not (front if has_order(layers) else stated):
        return None, ()
    if front:
        mean, std = _follow(front, stated, spec.in_channels)
    else:
        mean, variance, *_ = stated
        std = np.sqrt(variance)
        if _is_published(variance):
            std = variance
            notes = ("its variance is ImageNet's std, as in Keras' published weights: it was read as the std",)
    shapes = (layer.get("batch_shape", layer.get("batch_input_shape")) for layer in layers or ())
    _, height, width, _ = next((shape for shape in shapes if shape), (None,) * 4)
    size = height if height and height == width else spec.resolution
    return InputSpec(size, size, _rounded(mean), _rounded(std), "bilinear", "squash"), notes


def has_order(layers: tuple[KerasLayer, ...] | None) -> bool:
    """Whether a file lists its layers in order and with their settings."""
    return layers is not None and (not layers or layers[0].settings is not None)


def keras_policy(layers: tuple[KerasLayer, ...], policy: NumericPolicy, spec: NetworkSpec) -> NumericPolicy:
    """The policy with the constants of the batch normalisations of `spec`, not of those behind it."""
    norms = {
        (layer.get("epsilon", 1e-3), round(1 - layer.get("momentum", 0.99), 6) or policy.bn_momentum)
        for layer in [layer for layer in layers if layer.kind == "BatchNormalization"][: _count_norms(spec)]
    }
    if len(norms) > 1:
        raise MismatchError("its batch normalisations have several epsilons or momenta; effnet's networks have one")
    return NumericPolicy(*norms.pop(), policy.padding) if norms else policy


def check_layers(
    layers: tuple[KerasLayer, ...], tensors: Mapping[str, AnyArray], spec: NetworkSpec, *, classifier: bool
) -> None:
    """Raise MismatchError where the layers are not those of `spec`, behind the ones that prepare images.

    `classifier`: whether pooling and classifier are used; else the layers behind the head do not matter.
    """
    if not layers:
        raise MismatchError("its config lists no layers, so effnet cannot tell what is computed between the tensors")
    if not has_order(layers):
        if classifier:
            _check_kinds(layers, tensors, spec)
        return
    found, pads = list[tuple[str, str]](), list[KerasLayer]()
    for layer in layers:
        if layer.kind == "ZeroPadding2D":
            pads.append(layer)
        elif not IDLE.fullmatch(layer.kind):
            described = _describe(layer, pads)
            pads = []
            if found or described not in PREPARING:
                found.append((layer.name, described))
    while found and found[-1][1] in END:
        found.pop()
    expected = list(_expected(spec))
    if not classifier:
        expected = expected[:-2]
        found = found[: len(expected)]
    for there, wanted in zip_longest(found, expected):
        if there is None or there[1] != wanted:
            got = f"has the layer {there[0]} ({there[1]})" if there else "ends"
            raise MismatchError(f"it {got} where {spec.name} {f'has {wanted}' if wanted else 'ends'}")


def _check_kinds(layers: tuple[KerasLayer, ...], tensors: Mapping[str, AnyArray], spec: NetworkSpec) -> None:
    """Raise MismatchError where there are more layers of a kind than in Keras' own `spec`."""
    published = any(_is_published(tensors[key]) for key in INPUT_KEYS if key in tensors)
    allowed = Counter(kind.partition(",")[0].lower() for kind in _expected(spec))
    allowed |= Counter({"rescaling": 1 + published, "normalization": 1})
    found = Counter(layer.kind for layer in layers if not IDLE.fullmatch(layer.kind))
    for kind, count in found.items():
        if count > allowed[kind] and kind not in ("functional", "sequential"):
            there = f"{count} layer{'s' * (count > 1)} of kind {kind}, and Keras' {spec.name} has {allowed[kind]}"
            raise MismatchError(f"it has {there}; save the whole model as .keras, which says what they compute")


def _is_published(variance: AnyArray) -> bool:
    """Whether it is ImageNet's std, in place of its square."""
    return variance.size == 3 and np.allclose(variance.ravel(), InputSpec.std)


def _rounded(values: AnyArray) -> tuple[float, ...]:
    """To float32, in which Keras computes."""
    return tuple(values.astype(np.float32).tolist())


def _follow(front: list[KerasLayer], stated: list[AnyArray], channels: int) -> tuple[AnyArray, AnyArray]:
    """Mean and std, in shares of 255, of the layers that prepare images; `stated` are a Normalization's own tensors."""
    slope, shift = np.ones(channels), np.zeros(channels)
    for layer in front:
        if layer.kind == "Rescaling":
            scale, offset = (np.array(layer.get(key), np.float64) for key in ("scale", "offset"))
        else:
            given = [layer.get(key) for key in ("mean", "variance")]
            mean, variance = stated[:2] if None in given else (np.array(values, np.float64) for values in given)
            scale = 1 / np.sqrt(variance.ravel())
            offset = -mean.ravel() * scale
        slope, shift = slope * scale, shift * scale + offset
    std = 1 / (255 * slope)
    return 0 - shift * std, std  # not -0


def _expected(spec: NetworkSpec) -> Iterator[str]:
    """The layers of an EfficientNet behind those that prepare images, as `_describe` has them."""
    pooling = "GlobalAveragePooling2D"
    for step in walk(spec):
        block, role = step.block, step.role
        if role == "squeeze":
            yield from (pooling, "Conv2D, silu")
        elif role == "excite":
            yield from ("Conv2D, sigmoid", "Multiply")
        elif role == "classifier":
            yield from (pooling, "Dense")
        else:
            stride = {"stem": spec.stem_stride, "depthwise": block.stride if block else 1}.get(role, 1)
            conv = "DepthwiseConv2D" if role == "depthwise" else "Conv2D"
            yield from (conv + (", stride 2" if stride == 2 else ""), "BatchNormalization")
            if role != "project":
                yield f"Activation, {spec.activation}"
            elif block and block.has_shortcut:
                yield "Add"


def _describe(layer: KerasLayer, pads: list[KerasLayer]) -> str:
    """A layer's kind with what changes its answer beside its tensors; `pads` are the ZeroPadding2D in front of it."""
    activation = str(layer.get("activation", "linear")).replace("swish", "silu")
    details = [] if activation == "linear" and layer.kind != "Activation" else [activation]
    if layer.kind == "Dense" and activation == "softmax":
        details = []
    kernel, valid = max(np.atleast_1d(layer.get("kernel_size", 1))), layer.get("padding") == "valid"
    if layer.kind.endswith("Conv2D"):
        stride, dilation = ({*np.atleast_1d(layer.get(key, 1))} for key in ("strides", "dilation_rate"))
        details = (
            [f"stride {max(stride)}"] * (stride != {1}) + [f"dilation {max(dilation)}"] * (dilation != {1}) + details
        )
        if valid and not pads and kernel > 1:
            details.append("valid padding")
    for pad in pads:  # in Keras' own network as much as SAME padding for an even or an odd size
        sides = np.broadcast_to(pad.get("padding", 1), (2, 2)).tolist()
        same = [[kernel // 2 - 1, kernel // 2], [kernel // 2] * 2]
        if not valid or len(pads) > 1 or any(side not in same for side in sides):
            details.append(f"zero padding {sides}")
    details += ["channels_first"] * any(each.get("data_format") == "channels_first" for each in (layer, *pads))
    if layer.kind.endswith("Normalization") and not {*np.atleast_1d(layer.get("axis"))} <= {3, -1, None}:
        details.append(f"axis {layer.get('axis')}")
    details += ["inverted"] * bool(layer.get("invert"))
    return ", ".join((layer.kind, *details))


def _count_norms(spec: NetworkSpec) -> int:
    return sum(step.has_norm for step in walk(spec))


def _kind(name: str) -> str:
    """The kind of a layer by the name that Keras gives it, in small letters."""
    plain = re.sub(r"_\d+$", "", name)
    return next((kind for names, kind in OLDER_NAMES.items() if re.fullmatch(names, plain)), plain.replace("_", ""))


def _flatten(model: Mapping[str, Any]) -> Iterator[KerasLayer]:
    """The layers of a model's config, those of the models inside it in their place; "Output" where it ends earlier."""
    settings = model["config"]
    # a Sequential of an older Keras is a list of layers itself
    layers = settings if isinstance(settings, list) else settings.get("layers", ())
    name = ""
    for layer in layers:
        inner = layer["config"]
        name = layer.get("name") or layer["class_name"]
        if isinstance(inner, list) or "layers" in inner:
            yield from _flatten(layer)
        else:
            name = inner.get("name", name)
            yield KerasLayer(layer["class_name"], name, inner)
    outputs = settings.get("output_layers", ()) if isinstance(settings, Mapping) else ()
    for output in [outputs] if outputs and isinstance(outputs[0], str) else outputs:
        if output[0] != name:
            yield KerasLayer("Output", output[0], {})


def _pieces(name: str) -> list[str]:
    """The pieces of `layers/conv2d_3/vars/0`, or in older files of `stem_conv/stem_conv/kernel:0`."""
    pieces = name.partition(":")[0].replace("depthwise_kernel", "kernel").split("/")
    # older files number the normalisation of the input through all networks of one program
    pieces = [re.sub(r"^normalization_\d+$", "normalization", piece) for piece in pieces]
    return [piece for piece in pieces if piece not in ("layers", "vars")]


def _torch_order(layer: str, values: AnyArray) -> AnyArray:
    if values.ndim == 4:  # (h, w, in, out), depthwise (h, w, channels, 1)
        values = values.transpose((2, 3, 0, 1) if "dw" in layer or "depthwise" in layer else (3, 2, 0, 1))
    return (values.T if values.ndim == 2 else values).copy()
