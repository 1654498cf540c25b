"""effnet scale: the network for a budget or a phi, a rule's table, or the doubling laws."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from effnet import console
from effnet.arch.blocks import DepthRounding
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.arch.specfile import SUFFIXES, spec_text
from effnet.console import OK, Flag
from effnet.errors import ArgumentError
from effnet.files import write_file
from effnet.plots.style import drawable
from effnet.runtime.options import EngineName
from effnet.runtime.select import select
from effnet.scaling import tables
from effnet.scaling.budget import Budget
from effnet.scaling.compound import RESOLUTION_STEP, largest_phi, read_rule, tabulate
from effnet.scaling.fit import fit_spec
from effnet.scaling.laws import laws
from effnet.weights.bundle import read_network

if TYPE_CHECKING:
    from effnet.metrics.timing import Timing

PHIS = (-2, -1, 1, 2, 3, 4, 5, 6, 7)


@dataclass(frozen=True)
class ScaleOptions:
    """What is scaled and how, and where the result goes."""

    from_: Annotated[str, Parameter(name="--from")] = "b0"
    """The baseline to scale: a variant (b0 ..., lite0 ...), a bundle or a spec.yaml."""
    rule: str = "paper"
    """The growth of depth, width and resolution: paper (1.2,1.1,1.15), fast (mostly width), only width, depth or
    resolution, three numbers alpha,beta,gamma, or a YAML file with them."""
    phi: float | None = None
    """How far to scale: 1 for about twice the multiply-adds, below 0 to shrink. Default: a table of several."""
    depth_rounding: DepthRounding | None = None
    """How layers are rounded. Default: for a budget, whichever fits better; else as in the baseline (ceil in the
    official code), and nearest below phi 0, where rounding up hardly shrinks."""
    resolution_step: int = RESOLUTION_STEP
    """Pixels that the resolution is a multiple of."""
    laws: Flag = False
    """Show what doubling only depth, width or resolution costs, and why it differs from the textbook."""
    num_classes: int | None = None
    """For a budget: outputs of the classifier. Default: as in the baseline."""
    pretrained: Flag = False
    """For a budget: choose only among published networks with weights."""
    engine: EngineName | None = None
    """For --latency: engine that runs the networks. Default: the one that would run the baseline."""
    threads: int | None = None
    """For --latency: threads of the engine. Default: one per core."""
    plot: Path | None = None
    """For a budget: draw the candidates to this .png, .svg or .pdf file."""
    save: Path | None = None
    """Write the network to this .yaml file, which other commands take as MODEL."""
    json: Flag = False
    """Print JSON instead of tables."""


def scale(
    *,
    budget: Annotated[Budget | None, Parameter(name="*", group="Budget")] = None,
    options: Annotated[ScaleOptions, Parameter(name="*")] = ScaleOptions(),
) -> int:
    """Find the network for a budget or a phi; without either, print a table for a rule.

    A budget is any of --macs, --params, --memory, --train-memory with --batch, --file-size and --latency.
    """
    given = console.given(options)
    if budget is not None:
        _refuse(given, ("phi", "laws"), "does not go with a budget.")
    else:
        which = "needs a budget: add --macs, --params, --memory, --train-memory, --file-size or --latency."
        _refuse(given, ("num_classes", "pretrained", "engine", "threads", "plot"), which)
    if options.laws:
        others = "phi", "rule", "depth_rounding", "resolution_step", "save"
        _refuse(given, others, "does not go with --laws, which doubles one dimension at a time.")
    if options.save is not None and options.save.suffix.lower() not in SUFFIXES:
        raise ArgumentError("save", str(options.save), "must end in .yaml, so that other commands recognize it.")
    if options.save is not None and options.phi is None and budget is None:
        raise ArgumentError("save", str(options.save), "writes one network; say which, for example --phi 1")
    baseline = read_network(options.from_)
    if options.laws:
        tables.show_laws(baseline, laws(baseline), as_json=options.json)
        console.remark(f"Next: {_command(given)}")
    elif budget is not None:
        _scale_to_budget(budget, baseline, options, given)
    else:
        _scale_by_phi(baseline, options, given)
    return OK


def _scale_by_phi(baseline: NetworkSpec, options: ScaleOptions, given: Mapping[str, Any]) -> None:
    rule = read_rule(options.rule)
    limit = largest_phi(baseline, rule)
    phis = [phi for phi in PHIS if abs(phi) <= limit] if options.phi is None else [options.phi]
    rounding: dict[str, Any] = {name: getattr(options, name) for name in ("resolution_step", "depth_rounding")}
    steps = tabulate(baseline, phis, rule, **rounding)
    if options.phi is None:
        tables.show_rule(baseline, rule, steps, as_json=options.json)
        console.remark(f"Next: {_command(given)} --phi 1")
    else:
        tables.show_step(baseline, rule, steps[0], as_json=options.json)
        console.remark(f"Next: {_save(steps[0].network, options.save, _command(given))}")


def _scale_to_budget(budget: Budget, baseline: NetworkSpec, options: ScaleOptions, given: Mapping[str, Any]) -> None:
    limits = budget.to_options()
    if budget.latency is None:
        _refuse(given, ("engine", "threads"), "needs --latency: only then are networks timed.")
    if options.pretrained:
        fixed = "does not go with --pretrained: published networks are fixed."
        _refuse({**given, **limits}, ("rule", "depth_rounding", "width", "depth"), fixed)
    if options.plot is not None:
        drawable(options.plot)
        if options.pretrained or not budget.limits:
            rule = "draws networks near the curve, which --pretrained and a budget of only a latency do not need."
            raise ArgumentError("plot", str(options.plot), rule)
    measure = None if budget.latency is None else _stopwatch(baseline, options)
    with console.Display("looking for the network that fits"):
        fit = fit_spec(
            budget,
            baseline,
            options.rule,
            num_classes=options.num_classes,
            resolution_step=options.resolution_step,
            depth_rounding=options.depth_rounding,
            measure=measure,
            among=_variants_with_weights() if options.pretrained else None,
        )
    tables.show_fit(fit, as_json=options.json)
    if options.plot is not None:
        tables.draw_candidates(fit, options.plot)
        console.remark(f"drew {options.plot}")
    following = _save(fit.spec, options.save, _command({**limits, **given}))
    if fit.published is not None and fit.is_published:  # it has weights, unlike a spec.yaml
        following = f"effnet predict photo.jpg --model {fit.published.variant.name}"
    console.remark(f"Next: {following}")


def _save(network: NetworkSpec, path: Path | None, command: str) -> str:
    """Write the network if `path` is given; returns the next command, which shows or saves it."""
    if path is None:
        return f"{command} --save {shlex.quote(network.name)}.yaml"
    with write_file(path) as temporary:
        temporary.write_text(spec_text(network), encoding="utf-8")
    return f"effnet info {shlex.quote(str(path))}"


def _stopwatch(baseline: NetworkSpec, options: ScaleOptions) -> Callable[[NetworkSpec], Timing]:
    """A function that times networks with random weights, one image at a time, in the engine that runs the baseline."""
    from effnet.metrics.timing import time_network  # needs torch

    selection = select(baseline, engine=options.engine, batch=1, threads=options.threads)
    console.remark(f"timed in {selection}")

    def time(spec: NetworkSpec) -> Timing:
        with console.Display(f"timing {spec.name}: {console.billions(cost(spec).macs)}MACs"):
            timing = time_network(spec, selection)
        console.remark(f"{spec.name}: {timing.median_ms:.1f} ms in {selection.backend}")
        return timing

    return time


def _variants_with_weights() -> list[str]:
    from effnet.weights.registry import REGISTRY  # slow to import: loads the standard library's HTTP client

    return sorted({known.variant for known in REGISTRY.values()})


def _refuse(given: Mapping[str, Any], names: Iterable[str], rule: str) -> None:
    for name in names:
        if name in given:
            raise ArgumentError(name.replace("_", "-"), given[name], rule)


def _command(given: Mapping[str, Any], drop: Container[str] = ("save", "plot", "json", "laws")) -> str:
    """The command line, without options that do not change the network."""
    return console.command_line("scale", {name: value for name, value in given.items() if name not in drop})
