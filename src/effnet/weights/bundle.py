"""Bundles: folders with a network's weights and everything needed to use them.

    config.json         format, spec, numeric policy, InputSpec, class names, source, metrics, calibration, label sets,
                        familiarity, provenance, sha256 of the other files
    model.safetensors   the tensors under native names
    split.csv           if effnet trained it: the images that it was trained, selected and tested on
    familiarity.safetensors
                        if its familiarity score compares features: the arrays to compare with

Only `save` and `Bundle.network` need torch; other engines read and run a bundle without it.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet.arch.spec import Calibration, InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.specfile import SUFFIXES
from effnet.arch.variants import BASELINES, VARIANTS
from effnet.arch.variants import spec as make_spec
from effnet.errors import ArgumentError, BundleError, UnknownNameError, optional_import, reason
from effnet.fields import check_path, read_fields
from effnet.files import MARK, parse_json, read_bytes, write_folder
from effnet.version import __version__, is_newer, newer_file, newer_format
from effnet.weights.layouts import COUNTER, NATIVE
from effnet.weights.sureness import Familiarity, LabelSets

if TYPE_CHECKING:
    from torch import Tensor

    from effnet.data.dataset import Dataset
    from effnet.data.held_out import Splits
    from effnet.models.efficientnet import EfficientNet
    from effnet.weights.arrays import AnyArray

FORMAT = 1  # raised whenever an older effnet would misread a bundle
CONFIG, WEIGHTS, SPLIT = "config.json", "model.safetensors", "split.csv"
TENSORS = "familiarity.safetensors"


@dataclass(frozen=True)
class Record:
    """Data that a training adds to a bundle."""

    calibration: Calibration | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)  # data, recipe, versions, as JSON values
    split: str | None = None  # the text of split.csv
    sets: LabelSets | None = None
    familiarity: Familiarity | None = None


@dataclass(frozen=True)
class BundleConfig:
    """The contents of a bundle besides its weights."""

    spec: NetworkSpec
    policy: NumericPolicy
    input: InputSpec
    classes: tuple[str, ...] | None = None
    source: str = ""  # origin of the weights
    metrics: Mapping[str, float] = field(default_factory=dict)
    sha256: str = ""  # of the weight file
    calibration: Calibration | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # sha256 of each further file
    sets: LabelSets | None = None
    familiarity: Familiarity | None = None


@dataclass(frozen=True, eq=False)
class Bundle:
    """A network with its context, in memory."""

    config: BundleConfig
    weights: Mapping[str, AnyArray] = field(repr=False)  # under native names: float32, and training's counters int64

    @classmethod
    def from_network(cls, network: EfficientNet, config: BundleConfig) -> Bundle:
        """A bundle of a torch module; shares float32 CPU tensors with the module."""
        state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        weights = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in state.items()}
        bundle = cls(config, weights)
        vars(bundle)["network"] = network  # instead of building one
        return bundle

    @cached_property
    def network(self) -> EfficientNet:
        """The torch module in eval mode, built on first access."""
        with optional_import("a network as a torch module"):
            from effnet.models.efficientnet import EfficientNet

        with for_weights():
            network = EfficientNet(self.config.spec, policy=self.config.policy)
        network.load_state_dict(to_tensors(self.weights))
        return network.eval()


def save(
    network: EfficientNet,
    folder: str | Path,
    *,
    classes: Sequence[str] | None = None,
    input: InputSpec | None = None,
    source: str = "",
    metrics: Mapping[str, float] | None = None,
    record: Record | None = None,
) -> Path:
    """Write a bundle atomically, and return its folder.

    Args:
        network: the network, or one wrapped in DataParallel, AveragedModel or torch.compile.
        folder: the folder to write; an existing bundle is replaced, a folder with anything else in it is refused.
        classes: the names of the outputs, in order.
        input: how images are prepared; by default at the spec's resolution, cropped from 8/7 of it, with the mean and
            std of ImageNet. Its size becomes the spec's resolution.
        source: origin of the weights, as text.
        metrics: results to keep, by name.
        record: what the training adds: calibration, label sets, familiarity, provenance, the split.

    Raises:
        ArgumentError: `network` is not an EfficientNet, the names do not match the outputs, `input` has other channels
            than the network, the network has other tensors than its spec, JSON cannot hold the provenance, or `folder`
            is not a bundle.
    """
    with optional_import("effnet.save"):
        from safetensors.torch import save as serialise

        from effnet.models.efficientnet import unwrap_network

    check_path("folder", folder)
    network = unwrap_network(network)
    spec = network.spec
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    if {key: tuple(tensor.shape) for key, tensor in state.items()} != NATIVE.shapes(spec):
        raise ArgumentError("network", type(network).__name__, "must have the tensors of its spec, as BatchNorm does.")
    input_spec = input or default_input(spec)
    _check_channels(input_spec, spec)
    blob, record = serialise(state), record or Record()
    further = {} if record.split is None else {SPLIT: record.split.encode(errors="surrogateescape")}
    familiarity = record.familiarity
    if familiarity is not None and familiarity.tensors:
        further[TENSORS] = base64.b64decode(familiarity.tensors)
        familiarity = dataclasses.replace(familiarity, tensors="")  # for people who read config.json
    try:
        provenance = json.loads(json.dumps(dict(record.provenance), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgumentError("provenance", record.provenance, f"must be what JSON can hold: {error}.") from error
    config = BundleConfig(
        make_spec(spec, resolution=input_spec.size),
        _built_policy(network),
        input_spec,
        _check_classes(classes, spec),
        source,
        {name: float(value) for name, value in (metrics or {}).items()},
        _sha256(blob),
        record.calibration,
        provenance,
        {name: _sha256(content) for name, content in further.items()},
        record.sets,
        familiarity,
    )
    values = {"format": FORMAT, MARK: __version__, **entries_of(config)}
    values["digest"] = _digest(values)

    target = Path(folder)
    with write_folder(target, "bundle") as temporary:
        (temporary / WEIGHTS).write_bytes(blob)
        for name, content in further.items():
            (temporary / name).write_bytes(content)
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    return target


def default_input(spec: NetworkSpec) -> InputSpec:
    """At the spec's resolution, cropped from 8/7 of it as the official 224 from 256; ImageNet's mean and std."""
    return InputSpec(spec.resolution, round(spec.resolution * 8 / 7)).with_channels(spec.in_channels)


def read_config(folder: str | Path) -> BundleConfig:
    """Read the config of a bundle, without opening its weights.

    Raises:
        BundleError: it is not a bundle, its config is damaged, or a newer effnet wrote it.
    """
    path = Path(folder) / CONFIG
    try:
        values = parse_json(path.read_text("utf-8"))
        digest, expected = values.pop("digest", None), _digest(values)
        written, version = values.pop("format"), values.pop(MARK)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle: it has no {CONFIG}") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BundleError(f"{path} is damaged or not effnet's ({reason(error)})") from error
    if isinstance(written, int) and written > FORMAT:
        raise BundleError(f"{folder} {newer_format(version, written, FORMAT)}")
    if written != FORMAT:
        raise BundleError(f"{path} is damaged or not effnet's (format {written!r})")
    try:
        config = parse_config(values)
    except (ArgumentError, TypeError, ValueError) as error:
        if digest == expected and is_newer(version):
            raise BundleError(f"{folder} {newer_file(version, error)}") from error
        raise BundleError(f"{path} was changed: {error}") from error
    if digest not in (None, expected):  # None: from before configs had a digest
        raise BundleError(f"{path} was changed since it was written; effnet.save writes a bundle with other values")
    if config.familiarity is not None and TENSORS in config.files:
        tensors = base64.b64encode(_read_checked(path.with_name(TENSORS), config.files[TENSORS])).decode()
        config = dataclasses.replace(config, familiarity=dataclasses.replace(config.familiarity, tensors=tensors))
    return config


def entries_of(config: BundleConfig) -> dict[str, Any]:
    """A config as JSON values, for `parse_config`; missing values are left out, as in older versions."""
    entries = dataclasses.asdict(config)
    optional = ("calibration", "provenance", "files", "sets", "familiarity")
    return {name: value for name, value in entries.items() if value or name not in optional}


def parse_config(values: Mapping[str, Any]) -> BundleConfig:
    """A config from JSON values; raises ArgumentError, TypeError, ValueError or KeyError for others."""
    config = read_fields(BundleConfig, {"provenance": {}, "files": {}, **values})
    spec, input_spec = NetworkSpec.from_dict(values["spec"]), read_fields(InputSpec, values["input"])
    policy = read_fields(NumericPolicy, values["policy"])
    calibration = config.calibration and read_fields(Calibration, values["calibration"])
    sets = config.sets and read_fields(LabelSets, values["sets"])
    familiarity = config.familiarity and read_fields(Familiarity, values["familiarity"])
    _check_channels(input_spec, spec)
    classes = _check_classes(config.classes, spec)
    known: dict[str, Any] = {"calibration": calibration, "sets": sets, "familiarity": familiarity}
    return dataclasses.replace(config, spec=spec, policy=policy, input=input_spec, classes=classes, **known)


def read_network(model: str) -> NetworkSpec:
    """The network of a variant, a bundle or a spec.yaml, read without torch."""
    if is_bundle(Path(model)):
        return read_config(model).spec
    described = model in VARIANTS or model in BASELINES or Path(model).suffix.lower() in SUFFIXES
    if Path(model).exists() and not described:
        advice = name_model_inside(Path(model)) or f"; make one with: effnet convert {shlex.quote(model)}"
        raise ArgumentError("model", model, f"is not a bundle{advice}")
    try:
        return make_spec(model)
    except UnknownNameError as error:
        raise UnknownNameError("model", error.value, (*error.known, "a bundle", "a spec.yaml")) from error


def open_bundle(folder: str | Path) -> Bundle:
    """A bundle with its weights; raises BundleError as `read_config` does."""
    config, path = read_config(folder), Path(folder) / WEIGHTS
    content = _read_checked(path, config.sha256)
    from effnet.weights.arrays import MALFORMED, read_safetensors  # with numpy, which others may import meanwhile

    try:
        weights = read_safetensors(content)
    except MALFORMED as error:
        raise BundleError(f"{path} is not a safetensors file: {error}") from error
    misfit = {name: array.shape for name, array in weights.items()} != NATIVE.shapes(config.spec)
    if misfit or any(array.dtype != "float32" for name, array in weights.items() if not name.endswith(COUNTER)):
        raise BundleError(f"{folder} does not hold the network that its {CONFIG} describes")
    return Bundle(config, weights)


def to_tensors(weights: Mapping[str, AnyArray]) -> dict[str, Tensor]:
    """The same numbers as torch's tensors on the CPU."""
    import torch

    return {name: torch.from_numpy(array) for name, array in weights.items()}


