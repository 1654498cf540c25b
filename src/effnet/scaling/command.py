"""effnet scale: the network that compound scaling makes, a rule's table, and what doubling one dimension costs."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from effnet import console
from effnet.arch.blocks import DepthRounding
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.arch.specfile import SUFFIXES, spec_text
from effnet.console import MACS, OK, Flag, Whole
from effnet.errors import ArgumentError
from effnet.files import write_file
from effnet.machine import Precision
from effnet.machine import precision as best_precision
from effnet.scaling import compound
from effnet.scaling.budget import Budget
from effnet.scaling.budget_command import fit_budget, show_fit
from effnet.scaling.compound import Rule, Step
from effnet.scaling.laws import laws as count_laws
from effnet.weights.bundle import read_network

PHIS = (-2, -1, 1, 2, 3, 4, 5, 6, 7)
RATIOS = "MACs: nominal is what d w^2 r^2 promises, counted what is built, excess how much more that is."

# What is compared between a network and its baseline.
QUANTITIES = (
    # label, value, how it is written
    ("width", lambda network: network.width, "{:.4g}".format),
    ("depth", lambda network: network.depth, "{:.4g}".format),
    ("resolution, px", lambda network: network.resolution, str),
    ("blocks", lambda network: len(network.blocks), str),
    ("params", lambda network: cost(network).params, console.millions),
    ("MACs", lambda network: cost(network).macs, console.billions),
    ("FLOPs", lambda network: cost(network).flops, console.billions),
    ("activations", lambda network: cost(network).activations, console.millions),
)


def scale(
    *,
    phi: float | None = None,
    rule: str | None = None,
    from_: Annotated[str, Parameter(name="--from")] = "b0",
    depth_rounding: DepthRounding | None = None,
    resolution_step: Whole | None = None,
    laws: Flag = False,
    macs: str | None = None,
    params: str | None = None,
    memory: str | None = None,
    train_memory: str | None = None,
    batch: Whole | None = None,
    file_size: str | None = None,
    latency: str | None = None,
    resolution: Whole | None = None,
    width: float | None = None,
    depth: float | None = None,
    max_resolution: Whole | None = None,
    pretrained: Flag = False,
    num_classes: Whole | None = None,
    optimizer: str | None = None,
    precision: Precision | None = None,
    keep: str | None = None,
    threads: Whole | None = None,
    engine: Literal["auto", "torch", "openvino", "onnxruntime"] | None = None,
    plot: Path | None = None,
    save: Path | None = None,
    json: Flag = False,
) -> int:
    """The network that fits a budget, or the one that a phi makes; without either, what a rule promises and builds.

    A budget is any of --macs, --params, --memory, --train-memory with --batch, --file-size and --latency.

    Args:
        phi: How far to scale: 1 for about twice the multiply-adds, below 0 to shrink.
        rule: What depth, width and resolution grow by: paper (1.2,1.1,1.15), fast (mostly width), width, depth or
            resolution alone, three numbers alpha,beta,gamma, or a YAML file that names them. Default: paper.
        from_: What is scaled: a variant (b0 ..., lite0 ...), a bundle or a spec.yaml.
        depth_rounding: How layers become whole numbers. Default: as in what is scaled (ceil in the official code);
            nearest where phi is below 0, for rounding up hardly shrinks.
        resolution_step: The resolution is a multiple of so many pixels. Default: 8.
        laws: What doubling depth, width or resolution alone costs, and why it is not what the textbook says.
        macs: Multiply-adds per image at most: 1G, 390M.
        params: Parameters at most: 10M.
        memory: Memory of inference at most: weights, one image and its feature maps, fp32: 100MB, 100MiB.
        train_memory: Memory of training at most, all that it holds for --batch images: 8GB.
        batch: Images per training step.
        file_size: Bytes of the file of weights at most: 10MB.
        latency: Time for one image on this machine at most: 20ms. It is measured, so this takes a minute.
        resolution: Settle the resolution in pixels.
        width: Settle the width factor.
        depth: Settle the depth factor.
        max_resolution: The resolution does not grow beyond this.
        pretrained: Choose only among published networks that have weights.
        num_classes: Outputs of the classifier.
        optimizer: For --train-memory: rmsprop (default), sgd, momentum, adam or adamw.
        precision: For --train-memory: fp32 or bf16; by default what this processor trains in faster.
        keep: For --train-memory: what is kept for the backward pass: activations, convolutions, depthwise or
            bottlenecks; the rest is computed again. Default: everything is kept.
        threads: For --latency: the engine's threads. Default: one for each core.
        engine: For --latency: what runs the network: torch, openvino or onnxruntime. Default: auto, the fastest of
            those that are installed for what is scaled, measured once; in bf16 where that is faster.
        plot: Draw the candidates of a budget into this .png, .svg or .pdf file.
        save: Write the network to this .yaml file, which other commands take as MODEL.
        json: JSON instead of a table.
    """
    given: dict[str, Any] = {
        "phi": phi,
        "rule": rule,
        "depth-rounding": depth_rounding,
        "resolution-step": resolution_step,
        "save": save and str(save),
    }
    limits: dict[str, Any] = {
        "macs": macs,
        "params": params,
        "memory": memory,
        "train-memory": train_memory,
        "batch": batch,
        "file-size": file_size,
        "latency": latency,
        "resolution": resolution,
        "width": width,
        "depth": depth,
        "max-resolution": max_resolution,
        "optimizer": optimizer,
        "precision": precision,
        "keep": keep,
    }
    around: dict[str, Any] = {
        "pretrained": pretrained or None,
        "num-classes": num_classes,
        "threads": threads,
        "engine": engine,
        "plot": plot and str(plot),
    }
    given, limits, around = (_named(options) for options in (given, limits, around))
    if limits or around:
        for option in ("phi", *(["laws"] if laws else [])):
            if option in given or option == "laws":
                other = next(iter(limits | around))
                raise ArgumentError(
                    option, given.get(option, laws), f"does not go with --{other}, which is of a budget."
                )
    if laws:
        for option, value in given.items():
            raise ArgumentError(option, value, "does not go with --laws, which doubles one dimension at a time.")
        return _show_laws(read_network(from_), from_, as_json=json)
    if save is not None and save.suffix.lower() not in SUFFIXES:
        raise ArgumentError("save", str(save), "must end in .yaml, by which other commands know it.")
    if limits or around:
        return _scale_to_budget(limits, around, given, from_, as_json=json)
    if save is not None and phi is None:
        raise ArgumentError("save", str(save), "writes one network; say which, as in: --phi 1")
    baseline, growth = read_network(from_), compound.read_rule(rule or "paper")
    step = compound.RESOLUTION_STEP if resolution_step is None else resolution_step
    limit = compound.largest_phi(baseline, growth)
    phis = [number for number in PHIS if abs(number) <= limit] if phi is None else [phi]
    rows = compound.table(baseline, phis, growth, resolution_step=step, depth_rounding=depth_rounding)
    command = _command(from_, given)
    if phi is None:
        return _show_table(baseline, growth, rows, command, as_json=json)
    if save is not None:
        with write_file(save) as temporary:
            temporary.write_text(spec_text(rows[0].network), encoding="utf-8")
        command = f"effnet info {shlex.quote(str(save))}"
    else:
        command += f" --save {shlex.quote(rows[0].network.name)}.yaml"
    return _show_network(baseline, growth, rows[0], command, as_json=json)


def _scale_to_budget(
    limits: Mapping[str, Any], around: Mapping[str, Any], given: Mapping[str, Any], from_: str, *, as_json: bool
) -> int:
    """Find the network that fits and show it."""
    if "train-memory" in limits:
        limits = {"precision": best_precision().value, **limits}
    budget = Budget(**{option.replace("-", "_"): value for option, value in limits.items()})
    for option in ("threads", "engine"):
        if option in around and budget.latency is None:
            raise ArgumentError(option, around[option], "belongs to --latency, which is what is measured.")
    for option in ("rule", "depth-rounding", "width", "depth"):
        if "pretrained" in around and option in {**given, **limits}:
            words = "does not go with --pretrained: published networks are as they are."
            raise ArgumentError(option, {**given, **limits}[option], words)
    plot, save = (Path(path) if path else None for path in (around.get("plot"), given.get("save")))
    if plot is not None:
        from effnet.plots.style import drawable

        drawable(plot)
        if "pretrained" in around or not budget.limits:
            words = "draws priced candidates, of which neither --pretrained nor a latency alone has any."
            raise ArgumentError("plot", str(plot), words)
    fit = fit_budget(
        budget,
        read_network(from_),
        compound.read_rule(given.get("rule", "paper")),
        pretrained="pretrained" in around,
        threads=around.get("threads"),
        engine=None if around.get("engine") == "auto" else around.get("engine"),
        num_classes=around.get("num-classes"),
        resolution_step=given.get("resolution-step", compound.RESOLUTION_STEP),
        depth_rounding=given.get("depth-rounding"),
    )
    command = _command(from_, {**limits, **given, **around})
    return show_fit(fit, command, save=save, plot=plot, as_json=as_json)


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {option: value for option, value in options.items() if value is not None}


def _show_network(baseline: NetworkSpec, rule: Rule, row: Step, command: str, *, as_json: bool) -> int:
    """One network beside its baseline."""
    if as_json:
        sys.stdout.write(console.json_text(_values(row) | {"rule": _growths(rule)}))
        return OK
    network = row.network
    lines = []
    for label, value, written in QUANTITIES:
        before, after = value(baseline), value(network)
        lines.append((label, written(before), written(after), f"{after / before:.3f}x"))
    rate, sources = compound.dropout(baseline, network)
    origin = f"interpolated between {' and '.join(sources)}" if sources[1:] else f"as {(*sources, baseline.name)[0]}"
    implied = compound.implied(baseline, network, rule).macs
    console.table(("<", baseline.name, network.name, "ratio"), lines, title=f"{baseline.name} at phi {row.phi:g}")
    console.paragraphs(
        (
            f"By the rule {_described(rule)}.",
            f"Depth rounding: {network.depth_rounding}. Dropout {rate:g}, {origin}; "
            f"drop-connect {network.drop_connect:g}.",
            f"MACs: d w^2 r^2 promises {row.nominal_ratio:.3f}x, "
            f"{row.realised_ratio:.3f}x is built ({row.excess:+.0%}), which is phi {implied:.2f}.",
            MACS,
        )
    )
    console.remark(f"Next: {command}")
    return OK


def _show_table(baseline: NetworkSpec, rule: Rule, rows: tuple[Step, ...], command: str, *, as_json: bool) -> int:
    """What a rule promises and builds at each phi, and where the published variants lie."""
    variants = [
        (
            compound.step(baseline, variant, compound.nominal(baseline, variant)),
            compound.implied(baseline, variant, rule),
        )
        for variant in compound.published(baseline)[1:]
    ]
    if as_json:
        family = [_values(row) | {"implied_phi": dataclasses.asdict(implied)} for row, implied in variants]
        values = {"rule": _growths(rule), "steps": [_values(row) for row in rows], "published": family}
        sys.stdout.write(console.json_text(values))
        return OK
    sizes, ratios = ("width", "depth", "px", "blocks"), ("nominal", "counted", "excess")
    columns: tuple[str, ...] = ("phi", *sizes, "<layers", "dropout", "params", "MACs", "FLOPs", "activations", *ratios)
    lines: list[tuple[object, ...]] = []
    for row in rows:
        rates = row.network.depth_rounding, f"{row.network.dropout:g}"
        costs = console.millions(row.params), console.billions(row.macs), console.billions(2 * row.macs)
        lines.append(
            (f"{row.phi:g}", *_sizes(row.network), *rates, *costs, console.millions(row.activations), *_ratios(row))
        )
    console.table(columns, lines, title=f"{baseline.name} by the rule {_described(rule)}")
    if variants:
        phis = (f"phi by\n{number}" for number in ("depth", "width", "px", "MACs"))
        lines = []
        for row, implied in variants:
            numbers = ("-" if number is None else f"{number:.2f}" for number in dataclasses.astuple(implied))
            lines.append((row.network.name, *_sizes(row.network), *_ratios(row), *numbers))
        columns = "<name", *sizes, *ratios, *phis
        console.table(columns, lines, title="The published variants by the same rule")
    console.paragraphs((RATIOS, MACS))
    console.remark(f"Next: {command} --phi 1")
    return OK


def _show_laws(baseline: NetworkSpec, from_: str, *, as_json: bool) -> int:
    """What doubling one dimension costs."""
    laws = count_laws(baseline)
    if as_json:
        sys.stdout.write(console.json_text([dataclasses.asdict(law) | {"reason": law.reason} for law in laws]))
        return OK
    kinds = {"MACs": "macs", "params": "params", "activations": "activations"}
    columns = ["<doubled", *(f"{kind}\n{source}" for kind in kinds for source in ("counted", "textbook"))]
    lines = []
    for law in laws:
        pairs = [(getattr(law.counted, name), getattr(law.textbook, name)) for name in kinds.values()]
        lines.append((law.dimension, *(text for counted, book in pairs for text in (f"{counted:.2f}x", f"{book:g}x"))))
    console.table(columns, lines, title=f"{baseline.name} with one dimension doubled")
    console.paragraphs(
        ("Why the MACs are not the textbook's:", *(f"{law.dimension}: {law.reason}." for law in laws), MACS)
    )
    console.remark(f"Next: {_command(from_, {})}")
    return OK


def _values(row: Step) -> dict[str, Any]:
    """A step under the names of the attributes."""
    network = row.network
    names = "name", "width", "depth", "resolution", "depth_rounding", "dropout", "drop_connect"
    return {
        **{name: getattr(network, name) for name in names},
        "blocks": len(network.blocks),
        "phi": row.phi,
        "params": row.params,
        "macs": row.macs,
        "flops": 2 * row.macs,
        "activations": row.activations,
        "nominal_ratio": row.nominal_ratio,
        "realised_ratio": row.realised_ratio,
    }


def _sizes(network: NetworkSpec) -> tuple[str, ...]:
    return f"{network.width:.4g}", f"{network.depth:.4g}", str(network.resolution), str(len(network.blocks))


def _ratios(row: Step) -> tuple[str, ...]:
    return f"{row.nominal_ratio:.4g}x", f"{row.realised_ratio:.4g}x", f"{row.excess:+.0%}"


def _growths(rule: Rule) -> dict[str, float]:
    return {"alpha": rule.alpha, "beta": rule.beta, "gamma": rule.gamma}


def _described(rule: Rule) -> str:
    growths = ", ".join(f"{name} {growth:.4g}" for name, growth in _growths(rule).items())
    return f"{f'{rule.name}: ' if rule.name else ''}{growths}; alpha beta^2 gamma^2 = {rule.product:.4g} per phi"


def _command(from_: str, given: Mapping[str, Any]) -> str:
    """The command as it was typed, for the one to type next."""
    words = ["effnet", "scale", *(["--from", from_] if from_ != "b0" else [])]
    for option, value in given.items():
        if value is True:
            words.append(f"--{option}")
        elif option not in ("save", "plot"):
            words += [f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
