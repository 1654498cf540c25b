"""Output of effnet scale: a network beside its baseline, a rule, the doubling laws, a network for a budget."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effnet import console
from effnet.arch.cost import cost
from effnet.arch.segments import Keep
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import PAPER, VARIANTS
from effnet.console import MACS
from effnet.errors import ArgumentError
from effnet.plots.style import BLUE, INK, PALE, RED, RIGHT, decades, name_point, picture
from effnet.scaling.budget import Budget, count_resources
from effnet.scaling.compound import (
    Rule,
    ScalingStep,
    implied_phis,
    interpolate_dropout,
    nominal_ratio,
    published_variants,
    realised_ratio,
)
from effnet.scaling.fit import MORE, FittedSpec, PublishedFit, ResourceUse
from effnet.scaling.laws import Law

RATIOS = "MACs: nominal is d w^2 r^2, counted is what is built, excess is how much more that is."
FEW_PHOTOS = "With few photos its pretrained weights usually beat a better fit: --pretrained."
NAMES = {
    "macs": "MACs",
    "params": "params",
    "memory": "inference memory",
    "train_memory": "training memory",
    "file_size": "file",
    "latency": "latency, 1 image",
}
QUANTITIES: tuple[tuple[str, Callable[[NetworkSpec], Any], Callable[[Any], str]], ...] = (
    # label, value, format
    ("width", lambda network: network.width, "{:.4g}".format),
    ("depth", lambda network: network.depth, "{:.4g}".format),
    ("resolution, px", lambda network: network.resolution, str),
    ("blocks", lambda network: len(network.blocks), str),
    ("params", lambda network: cost(network).params, console.millions),
    ("MACs", lambda network: cost(network).macs, console.billions),
    ("FLOPs", lambda network: cost(network).flops, console.billions),
    ("activations", lambda network: cost(network).activations, console.millions),
)
PAPER_FAMILY = [row.spec for row in VARIANTS.values() if row.source == PAPER]


def show_step(baseline: NetworkSpec, rule: Rule, step: ScalingStep, *, as_json: bool) -> None:
    """Print a network beside its baseline."""
    if as_json:
        sys.stdout.write(console.json_text(_values(step) | {"rule": dataclasses.asdict(rule)}))
        return
    network = step.network
    lines = []
    for label, value, write in QUANTITIES:
        before, after = value(baseline), value(network)
        lines.append((label, write(before), write(after), f"{after / before:.3f}x"))
    console.table(("<", baseline.name, network.name, "ratio"), lines, title=f"{baseline.name} at phi {step.phi:g}")
    rate, sources = interpolate_dropout(baseline, network)
    origin = f"interpolated between {' and '.join(sources)}" if sources[1:] else f"as {(*sources, baseline.name)[0]}"
    implied = implied_phis(baseline, network, rule).macs
    console.paragraphs(
        (
            f"By the rule {_describe(rule)}.",
            f"Depth rounding: {network.depth_rounding}. Dropout {rate:g}, {origin}; "
            f"drop-connect {network.drop_connect:g}.",
            f"MACs: d w^2 r^2 promises {step.nominal_ratio:.3f}x, "
            f"{step.realised_ratio:.3f}x is built ({step.excess:+.0%}), which is phi {implied:.2f}.",
            MACS,
        )
    )


def show_rule(baseline: NetworkSpec, rule: Rule, steps: tuple[ScalingStep, ...], *, as_json: bool) -> None:
    """Print a rule's networks at each phi, nominal and as built, and where the published variants lie."""
    variants = published_variants(baseline)[1:]
    family = []
    for one in variants:
        step = ScalingStep(one, None, nominal_ratio(baseline, one), realised_ratio(baseline, one))
        family.append((step, implied_phis(baseline, one, rule)))
    if as_json:
        published = [_values(step) | {"implied_phi": dataclasses.asdict(implied)} for step, implied in family]
        values = {"rule": dataclasses.asdict(rule), "steps": [_values(step) for step in steps], "published": published}
        sys.stdout.write(console.json_text(values))
        return
    sizes, ratios = ("width", "depth", "px", "blocks"), ("nominal", "counted", "excess")
    columns: tuple[str, ...] = ("phi", *sizes, "<layers", "dropout", "params", "MACs", "FLOPs", "activations", *ratios)
    lines: list[tuple[object, ...]] = []
    for step in steps:
        rates = step.network.depth_rounding, f"{step.network.dropout:g}"
        costs = (write(value(step.network)) for _, value, write in QUANTITIES[4:])
        lines.append((f"{step.phi:g}", *_sizes(step.network), *rates, *costs, *_ratios(step)))
    console.table(columns, lines, title=f"{baseline.name} by the rule {_describe(rule)}")
    if family:
        lines = []
        for step, implied in family:
            phis = ("-" if phi is None else f"{phi:.2f}" for phi in dataclasses.astuple(implied))
            lines.append((step.network.name, *_sizes(step.network), *_ratios(step), *phis))
        columns = "<name", *sizes, *ratios, *(f"phi by\n{number}" for number in ("depth", "width", "px", "MACs"))
        console.table(columns, lines, title="The published variants by the same rule")
    console.paragraphs((RATIOS, MACS))


