"""What is wrong with a data set before anything is trained on it, and the same data without that. No torch.

A mirror image counts as a copy, for training flips images anyway. Where it has another label, that may be right: a "d"
is a mirrored "b". So that is a warning, and both images stay.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from effnet.checking.findings import KINDS, Finding, Findings
from effnet.data.dataset import SPLIT_NAMES, SPLITS, Dataset, Sample
from effnet.data.duplicates import Duplicates, Progress, find_duplicates, united
from effnet.data.fingerprint import Fingerprint
from effnet.data.image import natural_resolution
from effnet.data.paths import SUFFIXES
from effnet.errors import ArgumentError, ImageError

TINY_CLASS = 10  # images
IMBALANCE = 10  # times as many images in the largest class as in the smallest
LONG = 3  # times as long as high, or the reverse
ONE_COLOUR = 2.0  # levels of 255: less spread is noise
SMALL = 40  # pixels; where images are smaller, a stride of 32 leaves one pixel or two
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr")
JPEG = {"MPO": "JPEG"}  # a JPEG with a second one behind it, as phones write for depth


def check(dataset: Dataset, *, resolution: int | None = None, progress: Progress | None = None) -> Findings:
    """Look at every file and every class.

    Args:
        dataset: the data, split or not.
        resolution: of the network that will see it, in pixels; None asks nothing about sizes.
        progress: called with the number of files read and of all.

    Raises:
        MissingExtraError: ImageHash is not installed.
    """
    found = find_duplicates([dataset.file(sample) for sample in dataset.samples], progress=progress)
    parts = dataset.splits or ("",)
    counted = Counter((sample.label, sample.split) for sample in dataset.samples)
    classes = {name: {part: counted[label, part] for part in parts} for label, name in enumerate(dataset.classes)}
    looks = [print for print in found.prints if isinstance(print, Fingerprint)]
    findings = [
        *_file_findings(dataset, found),
        *_copy_findings(dataset, found),
        *_class_findings(dataset, classes),
        *_size_findings(looks, resolution),
    ]
    findings.sort(key=lambda finding: list(KINDS).index(finding.kind))  # the order within a kind stays
    return Findings(len(dataset), classes, _sizes(looks), resolution, tuple(findings), found)


def clean(dataset: Dataset, findings: Findings) -> Dataset:
    """The data set without unreadable files, contradictions, leaks and copies; what is still alike shares a group.

    Of copies the one stays that is in test, else in val, else in train; there the one with the most pixels, then bytes,
    then the first by name. An image is only left out where one that it is directly a copy of stays, so of a film whose
    every frame resembles the next, some frames stay. All copies of an image with several labels are left out.

    Raises:
        ArgumentError: the findings are another data set's.
    """
    found = findings.duplicates
    if found.files != tuple(dataset.file(sample) for sample in dataset.samples):
        raise ArgumentError("findings", f"of {len(found.files)} files", "are of another data set; check this one.")
    bad = {path for kind in ("unreadable", "label_conflict") for finding in findings.of(kind) for path in finding.files}
    alike = defaultdict(set)
    for first, second, _ in _links(found):
        alike[first].add(second)
        alike[second].add(first)

    def rank(place: int) -> tuple[Any, ...]:
        sample, look = dataset.samples[place], found.prints[place]
        assert isinstance(look, Fingerprint)
        part = SPLITS.index(sample.split) if sample.split else 0
        return -part, -look.width * look.height, -look.size_bytes, sample.path

    kept: dict[int, set[int]] = defaultdict(set)  # the labels that are kept of each content
    chosen = []
    for place in sorted((p for p, s in enumerate(dataset.samples) if s.path not in bad), key=rank):
        content, label = found.contents[place], dataset.samples[place].label
        if not any(label in kept[other] for other in (content, *alike[content])):
            kept[content].add(label)
            chosen.append(place)
    return dataclasses.replace(dataset, samples=tuple(_grouped(dataset, found, sorted(chosen))))


def _grouped(dataset: Dataset, found: Duplicates, chosen: list[int]) -> Iterator[Sample]:
    """The chosen samples, those that are alike or of one group before with one group's name."""
    names: dict[object, int] = {}
    links: list[tuple[int, int]] = []
    for at, place in enumerate(chosen):
        own = dataset.samples[place].group
        links += [(at, names.setdefault(name, at)) for name in (found.groups[place], own) if name != ""]
    roots = united(len(chosen), links)
    sizes = Counter(roots)
    given: dict[int, str] = {}
    for root, place in zip(roots, chosen, strict=True):
        if name := dataset.samples[place].group:
            given.setdefault(root, name)
    for root, place in zip(roots, chosen, strict=True):
        group = given.get(root) or (dataset.samples[chosen[root]].path if sizes[root] > 1 else "")
        yield dataclasses.replace(dataset.samples[place], group=group)


