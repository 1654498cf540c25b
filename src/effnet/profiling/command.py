"""effnet profile: where a network's time goes on this machine, and how well multiply-adds predict it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from effnet import console
from effnet.console import MACS, OK, Flag
from effnet.errors import ArgumentError
from effnet.plots.style import drawable
from effnet.profiling.profile import DEFAULTS, Profile, TimingOptions
from effnet.profiling.profile import profile as profile_blocks
from effnet.runtime.artifact import artifact_path, read_artifact
from effnet.runtime.options import EngineName
from effnet.weights.bundle import read_network

if TYPE_CHECKING:
    from effnet.metrics.timing import Timing
    from effnet.profiling.compare import Comparison

PAIRS = 8  # inversions to print; --json has them all


def profile(
    model: str | None = None,
    *,
    options: Annotated[TimingOptions, Parameter(name="*")] = DEFAULTS,
    engine: EngineName | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    compare: Flag = False,
    plot: Path | None = None,
    json: Flag = False,
) -> int:
    """Time a network block by block on this machine's processor, or compare networks.

    Weights are random, since time does not depend on their values.

    Args:
        model: A variant (b0 ..., lite0 ...), a bundle, a spec.yaml, or an artifact from effnet export.
        options: How to time it.
        engine: Engine to run it with. Default: torch, eagerly, or the engine of an artifact.
        precision: Precision to compute in. Default: fp32, or an artifact's own; only OpenVINO computes in bf16.
        compare: Instead of MODEL, time small EfficientNets and networks of other families in turn, and show how well
            multiply-adds and activations predict their times.
        plot: Draw the profile or the comparison to this .png, .svg or .pdf file.
        json: Print JSON instead of a table.
    """
    if (model is None) != compare:
        rule = "cannot be used with --compare." if model else "must name a network: effnet profile b0; or --compare."
        raise ArgumentError("model", model or "", rule)
    for option, value in (("engine", engine), ("precision", precision)):
        if compare and value is not None:
            raise ArgumentError(option, value, "needs MODEL: --compare runs every network in torch.")
    if plot is not None:
        drawable(plot)
    measured: Profile | Comparison
    with console.Display(f"measuring {model or 'the networks in turn'}") as progress:
        if model is None:
            from effnet.profiling.compare import compare_networks

            measured = compare_networks(options, progress=progress)
        else:
            opened = read_network(model) if artifact_path(model) is None else read_artifact(model)
            measured = profile_blocks(opened, options, engine=engine, precision=precision, progress=progress)
    if plot is not None:
        measured.draw(plot)
        console.remark(f"Drawn: {plot}")
    if json:
        sys.stdout.write(console.json_text(measured.to_dict()))
    elif isinstance(measured, Profile):
        _show_profile(measured)
    else:
        _show_comparison(measured)
    if measured.conditions.warning:
        console.remark(measured.conditions.warning)
    again = shlex.join(["effnet", "profile", model or "--compare"])
    for option, value in (("engine", engine), ("precision", precision)):
        again += f" --{option} {value}" if value else ""
    other = "effnet profile --compare" if model else "effnet profile b0"
    console.remark(f"Next: {other if plot else f'{again} --plot profile.png'}")
    return OK


def _show_profile(measured: Profile) -> None:
    """Print a row per block, their sum, and the whole network."""
    columns = "<block", "<operator", "input px", "MACs", "MB", "ms", "10 to 90 %", "time\n%", "MACs\n%", "GMAC/s"
    lines: list[tuple[object, ...]] = [
        (
            block.row.name,
            block.row.operator,
            block.row.input_size,
            f"{block.macs:,}",
            f"{block.bytes / 1e6:.2f}",
            f"{block.time.median_ms:.2f}",
            _spread(block.time),
            f"{100 * measured.time_share(block):.1f}",
            f"{100 * measured.macs_share(block):.1f}",
            f"{block.gmacs_per_second:.1f}",
        )
        for block in measured.blocks
    ]
    whole, macs = measured.whole.median_ms, f"{measured.macs:,}"
    megabytes = f"{sum(block.bytes for block in measured.blocks) / 1e6:.2f}"
    speed = f"{measured.macs / whole / 1e6:.1f}"
    lines.append(("sum", "", "", macs, megabytes, f"{measured.sum_ms:.2f}", "", "100.0", "100.0", ""))
    lines.append(("whole", "", "", macs, "", f"{whole:.2f}", _spread(measured.whole), "", "", speed))
    note = (
        f"Medians of {len(measured.whole.seconds)} runs with random weights; all figures are per batch of "
        f"{measured.conditions.batch}.\n"
        f"The blocks add up to {measured.sum_ms / whole:.1%} of the whole, which is timed separately.\n"
        f"MB: the minimum memory traffic, each weight read once,\neach activation written once and read once.\n{MACS}"
    )
    console.table(columns, lines, title=f"{measured.name}, {measured.resolution} px\n{measured.conditions}", note=note)


def _show_comparison(measured: Comparison) -> None:
    """Print a row per network, what predicts time, and the pairs for which multiply-adds do not."""
    columns = "<name", "px", "params", "MACs", "FLOPs", "activations", "ms", "10 to 90 %"
    lines = [
        (
            row.cost.name,
            row.resolution,
            console.millions(row.cost.params),
            console.billions(row.cost.macs),
            console.billions(row.cost.flops),
            console.millions(row.cost.activations),
            f"{row.time.median_ms:.1f}",
            _spread(row.time),
        )
        for row in sorted(measured.rows, key=lambda row: row.cost.macs)
    ]
    runs, found = len(measured.rows[0].time.seconds), measured.correlations
    note = (
        f"Medians of {runs} rounds, random weights; ms are per batch of {measured.conditions.batch}.\n{MACS}\n"
        f"Pearson's r of log time with log MACs {found['macs']:.3f}, with log activations {found['activations']:.3f}."
    )
    console.table(columns, lines, title=f"Networks in turn, by multiply-adds\n{measured.conditions}", note=note)
    if pairs := measured.inversions[:PAIRS]:
        texts = (f"{fewer.cost.name} than {more.cost.name} ({slowdown:.2f}x)" for slowdown, fewer, more in pairs)
        console.paragraphs([f"Fewer multiply-adds, yet slower: {', '.join(texts)}."])


def _spread(time: Timing) -> str:
    low, high = time.spread_ms
    return f"{low:.2f} - {high:.2f}"
