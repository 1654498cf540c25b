"""What effnet scale shows when it is given a budget: the network, every cost beside its limit, and the alternatives."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet import console
from effnet.arch.cost import cost
from effnet.arch.memory import Keep
from effnet.arch.spec import NetworkSpec
from effnet.arch.specfile import spec_text
from effnet.console import OK
from effnet.errors import MissingExtraError
from effnet.files import write_file
from effnet.scaling.budget import Budget
from effnet.scaling.compound import Rule
from effnet.scaling.fitting import MORE, Fit, Use, fit_spec

if TYPE_CHECKING:
    from effnet.metrics.timing import Timing
    from effnet.runtime.engines import EngineName

NAMES = {
    "macs": "MACs",
    "params": "params",
    "memory": "inference memory",
    "train_memory": "training memory",
    "file_size": "file",
    "latency": "latency, 1 image",
}
FEW_PHOTOS = "With few photos its pretrained weights usually win over a better fit: --pretrained."


def fit_budget(
    budget: Budget,
    baseline: NetworkSpec,
    rule: Rule,
    *,
    pretrained: bool,
    threads: int | None,
    engine: EngineName | None,
    **how: Any,
) -> Fit:
    """The report, with networks timed on this machine where a latency is asked for."""
    measure = None if budget.latency is None else stopwatch(baseline, engine, threads)
    among = _with_weights() if pretrained else None
    with console.Display("looking for the network that fits"):
        return fit_spec(budget, baseline, rule, measure=measure, among=among, **how)


def _with_weights() -> list[str]:
    """The variants of which weights are known."""
    from effnet.weights.registry import REGISTRY  # and with it the standard library's HTTP, which takes its time

    return sorted({known.variant for known in REGISTRY.values()})


def stopwatch(baseline: NetworkSpec, engine: EngineName | None, threads: int | None) -> Callable[[NetworkSpec], Timing]:
    """Times networks of random weights, one image at a time, in the engine that runs the baseline fastest.

    Raises:
        MissingExtraError: torch or the engine is not installed.
    """
    try:
        from effnet.runtime.latency import choose_for, time_network
    except ImportError as error:
        raise MissingExtraError("measuring", "torch") from error
    with console.Display("choosing an engine"):
        chosen = choose_for(baseline, engine, threads)
    console.remark(f"timed in {chosen}")

    def time(spec: NetworkSpec) -> Timing:
        with console.Display(f"timing {spec.name}: {console.billions(cost(spec).macs)}MACs"):
            timing = time_network(spec, chosen.way, threads=threads)
        console.remark(f"{spec.name}: {timing.median_ms:.1f} ms in {chosen.way}")
        return timing

    return time


def show_fit(fit: Fit, command: str, *, save: Path | None, plot: Path | None, as_json: bool) -> int:
    """Print the report; on request write the network and draw the candidates."""
    if save is not None:
        with write_file(save) as temporary:
            temporary.write_text(spec_text(fit.spec), encoding="utf-8")
    if plot is not None:
        from effnet.scaling.plots import budget_candidates

        budget_candidates(fit, plot)
        console.remark(f"drew {plot}")
    if as_json:
        sys.stdout.write(console.json_text(fit.to_dict()))
    else:
        _print(fit)
    if fit.published is not None and fit.is_published:  # it has weights, which a spec.yaml has not
        command = f"effnet predict photo.jpg --model {fit.published.variant.name}"
    elif save is not None:
        command = f"effnet info {shlex.quote(str(save))}"
    else:
        command += f" --save {shlex.quote(fit.spec.name)}.yaml"
    console.remark(f"Next: {command}")
    return OK


def _print(fit: Fit) -> None:
    spec, budget = fit.spec, fit.budget
    title = f"{spec.name}: {_sizes(spec)}"
    rows = [
        (
            NAMES[use.resource] + " (FLOPs / 2)" * (use.resource == "macs"),
            _written(use, use.value),
            "" if use.limit is None else _written(use, use.limit),
            "" if use.share is None else f"{use.share:.1%}",
            "" if use.limit is None else _written(use, use.limit - use.value),
            "binds" if use.resource == fit.binding else "",
        )
        for use in fit.uses
    ]
    console.table(("<", "value", "limit", "used", "slack", "<"), rows, title=title)
    origin = "" if fit.candidates is None else f": the best of {len(fit.candidates):,} networks near the rule's curve"
    lines = [f"{len(spec.blocks)} blocks, dropout {spec.dropout:g}, phi {fit.phi:.2f} by MACs{origin}."]
    if budget.batch is not None:
        kept = "everything" if budget.keep is None else Keep.parse(budget.keep).name.lower()
        average = ", moving average" if budget.ema else ""
        how = f"{budget.batch} images a step, {budget.optimizer}{average}, {budget.precision}, {kept} kept"
        lines.append(f"Training memory: {how}. Plans that keep less: effnet info --batch {budget.batch}.")
    if timed := fit.timed:
        low, high = timed.spread_ms
        lines.append(f"Measured on this machine: median {timed.median_ms:.1f} ms, {low:.1f} to {high:.1f} ms.")
    if shown := fit.published:
        row = shown.variant
        place = "" if shown.as_published else f" at {row.resolution} px"
        lines.append(
            f"Published within this budget: {row.name} at {shown.resolution} px, {console.billions(shown.macs)}MACs, "
            f"top-1 {row.top1} %{place} ({row.source}; on ImageNet, not measured here). "
            + FEW_PHOTOS
            * (not fit.is_published)
        )
    else:
        lines.append("No published network meets this budget.")
    if fit.more is not None:
        gain = cost(fit.more).macs / cost(spec).macs - 1
        lines.append(f"{MORE - 1:.0%} more {NAMES[fit.binding]} would buy {gain:+.0%} MACs: {_sizes(fit.more)}.")
    if fit.better is not None:
        name, network = fit.better
        gain = cost(network).macs / cost(spec).macs - 1
        lines.append(
            f"--rule {name} makes {gain:+.0%} MACs of the same budget: {_sizes(network)}. The paper grows accuracy "
            "with MACs; this is no accuracy."
        )
    console.paragraphs(lines)


def _sizes(spec: NetworkSpec) -> str:
    return f"width {spec.width:.4g}, depth {spec.depth:.4g} ({spec.depth_rounding}), {spec.resolution} px"


def _written(use: Use, value: float) -> str:
    if use.resource == "latency":
        return f"{1e3 * value:.2f} ms"
    if use.resource in ("macs", "params"):
        return console.billions(value) if use.resource == "macs" else console.millions(value)
    return console.size(value)