def _file_findings(dataset: Dataset, found: Duplicates) -> Iterator[Finding]:
    """What is wrong with single files."""
    formats = Image.registered_extensions()
    for sample, look in zip(dataset.samples, found.prints, strict=True):
        file = (sample.path,)
        if isinstance(look, ImageError):
            yield Finding("unreadable", file, str(look))
            continue
        named = formats.get(Path(sample.path).suffix.lower())
        kind = JPEG.get(look.kind, look.kind)
        if look.spread < ONE_COLOUR:
            yield Finding("one_colour", file, f"its colours vary by {look.spread:.1f} of 255 levels")
        if max(look.width, look.height) > LONG * min(look.width, look.height):
            yield Finding("long", file, f"{look.width} x {look.height} pixels")
        if look.turned:
            yield Finding("turned", file, f"upright it has {look.width} x {look.height} pixels")
        if named is not None and kind != JPEG.get(named, named):
            yield Finding("misnamed", file, f"is {kind}, its name says {named}")
        if look.frames > 1 and look.kind not in JPEG:
            yield Finding("animated", file, f"{look.frames} frames")
        if look.mode not in PLAIN_MODES:
            yield Finding("deep", file, f"{look.mode} pixels")


def _links(found: Duplicates) -> Iterator[tuple[int, int, bool]]:
    """Contents that are alike, each with itself where it has copies, and whether one is mirrored."""
    yield from ((content, content, False) for content, places in found.copies.items() if len(places) > 1)
    yield from ((pair.first, pair.second, pair.mirrored) for pair in found.pairs)


def _copy_findings(dataset: Dataset, found: Duplicates) -> Iterator[Finding]:
    """Copies with several labels, in several parts, in one class and part: one finding for each connected group."""
    gathered: dict[tuple[str, int, str, int], dict[int, None]] = defaultdict(dict)
    for first, second, mirrored in _links(found):
        both = [*found.copies[first], *(found.copies[second] if second != first else ())]
        labels = {dataset.samples[place].label for place in both}
        group = found.groups[first]
        if len(labels) > 1 and not mirrored:
            gathered["label_conflict", group, "", -1] |= dict.fromkeys(both)
            continue
        if len(labels) > 1:
            gathered["mirrored_label", group, "", -1] |= dict.fromkeys(both)
        for label in sorted(labels):
            own = [place for place in both if dataset.samples[place].label == label]
            parts = Counter(dataset.samples[place].split for place in own)
            if len(parts) > 1:
                gathered["leak", group, "", label] |= dict.fromkeys(own)
            for part, count in parts.items():
                if count > 1:
                    inside = [place for place in own if dataset.samples[place].split == part]
                    gathered["duplicate", group, part, label] |= dict.fromkeys(inside)
    likeness = {(pair.first, pair.second): pair for pair in found.pairs}
    for (kind, *_), places in gathered.items():
        ordered = _telling(dataset, kind, list(places))
        ends = sorted(found.contents[place] for place in ordered[:2])
        pair = likeness.get((ends[0], ends[1]))
        words = "mirrored" if pair and pair.mirrored else "alike"
        message = (
            "the same file" if found.is_exact(ordered[:2]) else words + (f" ({pair.likeness:.3f})" if pair else "")
        )
        yield Finding(kind, tuple(dataset.samples[place].path for place in ordered), message)


