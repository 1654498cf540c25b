"""The command line: one table of commands, each a thin function that calls the rooms it needs and prints their report.

Exit codes: 0 all is well; 1 it ran and something was wrong with the material (an unreadable image, a refused result);
2 wrong usage or an error that stopped it; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, Token

import effnet
from effnet import console
from effnet.arch.cost import Cost, cost
from effnet.arch.rivals import RIVALS
from effnet.arch.spec import Fit, NetworkSpec
from effnet.arch.table import block_rows, stage_rows
from effnet.arch.variants import PAPER, VARIANTS, spec, variant
from effnet.errors import ArgumentError, EffnetError, ImageError, RefusedError, UnknownNameError
from effnet.weights.bundle import is_bundle, read_config

OK, FINDING, ERROR, INTERRUPTED = 0, 1, 2, 130
STDIN = "\0-"  # how a lone hyphen travels past cyclopts, which takes it for an option; no path can have this name

SAME = 1e-4  # of the largest logit: two networks that differ by less are the same network

MACS = "MACs are multiply-adds, what the paper calls FLOPS; FLOPs are twice as many."
PUBLISHED = "Accuracies are published ones on ImageNet, not measured here."


def _whole(_: type, tokens: Sequence[Token]) -> int:
    """A whole number as it is written; cyclopts would cut 1.5 down to 1."""
    try:
        return int(tokens[0].value)
    except ValueError as error:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from error


Whole = Annotated[int, Parameter(converter=_whole)]
Flag = Annotated[bool, Parameter(negative=())]
app = App(
    name="effnet",
    help="EfficientNet: exact networks, verified weights, and photos named by them.\n\n"
    "An error is one line; --traceback shows where it came from.",
    version=effnet.__version__,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit code; `--traceback` shows where an error came from."""
    words = sys.argv[1:] if arguments is None else arguments
    code = ERROR
    try:
        code = app([STDIN if word == "-" else word for word in words if word != "--traceback"]) or OK
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe has left, so there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if "--traceback" in words:
            raise
        expected = isinstance(error, (EffnetError, CycloptsError, OSError))
        console.remark(f"effnet: {'' if expected else f'unexpected {type(error).__name__}, see --traceback: '}{error}")
        code = FINDING if isinstance(error, RefusedError) else ERROR
        if isinstance(error, CycloptsError):
            console.remark("effnet --help lists the commands, effnet COMMAND --help the options of one.")
    sys.exit(code)


@app.command
def info(
    model: str | None = None,
    *,
    blocks: Flag = False,
    rivals: Flag = False,
    plot: Path | None = None,
    json: Flag = False,
    width: float | None = None,
    depth: float | None = None,
    resolution: Whole | None = None,
    num_classes: Whole | None = None,
) -> int:
    """The family, or one network stage by stage: sizes, parameters, multiply-adds and activations.

    Args:
        model: A variant (b0 ... b8, l2, lite0 ... lite4) or a bundle; without it, the family with published accuracies.
        blocks: Every block instead of every stage.
        rivals: The paper's Table 2: the family beside the networks that it is compared with, all figures published.
        plot: With --rivals, draw the paper's Figure 1 into this .png, .svg or .pdf file.
        json: JSON instead of a table.
        width: Factor on the baseline's channels, in place of the variant's.
        depth: Factor on the baseline's layers, in place of the variant's.
        resolution: Height and width of the input in pixels.
        num_classes: Outputs of the classifier.
    """
    changes: dict[str, Any] = {"width": width, "depth": depth, "resolution": resolution, "num_classes": num_classes}
    given = {name: value for name, value in changes.items() if value is not None}
    if plot is not None and not rivals:
        raise ArgumentError("plot", str(plot), "draws the rivals: add --rivals.")
    if model is not None and not rivals:
        return _info_network(spec(_network(model), **given), model, blocks=blocks, as_json=json)
    for name, value in (given | {"blocks": True} if blocks else given).items():
        raise ArgumentError(name, value, f"is about one network; name it, as in: effnet info b0 --{name} {value}")
    if model is not None:
        raise ArgumentError("model", model, "does not go with --rivals, which shows the whole family.")
    return _info_rivals(plot, as_json=json) if rivals else _info_family(as_json=json)


