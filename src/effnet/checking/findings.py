"""Faults of a data set: their kinds, how they are found, and the data without them. No torch.

An error makes training fail or its figures wrong; a warning probably costs accuracy; a note is good to know.

A mirror image counts as a copy, since training flips images anyway. Its label may rightly differ, as a mirrored "b" is
a "d": this is only a warning, and both images stay.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from effnet.data.bit_depth import describe_ranges
from effnet.data.dataset import SPLITS, Dataset, Sample, explain_one_class, missing_classes, split_data
from effnet.data.duplicates import Duplicates, connect, find_duplicates
from effnet.data.fingerprint import MOST_PAGES, Fingerprint
from effnet.data.folders import EMPTY, class_name
from effnet.data.image import natural_resolution
from effnet.data.shards import SHARD
from effnet.errors import ArgumentError, DataError, ImageError
from effnet.fields import write_count
from effnet.progress import SILENT, Progress

Severity = Literal["error", "warning", "note"]

KINDS: dict[str, tuple[Severity, str, str]] = {
    # kind: severity, name in the singular and plural, advice
    "unreadable": ("error", "unreadable file(s)", "Replace them or leave them out: training needs every image."),
    "shard": ("error", "damaged shard(s)", "The other images are used; run the same effnet pack again to rewrite it."),
    "label_conflict": ("error", "image(s) with several labels", "Decide which is right; --fix leaves all copies out."),
    "leak": (
        "error",
        "image(s) in several splits",
        "They make results look too good; --fix keeps them in test, else in val.",
    ),
    "one_class": ("error", "data set(s) of one class", "There is nothing to tell apart."),
    "passed_over": ("warning", "file(s) passed over", "Only images in class folders are read."),
    "missing_class": (
        "warning",
        "class(es) missing from a split",
        "Add images: the class is not learned or not measured.",
    ),
    "empty_class": ("warning", "class folder(s) without images", "Ignored; add images or remove the folder."),
    "tiny_class": ("warning", "tiny class(es)", "So few images teach and measure little: add some, or merge classes."),
    "unbalanced": ("warning", "imbalance(s)", "Look at the figures of each class; train with --class-weights."),
    "resolution": ("warning", "resolution(s) too high", "Enlarging adds work but no detail."),
    "mirrored_label": ("warning", "mirror image(s) with another label", "If sides matter, train with --set flip=0."),
    "duplicate": ("warning", "image(s) with copies in the same class", "Each copy counts again; --fix keeps one."),
    "ranges": (
        "warning",
        "data set(s) with several ranges of pixel values",
        "Dark images may be brightened; save files that state their bit depth.",
    ),
    "one_colour": ("warning", "image(s) of one colour", "They show nothing: look at them, and leave them out."),
    "long": ("warning", "long image(s)", "A network sees a square: cut them up, or train with --fit pad."),
    "several_folders": ("note", "class(es) of several folders", "Their names differ only in blanks or Unicode forms."),
    "turned": ("note", "image(s) turned by EXIF", "effnet shows them upright; other programs may not."),
    "misnamed": ("note", "image(s) named as another format", "effnet reads them; programs that trust names will fail."),
    "animated": ("note", "image(s) with several frames", "Only the first one is used."),
    "deep": ("note", "image(s) of a rare pixel type", "Converted to 8-bit RGB; other programs may clip them."),
}
COPIES = ("label_conflict", "leak", "mirrored_label", "duplicate")  # kinds that concern several images, worst first

TINY_CLASS = 10  # images
IMBALANCE = 10  # times as many images in the largest class as in the smallest
LONG = 3  # ratio of the sides
ONE_COLOUR = 2.0  # levels of 255: a smaller spread is noise
SMALL = 40  # pixels; a stride of 32 leaves only one or two pixels of smaller images
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr")
JPEG = {"MPO": "JPEG"}  # a JPEG followed by a second one, as phones write for depth


@dataclass(frozen=True)
class Finding:
    """One fault."""

    kind: str  # one of KINDS
    files: tuple[str, ...]  # paths as in the data set; the first two show the fault
    message: str

    @property
    def severity(self) -> Severity:
        """Error, warning or note."""
        return KINDS[self.kind][0]

    @property
    def advice(self) -> str:
        """What to do about it."""
        return KINDS[self.kind][2]


@dataclass(frozen=True)
class Findings:
    """All faults of a data set."""

    images: int
    classes: dict[str, dict[str, int]]  # images of each class in each split, or in "" if there are no splits
    sizes: dict[str, tuple[int, int]]  # median, smallest and largest width and height; empty without a readable image
    resolution: int | None
    findings: tuple[Finding, ...]  # worst kind first
    duplicates: Duplicates = dataclasses.field(repr=False)

    def of(self, kind: str) -> tuple[Finding, ...]:
        """The findings of one kind."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the fingerprints, for JSON."""
        rows = [vars(each) | {"severity": each.severity, "advice": each.advice} for each in self.findings]
        numbers = {"images": self.images, "errors": self.errors, "resolution": self.resolution}
        return numbers | {"classes": self.classes, "sizes": self.sizes, "findings": rows}


