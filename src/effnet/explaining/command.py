"""effnet explain: shows where a model looked, as exact maps over the photos, and tests the maps."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from effnet import console
from effnet.console import FINDING, OK, STDIN, Flag, json_line
from effnet.data.paths import expand, read_ahead
from effnet.errors import ArgumentError, ImageError
from effnet.fields import positive_int, write_count
from effnet.files import new_run, write_folder
from effnet.runtime.artifact import artifact_path
from effnet.runtime.load import load
from effnet.runtime.options import LoadOptions

if TYPE_CHECKING:
    from effnet.explaining.faithfulness import Faithfulness, Summary
    from effnet.plots.contact_sheet import Cell
    from effnet.runtime.cam import Explanation
    from effnet.runtime.classifier import Classifier

RUNS, SHEET = Path("runs") / "explain", "sheet.jpg"
SHOWN = 60  # photos on the sheet, at most
DEFAULTS = LoadOptions()
AHEAD = 4  # photos to read ahead
CHANCE = "no better than chance"
HEAD = f"{'file':<32} {'class':<28} {'logit':>8} {'residual':>9} {'deletion':>9} {'insertion':>10}  gain over chance\n"


@dataclass(frozen=True)
class ExplainOptions:
    """What to explain, and how."""

    label: Annotated[str | None, Parameter(name="--class")] = None
    """The class to explain, by name or index. Default: the most probable one of each photo."""
    topk: int = 1
    """How many of the most probable classes to explain, if no class is named."""
    versus: str | None = None
    """A class to compare with: the map shows what speaks for the explained class and against this one."""
    fine: Flag = False
    """A finer map: the mean over 16 shifted inputs, each exact only for its own input."""
    check: Flag = False
    """Only test the maps, and draw no pictures."""

    def __post_init__(self) -> None:
        positive_int("topk", self.topk)
        if self.label is not None and self.topk != 1:
            raise ArgumentError("topk", self.topk, "is for the most probable classes; --class names one.")


def explain(
    *sources: str,
    model: str = "lite0",
    options: Annotated[ExplainOptions, Parameter(name="*")] = ExplainOptions(),
    engine: Annotated[LoadOptions, Parameter(name="*")] = DEFAULTS,
    json: Flag = False,
    out: Path | None = None,
) -> int:
    """Show where a model looked: how much each place adds to a class's logit, and whether the class depends on it.

    The cells of a map sum to the logit, exactly except for rounding (the residual). To test whether the class depends
    on them, cells are blurred and restored in the map's order, in random orders, and from the middle outwards. A map
    whose gain is no better than chance says nothing about the photo.

    Args:
        sources: Files, folders (at any depth), patterns such as 'photos/*.jpg', or - for a list on standard input.
        model: Registered weights (lite0, b0 ...), a bundle, an artifact of effnet export, another library's file or
            folder, timm/NAME, hf:ORG/NAME.
        options: What to explain, and how.
        engine: How to run the model. The precision is an artifact's own, else fp32.
        json: One JSON object per line; pictures only with --out.
        out: Folder for the pictures: one for each photo, and a contact sheet. Default: a new one in runs/explain.
    """
    if not sources:
        raise ArgumentError("sources", "", "must name a file, a folder, a pattern, or - for a list on standard input.")
    if options.check and out is not None:
        raise ArgumentError("out", str(out), "is for pictures; --check draws none.")
    if engine.precision is None and artifact_path(model) is None:
        engine = replace(engine, precision="fp32")
    pictures = not options.check and (out is not None or not json)
    with console.Display(f"opening {model}") as progress:
        classifier = load(model, progress=progress, **asdict(engine))
    for argument, label in (("class", options.label), ("versus", options.versus)):
        if label is not None:
            classifier.index(label, argument)
    photos = expand(["-" if source == STDIN else source for source in sources], sys.stdin)
    name = Path(sources[0]).stem if sources[0] not in (STDIN, "-") else "photos"
    measured: list[Faithfulness] = []
    cells: list[Cell] = []
    explained = unreadable = 0
    with (
        new_run(out, RUNS, name) if pictures else nullcontext() as place,
        nullcontext() if place is None else write_folder(place) as folder,  # complete, or empty if killed
    ):
        sys.stdout.write("" if json else HEAD)
        for photo, answer in _explained(classifier, photos, options):
            if isinstance(answer, ImageError):
                unreadable += 1
                text = json_line({"file": photo, "error": str(answer)}) if json else f"{photo} unreadable: {answer}\n"
            else:
                explained += 1
                measured += [true for _, true in answer]
                text = "".join((_json_line if json else _line)(photo, *each) for each in answer)
                if folder is not None:
                    cells += [_draw(photo, answer, folder)][: max(0, SHOWN - len(cells))]
            sys.stdout.write(text)
            sys.stdout.flush()
        if folder is not None and len(cells) > 1:
            _draw_sheet(cells, explained, folder / SHEET)
    written = place if explained else None
    return _finish(measured, unreadable, written, classifier, json, shlex.quote(model))


Answer = list[tuple["Explanation", "Faithfulness"]]


def _explained(
    classifier: Classifier, photos: Iterator[str], options: ExplainOptions
) -> Iterator[tuple[str, Answer | ImageError]]:
    """Each photo with its maps and their tests, or with the reason why it cannot be read."""
    from effnet.explaining.faithfulness import measure

    labels = () if options.label is None else (options.label,)
    for number, (photo, read) in enumerate(read_ahead(photos, classifier.read, window=AHEAD)):
        if isinstance(read, ImageError):
            yield photo, read
            continue
        found = classifier.explain_pixels(read, labels, options.versus, topk=options.topk, fine=options.fine)
        yield photo, [(each, measure(classifier.logits, each, number)) for each in found]


def _line(photo: str, found: Explanation, true: Faithfulness) -> str:
    """A line of the table; a long file name gets a separate line."""
    first = f"{photo:<32}" if len(photo) <= 32 else f"{photo}\n{'':<32}"
    numbers = f"{found.logit:>8.2f} {found.residual:>9.1e} {true.deletion:>9.3f} {true.insertion:>10.3f}"
    return f"{first} {found.title:<28} {numbers}  {_gain(true)}\n"


def _gain(true: Faithfulness) -> str:
    gain = true.gain
    verdict = "" if true.beats_chance else f", {CHANCE}"
    return f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}){verdict}"


def _json_line(photo: str, found: Explanation, true: Faithfulness) -> str:
    values = {"file": photo, "class": found.title, "logit": found.logit, "residual": found.residual}
    values |= {"map": found.map.tolist(), "deletion": true.deletion, "insertion": true.insertion}
    return json_line(values | {"gain": asdict(true.gain)})


def _draw(photo: str, answer: Answer, folder: Path) -> Cell:
    """Write the picture of a photo, and return its cell for the sheet."""
    from PIL import Image

    from effnet.plots.contact_sheet import TILE, Cell
    from effnet.plots.overlay import describe_scale, draw_overlay, shade, strength
    from effnet.plots.style import GREY, INK

    lines = [
        f"{photo}: the map sums to the logit; residual {max(each.residual for each, _ in answer):.0e} of the largest"
    ]
    if answer[0][0].fine:
        lines.append("A fine map is the mean over 16 shifted inputs, each exact only for its own input.")
    for found, true in answer:
        curves = f"deletion {true.deletion:.3f}, insertion {true.insertion:.3f}, gain over chance {_gain(true)}"
        lines.append(f"{found.title}: {curves}; from the middle outwards {true.centre:+.3f}")
    every = [found for found, _ in answer]
    draw_overlay(every, lines, _free(folder, Path(photo).stem or "photo"))
    first, true = answer[0]
    shown = Image.fromarray(first.pixels if first.pixels.shape[2] == 3 else first.pixels[:, :, 0])
    texts = (f"{first.title}, logit {first.logit:+.2f}", INK), (f"gain {_gain(true)}", GREY), (Path(photo).name, GREY)
    return Cell((shown, shade(first, strength(every[:1]), TILE)), (*texts, (describe_scale(every[:1]), GREY)))


def _free(folder: Path, stem: str) -> Path:
    """A file name that no other photo has: coffee.jpg, coffee-2.jpg."""
    number, path = 1, folder / f"{stem}.jpg"
    while path.exists() or path.name == SHEET:
        number += 1
        path = folder / f"{stem}-{number}.jpg"
    return path


def _draw_sheet(cells: Sequence[Cell], photos: int, out: Path) -> None:
    from effnet.plots.contact_sheet import draw_sheet

    some = f"{photos} photos" if photos == len(cells) else f"the first {len(cells)} of {photos:,} photos"
    draw_sheet(cells, f"Where the network looked: {some}; each has its own scale", out, across=min(3, len(cells)))


def _finish(
    measured: Sequence[Faithfulness],
    unreadable: int,
    folder: Path | None,
    classifier: Classifier,
    json: bool,
    model: str,
) -> int:
    """Print the verdict over all photos, what was written, and the next command."""
    from effnet.explaining.faithfulness import summarise

    if measured:
        say: Callable[[str], None] = console.remark if json else lambda text: console.paragraphs((text,))
        say(_verdict(summarise(measured)))
    if unreadable:
        console.remark(f"{write_count(unreadable, 'photo', 'are')} unreadable")
    if folder is not None:
        console.remark(f"Written: {folder}")
    console.remark(f"{classifier.selection}")
    console.remark(f"Next: effnet val {shlex.quote(model)} DATA --out val")
    return FINDING if unreadable else OK


def _verdict(found: Summary) -> str:
    """The result of the tests, in words."""
    if found.gain is None or found.over_centre is None:
        if found.beats_chance:
            return "The map is better than chance: 95 % of random orders of its cells gain less."
        return f"The map is {CHANCE}: random orders of its cells gain or lose as much."
    gains = found.gain, found.over_centre
    gain, centre = (f"{each.value:+.3f} ({each.low:+.3f} to {each.high:+.3f})" for each in gains)
    verdict = "better than chance" if found.beats_chance else "not shown to be better than chance"
    beyond = "more than" if found.over_centre.low > 0 else "not shown to be more than"
    return (
        f"{found.images:,} maps, mean gain {gain}: {verdict}; {found.beating:,} beat it individually. Minus the "
        f"gain of the order from the middle outwards: {centre}, {beyond} a subject in the middle explains. "
        "95 % intervals of the means, by Student's t, for photos drawn like these."
    )