@app.command
def predict(
    *sources: str,
    model: str = "lite0",
    topk: Whole = 5,
    batch: Whole = 16,
    fit: Fit | None = None,
    source: str | None = None,
    json: Flag = False,
    csv: Flag = False,
) -> int:
    """Name what is in photos. Every file gets exactly one answer, in order.

    Args:
        sources: Files, folders (at any depth), patterns such as 'photos/*.jpg', or - for a list on standard input
            (answered once two batches of it were read, or all of it).
        model: Registered weights (lite0, b0 ...), a bundle, another library's file or folder, timm/NAME, hf:ORG/NAME.
        topk: How many classes to name for each photo.
        batch: Photos that go through the network together.
        fit: How a photo is made square, in place of the weights' own way: crop its sides, pad it, or squash it.
        source: The library that wrote a file of weights, where its keys cannot tell: timm or timm-tf.
        json: One JSON object a line.
        csv: CSV, one line for each class.
    """
    from effnet.data.sources import expand

    if not sources:
        raise ArgumentError("sources", "", "must name a file, a folder, a pattern, or - for a list on standard input.")
    if json and csv:
        raise ArgumentError("csv", csv, "excludes --json: choose one form of output.")
    named = ["-" if source == STDIN else source for source in sources]
    form = console.PredictionJson() if json else console.PredictionCsv() if csv else console.PredictionTable()
    started, photos, unreadable = time.perf_counter(), 0, 0
    with console.status(f"opening {model}"):
        from effnet.deploy.runtime import load

        classifier = load(model, source=source, fit=fit)
    answers = classifier.stream(expand(named, sys.stdin), topk=topk, batch=batch)
    sys.stdout.write(form.begin())
    for photo, answer in answers:
        photos, unreadable = photos + 1, unreadable + isinstance(answer, ImageError)
        sys.stdout.write(form.answer(str(photo), answer))
        sys.stdout.flush()
    seconds = time.perf_counter() - started
    console.remark(
        f"{photos:,} photo{'' if photos == 1 else 's'}, {unreadable} unreadable, {seconds:.1f} s with {model}"
    )
    console.remark(f"Next: effnet info {classifier.spec.name if classifier.spec.name in VARIANTS else ''}".rstrip())
    return FINDING if unreadable else OK


@app.command
def convert(
    file: str,
    *,
    model: str | None = None,
    source: str | None = None,
    to: str = "bundle",
    out: Path | None = None,
    num_classes: Whole | None = None,
) -> int:
    """Turn a checkpoint of one library into another's or into a bundle, and check that the logits stay the same.

    Args:
        file: A .pth, .pt, .bin, .safetensors, .h5 or .keras file, a hub folder of timm or transformers, a bundle, or
            registered weights (lite0, b0 ...).
        model: The variant that the file must hold; by default its shapes tell.
        source: Who wrote it: tutorial, torchvision, timm, timm-tf, lukemelas, hf, keras; by default its keys tell.
        to: What to write: bundle, tutorial, torchvision, timm, timm-tf or hf.
        out: The file or folder to write; by default named after the input, in the working folder.
        num_classes: Another number of classes than the file's lets the classifier start fresh.
    """
    with console.status(f"reading {file}"):
        from effnet.weights.bundle import save
        from effnet.weights.folders import appearing_file, appearing_folder
        from effnet.weights.pretrained import build, read
        from effnet.weights.verify import logit_difference
        from effnet.weights.writers import FILES, WRITTEN, write_checkpoint

        if to not in ("bundle", *WRITTEN):
            raise UnknownNameError("to", to, ("bundle", *WRITTEN))
        checkpoint = read(file, model, source=source, num_classes=num_classes)
        network, report = build(checkpoint), checkpoint.report
    sys.stdout.write(f"{report}\n")
    with console.status(f"comparing logits with {report.source}"):
        difference = logit_difference(report.path, report.source)
    sys.stdout.write(f"read: {difference}\n")
    if not difference.relative <= SAME:
        raise RefusedError(
            "this network does not compute what the file's library computes with it; nothing was written"
        )

    target = out or Path(f"{Path(file).stem}-{to}{'.pth' if to in FILES else ''}")
    place = appearing_file(target) if to in FILES else appearing_folder(target, bundle=to == "bundle")
    with place as temporary:
        notes: tuple[str, ...] = ()
        if to == "bundle":
            words = f"{file} ({report.source})"
            save(network, temporary, classes=checkpoint.classes, input=report.input, source=words)
        else:
            written = write_checkpoint(network, to, temporary, see=report.input, classes=checkpoint.classes)
            notes = written.notes
        with console.status(f"comparing logits with {to}"):
            difference = logit_difference(temporary, to, network)
        if not difference.relative <= SAME:
            raise RefusedError(f"{target} was not written: {difference}")
    sys.stdout.write("\n".join((f"wrote {target} for {to}", *notes, f"written: {difference}")) + "\n")
    console.remark(f"Next: effnet predict photo.jpg --model {target}")
    return OK


def _network(model: str) -> NetworkSpec:
    """The network of a variant or a bundle, read without torch."""
    if is_bundle(Path(model)):
        return read_config(model).spec
    if Path(model).exists() and model not in VARIANTS:
        raise ArgumentError("model", model, f"is no bundle; make one with: effnet convert {model}")
    return variant(model).spec