def check(dataset: Dataset, *, resolution: int | None = None, progress: Progress = SILENT) -> Findings:
    """Check every file and class, and the sizes if the network's `resolution`, in pixels, is given."""
    found = find_duplicates([dataset.file(sample) for sample in dataset.samples], progress=progress)
    splits = dataset.splits or ("",)
    counts = Counter((sample.label, sample.split) for sample in dataset.samples)
    classes = {name: {split: counts[label, split] for split in splits} for label, name in enumerate(dataset.classes)}
    readable = [each for each in found.fingerprints if isinstance(each, Fingerprint)]
    findings = [
        *_file_findings(dataset, found),
        *_copy_findings(dataset, found),
        *_folder_findings(dataset),
        *_class_findings(dataset, classes, found.groups),
        *_size_findings(readable, resolution),
    ]
    findings.sort(key=lambda finding: list(KINDS).index(finding.kind))  # keeps the order within a kind
    return Findings(len(dataset), classes, _sizes(readable), resolution, tuple(findings), found)


def clean(dataset: Dataset, findings: Findings) -> Dataset:
    """The data set without unreadable files, contradictions, leaks and copies; remaining similar images share a group.

    One of several copies stays: in test, else in val, else in train; there the one with the most pixels, then bytes,
    then the first by name. An image is left out only if a direct copy of it stays, so some frames of a film stay even
    if every frame resembles the next. All copies of an image with several labels are left out.

    Raises:
        ArgumentError: the findings are for another data set.
    """
    found = findings.duplicates
    if found.files != tuple(dataset.file(sample) for sample in dataset.samples):
        raise ArgumentError("findings", f"of {len(found.files)} files", "are for another data set; check this one.")
    bad = {path for kind in ("unreadable", "label_conflict") for finding in findings.of(kind) for path in finding.files}
    alike = defaultdict(set)
    for first, second, _ in _links(found):
        alike[first].add(second)
        alike[second].add(first)

    def rank(index: int) -> tuple[Any, ...]:
        sample, fingerprint = dataset.samples[index], found.fingerprints[index]
        assert isinstance(fingerprint, Fingerprint)
        split = SPLITS.index(sample.split) if sample.split else 0
        return -split, -fingerprint.width * fingerprint.height, -fingerprint.size_bytes, sample.path

    kept: dict[int, set[int]] = defaultdict(set)  # labels kept for each content
    indices = []
    for index in sorted((i for i, s in enumerate(dataset.samples) if s.path not in bad), key=rank):
        content, label = found.contents[index], dataset.samples[index].label
        if not any(label in kept[other] for other in (content, *alike[content])):
            kept[content].add(label)
            indices.append(index)
    return dataclasses.replace(dataset, samples=tuple(_group_copies(dataset, found, sorted(indices))))


def _group_copies(dataset: Dataset, found: Duplicates, indices: Sequence[int]) -> Iterator[Sample]:
    """The samples at `indices`; similar ones, and those of one group, get the same group."""
    samples = [dataset.samples[index] for index in indices]
    first: dict[object, int] = {}
    links = []
    for at, (index, sample) in enumerate(zip(indices, samples, strict=True)):
        links += [(at, first.setdefault(name, at)) for name in (found.groups[index], sample.group) if name != ""]
    roots = connect(len(samples), links)
    sizes, names = Counter(roots), dict[int, str]()
    for root, sample in zip(roots, samples, strict=True):
        if sample.group:
            names.setdefault(root, sample.group)
    for root, sample in zip(roots, samples, strict=True):
        yield dataclasses.replace(sample, group=names.get(root) or (samples[root].path if sizes[root] > 1 else ""))