def _telling(dataset: Dataset, kind: str, places: list[int]) -> list[int]:
    """The places in the order of their names, but the first two differ in what is wrong."""
    ordered = sorted(places, key=lambda place: dataset.samples[place].path)
    quality = "label" if kind in ("label_conflict", "mirrored_label") else "split"
    first = getattr(dataset.samples[ordered[0]], quality)
    other = next((place for place in ordered if getattr(dataset.samples[place], quality) != first), ordered[1])
    return [ordered[0], other, *(place for place in ordered[1:] if place != other)]


def _class_findings(dataset: Dataset, classes: dict[str, dict[str, int]]) -> Iterator[Finding]:
    """Classes that are missing, empty, tiny or far from as large as others."""
    for name in _empty_folders(dataset):
        yield Finding("empty_class", (name,), "holds no image")
    learned = "train" if "train" in dataset.splits else ""
    for name, parts in classes.items():
        lacking = [part for part, count in parts.items() if not count]
        if lacking == list(parts):
            yield Finding("empty_class", (name,), "has no image")
        elif lacking:
            yield Finding("missing_class", (name,), f"not in {' and '.join(lacking)}")
        count = parts.get(learned, sum(parts.values()))
        if 0 < count < TINY_CLASS:
            yield Finding("tiny_class", (name,), f"{count} image{'s' if count > 1 else ''}")
    counts = {name: count for name, parts in classes.items() if (count := parts.get(learned, sum(parts.values())))}
    if counts:
        few, many = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
        if counts[many] > IMBALANCE * counts[few]:
            words = f"{counts[many]:,} and {counts[few]:,} images: 1 in {counts[many] / counts[few]:.0f}"
            yield Finding("unbalanced", (many, few), words)


def _empty_folders(dataset: Dataset) -> Iterator[str]:
    """Class folders without an image, where the data set is one of folders."""
    parents = set()
    for sample in dataset.samples:
        *above, label = Path(sample.path).parts[:-1][: 2 if sample.split else 1] or ("",)
        is_part = [SPLIT_NAMES.get(name.lower()) for name in above] == ([sample.split] if sample.split else [])
        if not is_part or label != dataset.classes[sample.label]:
            return
        parents.add(Path(*above))
    known = {Path(sample.path).parts[: 2 if sample.split else 1] for sample in dataset.samples}
    for parent in sorted(parents):
        for folder in sorted((dataset.root / parent).iterdir()):
            path = parent / folder.name
            named = folder.is_dir() and not folder.name.startswith(".") and path.parts not in known
            if named and not any(file.suffix.lower() in SUFFIXES for file in folder.rglob("*")):
                yield path.as_posix()


def _sizes(looks: list[Fingerprint]) -> dict[str, tuple[int, int]]:
    if not looks:
        return {}
    ordered = sorted((look.width * look.height, look.width, look.height) for look in looks)
    median = tuple(round(statistics.median(getattr(look, side) for look in looks)) for side in ("width", "height"))
    return {"median": (median[0], median[1]), "smallest": ordered[0][1:], "largest": ordered[-1][1:]}


def _size_findings(looks: list[Fingerprint], resolution: int | None) -> Iterator[Finding]:
    """Images that are far smaller than what the network sees."""
    if resolution is None or not looks:
        return
    short = round(statistics.median(min(look.width, look.height) for look in looks))
    if short < resolution / 2:
        better = natural_resolution(short)
        words = f"half of the images have a shorter side of at most {short} px, the network sees {resolution}: train "
        if short <= SMALL:
            words += f"with --resolution {better} --stem-stride 1, which keeps the size in the stem"
        else:
            words += f"with --resolution {better}"
        yield Finding("resolution", (), words)
