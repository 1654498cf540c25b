"""effnet check: what is wrong with a data set, and a manifest of it without those images."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from effnet import console
from effnet.checking.findings import COPIES, KINDS, Finding, Findings, clean
from effnet.checking.findings import check as find
from effnet.console import FINDING, OK, Flag
from effnet.data.dataset import Dataset, read_data, write_manifest
from effnet.errors import ArgumentError
from effnet.fields import positive_int
from effnet.plots.contact_sheet import Cell, check_sheet, draw_sheet
from effnet.plots.style import GREY, INK, RED
from effnet.weights.bundle import read_network

NAMED = 3  # files of one finding in a line
CLASSES = 20  # that are named when images are left out, at most
PAIRS = 60  # copies on a sheet, at most


def check(
    data: Path,
    *,
    model: str = "lite0",
    resolution: int | None = None,
    fix: Path | None = None,
    pictures: Path | None = None,
    limit: int = 3,
    json: Flag = False,
) -> int:
    """Find what is wrong with a data set before training: broken files, copies, leaks, contradictions, sizes.

    Copies are found even if they were compressed again, resized, converted, brightened or mirrored.

    Args:
        data: A folder with a sub-folder for each class, split (train, val, test) or not, or a manifest.
        model: The network that will see the images: a variant (b0 ..., lite0 ...), a bundle or a spec.yaml.
        resolution: Its resolution in pixels, in place of the model's own.
        fix: Write a manifest without unreadable files, contradictions, leaks and copies to this .csv file; the data
            stays as it is.
        pictures: Draw copies side by side into this .jpg or .png file.
        limit: How many examples of each kind to show.
        json: JSON with every finding instead of a summary.
    """
    limit = positive_int("limit", limit)
    pixels = read_network(model).resolution if resolution is None else positive_int("resolution", resolution)
    if fix is not None:
        _check_manifest(fix, data)
    if pictures is not None:
        check_sheet("pictures", pictures)
    with console.Display(f"reading {data}") as progress:
        dataset = read_data(data)
        findings = find(dataset, resolution=pixels, progress=progress)
    if json:
        sys.stdout.write(console.json_text({"data": str(data)} | findings.to_dict()))
    else:
        _show(data, dataset, findings, model, limit)
    if fix is not None:
        cleaned = clean(dataset, findings)
        fix.parent.mkdir(parents=True, exist_ok=True)
        write_manifest(cleaned, fix)
        console.remark(f"Written: {fix}, {len(cleaned):,} of {len(dataset):,} images")
        if len(cleaned) < len(dataset):
            console.remark(f"Left out: {_count_removed(dataset, cleaned)}")
    if pictures is not None:
        cells = _pair_copies(dataset, findings)
        if cells:
            draw_sheet(cells, f"{data}: copies, two of each", pictures, across=3)
        console.remark(f"Drawn: {pictures}, {len(cells)} pairs" if cells else "Nothing to draw: no copies.")
    console.remark(f"Next: {_next(data, fix, pictures, findings)}")
    return FINDING if findings.errors else OK


def _check_manifest(fix: Path, data: Path) -> None:
    """Refuse a manifest that cannot be written, before the check takes time."""
    if fix.suffix.lower() != ".csv":
        raise ArgumentError("fix", str(fix), "must end in .csv: it is a manifest.")
    if fix.is_dir():
        raise ArgumentError("fix", str(fix), "is a folder; name a file.")
    if fix.resolve() == data.resolve():
        raise ArgumentError("fix", str(fix), "is the data itself; name another file.")


def _show(data: Path, dataset: Dataset, findings: Findings, model: str, limit: int) -> None:
    """One page: the splits, the sizes, then each kind of finding with a few examples."""
    rows = []
    for split in dataset.splits or ("",):
        counts = {name: splits[split] for name, splits in findings.classes.items()}
        smallest, largest = (choose(counts, key=counts.__getitem__) for choose in (min, max))
        ends = (f"{name}: {counts[name]:,}" for name in (smallest, largest))
        rows.append((split or "all", f"{sum(counts.values()):,}", sum(map(bool, counts.values())), *ends))
    title = f"{data}: {findings.images:,} images, {len(findings.classes)} classes"
    console.table(("<split", "images", "classes", "<smallest class", "<largest class"), rows, title=title)
    if findings.sizes:
        sizes = [f"{name} {width} x {height}" for name, (width, height) in findings.sizes.items()]
        console.paragraphs([f"Pixels: {', '.join(sizes)}; {model} sees {findings.resolution} x {findings.resolution}."])
    for kind, (severity, name, advice) in KINDS.items():
        found = findings.of(kind)
        if not found:
            continue
        sys.stdout.write("\n")
        count = sum(len(finding.files) for finding in found) if kind == "passed_over" else len(found)
        console.paragraphs([f"{severity}: {count:,} {_plural(name, count)}. {advice}"])
        for finding in found[:limit]:
            sys.stdout.write(f"  {_example(finding)}\n")
        if len(found) > limit:
            sys.stdout.write(f"  ... and {len(found) - limit:,} more\n")
    if not findings.findings:
        sys.stdout.write("Nothing was found: every file can be read, and there are no copies.\n")


def _plural(name: str, count: int) -> str:
    """A name such as image(s) or class(es) for that many."""
    ending = "es" if "(es)" in name else "s"
    return name.replace(f"({ending})", ending if count > 1 else "")


def _pair_copies(dataset: Dataset, findings: Findings) -> list[Cell]:
    """Two images of each group of copies, the worst kinds first, with what is wrong and both names below them."""
    cells = []
    for finding in [finding for kind in COPIES for finding in findings.of(kind)][:PAIRS]:
        pair = finding.files[:2]
        more = f", {len(finding.files)} files" if len(finding.files) > 2 else ""
        fault = f"{_plural(KINDS[finding.kind][1], 1)}: {finding.message}{more}"
        names = [(f"{number}: {path}", GREY) for number, path in enumerate(pair, start=1)]
        lines = (fault, RED if finding.severity == "error" else INK), *names
        cells.append(Cell(tuple(dataset.root / path for path in pair), lines))
    return cells


def _example(finding: Finding) -> str:
    """A finding in one line."""
    between = " = " if finding.kind in COPIES else ", "
    more = [f"{len(finding.files) - NAMED:,} more"] if len(finding.files) > NAMED else []
    files = between.join([*finding.files[:NAMED], *more])
    return f"{files}: {finding.message}" if files else finding.message


def _count_removed(dataset: Dataset, cleaned: Dataset) -> str:
    """How many images of each class `clean` took away, most first."""
    pairs = zip(dataset.classes, dataset.counts, cleaned.counts, strict=True)
    rows = sorted(((had - has, had, name) for name, had, has in pairs if has < had), key=lambda row: -row[0])
    lines = [f"{gone:,} of {had:,} of {name}{' (none is left)' if gone == had else ''}" for gone, had, name in rows]
    more = [f"and of {len(lines) - CLASSES:,} more classes"] if len(lines) > CLASSES else []
    return ", ".join([*lines[:CLASSES], *more])


def _next(data: Path, fix: Path | None, pictures: Path | None, findings: Findings) -> str:
    """The next command."""
    if fix is not None:
        return f"effnet train {shlex.quote(str(fix))}"
    if pictures is None and any(findings.of(kind) for kind in COPIES):
        return f"effnet check {shlex.quote(str(data))} --pictures copies.jpg --fix clean.csv"
    if findings.errors:
        return f"effnet check {shlex.quote(str(data))} --fix clean.csv"
    return f"effnet train {shlex.quote(str(data))}"
