"""effnet profile: where a network's time goes on this machine, and how well multiply-adds predict it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effnet import console
from effnet.console import MACS, OK, Flag, Whole
from effnet.errors import ArgumentError, MissingExtraError
from effnet.fields import positive_int
from effnet.weights.bundle import read_network

if TYPE_CHECKING:
    from effnet.metrics.conditions import Conditions
    from effnet.metrics.timing import Timing
    from effnet.profiling.compare import Comparison, Repeated
    from effnet.profiling.profile import Profile

PAIRS = 12  # inversions that are listed; --json has them all


def profile(
    model: str | None = None,
    *,
    batch: Whole | None = None,
    threads: Whole | None = None,
    engine: Literal["torch", "openvino", "onnxruntime"] | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    runs: Whole | None = None,
    compare: Flag = False,
    paper: Flag = False,
    plot: Path | None = None,
    json: Flag = False,
) -> int:
    """Time on this machine's processor: a network block by block beside its multiply-adds, or networks side by side.

    Networks have random weights: time does not depend on their values.

    Args:
        model: A variant (b0 ..., lite0 ...), a bundle, a spec.yaml, or an artifact of effnet export.
        batch: Images that go through together. Default: 1, or as an artifact was exported.
        threads: That the engine may use. Default: as many as it takes by itself.
        engine: What runs the network: torch (eagerly, the default), openvino or onnxruntime; an artifact's own.
        precision: fp32 (the default), or bf16, which is OpenVINO's; an artifact's own.
        runs: How many count, after a warm-up. Default: as many as fit into 20 seconds (7 to 30); 20 with --paper.
        compare: Instead of MODEL: small EfficientNets in turn with networks of other kinds, and how well multiply-adds
            and activations predict their times.
        paper: Instead of MODEL: the paper's Table 4, B1 against ResNet-152 on one thread.
        plot: Draw the profile or the comparison into this .png, .svg or .pdf file.
        json: JSON instead of a table.
    """
    given = {"batch": batch, "threads": threads, "runs": runs}
    numbers = {name: positive_int(name, value) for name, value in given.items() if value is not None}
    how = {name: value for name, value in (("engine", engine), ("precision", precision)) if value is not None}
    _check(model, compare=compare, paper=paper, fixed=numbers.keys() - {"runs"}, plot=plot)
    if how and model is None:
        option, value = next(iter(how.items()))
        raise ArgumentError(option, value, "is for a MODEL; networks are compared in torch.")
    if plot is not None:
        from effnet.plots.figures import drawable

        drawable(plot)
    if find_spec("torch") is None:
        raise MissingExtraError("measuring", "torch")
    if paper:
        return _repeat_paper(numbers, as_json=json)
    if model is None:
        return _compare(numbers, plot, as_json=json)
    return _profile(model, numbers, how, plot, as_json=json)


def _check(model: str | None, *, compare: bool, paper: bool, fixed: set[str], plot: Path | None) -> None:
    """Refuse options that contradict each other."""
    if compare and paper:
        raise ArgumentError("paper", paper, "does not go with --compare: choose one.")
    if model is None and not compare and not paper:
        raise ArgumentError("model", "", "must name a network, as in: effnet profile b0; or add --compare or --paper.")
    if model is not None and (compare or paper):
        rule = f"does not go with --{'compare' if compare else 'paper'}, which has networks of its own."
        raise ArgumentError("model", model, rule)
    if paper and plot is not None:
        raise ArgumentError("plot", str(plot), "draws a profile or a comparison: leave it or --paper out.")
    if paper and fixed:
        raise ArgumentError("paper", paper, f"fixes batch 1 and one thread: leave out {' and '.join(sorted(fixed))}.")


def _profile(model: str, numbers: dict[str, Any], how: Mapping[str, Any], plot: Path | None, *, as_json: bool) -> int:
    """One network, block by block."""
    from effnet.runtime.artifact import artifact_path

    if artifact_path(model) is None and how.get("engine", "torch") == "torch":
        from effnet.models.efficientnet import EfficientNet
        from effnet.profiling.profile import profile as measure
        from effnet.runtime.engines import Way

        Way("torch", how.get("precision", "fp32"))  # which refuses what torch cannot do
        spec = read_network(model)
        with console.counting(f"measuring {spec.name}", "rounds", 1) as progress:
            measured = measure(EfficientNet(spec), progress=progress, **numbers)
    else:
        from effnet.profiling import engine_blocks as blocks

        source = blocks.of_artifact if artifact_path(model) else blocks.of_network
        subject: Any = model if artifact_path(model) else read_network(model)
        with console.counting(f"measuring {model}", "rounds", 1) as progress:
            measured = source(subject, progress=progress, **numbers, **how)
    if plot is not None:
        from effnet.plots.figures import profile_blocks

        profile_blocks(measured, plot)
    if as_json:
        sys.stdout.write(console.json_text(measured.to_dict()))
    else:
        _show_profile(measured)
    words = " ".join(f"--{name} {value}" for name, value in how.items())
    again = " ".join(filter(None, ("effnet profile", shlex.quote(model), words, "--plot profile.png")))
    _finish(measured.conditions, plot, again if plot is None else "effnet profile --compare")
    return OK


def _show_profile(measured: Profile) -> None:
    """A row for each block, their sum, and the network itself."""
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
        f"Medians of {len(measured.whole.seconds)} runs, random weights; everything is of a batch of "
        f"{measured.conditions.batch}.\n"
        f"The blocks add up to {measured.sum_ms / whole:.1%} of the whole, which is timed by itself.\n"
        f"MB: the least that moves, each weight read once,\neach activation written once and read once.\n{MACS}"
    )
    console.table(columns, lines, title=f"{measured.name}, {measured.resolution} px\n{measured.conditions}", note=note)


def _compare(numbers: dict[str, Any], plot: Path | None, *, as_json: bool) -> int:
    """Networks of many kinds in turn."""
    from effnet.profiling.compare import compare

    with console.counting("measuring the networks in turn", "rounds", 1) as progress:
        measured = compare(progress=progress, **numbers)
    if plot is not None:
        from effnet.plots.figures import compare_times

        compare_times(measured, plot)
    if as_json:
        sys.stdout.write(console.json_text(measured.to_dict()))
    else:
        _show_comparison(measured)
    again = "effnet profile --compare --plot times.png"
    _finish(measured.conditions, plot, again if plot is None else "effnet profile --paper")
    return OK


def _show_comparison(measured: Comparison) -> None:
    """A row for each network, then what predicts time, then where it is not predicted."""
    columns = "<name", "px", "params", "MACs", "FLOPs", "activations", "ms", "10 to 90 %", "images/s"
    lines: list[tuple[object, ...]] = [
        (
            row.cost.name,
            row.resolution,
            console.millions(row.cost.params),
            console.billions(row.cost.macs),
            console.billions(row.cost.flops),
            console.millions(row.cost.activations),
            f"{row.time.median_ms:.1f}",
            _spread(row.time),
            f"{row.images_per_second:.1f}",
        )
        for row in sorted(measured.rows, key=lambda row: row.cost.macs)
    ]
    runs, found = len(measured.rows[0].time.seconds), measured.correlations
    note = (
        f"Medians of {runs} rounds, random weights; ms are of a batch of {measured.conditions.batch}.\n{MACS}\n"
        f"Pearson's r of log time with log MACs {found['macs']:.3f}, with log activations {found['activations']:.3f}."
    )
    console.table(columns, lines, title=f"Networks in turn, by multiply-adds\n{measured.conditions}", note=note)
    pairs = measured.inversions
    if not pairs:
        return
    inverted = [
        (
            pair.fewer.cost.name,
            console.billions(pair.fewer.cost.macs),
            f"{pair.fewer.time.median_ms:.1f}",
            pair.more.cost.name,
            console.billions(pair.more.cost.macs),
            f"{pair.more.time.median_ms:.1f}",
            f"{pair.slowdown:.2f}x",
            "yes" if pair.clear else "",
        )
        for pair in pairs[:PAIRS]
    ]
    count = f"{len(pairs)}" if len(pairs) <= PAIRS else f"{PAIRS} of {len(pairs)}"
    note = "Clear: the one's 10th percentile lies above the other's 90th;\nthe rest may turn round next time."
    heads = "<fewer MACs", "MACs", "ms", "<more MACs", "MACs", "ms", "slower by", "clear"
    console.table(heads, inverted, title=f"Fewer multiply-adds, and yet slower: {count} pairs", note=note)


def _repeat_paper(numbers: dict[str, Any], *, as_json: bool) -> int:
    """Table 4 on this machine."""
    from effnet.profiling.compare import TABLE_4_RUNS, paper_protocol

    with console.counting("measuring b1 and ResNet-152 on one thread", "rounds", 1) as progress:
        rows = paper_protocol(runs=numbers.get("runs", TABLE_4_RUNS), progress=progress)
    if as_json:
        sys.stdout.write(console.json_text([row.to_dict() for row in rows]))
    else:
        _show_paper(rows)
    _finish(rows[0].conditions, None, "effnet profile --compare")
    return OK


def _show_paper(rows: tuple[Repeated, ...]) -> None:
    """The published row, and ours in each memory layout."""
    from effnet.profiling.compare import GPIPE, TABLE_4

    ours, seconds, theirs, their_seconds = TABLE_4
    columns = "<", f"{ours}, ms", f"{theirs}, ms", "ratio"
    published = f"{1e3 * seconds:.0f}", f"{1e3 * their_seconds:.0f}", f"{their_seconds / seconds:.2f}x"
    lines: list[tuple[object, ...]] = [("paper, Xeon E5-2690", *published)]
    for row in rows:
        times = (f"{time.mean_ms:.1f} ± {time.stdev_ms:.1f}" for time in (row.ours, row.theirs))
        lines.append((f"here, {row.conditions.layout}", *times, f"{row.ratio:.2f}x"))
    first = rows[0].conditions
    note = (
        f"Here: mean ± standard deviation of {len(rows[0].ours.seconds)} runs, random weights; "
        f"{theirs} is torchvision's.\n{GPIPE}\n"
    )
    title = f"Table 4 of the paper: batch 1, one thread\n{first.machine}\n{first.dtype}, {', '.join(first.versions)}"
    console.table(columns, lines, title=title)
    sys.stdout.write(note)


def _spread(time: Timing) -> str:
    low, high = time.spread_ms
    return f"{low:.2f} - {high:.2f}"


def _finish(conditions: Conditions, plot: Path | None, command: str) -> None:
    """What may have disturbed the measurement, where the picture is, and what to type next."""
    if conditions.crowded:
        words = f"Other programs were busy before this began (load {conditions.load:.1f}): the times may be "
        if conditions.threads == 1:
            words += "too long. Measure again when it is quiet."
        else:
            words += (
                "far too long, as torch's threads wait for each other. Measure when it is quiet, or with --threads 1."
            )
        console.remark(words)
    if plot is not None:
        console.remark(f"Drawn: {plot}")
    console.remark(f"Next: {command}")