def _info_family(*, as_json: bool) -> int:
    """The published variants side by side."""
    if as_json:
        sys.stdout.write(console.json_text([_values(row.spec) for row in VARIANTS.values()]))
        return OK
    columns = "<name", "width", "depth", "px", "dropout", "drop\nconnect", "params", "MACs", "FLOPs", "top-1\n%"
    rows = []
    sources: dict[str, list[str]] = {}
    for row in VARIANTS.values():
        network, price = row.spec, cost(row.spec)
        sizes = row.name, row.width, row.depth, row.resolution, row.dropout, network.drop_connect
        costs = console.millions(price.params), console.billions(price.macs), console.billions(price.flops)
        rows.append((*sizes, *costs, row.top1))
        sources.setdefault(row.source, []).append(row.name)
    published = [f"{names[0]}{' ... ' + names[-1] if names[1:] else ''}: {source}" for source, names in sources.items()]
    note = "\n".join((MACS, f"{PUBLISHED} Sources:", *published))
    console.table(columns, rows, title="The EfficientNet family, one image each", note=note)
    console.remark("Next: effnet info b4")
    return OK


def _info_network(network: NetworkSpec, model: str, *, blocks: bool, as_json: bool) -> int:
    """One network as the paper's Table 1 has it, with what each row costs."""
    rows = block_rows(network) if blocks else stage_rows(network)
    if as_json:
        parts = [row.to_dict() for row in rows]
        sys.stdout.write(console.json_text(_values(network) | {"blocks" if blocks else "stages": parts}))
        return OK
    price = cost(network)
    columns = ("<block" if blocks else "<stage", "<operator", "input px", "channels", "layers", "stride")
    costs = "params", "MACs", "activations"
    lines: list[tuple[object, ...]] = [
        (row.name, row.operator, row.input_size, row.channels, row.layers, row.stride, *_costs(row.cost))
        for row in rows
    ]
    layers = sum(row.layers for row in stage_rows(network))
    lines.append(("total", "", "", "", layers, "", *_costs(price)))
    title = (
        f"{network.name}: width {network.width:g}, depth {network.depth:g}, {network.resolution} px, "
        f"dropout {network.dropout:g}, drop-connect {network.drop_connect:g}, {network.num_classes} classes"
    )
    console.table((*columns, *costs), lines, title=title, note=f"{price.flops:,} FLOPs. {MACS}")
    console.remark(f"Next: effnet info {model} --blocks" if not blocks else "Next: effnet info --rivals")
    return OK


def _info_rivals(plot: Path | None, *, as_json: bool) -> int:
    """Table 2 of the paper, group by group, and on request Figure 1."""
    if plot is not None:
        from effnet.analysis.plots import compare_rivals

        compare_rivals(plot)
    groups = [(row, [rival for rival in RIVALS if rival.compared_with == row.name]) for row in VARIANTS.values()]
    groups = [(ours, rivals) for ours, rivals in groups if ours.source == PAPER]
    if as_json:
        values = [_values(ours.spec) | {"rivals": [vars(rival) for rival in rivals]} for ours, rivals in groups]
        sys.stdout.write(console.json_text(values))
    else:
        columns = "<name", "top-1\n%", "top-5\n%", "params", "", "MACs", "FLOPs", ""
        lines: list[tuple[object, ...]] = []
        for ours, theirs in groups:
            price = cost(ours.spec)
            counted = (
                console.millions(price.params),
                "",
                console.billions(price.macs),
                console.billions(price.flops),
                "",
            )
            lines.append((f"EfficientNet-{ours.name.upper()}", ours.top1, ours.top5, *counted))
            for rival in theirs:
                params, macs = rival.params_millions, rival.macs_billions
                sizes = [f"{params:g} M", f"{1e6 * params / price.params:.1f}x"]
                sizes += [f"{macs:g} G", f"{2 * macs:g} G", f"{1e9 * macs / price.macs:.1f}x"] if macs else ["-"] * 3
                lines.append((f"  {rival.name}", rival.top1, rival.top5, *sizes))
        note = f"EfficientNet's sizes are counted, its rivals' are the paper's (Table 2, v5).\n{PUBLISHED}\n{MACS}"
        console.table(columns, lines, title="The family beside the networks of its time", note=note)
    console.remark(f"Figure 1: {plot}" if plot else "Next: effnet info --rivals --plot figure1.png")
    return OK


def _values(network: NetworkSpec) -> dict[str, Any]:
    """A network's sizes and costs under the names of the attributes."""
    sizes = "name", "width", "depth", "resolution", "dropout", "drop_connect", "num_classes", "in_channels"
    price = cost(network)
    values = {name: getattr(network, name) for name in sizes}
    values |= {name: getattr(price, name) for name in ("params", "macs", "flops", "activations")}
    if row := VARIANTS.get(network.name):
        values |= {"published_top1": row.top1, "published_top5": row.top5, "published_in": row.source}
    return values


def _costs(part: Cost) -> tuple[str, str, str]:
    return f"{part.params:,}", f"{part.macs:,}", f"{part.activations:,}"
