"""effnet scale: the network that compound scaling makes, a rule's table, and what doubling one dimension costs."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from effnet import console
from effnet.arch.cost import cost
from effnet.arch.shape import DepthRounding
from effnet.arch.spec import NetworkSpec
from effnet.arch.specfile import SUFFIXES, spec_text
from effnet.commands.arguments import MACS, OK, Flag, Whole, network_of
from effnet.errors import ArgumentError
from effnet.scaling import compound
from effnet.scaling.compound import Rule, Step
from effnet.scaling.laws import laws as count_laws
from effnet.weights.folders import appearing_file

WIDE = 100  # columns of prose
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
    save: Path | None = None,
    json: Flag = False,
) -> int:
    """A network grown or shrunk by compound scaling; without --phi, what a rule promises and what it builds.

    Args:
        phi: How far to scale: 1 for about twice the multiply-adds, below 0 to shrink.
        rule: What depth, width and resolution grow by: paper (1.2,1.1,1.15), fast (mostly width), width, depth or
            resolution alone, three numbers alpha,beta,gamma, or a YAML file that names them. Default: paper.
        from_: What is scaled: a variant (b0 ..., lite0 ...), a bundle or a spec.yaml.
        depth_rounding: How layers become whole numbers. Default: as in what is scaled (ceil in the official code);
            nearest where phi is below 0, for rounding up hardly shrinks.
        resolution_step: The resolution is a multiple of so many pixels. Default: 8.
        laws: What doubling depth, width or resolution alone costs, and why it is not what the textbook says.
        save: With --phi, write the network to this .yaml file, which other commands take as MODEL.
        json: JSON instead of a table.
    """
    given: dict[str, Any] = {
        "phi": phi,
        "rule": rule,
        "depth-rounding": depth_rounding,
        "resolution-step": resolution_step,
        "save": save and str(save),
    }
    given = {option: value for option, value in given.items() if value is not None}
    if laws:
        for option, value in given.items():
            raise ArgumentError(option, value, "does not go with --laws, which doubles one dimension at a time.")
        return _show_laws(network_of(from_), as_json=json)
    if save is not None and phi is None:
        raise ArgumentError("save", str(save), "writes one network; say which, as in: --phi 1")
    if save is not None and save.suffix.lower() not in SUFFIXES:
        raise ArgumentError("save", str(save), "must end in .yaml, by which other commands know it.")
    baseline, growth = network_of(from_), compound.read_rule(rule or "paper")
    step = compound.RESOLUTION_STEP if resolution_step is None else resolution_step
    limit = compound.largest_phi(baseline, growth)
    phis = [number for number in PHIS if abs(number) <= limit] if phi is None else [phi]
    rows = compound.table(baseline, phis, growth, resolution_step=step, depth_rounding=depth_rounding)
    command = _command(from_, given)
    if phi is None:
        return _show_table(baseline, growth, rows, command, as_json=json)
    if save is not None:
        with appearing_file(save) as temporary:
            temporary.write_text(spec_text(rows[0].network), encoding="utf-8")
        command = f"effnet info {shlex.quote(str(save))}"
    else:
        command += f" --save {shlex.quote(rows[0].network.name)}.yaml"
    return _show_network(baseline, growth, rows[0], command, as_json=json)


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
    _explain(
        f"By the rule {_described(rule)}.",
        f"Depth rounding: {network.depth_rounding}. Dropout {rate:g}, {origin}; drop-connect {network.drop_connect:g}.",
        f"MACs: d w^2 r^2 promises {row.nominal_ratio:.3f}x, {row.realised_ratio:.3f}x is built ({row.excess:+.0%}), "
        f"which is phi {implied:.2f}.",
        MACS,
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
    _explain(RATIOS, MACS)
    console.remark(f"Next: {command} --phi 1")
    return OK


def _show_laws(baseline: NetworkSpec, *, as_json: bool) -> int:
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
    _explain("Why the MACs are not the textbook's:", *(f"{law.dimension}: {law.reason}." for law in laws), MACS)
    console.remark("Next: effnet scale")
    return OK


def _explain(*paragraphs: str) -> None:
    """What a table means."""
    for words in paragraphs:
        sys.stdout.write(textwrap.fill(words, WIDE, subsequent_indent="  ") + "\n")


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
        if option != "save":
            words += [f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