@contextmanager
def for_weights(fresh: Collection[str] = ()) -> Iterator[None]:
    """Around a network that is built for weights that are read: all of them, but for those that start `fresh`.

    Without fresh ones it takes none of the caller's random numbers. Inside torch.device("meta"), where tensors have no
    values, weights are read to the CPU; elsewhere as usual.
    """
    import torch

    device = torch.get_default_device()
    draws = nullcontext() if fresh else torch.random.fork_rng((device,) if device.type == "cuda" else ())
    with draws, torch.device("cpu") if device.type == "meta" else nullcontext():
        yield


def read_split(folder: str | Path) -> str | None:
    """The text of a bundle's split.csv, a manifest (path, label, split, group); None if it has none."""
    expected = read_config(folder).files.get(SPLIT)
    if expected is None:
        return None
    return _read_checked(Path(folder) / SPLIT, expected).tobytes().decode(errors="surrogateescape")


def find_splits(model: str, dataset: Dataset) -> Splits | None:
    """The split of each image of `dataset` in a model's training, by path; None if unknown."""
    from effnet.data.dataset import root_of
    from effnet.data.held_out import match_split

    text = read_split(model) if is_bundle(Path(model)) else None
    if text is None:
        return None
    data = Path(str(read_config(model).provenance.get("data", "")))
    return match_split(text, root_of(data), dataset)


