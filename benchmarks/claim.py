"""The paper's claim on a small problem: compound scaling is better than scaling one dimension (Figures 3, 4, 8).

    python benchmarks/claim.py DATA --from examples/baselines/separable.yaml --epochs 0.75 --seeds 4 --out runs/claim

The networks that the paper compares differ in cost: by our count, compound scaling in Table 7 has 1.80 billion
multiply-adds and the others 1.45 to 1.58. Here, compared networks have the same cost within 2 %: each is built by its
rule and then adjusted in width and resolution (effnet.searching.candidates).

Compound scaling is compared with each other line seed by seed. Unlike in a search, the noise is not pooled, because it
differs between lines: deep plain networks depend more on their initial weights. The intervals hold for all comparisons
at once (Bonferroni).

Figure 4 sweeps the width at several depths and resolutions. The factors here are those of its caption, 1.3 for
resolution and 2 for depth; section 3.3 says 2 for both.

The networks (candidates.csv), their scores (trials.csv), the verdict (verdict.json) and its picture (compare.png) are
written to --out. The same command resumes an interrupted comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from effnet import console
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import spec as make_spec
from effnet.data.dataset import manifest
from effnet.errors import ArgumentError
from effnet.fields import positive_float
from effnet.plots.style import GREEN, GREY, ORANGE, RED, SKY, picture
from effnet.progress import SILENT, Progress
from effnet.scaling.compound import RULES, Rule, read_rule
from effnet.searching.candidates import Candidate, adapt_baseline, build_network
from effnet.searching.halving import CONFIDENCE, Job, PairedDifference, Scores
from effnet.searching.jobs import LocalExecutor, interruptible, open_record, run_jobs
from effnet.searching.plan import (
    CANDIDATES,
    TRIALS,
    SearchOptions,
    SearchPlan,
    WorkOptions,
    candidate_row,
    split_images,
)
from effnet.training.initial_network import short_side
from effnet.training.recipe import read_recipe

SINGLE = ("width", "depth", "resolution")
COMPOUND, BASELINE = "compound", "baseline"
SWEPT_WIDTHS = (1.0, 1.4, 2.0)
SWEPT = ((1.0, 1.0), (1.0, 1.3), (2.0, 1.0), (2.0, 1.3))  # factors on depth and resolution
SLACK = 0.1  # how much more a swept network may cost than the most expensive line
SWEEP_SEEDS = 2  # trainings of each network of the sweeps
PHIS = 71  # number of phis to try, around the one whose nominal cost is right
LINES = {  # colour and marker of each way to scale
    "width": (ORANGE, "s"),
    "depth": (GREEN, "^"),
    "resolution": (SKY, "D"),
    COMPOUND: (RED, "o"),
}
SWEEPS = ((GREY, "o"), (GREEN, "^"), (SKY, "D"), (RED, "s"))


@dataclass(frozen=True)
class Contestant:
    """A network of the comparison."""

    line: str  # baseline, width, depth, resolution, compound, or the name of a sweep
    factor: float  # the wanted multiply-adds over the baseline's
    candidate: Candidate

    @property
    def network(self) -> NetworkSpec:
        """Its network."""
        return self.candidate.network

    @property
    def ratio(self) -> float:
        """Its multiply-adds over the baseline's."""
        return self.candidate.ratio


@dataclass(frozen=True)
class Comparison:
    """Compound scaling against one other line, at one cost."""

    line: str
    factor: float
    difference: PairedDifference  # compound minus the other

    @property
    def verdict(self) -> str:
        """Which of the two is better, if the difference is significant."""
        if self.difference.low > 0:
            return f"compound is better than {self.line} alone"
        if self.difference.high < 0:
            return f"{self.line} alone is better than compound"
        return f"no difference between compound and {self.line} alone was found"


