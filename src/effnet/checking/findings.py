"""What can be wrong with a data set, how bad it is and what to do about it; and what was found in one.

An error makes a training fail or its figures wrong; a warning probably costs accuracy; a note is good to know.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from effnet.data.duplicates import Duplicates

Severity = Literal["error", "warning", "note"]

KINDS: dict[str, tuple[Severity, str, str]] = {
    # kind: severity, what one or several are called, what to do
    "unreadable": ("error", "unreadable file(s)", "Replace them or leave them out: training needs every image."),
    "label_conflict": (
        "error",
        "image(s) with more than one label",
        "Decide which class is right; --fix leaves all copies out.",
    ),
    "leak": (
        "error",
        "image(s) in more than one part",
        "Figures on images that were trained on are too good; --fix keeps them in test, else in val.",
    ),
    "missing_class": ("warning", "class(es) missing from a part", "Add images: it is not learned or not measured."),
    "empty_class": ("warning", "class folder(s) without images", "Passed over; add images or remove the folder."),
    "tiny_class": (
        "warning",
        "tiny class(es)",
        "Add images or merge classes: so few teach little and measure nothing.",
    ),
    "unbalanced": (
        "warning",
        "imbalance(s)",
        "Read each class's figures, not accuracy alone; train with --class-weights.",
    ),
    "resolution": ("warning", "resolution(s) too high", "Enlarging adds work and no detail."),
    "mirrored_label": (
        "warning",
        "mirror image(s) with another label",
        "Where left and right make the class, as in letters and arrows, train with --set flip=0.",
    ),
    "duplicate": (
        "warning",
        "image(s) with copies in the same class",
        "Each copy counts again in training and in figures; --fix keeps one.",
    ),
    "one_colour": ("warning", "image(s) of one colour", "There is nothing to see: look at them, leave them out."),
    "long": ("warning", "long image(s)", "A network sees a square: cut them up, or train with --fit pad."),
    "turned": ("note", "image(s) turned by EXIF", "effnet shows them upright; other programs may not."),
    "misnamed": ("note", "image(s) named as another format", "effnet looks inside; programs that do not will fail."),
    "animated": ("note", "image(s) with several frames", "Only the first one is used."),
    "deep": ("note", "image(s) of a rare pixel type", "Converted to 8 bits of RGB; other programs may clip them."),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str  # one of KINDS
    files: tuple[str, ...]  # paths as the data set has them; the first two show what is wrong
    message: str  # what it is, of this one

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return KINDS[self.kind][0]

    @property
    def advice(self) -> str:
        """What to do about it."""
        return KINDS[self.kind][2]


@dataclass(frozen=True)
class Findings:
    """Everything that was found in a data set."""

    images: int
    classes: dict[str, dict[str, int]]  # for each class its images in each part; one part "" where there is no split
    sizes: dict[str, tuple[int, int]]  # median, smallest and largest width and height; empty without a readable image
    resolution: int | None
    findings: tuple[Finding, ...]  # the worst kind first
    duplicates: Duplicates = dataclasses.field(repr=False)

    def of(self, kind: str) -> tuple[Finding, ...]:
        """The findings of one kind."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    @property
    def errors(self) -> int:
        """How many findings stop a training."""
        return sum(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the fingerprints, for JSON."""
        rows = [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "files": list(finding.files),
                "message": finding.message,
                "advice": finding.advice,
            }
            for finding in self.findings
        ]
        numbers = {"images": self.images, "errors": self.errors, "resolution": self.resolution}
        return numbers | {"classes": self.classes, "sizes": self.sizes, "findings": rows}