def _file_findings(dataset: Dataset, found: Duplicates) -> Iterator[Finding]:
    """Faults of single files, and pixel ranges that differ between files."""
    ranges: dict[int, list[str]] = defaultdict(list)
    formats = Image.registered_extensions()
    for sample, fingerprint in zip(dataset.samples, found.fingerprints, strict=True):
        file = (sample.path,)
        if isinstance(fingerprint, ImageError):
            yield Finding("unreadable", file, str(fingerprint))
            continue
        named = formats.get(Path(sample.path).suffix.lower())
        format = JPEG.get(fingerprint.format, fingerprint.format)
        if fingerprint.spread < ONE_COLOUR:
            yield Finding("one_colour", file, f"its colours vary by {fingerprint.spread:.1f} of 255 levels")
        if max(fingerprint.width, fingerprint.height) > LONG * min(fingerprint.width, fingerprint.height):
            yield Finding("long", file, f"{fingerprint.width} x {fingerprint.height} pixels")
        if fingerprint.turned:
            yield Finding("turned", file, f"when upright, {fingerprint.width} x {fingerprint.height} pixels")
        if named is not None and format != JPEG.get(named, named):
            yield Finding("misnamed", file, f"is {format}, but its name says {named}")
        if fingerprint.frames > 1 and fingerprint.format not in JPEG:
            more = " or more" if fingerprint.frames == MOST_PAGES else ""
            yield Finding("animated", file, f"{fingerprint.frames} frames{more}")
        if fingerprint.mode not in PLAIN_MODES or fingerprint.range:
            values = f", read from 0 ... {fingerprint.range:,}" if fingerprint.range else ""
            yield Finding("deep", file, f"{fingerprint.mode} pixels{values}")
        if fingerprint.range:
            ranges[fingerprint.range].append(sample.path)
    if message := describe_ranges(top for top, paths in ranges.items() for _ in paths):
        commonest = sorted(ranges.values(), key=len, reverse=True)
        yield Finding("ranges", tuple(paths[0] for paths in commonest), message)


def _links(found: Duplicates) -> Iterator[tuple[int, int, bool]]:
    """Pairs of similar contents, and of contents that have copies with themselves; whether one is mirrored."""
    yield from ((content, content, False) for content, indices in found.copies.items() if len(indices) > 1)
    yield from ((pair.first, pair.second, pair.mirrored) for pair in found.pairs)


def _copy_findings(dataset: Dataset, found: Duplicates) -> Iterator[Finding]:
    """Copies with several labels, in several splits, or in one class and split: one finding for each group."""
    gathered: dict[tuple[str, int, str, int], dict[int, None]] = defaultdict(dict)
    for first, second, mirrored in _links(found):
        both = [*found.copies[first], *(found.copies[second] if second != first else ())]
        labels = {dataset.samples[index].label for index in both}
        group = found.groups[first]
        if len(labels) > 1:
            gathered["mirrored_label" if mirrored else "label_conflict", group, "", -1] |= dict.fromkeys(both)
            if not mirrored:
                continue
        for label in sorted(labels):
            own = [index for index in both if dataset.samples[index].label == label]
            splits = Counter(dataset.samples[index].split for index in own)
            if len(splits) > 1:
                gathered["leak", group, "", label] |= dict.fromkeys(own)
            for split, count in splits.items():
                if count > 1:
                    inside = [index for index in own if dataset.samples[index].split == split]
                    gathered["duplicate", group, split, label] |= dict.fromkeys(inside)
    pairs = {(pair.first, pair.second): pair for pair in found.pairs}
    for (kind, *_), indices in gathered.items():
        ordered = _put_in_order(dataset, kind, list(indices))
        first, second = sorted(found.contents[index] for index in ordered[:2])
        pair = pairs.get((first, second))
        message = "mirrored" if pair and pair.mirrored else "alike"
        message += f" ({pair.similarity:.3f})" if pair else ""
        message = "the same file" if found.is_exact(ordered[:2]) else message
        yield Finding(kind, tuple(dataset.samples[index].path for index in ordered), message)