def contestants(
    baseline: NetworkSpec,
    rule: Rule,
    factor: float,
    *,
    largest: int | None = None,
    progress: Progress = SILENT,
) -> list[Contestant]:
    """The baseline, the four lines at the square root of `factor` and at `factor`, then the sweeps of the width.

    Args:
        baseline: the network to scale.
        rule: of compound scaling.
        factor: growth of the multiply-adds, more than 1.
        largest: the images' size in pixels, which no network exceeds.
        progress: reports the work, which is slow for large baselines.

    Raises:
        ArgumentError: a line has no network of the wanted cost.
    """
    if positive_float("factor", factor) <= 1:
        raise ArgumentError("factor", factor, "must be more than 1.")
    found = [_contestant(BASELINE, 1.0, baseline, baseline)]
    rules = {name: RULES[name] for name in SINGLE} | {COMPOUND: rule}
    wanted = list(itertools.product((factor**0.5, factor), rules.items()))
    for done, (ratio, (line, growth)) in enumerate(wanted):
        progress.update("building networks", done, len(wanted))
        network = reach_cost(baseline, growth, ratio, largest)
        if network is None:
            limit = "" if largest is None else f" and at most the images' {largest} px"
            why = f"cannot be reached by {line} from {baseline.name} at {baseline.resolution} px: no network within 2 %"
            raise ArgumentError("factor", round(ratio, 3), f"{why}{limit}. Take another factor.")
        found.append(_contestant(line, ratio, baseline, network))
    progress.update("building networks", len(wanted), len(wanted))
    for (deep, fine), wide in itertools.product(SWEPT, SWEPT_WIDTHS):
        pixels = round(fine * baseline.resolution)
        if (deep, fine, wide) == (1, 1, 1) or pixels > (largest or pixels):
            continue
        network = dataclasses.replace(
            baseline,
            depth=deep * baseline.depth,
            width=wide * baseline.width,
            resolution=pixels,
            depth_rounding="nearest",
        )
        ratio = cost(network).macs / cost(baseline).macs
        if ratio <= factor * (1 + SLACK):
            found.append(_contestant(f"d={deep:g}, r={fine:g}", ratio, baseline, network))
    return found


def reach_cost(baseline: NetworkSpec, rule: Rule, ratio: float, largest: int | None = None) -> NetworkSpec | None:
    """Scale a baseline by a rule to `ratio` times its multiply-adds, or return None if that is impossible.

    Of several phis, the one is taken that needs the smallest adjustment of width and resolution.
    """
    aim = rule.phi_of_macs(ratio)
    built = [build_network(baseline, rule, float(phi), ratio, largest) for phi in aim * np.linspace(0.8, 1.5, PHIS)]
    networks = [each for each in built if each is not None]
    return min(networks, key=lambda each: each[1])[0] if networks else None


def _contestant(line: str, factor: float, baseline: NetworkSpec, network: NetworkSpec) -> Contestant:
    network = dataclasses.replace(
        network, name=f"{baseline.name} {line} x{factor:.3g}" if factor != 1 else baseline.name
    )
    return Contestant(line, factor, Candidate.of(baseline, network, ()))


def jobs(found: Sequence[Contestant], seeds: int, scores: Scores) -> tuple[Job, ...]:
    """The missing trainings: the lines seed by seed, then the sweeps."""
    lines = (BASELINE, *SINGLE, COMPOUND)
    main = [place for place, each in enumerate(found) if each.line in lines]
    swept = [place for place, each in enumerate(found) if each.line not in lines]
    wanted = [Job(0, seed, place) for seed in range(seeds) for place in main]
    wanted += [Job(0, seed, place) for seed in range(min(seeds, SWEEP_SEEDS)) for place in swept]
    return tuple(job for job in wanted if job not in scores)


