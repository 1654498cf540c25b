"""Where a run starts: the data in parts, and the network with its weights, input and classes."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.specfile import SUFFIXES
from effnet.arch.variants import BASELINES, VARIANTS
from effnet.arch.variants import spec as make_spec
from effnet.data.dataset import SIZE, Dataset, file_size, manifest, match_classes, read_data, read_manifest, split_data
from effnet.data.duplicates import find_duplicates
from effnet.data.image import identify, natural_resolution, open_photo
from effnet.errors import ArgumentError, DataError, DownloadError, ImageError, TrainingError, UnknownNameError
from effnet.files import write_text
from effnet.models.efficientnet import EfficientNet
from effnet.progress import Progress
from effnet.training.module import init_classifier, set_momentum
from effnet.training.recipe import Recipe
from effnet.training.run import SPLIT, RunPlan, Settings, versions
from effnet.weights.bundle import Bundle, is_bundle
from effnet.weights.inherit import inherit
from effnet.weights.load import open_model

SAMPLED = 60  # images of which the size is read


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts from."""

    network: EfficientNet
    input: InputSpec
    source: str  # where the weights came from
    notes: tuple[str, ...]  # what the user should know
    trained: bool  # whether it has weights from elsewhere
    image_side: int  # the shorter side of the images in pixels, the median


def find_start(settings: Settings, recipe: Recipe, data: Dataset, progress: Progress) -> StartingPoint:
    """The network to train, its outputs in the order of the data's classes.

    Raises:
        ArgumentError, UnknownNameError, CheckpointError, BundleError, DownloadError: the model cannot be used.
        DataError: the data has no images.
    """
    model = settings.model
    bundle = is_bundle(Path(model))
    if bundle and settings.init:
        raise ArgumentError("init", settings.init, f"cannot be used with {model}, which has weights.")
    no_weights = Path(model).suffix.lower() in SUFFIXES or model.lower() in BASELINES
    untrained = bool(no_weights or settings.init or (recipe.fresh and not bundle))
    weights = settings.init if untrained else model
    given = None if weights is None else _open("init" if settings.init else "model", weights, progress)
    spec = make_spec(
        make_spec(model) if untrained or given is None else given.config.spec,
        num_classes=len(data.classes),
        resolution=settings.resolution,
        stem_stride=settings.stem_stride,
        dropout=recipe.dropout,
        drop_connect=recipe.drop_connect,
    )
    side = short_side(data)
    network = EfficientNet(spec, policy=NumericPolicy() if given is None else given.config.policy)
    init_classifier(network)
    notes = _size_notes(spec, side)
    if given is not None:
        unnamed = tuple(f"output {number}" for number in range(given.config.spec.num_classes))
        notes.append(str(inherit(network, given.network, classes=(data.classes, given.config.classes or unnamed))))
        source = given.config.source or str(weights)
    else:
        if not recipe.bn_momentum:
            raise ArgumentError("recipe", recipe.name, f"needs weights, and {model} has none: take scratch.")
        source = f"from scratch ({spec.name})"
        why = "it has no weights" if no_weights else f"the recipe {recipe.name} uses none"
        notes.append(f"{model} starts from scratch: {why}")
    set_momentum(network, recipe.bn_momentum)
    input_spec = InputSpec() if given is None else given.config.input
    input_spec = dataclasses.replace(input_spec, fit=settings.fit or input_spec.fit)
    return StartingPoint(network, _input(spec, input_spec, side), source, tuple(notes), given is not None, side)


def _open(argument: str, model: str, progress: Progress) -> Bundle:
    try:
        return open_model(model, progress=progress)
    except DownloadError as error:
        raise DownloadError(f"{error}; to train it from scratch: --recipe scratch") from error
    except UnknownNameError as error:
        raise UnknownNameError(argument, model, (*VARIANTS, "a bundle", "a spec.yaml")) from error


def _input(spec: NetworkSpec, input_spec: InputSpec, side: int) -> InputSpec:
    """How images are prepared: as the weights expect, at the run's resolution, not enlarged only to be cropped."""
    size = spec.resolution
    enlarged = input_spec.fit == "crop" and side <= size
    resize = size if enlarged else max(size, round(size * input_spec.resize / input_spec.size))
    return dataclasses.replace(input_spec.with_channels(spec.in_channels), size=size, resize=resize)