def read_record(folder: str | Path) -> Record:
    """The data that a training added to a bundle, for `save`."""
    config = read_config(folder)
    return Record(config.calibration, config.provenance, read_split(folder), config.sets, config.familiarity)


def is_bundle(path: Path) -> bool:
    """Whether a folder contains a bundle's config."""
    try:
        return bool(parse_json((path / CONFIG).read_text("utf-8")).keys() >= {"format", MARK})
    except (OSError, ValueError, AttributeError):
        return False


def name_model_inside(folder: Path) -> str:
    """Advice for a folder that is not a model: the path of the model inside a training's or fit's folder, or ""."""
    for inside in (folder / "best", folder / "model"):
        if is_bundle(inside) or (inside / "model.xml").is_file():
            return f"; the model of this run is {inside}"
    return ""


def _read_checked(path: Path, sha256: str) -> memoryview:
    """The content of a file of a bundle; raises BundleError if it was changed."""
    try:
        content = read_bytes(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if _sha256(content) != sha256:
        raise BundleError(f"{path} was changed or cut short: its sha256 is not the one in {CONFIG}")
    return content


def _sha256(blob: bytes | memoryview) -> str:
    return hashlib.sha256(blob).hexdigest()


def _digest(values: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(values, sort_keys=True).encode())


def _built_policy(network: EfficientNet) -> NumericPolicy:
    """What the network computes with; its layers may have been changed since it was built."""
    from torch import nn

    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    built = {(norm.eps, norm.momentum) for norm in norms}
    if len(built) != 1:
        raise ArgumentError("network", type(network).__name__, "must have one eps and momentum in all BatchNorms.")
    eps, momentum = built.pop()
    return dataclasses.replace(network.policy, bn_eps=eps, bn_momentum=momentum or network.policy.bn_momentum)


def _check_classes(classes: Sequence[str] | None, spec: NetworkSpec) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise ArgumentError("classes", classes, "must be a sequence of names.")
    if len(classes) != spec.num_classes:
        raise ArgumentError("classes", f"{len(classes)} names", f"must name the network's {spec.num_classes} outputs.")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ArgumentError("classes", twice, "names two classes.")
    return tuple(classes)


def _check_channels(input_spec: InputSpec, spec: NetworkSpec) -> None:
    if input_spec.channels != spec.in_channels:
        raise ArgumentError("input", f"{input_spec.channels} channels", f"must have the network's {spec.in_channels}.")
