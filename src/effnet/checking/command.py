"""effnet check: what is wrong with a data set, and a manifest of it without that."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from effnet import console
from effnet.console import FINDING, OK, Flag, Whole
from effnet.errors import ArgumentError
from effnet.fields import positive_int
from effnet.weights.bundle import read_network

if TYPE_CHECKING:
    from effnet.checking.findings import Finding, Findings
    from effnet.data.dataset import Dataset

NAMED = 3  # files of one finding that are named


def check(
    data: Path,
    *,
    model: str = "lite0",
    resolution: Whole | None = None,
    fix: Path | None = None,
    pictures: Path | None = None,
    limit: Whole = 3,
    json: Flag = False,
) -> int:
    """What is wrong with a data set before it is trained on: broken files, copies, leaks, contradictions, sizes.

    Copies are found where they were compressed again, resized, converted, brightened or mirrored.

    Args:
        data: A folder with a sub-folder for each class, split (train, val, test) or not, or a manifest.
        model: The network that will see the images: a variant (b0 ..., lite0 ...), a bundle or a spec.yaml.
        resolution: Its resolution in pixels, in place of the model's own.
        fix: Write a manifest without unreadable files, contradictions, leaks and copies to this .csv file, and leave
            the data as it is.
        pictures: Draw copies side by side into this .jpg or .png file.
        limit: How many examples of each kind to show.
        json: JSON with every finding instead of a summary.
    """
    limit = positive_int("limit", limit)
    sees = read_network(model).resolution if resolution is None else positive_int("resolution", resolution)
    _check_targets(data, fix, pictures)
    from effnet.checking.check import check as look
    from effnet.checking.check import clean
    from effnet.checking.pairs import draw_pairs
    from effnet.data.dataset import read_data, write_manifest

    with console.counting(f"reading and comparing {data}") as progress:
        dataset = read_data(data)
        findings = look(dataset, resolution=sees, progress=progress)
    cleaned = clean(dataset, findings) if fix is not None else None
    if fix is not None and cleaned is not None:
        fix.parent.mkdir(parents=True, exist_ok=True)
        write_manifest(cleaned, fix)
    drawn = draw_pairs(dataset, findings, pictures) if pictures is not None else 0
    if json:
        sys.stdout.write(console.json_text({"data": str(data)} | findings.to_dict()))
    else:
        _show(data, dataset, findings, model, limit)
    if cleaned is not None:
        console.remark(f"Written: {fix}, {len(cleaned):,} of {len(dataset):,} images")
    if pictures is not None:
        console.remark(f"Drawn: {pictures}, {drawn} pairs" if drawn else "Nothing to draw: no copies.")
    console.remark(f"Next: {_following(data, fix, pictures, findings)}")
    return FINDING if findings.errors else OK


def _check_targets(data: Path, fix: Path | None, pictures: Path | None) -> None:
    """Refuse what cannot be written before anything takes time."""
    if fix is not None:
        if fix.suffix.lower() != ".csv":
            raise ArgumentError("fix", str(fix), "must end in .csv: it is a manifest.")
        if fix.is_dir() or fix.resolve() == data.resolve():
            words = "is a folder; name a file." if fix.is_dir() else "is the data itself; name another file."
            raise ArgumentError("fix", str(fix), words)
    if pictures is not None:
        from effnet.checking.pairs import sheet_format

        sheet_format(pictures)
        if pictures.is_dir():
            raise ArgumentError("pictures", str(pictures), "is a folder; name a file.")


def _show(data: Path, dataset: Dataset, findings: Findings, model: str, limit: int) -> None:
    """One page: the parts, the sizes, then each kind of finding with a few examples."""
    from effnet.checking.findings import KINDS

    lines = []
    for part in dataset.splits or ("",):
        counts = {name: parts[part] for name, parts in findings.classes.items()}
        few, many = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
        words = f"{few}: {counts[few]:,}", f"{many}: {counts[many]:,}"
        lines.append((part or "all", f"{sum(counts.values()):,}", sum(map(bool, counts.values())), *words))
    title = f"{data}: {findings.images:,} images, {len(findings.classes)} classes"
    console.table(("<part", "images", "classes", "<smallest class", "<largest class"), lines, title=title)
    if findings.sizes:
        sizes = [f"{name} {wide} x {high}" for name, (wide, high) in findings.sizes.items()]
        console.paragraphs([f"Pixels: {', '.join(sizes)}; {model} sees {findings.resolution} x {findings.resolution}."])
    for kind, (severity, name, advice) in KINDS.items():
        found = findings.of(kind)
        if not found:
            continue
        sys.stdout.write("\n")
        several = "es" if "(es)" in name else "s"
        named = name.replace(f"({several})", several if len(found) > 1 else "")
        console.paragraphs([f"{severity}: {len(found):,} {named}. {advice}"])
        for finding in found[:limit]:
            sys.stdout.write(f"  {_example(finding)}\n")
        if len(found) > limit:
            sys.stdout.write(f"  ... and {len(found) - limit:,} more\n")
    if not findings.findings:
        sys.stdout.write("Nothing was found: every file can be read, and there are no copies.\n")


def _example(finding: Finding) -> str:
    """A finding in one line."""
    files = " = ".join(finding.files[:NAMED]) if len(finding.files) > 1 else "".join(finding.files)
    if finding.kind == "unbalanced":
        files = " and ".join(finding.files)
    more = f" = {len(finding.files) - NAMED:,} more" if len(finding.files) > NAMED else ""
    return f"{files}{more}: {finding.message}" if files else finding.message


def _following(data: Path, fix: Path | None, pictures: Path | None, findings: Findings) -> str:
    """The next command."""
    from effnet.checking.pairs import SHOWN

    if fix is not None:
        return f"effnet train {shlex.quote(str(fix))}"
    if any(findings.of(kind) for kind in SHOWN) and pictures is None:
        return f"effnet check {shlex.quote(str(data))} --pictures copies.jpg --fix clean.csv"
    if findings.errors:
        return f"effnet check {shlex.quote(str(data))} --fix clean.csv"
    return f"effnet train {shlex.quote(str(data))}"