def show_laws(baseline: NetworkSpec, laws: tuple[Law, ...], *, as_json: bool) -> None:
    """Print what doubling one dimension costs."""
    if as_json:
        sys.stdout.write(console.json_text([dataclasses.asdict(law) | {"reason": law.reason} for law in laws]))
        return
    resources = {"MACs": "macs", "params": "params", "activations": "activations"}
    columns = ["<doubled", *(f"{label}\n{source}" for label in resources for source in ("counted", "textbook"))]
    lines = []
    for law in laws:
        pairs = [(getattr(law.counted, name), getattr(law.textbook, name)) for name in resources.values()]
        lines.append((law.dimension, *(text for counted, book in pairs for text in (f"{counted:.2f}x", f"{book:g}x"))))
    console.table(columns, lines, title=f"{baseline.name} with one dimension doubled")
    reasons = (f"{law.dimension}: {law.reason}." for law in laws)
    console.paragraphs(("Why the MACs differ from the textbook's:", *reasons, MACS))


def show_fit(fit: FittedSpec, *, as_json: bool) -> None:
    """Print the network that fits a budget, its costs beside the limits, and the alternatives."""
    if as_json:
        sys.stdout.write(console.json_text(fit.to_dict()))
        return
    spec = fit.spec
    rows = []
    for use in fit.uses:
        label = NAMES[use.resource] + " (FLOPs / 2)" * (use.resource == "macs")
        limits = "", "", ""
        if use.limit is not None:
            limits = _write(use, use.limit), f"{use.share:.1%}", _write(use, use.limit - use.value)
        rows.append((label, _write(use, use.value), *limits, "binds" if use.resource == fit.binding else ""))
    console.table(("<", "value", "limit", "used", "slack", "<"), rows, title=f"{spec.name}: {_describe_sizes(spec)}")
    origin = f": the best of {fit.considered:,} networks near the rule's curve" if fit.considered else ""
    lines = [f"{len(spec.blocks)} blocks, dropout {spec.dropout:g}, phi {fit.phi:.2f} by MACs{origin}."]
    if fit.budget.batch is not None:
        lines.append(_describe_training(fit.budget))
    if timed := fit.timed:
        low, high = timed.spread_ms
        lines.append(f"Measured on this machine: median {timed.median_ms:.1f} ms, {low:.1f} to {high:.1f} ms.")
    if fit.published is None:
        lines.append("No published network meets this budget.")
    else:
        lines.append(_describe_published(fit.published) + f" {FEW_PHOTOS}" * (not fit.is_published))
    macs = cost(spec).macs
    if fit.more is not None:
        gain = f"{cost(fit.more).macs / macs - 1:+.0%} MACs: {_describe_sizes(fit.more)}"
        lines.append(f"{MORE - 1:.0%} more {NAMES[fit.binding]} would buy {gain}.")
    if fit.better is not None:
        name, network = fit.better
        gain = f"{cost(network).macs / macs - 1:+.0%} MACs of the same budget: {_describe_sizes(network)}"
        lines.append(f"--rule {name} makes {gain}. The paper grows accuracy with MACs; MACs are not an accuracy.")
    console.paragraphs(lines)