def paired_difference(candidate: int, gaps: Sequence[float], comparisons: int) -> PairedDifference:
    """The mean of the gaps per seed, with Student's interval, corrected for the number of comparisons.

    The two networks may differ in their noise. With a single seed, the interval is infinite.
    """
    mean = statistics.fmean(gaps)
    if len(gaps) < 2:
        return PairedDifference(candidate, mean, -math.inf, math.inf)
    tail = (1 - CONFIDENCE) / 2 / comparisons
    reach = float(stats.t.ppf(1 - tail, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return PairedDifference(candidate, mean, mean - reach, mean + reach)


def compare_lines(found: Sequence[Contestant], seeds: int, scores: Mapping[Job, float]) -> list[Comparison]:
    """Compound scaling against width, depth and resolution alone at each cost; the intervals hold for all at once.

    Raises:
        ArgumentError: trainings are missing.
    """
    if missing := jobs(found, seeds, scores):
        raise ArgumentError("scores", f"{len(scores)} trainings", f"lack {len(missing)} of the comparison.")
    places = {(each.line, each.factor): place for place, each in enumerate(found)}
    factors = sorted({each.factor for each in found if each.line == COMPOUND})
    rows = []
    for factor, line in itertools.product(factors, SINGLE):
        ours, other = places[COMPOUND, factor], places[line, factor]
        gaps = [scores[Job(0, seed, ours)] - scores[Job(0, seed, other)] for seed in range(seeds)]
        rows.append(Comparison(line, factor, paired_difference(other, gaps, len(factors) * len(SINGLE))))
    return rows


def draw_comparison(found: Sequence[Contestant], scores: Mapping[int, Sequence[float]], out: Path) -> None:
    """Draw accuracy over multiply-adds: the four ways to scale with their intervals, and the sweeps of the width.

    Args:
        found: the networks.
        scores: one score per seed for each network, by its index.
        out: the file to write.
    """
    base = next(place for place, each in enumerate(found) if each.line == BASELINE)
    title = f"{found[base].network.name}: ways to scale, at equal multiply-adds"
    with picture(out, 13, 6, title) as figure:
        lines, sweeps = figure.subplots(1, 2, sharey=True)
        for name in (*SINGLE, COMPOUND):
            colour, mark = LINES[name]
            places = [base, *(place for place, each in enumerate(found) if each.line == name)]
            means, reach = zip(*(_interval(scores[place]) for place in places), strict=True)
            macs = [found[place].ratio for place in places]
            label = name if name == COMPOUND else f"{name} alone"
            width = 2.5 if name == COMPOUND else 1.5
            lines.errorbar(macs, means, reach, marker=mark, color=colour, capsize=4, linewidth=width, label=label)
        swept: dict[str, list[int]] = defaultdict(list)
        for place, each in enumerate(found):
            if each.line not in (*SINGLE, COMPOUND, BASELINE):
                swept[each.line].append(place)
        for (name, places), (colour, mark) in zip(swept.items(), SWEEPS, strict=False):
            places = [base, *places] if name == "d=1, r=1" else places
            macs = [found[place].ratio for place in places]
            levels = [100 * statistics.fmean(scores[place]) for place in places]
            sweeps.plot(macs, levels, marker=mark, color=colour, label=name)
        lines.set_title("one dimension alone, and all together", loc="left", fontsize=12)
        sweeps.set_title("the width swept at several depths and resolutions", loc="left", fontsize=12)
        for axes in (lines, sweeps):
            axes.set_xlabel("multiply-adds, the baseline's being 1")
            axes.legend(frameon=False)
        lines.set_ylabel("accuracy on the val split, %")
        count = min(len(scores[place]) for place, each in enumerate(found) if each.line == COMPOUND)
        figure.supxlabel(
            f"Means of {count} trainings with {CONFIDENCE:.0%} intervals (left), of {min(count, 2)} (right).",
            x=0.012,
            ha="left",
            fontsize=10,
            color=GREY,
        )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean in percent, and half the width of its interval, which is 0 for a single value."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return mean, 100 * t * statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    """Run the missing trainings and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a folder with a sub-folder for each class, or a manifest")
    parser.add_argument("--from", dest="baseline", default="b0", help="a variant, another baseline, or a spec.yaml")
    parser.add_argument(
        "--factor", type=float, default=4.0, help="growth of multiply-adds; its square root is compared, too"
    )
    parser.add_argument(
        "--rule", default="paper", help="rule of compound scaling: a name, three numbers, or a rule.yaml"
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each network")
    parser.add_argument("--epochs", type=float, required=True, help="length of a training")
    parser.add_argument("--val", type=float, default=0.15, help="share of the data to score networks with")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the initial weights and the order")
    parser.add_argument("--workers", type=int, help="trainings at a time; default: one for each core")
    parser.add_argument("--minutes", type=float, help="time after which no training starts")
    parser.add_argument("--out", type=Path, default=Path("runs/claim"))
    given = parser.parse_args()
    with console.Display("preparing the comparison") as display:
        run(given, display)


def run(given: argparse.Namespace, progress: Progress) -> None:
    """Run the missing trainings and, if all are done, write the results."""
    options = SearchOptions(rungs=1, epochs=given.epochs, val=given.val, seed=given.seed)
    work = WorkOptions(minutes=given.minutes, workers=given.workers)
    images = split_images(given.data, options)
    native = short_side(images)
    baseline = adapt_baseline(make_spec(make_spec(given.baseline), num_classes=len(images.classes)), native)
    found = contestants(baseline, read_rule(given.rule), given.factor, largest=native, progress=progress)
    networks = tuple(each.candidate for each in found)
    plan = SearchPlan(given.out, options, images, read_recipe("scratch"), baseline, networks, given.epochs)
    given.out.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in vars(given).items() if name not in ("out", "workers", "minutes")}
    settings = json.dumps(about | {"images": manifest(images, sizes=True)}, default=str, indent=2)
    kept = given.out / "args.json"
    if kept.exists() and kept.read_text() != settings:
        raise SystemExit(f"{given.out} holds another comparison; choose another --out")
    kept.write_text(settings)
    rows = [{"line": each.line} | candidate_row(place, each.candidate) for place, each in enumerate(found)]
    (given.out / CANDIDATES).write_text(console.csv_lines([tuple(rows[0]), *(tuple(row.values()) for row in rows)]))
    with open_record(given.out / TRIALS, plan.names) as record:
        open_jobs = functools.partial(jobs, found, given.seeds)
        with interruptible(), closing(LocalExecutor(plan, work.count_workers("cpu"))) as executor:
            run_jobs(open_jobs, record, executor, progress, total=len(open_jobs({})), minutes=work.minutes)
        if missing := open_jobs(record.scores):
            raise SystemExit(f"{len(missing)} trainings are missing; run the same command again.")
        scores = record.scores
    write_answer(given.out, found, compare_lines(found, given.seeds, scores), scores)


def write_answer(out: Path, found: Sequence[Contestant], compared: Sequence[Comparison], scores: Scores) -> None:
    """Write verdict.json and the picture, and print the verdict."""
    rows = []
    for each in compared:
        gap = dataclasses.asdict(each.difference)
        gap = {name: value if math.isfinite(value) else None for name, value in gap.items() if name != "candidate"}
        rows.append({"against": each.line, "macs": each.factor, **gap, "words": each.verdict})
        values = ("value", "low", "high")
        shown = "{:+.2f} points ({:+.2f} to {:+.2f})".format(*(100 * getattr(each.difference, name) for name in values))
        print(f"At {each.factor:.3g}x the multiply-adds {each.verdict}: {shown}.")
    (out / "verdict.json").write_text(json.dumps({"compound": rows}, indent=2) + "\n")
    by_place = {
        place: [score for job, score in sorted(scores.items()) if job.candidate == place] for place in range(len(found))
    }
    draw_comparison(found, by_place, out / "compare.png")


if __name__ == "__main__":
    main()
