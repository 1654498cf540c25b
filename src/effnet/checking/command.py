"""effnet check: finds what is wrong with a data set and its labels, and writes cleaned manifests."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from effnet import console
from effnet.checking.findings import COPIES, KINDS, Finding, Findings, clean
from effnet.checking.findings import check as find
from effnet.checking.labels import LabelErrors, find_label_errors, without_suspects, write_review
from effnet.console import FINDING, OK, Flag
from effnet.data.dataset import Dataset, place, read_data, write_manifest
from effnet.data.shards import text_of
from effnet.errors import ArgumentError
from effnet.fields import positive_int
from effnet.plots.contact_sheet import Cell, check_sheet, draw_sheet
from effnet.plots.style import GREY, INK, RED
from effnet.runtime.load import read_model
from effnet.weights.bundle import read_network

NAMED = 3  # files of a finding in its line, at most
CLASSES = 20  # listed when images are left out, at most
CELLS = 60  # of a sheet, at most


@dataclass(frozen=True)
class CheckFiles:
    """The files to write; the data itself is not changed."""

    fix: Path | None = None
    """Write a manifest without unreadable files, contradictions, leaks and copies to this .csv file; with --labels,
    also without images whose label is more likely wrong than right."""
    review: Path | None = None
    """With --labels: write a manifest of all images to this .csv file, suspects first, with the likely label beside the
    given one. Correct labels in it, delete lines, and train from it."""
    pictures: Path | None = None
    """Draw copies side by side to this .jpg or .png file; with --labels, the suspects instead."""


def check(
    data: Path,
    *,
    labels: Flag = False,
    model: str = "lite0",
    resolution: int | None = None,
    files: Annotated[CheckFiles, Parameter(name="*")] = CheckFiles(),
    limit: int = 3,
    json: Flag = False,
) -> int:
    """Find what is wrong with a data set before training: broken files, copies, leaks, contradictions, sizes, labels.

    Copies are found even if they were recompressed, resized, converted, brightened or mirrored. Labels are judged by
    classifiers on the model's features, each trained without the images that it judges.

    Args:
        data: A folder with a sub-folder for each class, split (train, val, test) or not, or a manifest.
        labels: Also find labels that are probably wrong. This takes as long as predicting every image.
        model: The network that will see the images: a variant (b0 ..., lite0 ...), a bundle or a spec.yaml. --labels
            needs one with weights.
        resolution: Resolution in pixels, instead of the model's own.
        files: The files to write.
        limit: Examples of each kind to show.
        json: JSON with every finding instead of a summary.
    """
    limit = positive_int("limit", limit)
    _check_files(files, data, labels)
    pixels = read_network(model).resolution if resolution is None else positive_int("resolution", resolution)
    errors: LabelErrors | None = None
    with console.Display(f"reading {text_of(data)}") as progress:
        opened = read_model(model, progress=progress) if labels else None
        dataset = read_data(data)
        findings = find(dataset, resolution=pixels, progress=progress)
        if opened is not None:
            known = findings.duplicates
            errors = find_label_errors(dataset, opened, resolution=resolution, duplicates=known, progress=progress)
    if json:
        more = {} if errors is None else {"labels": errors.to_dict()}
        sys.stdout.write(console.json_text({"data": text_of(data)} | findings.to_dict() | more))
    else:
        _show(data, dataset, findings, model, limit)
        if errors is not None:
            _show_labels(errors, limit)
    _write(files, dataset, findings, errors)
    console.remark(f"Next: {_next(data, model, files, findings, errors)}")
    return FINDING if findings.errors else OK


def _check_files(files: CheckFiles, data: Path, labels: bool) -> None:
    """Before the check, which is slow, refuse files that cannot be written."""
    if files.review is not None and not labels:
        raise ArgumentError("review", str(files.review), "lists suspect labels: add --labels.")
    for argument, file in (("fix", files.fix), ("review", files.review)):
        if file is None:
            continue
        if file.suffix.lower() != ".csv":
            raise ArgumentError(argument, str(file), "must end in .csv: it is a manifest.")
        if file.is_dir():
            raise ArgumentError(argument, str(file), "is a folder; name a file.")
        if file.resolve() == data.resolve():
            raise ArgumentError(argument, str(file), "is the data itself; name another file.")
    if files.fix is not None and files.review is not None and files.fix.resolve() == files.review.resolve():
        raise ArgumentError("review", str(files.review), "is also the file of --fix; name another one.")
    if files.pictures is not None:
        check_sheet("pictures", files.pictures)


def _write(files: CheckFiles, dataset: Dataset, findings: Findings, errors: LabelErrors | None) -> None:
    """Write the requested files, and report them."""
    if files.fix is not None:
        cleaned = clean(dataset, findings)
        if errors is not None:
            cleaned = without_suspects(cleaned, errors)
        files.fix.parent.mkdir(parents=True, exist_ok=True)
        write_manifest(cleaned, files.fix)
        console.remark(f"Written: {files.fix}, {len(cleaned):,} of {len(dataset):,} images")
        if len(cleaned) < len(dataset):
            console.remark(f"Left out: {_count_removed(dataset, cleaned)}")
    if files.review is not None and errors is not None:
        files.review.parent.mkdir(parents=True, exist_ok=True)
        write_review(dataset, errors, files.review)
        console.remark(f"Written: {files.review}, {len(dataset):,} images, the {len(errors.suspects):,} suspects first")
        if errors.suspects:
            console.remark(
                "Look at each: correct its `label`, or delete its line; only path, label, split and group are read."
            )
    if files.pictures is not None:
        if errors is None:
            cells, across, of = _pair_copies(dataset, findings), 3, "copies, two of each"
        else:
            cells, across, of = _picture_suspects(dataset, errors), 5, "labels that may be wrong"
        if cells:
            draw_sheet(cells, f"{dataset}: {of}", files.pictures, across=across)
        nothing = "no copies" if errors is None else "no label stands out"
        drawn = f"Drawn: {files.pictures}, {len(cells)} {'pairs' if errors is None else 'images'}"
        console.remark(drawn if cells else f"Nothing to draw: {nothing}.")


def _show(data: Path, dataset: Dataset, findings: Findings, model: str, limit: int) -> None:
    """Print the splits, the sizes, then each kind of finding with a few examples."""
    rows = []
    for split in dataset.splits or ("",):
        counts = {name: splits[split] for name, splits in findings.classes.items()}
        smallest, largest = (choose(counts, key=counts.__getitem__) for choose in (min, max))
        ends = (f"{name}: {counts[name]:,}" for name in (smallest, largest))
        rows.append((split or "all", f"{sum(counts.values()):,}", sum(map(bool, counts.values())), *ends))
    title = f"{text_of(data)}: {findings.images:,} images, {len(findings.classes)} classes"
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
        sys.stdout.write("No faults were found: every file can be read, and there are no copies.\n")


def _show_labels(errors: LabelErrors, limit: int) -> None:
    """Print how reliably the labels can be judged, and the first suspects."""
    judged = f"{errors.model}'s features at {errors.resolution} px predict {errors.accuracy.value:.1%} of"
    judged += f" {errors.judged:,} held-out labels"
    if errors.not_judged:
        judged += f"; {errors.not_judged:,} could not be judged"
    count, expected = len(errors.suspects), round(errors.expected)
    sys.stdout.write("\n")
    if not count:
        console.paragraphs([f"No label stands out as wrong: {judged}."])
        return
    about = f"about {expected:,} of these {count:,} are wrong" if count > 1 else f"wrong: {_percent(errors.expected)}"
    console.paragraphs([f"warning: {count:,} {_plural('label(s)', count)} to look at, {about}. {judged}."])
    for each in errors.suspects[:limit]:
        wrong = f"labelled {each.given}, rather {each.likely} (wrong: {_percent(each.wrong)})"
        sys.stdout.write(f"  {console.one_line(each.path)}: {wrong}\n")
    if count > limit:
        sys.stdout.write(f"  ... and {count - limit:,} more\n")


def _plural(name: str, count: int) -> str:
    """A name such as image(s) or class(es), in the singular or plural for `count`."""
    ending = "es" if "(es)" in name else "s"
    return name.replace(f"({ending})", ending if count > 1 else "")


def _pair_copies(dataset: Dataset, findings: Findings) -> list[Cell]:
    """Two images of each group of copies, worst kinds first, with the fault and both names below them."""
    cells = []
    for finding in [finding for kind in COPIES for finding in findings.of(kind)][:CELLS]:
        pair = finding.files[:2]
        more = f", {len(finding.files)} files" if len(finding.files) > 2 else ""
        fault = f"{_plural(KINDS[finding.kind][1], 1)}: {finding.message}{more}"
        names = [(f"{number}: {path}", GREY) for number, path in enumerate(pair, start=1)]
        lines = (fault, RED if finding.severity == "error" else INK), *names
        cells.append(Cell(tuple(place(dataset.root, path) for path in pair), lines))
    return cells


def _picture_suspects(dataset: Dataset, errors: LabelErrors) -> list[Cell]:
    """The first suspects, each with both labels."""
    return [
        Cell(
            (place(dataset.root, each.path),),
            (
                (f"labelled {each.given}", INK),
                (f"rather {each.likely}", RED),
                (f"wrong: {_percent(each.wrong)}", GREY),
                (each.path, GREY),
            ),
        )
        for each in errors.suspects[:CELLS]
    ]


def _percent(chance: float) -> str:
    """A probability of being wrong, shown as at most 99 %, because it is an estimate."""
    return f"{min(chance, 0.99):.0%}"


def _example(finding: Finding) -> str:
    """A finding in one line."""
    between = " = " if finding.kind in COPIES else ", "
    more = [f"{len(finding.files) - NAMED:,} more"] if len(finding.files) > NAMED else []
    files = between.join([*map(console.one_line, finding.files[:NAMED]), *more])
    return f"{files}: {finding.message}" if files else finding.message


def _count_removed(dataset: Dataset, cleaned: Dataset) -> str:
    """How many images `clean` removed from each class, most first."""
    pairs = zip(dataset.classes, dataset.counts, cleaned.counts, strict=True)
    rows = sorted(((had - has, had, name) for name, had, has in pairs if has < had), key=lambda row: -row[0])
    lines = [f"{gone:,} of {had:,} of {name}{' (none is left)' if gone == had else ''}" for gone, had, name in rows]
    more = [f"and of {len(lines) - CLASSES:,} more classes"] if len(lines) > CLASSES else []
    return ", ".join([*lines[:CLASSES], *more])


def _next(data: Path, model: str, files: CheckFiles, findings: Findings, errors: LabelErrors | None) -> str:
    """The next command."""
    if files.review is not None or files.fix is not None:
        return f"effnet train {shlex.quote(str(files.review or files.fix))}"
    where = shlex.quote(text_of(data))
    check = f"effnet check {where}"
    if errors is not None and errors.suspects:
        chosen = "" if model == "lite0" else f" --model {shlex.quote(model)}"
        return f"{check} --labels{chosen} --pictures labels.jpg --review labels.csv"
    if files.pictures is None and any(findings.of(kind) for kind in COPIES):
        return f"{check} --pictures copies.jpg --fix clean.csv"
    return f"{check} --fix clean.csv" if findings.errors else f"effnet train {where}"
