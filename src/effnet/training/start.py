"""Where a run starts: the network, its weights, how it sees images, and its classes in order."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path

from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.specfile import SUFFIXES
from effnet.arch.variants import BASELINES, VARIANTS
from effnet.arch.variants import spec as make_spec
from effnet.data.dataset import Dataset
from effnet.data.image import natural_resolution, open_photo
from effnet.errors import ArgumentError, DownloadError, ImageError, UnknownNameError
from effnet.models.efficientnet import EfficientNet
from effnet.training.module import init_classifier, set_momentum
from effnet.training.recipe import Recipe
from effnet.training.settings import Settings
from effnet.weights.bundle import Bundle, is_bundle
from effnet.weights.inherit import inherit
from effnet.weights.load import open_model

SAMPLED = 60  # images whose size is looked at


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    network: EfficientNet
    see: InputSpec
    source: str  # where the weights came from, in words
    words: tuple[str, ...]  # what a user should know
    trained: bool  # whether it has weights from elsewhere


def begin(settings: Settings, recipe: Recipe, data: Dataset) -> Start:
    """The network to train, its outputs in the order of the data's classes.

    Args:
        settings: the model, the weights to start from, the resolution.
        recipe: its rates and momentum.
        data: the data set, split.

    Raises:
        ArgumentError: a bundle and weights from elsewhere are both given, or the recipe needs weights.
        UnknownNameError, CheckpointError, BundleError, DownloadError: the model cannot be used.
        DataError: the data has no images.
    """
    bundle = is_bundle(Path(settings.model))
    if bundle and settings.init:
        raise ArgumentError("init", settings.init, f"is one start too many: {settings.model} has weights of its own.")
    unknown = Path(settings.model).suffix.lower() in SUFFIXES or settings.model.lower() in BASELINES
    untrained = unknown or (recipe.fresh and not bundle)
    words: list[str] = []
    if untrained or settings.init:
        base = make_spec(settings.model)
        given = None if settings.init is None else _open(settings.init)
    else:
        given = _open(settings.model)
        base = given.config.spec
    spec = make_spec(
        base,
        num_classes=len(data.classes),
        resolution=settings.resolution,
        stem_stride=settings.stem_stride,
        dropout=recipe.dropout,
        drop_connect=recipe.drop_connect,
    )
    see = InputSpec() if given is None else given.config.input
    if settings.fit is not None:
        see = dataclasses.replace(see, fit=settings.fit)
    see, said = _input(spec, see, data)
    words += said
    policy = NumericPolicy() if given is None else given.config.policy
    network = EfficientNet(spec, policy=policy)
    init_classifier(network)
    source = f"from scratch ({spec.name})"
    if given is not None:
        unnamed = tuple(f"output {number}" for number in range(given.config.spec.num_classes))
        report = inherit(network, given.network, classes=(data.classes, given.config.classes or unnamed))
        source = given.config.source or str(settings.init or settings.model)
        words.append(str(report))
    else:
        if not recipe.bn_momentum:
            raise ArgumentError("recipe", recipe.name, f"needs weights, and {settings.model} has none: take scratch.")
        why = "it has no weights" if unknown else f"the recipe {recipe.name} uses none"
        words.append(f"{settings.model} starts from scratch: {why}")
    set_momentum(network, recipe.bn_momentum)
    return Start(network, see, source, tuple(words), given is not None)


def _open(model: str) -> Bundle:
    try:
        return open_model(model)
    except DownloadError as error:
        raise DownloadError(f"{error}; to train it from scratch: --recipe scratch") from error
    except UnknownNameError as error:
        raise UnknownNameError("model", model, (*VARIANTS, "a bundle", "a spec.yaml")) from error


def _input(spec: NetworkSpec, see: InputSpec, data: Dataset) -> tuple[InputSpec, list[str]]:
    """How images are prepared: the same at the run's resolution, without enlarging before a crop."""
    see = see.with_channels(spec.in_channels)
    size = spec.resolution
    see = dataclasses.replace(see, size=size, resize=max(size, round(size * see.resize / see.size)))
    short = short_side(data)
    words = []
    if see.fit == "crop" and short <= size:
        see = dataclasses.replace(see, resize=size)
    if short * 2 <= size:
        natural = natural_resolution(short)
        words.append(
            f"the images are small: {short} px on their shorter side, enlarged to {size} px. That costs "
            f"{(size / natural) ** 2:.0f} times the work of --resolution {natural}"
        )
    if spec.final_size == 1:
        words.append(
            f"at {size} px the last feature map has one pixel, from which little is learned; with --stem-stride 1 it "
            "has four"
        )
    return see, words


def short_side(data: Dataset) -> int:
    """The median shorter side in pixels of some images, spread over the data set."""
    sides: list[int] = []
    step = max(1, len(data) // SAMPLED)
    for sample in data.samples[::step]:
        try:
            sides.append(min(open_photo(data.file(sample)).size))
        except ImageError:
            continue
    return round(statistics.median(sides)) if sides else 0
