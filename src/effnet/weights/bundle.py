"""A bundle: a folder that holds a network's weights and all that belongs to them.

    config.json         format, spec, numeric policy, InputSpec, class names, source, metrics, the weights' sha256
    model.safetensors   the tensors under native names

`read_config` needs no torch, so a bundle can be described and counted where it cannot be run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import effnet
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy, read_fields
from effnet.errors import ArgumentError, BundleError

if TYPE_CHECKING:
    from effnet.models.efficientnet import EfficientNet

FORMAT = 1  # raised whenever an older effnet would misread a bundle
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class BundleConfig:
    """What a bundle knows beside its weights."""

    spec: NetworkSpec
    policy: NumericPolicy
    input: InputSpec
    classes: tuple[str, ...] | None = None
    source: str = ""  # where the weights came from, in words
    metrics: Mapping[str, float] = field(default_factory=dict)
    sha256: str = ""  # of the file of weights


@dataclass(frozen=True)
class Bundle:
    """A network with its context, in memory."""

    network: EfficientNet
    config: BundleConfig


def save(
    network: EfficientNet,
    folder: str | Path,
    *,
    classes: Sequence[str] | None = None,
    input: InputSpec | None = None,
    source: str = "",
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write a bundle; the folder appears whole or not at all.

    Args:
        network: what to save.
        folder: where to; a bundle that is there already is replaced, anything else is left alone.
        classes: the names of the outputs, in order.
        input: how images are prepared; by default at the spec's resolution, cut from 8/7 of it, with ImageNet's mean
            and std.
        source: where the weights came from, in words.
        metrics: results worth keeping, by name.

    Returns:
        The folder.

    Raises:
        ArgumentError: the names do not match the outputs, or the network has other tensors than its spec says.
        BundleError: something that is no bundle is in the way.
    """
    from safetensors.torch import save as serialise

    from effnet.weights.layouts import NATIVE

    spec = network.spec
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    if {key: tuple(tensor.shape) for key, tensor in state.items()} != NATIVE.shapes(spec):
        raise ArgumentError(
            "network", type(network).__name__, "must have the tensors of its spec; another norm has not."
        )
    blob = serialise(state)
    config = BundleConfig(
        spec,
        network.policy,
        input or InputSpec(spec.resolution, round(spec.resolution * 8 / 7)),
        _checked_classes(classes, spec),
        source,
        dict(metrics or {}),
        hashlib.sha256(blob).hexdigest(),
    )
    values = {"format": FORMAT, "effnet": effnet.__version__, **dataclasses.asdict(config)}

    target = Path(folder)
    if target.exists() and not _is_replaceable(target):
        raise BundleError(f"{target} exists and is no bundle; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        (temporary / WEIGHTS).write_bytes(blob)
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def read_config(folder: str | Path) -> BundleConfig:
    """What a bundle says of itself, without opening its weights.

    Raises:
        BundleError: it is no bundle, comes from a newer effnet, or its config was damaged.
    """
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text())
        written, version = values.pop("format"), values.pop("effnet")
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is no bundle: it has no {CONFIG}") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BundleError(f"{path} is damaged or not effnet's ({type(error).__name__}: {error})") from error
    if written != FORMAT:
        raise BundleError(
            f"{folder} has format {written}, written by effnet {version}; this effnet reads {FORMAT}: upgrade"
        )
    try:
        config = read_fields(BundleConfig, values)
        spec = NetworkSpec.from_dict(values["spec"])
        return dataclasses.replace(
            config,
            spec=spec,
            policy=read_fields(NumericPolicy, values["policy"]),
            input=read_fields(InputSpec, values["input"]),
            classes=_checked_classes(values.get("classes"), spec),
        )
    except (ArgumentError, TypeError, ValueError) as error:
        raise BundleError(f"{path} was changed: {error}") from error


def open_bundle(folder: str | Path) -> Bundle:
    """The network of a bundle, in eval mode, with its context.

    Raises:
        BundleError: it is no bundle, was changed or cut short, or comes from a newer effnet.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from effnet.models.efficientnet import EfficientNet

    config = read_config(folder)
    path = Path(folder) / WEIGHTS
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(blob).hexdigest() != config.sha256:
        raise BundleError(f"{path} was changed or cut short: its sha256 is not the one in {CONFIG}")
    network = EfficientNet(config.spec, policy=config.policy)
    try:
        network.load_state_dict(load(blob))
    except (SafetensorError, RuntimeError) as error:
        raise BundleError(f"{path} does not hold the network that {CONFIG} describes") from error
    return Bundle(network.eval(), config)


def is_bundle(path: Path) -> bool:
    """Whether a folder says that it is a bundle."""
    try:
        return "format" in json.loads((path / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def _is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and (is_bundle(folder) or not any(folder.iterdir()))


def _checked_classes(classes: Sequence[str] | None, spec: NetworkSpec) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise ArgumentError("classes", classes, "must be a sequence of names.")
    if len(classes) != spec.num_classes:
        raise ArgumentError("classes", f"{len(classes)} names", f"must name the network's {spec.num_classes} outputs.")
    return tuple(classes)