def _put_in_order(dataset: Dataset, kind: str, indices: list[int]) -> list[int]:
    """Sort by path, but put two first that show the fault: different labels or splits."""
    ordered = sorted(indices, key=lambda index: dataset.samples[index].path)
    quality = "label" if kind in ("label_conflict", "mirrored_label") else "split"
    first = getattr(dataset.samples[ordered[0]], quality)
    other = next((index for index in ordered if getattr(dataset.samples[index], quality) != first), ordered[1])
    return [ordered[0], other, *(index for index in ordered[1:] if index != other)]


def _folder_findings(dataset: Dataset) -> Iterator[Finding]:
    """Files passed over, and folders that became one class."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for path, reason in dataset.passed_over:
        reasons[reason].append(path)
    for path in reasons.pop(EMPTY, []):
        yield Finding("empty_class", (path,), EMPTY)
    for reason, paths in sorted(reasons.items(), key=lambda item: -len(item[1])):
        yield Finding("shard" if reason.startswith(SHARD) else "passed_over", tuple(paths), reason)
    spellings: dict[str, dict[str, None]] = {name: {} for name in dataset.classes}
    for sample in dataset.samples:
        name = dataset.classes[sample.label]
        spellings[name].update((part, None) for part in sample.path.split("/")[:-1] if class_name(part) == name)
    for name, found in spellings.items():
        if len(found) > 1:
            yield Finding("several_folders", (name,), f"from the folders {', '.join(map(ascii, found))}")


def _class_findings(dataset: Dataset, classes: dict[str, dict[str, int]], groups: Sequence[int]) -> Iterator[Finding]:
    """Classes that are missing, alone, tiny or far smaller than others."""
    if len(dataset.classes) == 1:
        yield Finding("one_class", dataset.classes, explain_one_class(dataset))
    learned = "train" if "train" in dataset.splits else ""
    counts = {name: splits.get(learned, sum(splits.values())) for name, splits in classes.items()}
    for name, splits in classes.items():
        if not any(splits.values()):
            yield Finding("empty_class", (name,), "has no image")
    planned, groups_of = dataset, defaultdict[str, list[int]](list)
    with suppress(DataError):  # without a train split nothing can be trained
        planned = split_data(dataset, groups=groups)
    for sample, group in zip(dataset.samples, groups, strict=True):
        groups_of[dataset.classes[sample.label]].append(group)
    for name, lacking in missing_classes(planned).items():
        own, message = groups_of[name], f"not in {' and '.join(lacking)}"
        if not set(lacking) <= set(dataset.splits):
            alike = f", {len(set(own)):,} if near-duplicates count once" if len(set(own)) < len(own) else ""
            message = f"{write_count(len(own), 'image')}{alike}: training leaves none for {' and '.join(lacking)}"
        yield Finding("missing_class", (name,), message)
    for name, count in counts.items():
        if 0 < count < TINY_CLASS:
            yield Finding("tiny_class", (name,), write_count(count, "image"))
    filled = [name for name in counts if counts[name]]
    if filled:
        few, many = min(filled, key=counts.__getitem__), max(filled, key=counts.__getitem__)
        if counts[many] > IMBALANCE * counts[few]:
            message = f"{counts[many]:,} and {counts[few]:,} images: {counts[many] / counts[few]:.0f} to 1"
            yield Finding("unbalanced", (many, few), message)


def _sizes(fingerprints: Sequence[Fingerprint]) -> dict[str, tuple[int, int]]:
    if not fingerprints:
        return {}
    sides = [(each.width, each.height) for each in fingerprints]
    sizes = sorted(sides, key=lambda size: (math.prod(size), size))
    width, height = (round(statistics.median(sides)) for sides in zip(*sizes, strict=True))
    return {"median": (width, height), "smallest": sizes[0], "largest": sizes[-1]}


def _size_findings(fingerprints: Sequence[Fingerprint], resolution: int | None) -> Iterator[Finding]:
    """Images that are far smaller than the network's resolution."""
    if resolution is None or not fingerprints:
        return
    short = round(statistics.median(min(each.width, each.height) for each in fingerprints))
    if short < resolution / 2:
        message = f"half of the images have a shorter side of at most {short} px, the network sees {resolution}: train "
        message += f"with --resolution {natural_resolution(short)}"
        if short <= SMALL:
            message += " --stem-stride 1, which keeps the size in the stem"
        yield Finding("resolution", (), message)