def draw_candidates(fit: FittedSpec, out: Path) -> None:
    """Draw the candidates for a budget: the binding resource over multiply-adds, with the limits as lines.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf, or the fit has no candidates.
        MissingExtraError: matplotlib is not installed.
    """
    if fit.candidates is None:
        raise ArgumentError("fit", fit.spec.name, "was chosen among published networks and has no candidates to draw.")
    drawn = fit.binding if fit.binding in fit.candidates and fit.binding != "macs" else "params"
    label = "parameters, millions" if drawn == "params" else f"{drawn.replace('_', ' ')}, MB"
    here, *published = (
        (counts["macs"] / 1e9, counts[drawn] / 1e6)
        for counts in (count_resources(spec, fit.budget) for spec in (fit.spec, *PAPER_FAMILY))
    )
    with picture(out, 10, 6.4, f"{fit.spec.name}: the budget and its candidates") as figure:
        axes = figure.subplots()
        points = fit.candidates["macs"] / 1e9, fit.candidates[drawn] / 1e6
        axes.scatter(*points, 4, PALE, label=f"{fit.considered:,} candidates", rasterized=True)
        axes.plot(*zip(*published, strict=True), "D-", color=RED, markerfacecolor="white", label="published")
        axes.plot(*here, "o", color=BLUE, markersize=11, zorder=4, label="chosen")
        left, right = here[0] / 8, here[0] * 8
        for spec, point in zip(PAPER_FAMILY, published, strict=True):
            if left < point[0] < right:
                name_point(axes, spec.name.upper(), point, (RIGHT, -8), color=RED, fontsize=11)
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(here[1] / 6, here[1] * 6))
        axes.set(xlabel="multiply-adds per image, billions", ylabel=label)
        limits = fit.budget.limits
        line: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 1.5, "label": "limits"}
        if "macs" in limits:
            axes.axvline(limits["macs"] / 1e9, **line)
        if drawn in limits:
            axes.axhline(limits[drawn] / 1e6, **line)
        decades(axes)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), frameon=False, loc="upper left")


def _describe_training(budget: Budget) -> str:
    kept = "everything" if budget.keep is None else Keep.parse(budget.keep).name.lower()
    average = ", moving average" if budget.ema else ""
    settings = f"{budget.batch} images a step, {budget.optimizer}{average}, {budget.precision}, {kept} kept"
    return f"Training memory: {settings}. Plans that keep less: effnet info --batch {budget.batch}."


def _describe_published(published: PublishedFit) -> str:
    row = published.variant
    place = "" if published.as_published else f" at {row.resolution} px"
    return (
        f"Published within this budget: {row.name} at {published.spec.resolution} px, "
        f"{console.billions(cost(published.spec).macs)}MACs, top-1 {row.top1} %{place} "
        f"({row.source}; on ImageNet, not measured here)."
    )


def _describe_sizes(spec: NetworkSpec) -> str:
    return f"width {spec.width:.4g}, depth {spec.depth:.4g} ({spec.depth_rounding}), {spec.resolution} px"


def _describe(rule: Rule) -> str:
    growths = f"alpha {rule.alpha:.4g}, beta {rule.beta:.4g}, gamma {rule.gamma:.4g}"
    return f"{f'{rule.name}: ' if rule.name else ''}{growths}; alpha beta^2 gamma^2 = {rule.product:.4g} per phi"


def _write(use: ResourceUse, value: float) -> str:
    if use.resource == "latency":
        return f"{1e3 * value:.2f} ms"
    if use.resource in ("macs", "params"):
        return console.billions(value) if use.resource == "macs" else console.millions(value)
    return console.size(value)


def _values(step: ScalingStep) -> dict[str, Any]:
    sizes = "name", "width", "depth", "resolution", "depth_rounding", "dropout", "drop_connect"
    sources = (step.network, sizes), (cost(step.network), ("params", "macs", "flops", "activations"))
    values = {name: getattr(source, name) for source, names in sources for name in names}
    ratios = {"nominal_ratio": step.nominal_ratio, "realised_ratio": step.realised_ratio}
    return values | ratios | {"blocks": len(step.network.blocks), "phi": step.phi}


def _sizes(network: NetworkSpec) -> tuple[str, ...]:
    return f"{network.width:.4g}", f"{network.depth:.4g}", str(network.resolution), str(len(network.blocks))


def _ratios(step: ScalingStep) -> tuple[str, ...]:
    return f"{step.nominal_ratio:.4g}x", f"{step.realised_ratio:.4g}x", f"{step.excess:+.0%}"