def _size_notes(spec: NetworkSpec, side: int) -> list[str]:
    size, notes = spec.resolution, []
    if side * 2 <= size:
        natural = natural_resolution(side)
        cost = f"{(size / natural) ** 2:.0f} times the work of --resolution {natural}"
        notes.append(f"the images have {side} px on their shorter side and are enlarged to {size} px: {cost}")
    if spec.final_size == 1:
        notes.append(f"at {size} px the last feature map has one pixel, which is little; --stem-stride 1 makes it four")
    return notes


def short_side(data: Dataset) -> int:
    """The median shorter side in pixels of some images, spread over the data set."""
    sides: list[int] = []
    for sample in data.samples[:: max(1, len(data) // SAMPLED)]:
        with suppress(ImageError):
            sides.append(min(open_photo(data.file(sample)).size))
    return round(statistics.median(sides)) if sides else 0


def write_split(path: str, settings: Settings, folder: Path, progress: Progress) -> tuple[str, ...]:
    """Split the data, near-duplicates and groups together, write split.csv, and return the classes.

    Raises:
        DataError: the data cannot be trained with.
    """
    data = read_data(path)
    if "val" in data.splits:
        _refuse_broken(list(_unreadable(data, progress)), path)
    else:
        found = find_duplicates([data.file(sample) for sample in data.samples], progress=progress)
        prints = zip(found.files, found.fingerprints, strict=True)
        broken = [f"{file} {error}" for file, error in prints if isinstance(error, ImageError)]
        _refuse_broken(broken, path)
        data = split_data(data, val=settings.val, test=settings.test, seed=settings.seed, groups=found.groups)
        groups = len(set(found.groups))
        if copies := len(data) - groups:
            text = f"{copies} images are near-duplicates of others; they stay in one split with them"
            splits = {(group, sample.split) for group, sample in zip(found.groups, data.samples, strict=True)}
            if leaks := len(splits) - groups:
                text += f", except {leaks} groups that the data itself divides, which flatters the figures"
            progress.message(text)
    if "val" not in data.splits:
        raise DataError(f"{path} leaves no image for validation at --val {settings.val:g}: take a larger share")
    if len(data.subset("train").classes) < 2:
        raise DataError(f"{path} has one class; there is nothing to tell apart")
    write_text(folder / SPLIT, manifest(data, sizes=True))
    return data.classes


def _unreadable(data: Dataset, progress: Progress) -> Iterator[str]:
    """The files whose first bytes already show that they are not images, each with the reason."""
    for done, sample in enumerate(data.samples, start=1):
        try:
            with data.file(sample).open("rb") as file:
                identify(file)
        except (ImageError, OSError) as error:
            yield f"{data.file(sample)} {error}"
        progress.update("reading the images", done, len(data))


def _refuse_broken(broken: Sequence[str], data: str) -> None:
    if broken:
        others = f", and {len(broken) - 1} other images" if len(broken) > 1 else ""
        raise DataError(f"{broken[0]}{others}. A list without what cannot be read: effnet check {data} --fix clean.csv")


def read_split(path: str, folder: Path, classes: tuple[str, ...]) -> Dataset:
    """The data of a run by its split.csv, with the run's order of classes."""
    root = Path(path)
    data = read_manifest(folder / SPLIT, root if root.is_dir() else root.parent)
    return match_classes(data, classes, "the run's")


def check_resumed(plan: RunPlan, folder: Path, began: Mapping[str, str], data: Dataset, world: int) -> list[str]:
    """What differs from when the run began, in sentences.

    Raises:
        TrainingError: images are gone, or the number of processes changed, so the run cannot go on.
    """
    if world != plan.processes:
        raise TrainingError(f"the run began with {plan.processes} processes and is resumed with {world}")
    with (folder / SPLIT).open(newline="", encoding="utf-8") as file:
        sizes = {row["path"]: row.get(SIZE) for row in csv.DictReader(file)}
    now = {sample.path: file_size(data.file(sample)) for sample in data.samples}
    if gone := [path for path, size in now.items() if size < 0]:
        raise TrainingError(f"{len(gone):,} images of {plan.data} are gone, such as {gone[0]}: put them back")
    current = versions()
    differences = [
        f"{name} was {began.get(name)!r} and is {current.get(name)!r}"
        for name in sorted(began.keys() | current.keys())
        if began.get(name) != current.get(name)
    ]
    if changed := [path for path, size in now.items() if sizes[path] not in (None, str(size))]:
        differences.append(f"{len(changed):,} images have another size than when the run began, such as {changed[0]}")
    return differences
