"""effnet search run and compare: alpha, beta and gamma for a baseline, and whether compound scaling is worth it."""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from effnet import console
from effnet.arch.cost import cost
from effnet.arch.spec import FitMode, NetworkSpec
from effnet.console import FINDING, INTERRUPTED, OK, Display, Flag, Whole
from effnet.errors import MissingExtraError
from effnet.scaling import compound
from effnet.scaling.budget import Budget
from effnet.weights.bundle import read_network

if TYPE_CHECKING:
    from effnet.searching.compare import Compared
    from effnet.searching.search import Found

FAMILY = (1, 2, 3, 4)  # phis of the family that a rule spans

search = App(name="search", help="Search alpha, beta and gamma for a baseline on your images, or test the claim.")


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """How networks are trained and kept.

    Args:
        epochs: Length of the longest training. Default: what fits into --minutes, or into an hour.
        minutes: No training begins after so many minutes.
        trials: No more trainings than these, this time.
        workers: Processes that train, each on one thread. Default: one for each core.
        storage: URL of a database that workers on several machines share, such as postgresql://host/search; they run
            the same command with the same --out.
        out: The folder for everything. Default: in runs/search.
        resolution: Of the baseline in pixels. Default: half the images' own, if that is less than the baseline's.
        recipe: How networks are trained: scratch, paper, or a YAML file. Images are only mirrored and moved.
        fit: How images become square: squash, pad or crop.
        images: Use only so many images for training, evenly over the classes, and at most so many for the scores.
        val: Share of the data that networks are scored on, where it has no val part.
        seed: Of the split, the weights and the order.
        device: cpu or cuda.
    """

    epochs: float | None = None
    minutes: float | None = None
    trials: Whole | None = None
    workers: Whole | None = None
    storage: str | None = None
    out: Path | None = None
    resolution: Whole | None = None
    recipe: str = "scratch"
    fit: FitMode = "squash"
    images: Whole | None = None
    val: float = 0.15
    seed: Whole = 0
    device: str = "cpu"


USUAL = Options()


@search.command
def run(
    data: Path,
    /,
    *,
    from_: Annotated[str, Parameter(name="--from")] = "b0",
    step: float = 0.05,
    tolerance: float = 0.1,
    phi: float = 1.0,
    triple: Annotated[list[str] | None, Parameter(negative=())] = None,
    memory: str | None = None,
    params: str | None = None,
    latency: str | None = None,
    rungs: Whole = 3,
    seeds: Whole = 5,
    finalists: Whole = 4,
    options: Options = USUAL,
    json: Flag = False,
) -> int:
    """Search alpha, beta and gamma for a baseline on your images: step 1 of the paper.

    Triples become networks of equal cost, which are trained briefly; the better third goes on to trainings three times
    as long, and the finalists are trained with several seeds. The same command goes on where an interrupted one was.

    Args:
        data: A folder with a sub-folder for each class, split or not, or a manifest.
        from_: The baseline: a variant (b0 ...), mobilenetv1, mobilenetv2, resnet50, or a spec.yaml of your own rows.
        step: Of the grid: alpha, beta and gamma are multiples of it from 1 on.
        tolerance: How far alpha beta^2 gamma^2 may be from 2.
        phi: 1, as in the paper, compares networks of twice the multiply-adds, 2 of four times.
        triple: A candidate as alpha,beta,gamma, in place of the grid; give it several times.
        memory: Memory of inference that candidates may take: 10MB. This is the paper's target_memory.
        params: Parameters that they may have: 1M.
        latency: Time for one image on this machine that they may take: 5ms. It is measured.
        rungs: Stages; of each but the last the better third goes on, to trainings three times as long.
        seeds: Trainings of each finalist.
        finalists: Candidates at the last rung, at least.
        json: JSON instead of tables.
    """
    baseline = read_network(from_)
    rules = tuple(compound.read_rule(text) for text in triple or ())
    limited = any((memory, params, latency))
    budget = Budget(memory=memory, params=params, latency=latency) if limited else None
    begin, question = _training("search"), _training("search", "Question")
    asked = question(step, tolerance, phi, rules, budget, rungs, seeds, finalists)
    with Display() as display:
        try:
            found = begin(data, baseline, question=asked, progress=display, **vars(options))
        except KeyboardInterrupt:
            return _interrupted(display)
    if found.verdict is None:
        return _unfinished(len(found.scores))
    _show_found(found, as_json=json)
    rule, searched = (shlex.quote(str(found.folder / name)) for name in ("rule.yaml", "baseline.yaml"))
    console.remark(f"{found.folder}: rule.yaml, search.png, verdict.json, trials.csv, candidates.csv, baseline.yaml")
    console.remark(f"Next: effnet scale --from {searched} --rule {rule} --phi 2")
    return OK


@search.command
def compare(
    data: Path,
    /,
    *,
    from_: Annotated[str, Parameter(name="--from")] = "b0",
    factor: float = 4.0,
    rule: str = "paper",
    seeds: Whole = 5,
    options: Options = USUAL,
    json: Flag = False,
) -> int:
    """Compare compound scaling with width, depth and resolution alone, at equal multiply-adds: the paper's claim.

    The same command goes on where an interrupted one was.

    Args:
        data: A folder with a sub-folder for each class, split or not, or a manifest.
        from_: The baseline: a variant (b0 ...), mobilenetv1, mobilenetv2, resnet50, or a spec.yaml of your own rows.
        factor: What the multiply-adds grow by; the square root of it is compared as well.
        rule: Of compound scaling: paper, fast, alpha,beta,gamma, or the rule.yaml of a search.
        seeds: Trainings of each network.
        json: JSON instead of tables.
    """
    baseline, growth, begin = read_network(from_), compound.read_rule(rule), _training("compare")
    with Display() as display:
        try:
            found = begin(data, baseline, factor=factor, rule=growth, seeds=seeds, progress=display, **vars(options))
        except KeyboardInterrupt:
            return _interrupted(display)
    if found.standings is None:
        return _unfinished(len(found.scores))
    _show_compared(found, as_json=json)
    console.remark(f"{found.folder}: compare.png, verdict.json, trials.csv, candidates.csv")
    console.remark(f"Next: effnet search run {shlex.quote(str(data))} --from {shlex.quote(from_)}")
    return OK


def _training(module: str, name: str | None = None) -> Any:
    """What trains, which needs torch."""
    try:
        return getattr(import_module(f"effnet.training.{module}"), name or module)
    except ImportError as error:
        raise MissingExtraError("a search", "search") from error


def _interrupted(display: Display) -> int:
    display.close()
    console.remark("Stopped; the finished trainings are kept, and the same command goes on.")
    return INTERRUPTED


def _unfinished(done: int) -> int:
    console.remark(f"{done} trainings are done and some are left; the same command goes on.")
    return FINDING


def _show_found(found: Found, *, as_json: bool) -> None:
    """The finalists, the verdict in words, and the family that the rule spans."""
    if as_json:
        sys.stdout.write((found.folder / "verdict.json").read_text(encoding="utf-8"))
        return
    verdict = found.verdict
    assert verdict is not None
    gaps = {each.candidate: each for each in verdict.differences}
    rows = []
    for place, mean in verdict.means.items():
        each, gap = found.candidates[place], gaps.get(place)
        judged = "best" if gap is None else "level with the best" if gap.level else "worse"
        shown = "" if gap is None else f"{100 * gap.value:+.2f} ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})"
        growths = (f"{growth:.3g}" for growth in (*each.rule.growths, *each.effective))
        rows.append((*growths, each.network.resolution, len(each.network.blocks), f"{mean:.2%}", shown, judged))
    console.table(
        ("alpha", "beta", "gamma", "depth", "width", "res.", "px", "blocks", "accuracy", "less the best", "<"),
        rows,
        title=f"Finalists of {len(found.candidates)} networks of {found.baseline.name}; growths asked, and in effect",
    )
    others, level = len(rows) - 1, len(verdict.level) - 1
    words = [f"{level} of the {others} other finalists may be as good as the best: their intervals hold 0."]
    if not others:
        words = ["There was one finalist, and nothing to compare it with."]
    elif not level:
        words = ["No other finalist is level with the best."]
    elif level == others:
        words.append("No significant difference was found between the finalists.")
    for name, taus in (("rungs", verdict.between_rungs), ("seeds", verdict.between_seeds)):
        if taus and others:
            listed = ", ".join("all tied" if math.isnan(tau) else f"{tau:+.2f}" for tau in taus)
            words.append(f"Kendall's tau between the rankings of two {name} (1: the same, 0: by chance): {listed}.")
    if not math.isnan(verdict.noise):
        words.append(f"A seed moves a score by {100 * verdict.noise:.2f} points (standard deviation).")
    if any(verdict.close_calls):
        listed = ", ".join(f"{count} at rung {rung}" for rung, count in enumerate(verdict.close_calls, start=1))
        words.append(f"Left after one training, though within that noise of one that went on: {listed}.")
    console.paragraphs(words)
    _show_family(found.baseline, found.rule)


def _show_family(baseline: NetworkSpec, rule: compound.Rule) -> None:
    rows = [(baseline.name, *_built(baseline))]
    steps = compound.tabulate(baseline, FAMILY, rule, resolution_step=1, depth_rounding="nearest")
    rows += [(f"phi {row.phi:g}", *_built(row.network)) for row in steps]
    sys.stdout.write("\n")
    title = f"The family of alpha {rule.alpha:g}, beta {rule.beta:g}, gamma {rule.gamma:g}"
    console.table(("<", "depth", "width", "px", "blocks", "params", "MACs"), rows, title=title)


def _built(network: NetworkSpec) -> tuple[object, ...]:
    price = cost(network)
    sizes = f"{network.depth:.3g}", f"{network.width:.3g}", network.resolution, len(network.blocks)
    return (*sizes, console.millions(price.params), console.millions(price.macs))


def _show_compared(found: Compared, *, as_json: bool) -> None:
    """Every network with its accuracy, and the verdict in words."""
    if as_json:
        sys.stdout.write((found.folder / "verdict.json").read_text(encoding="utf-8"))
        return
    rows = []
    for place, each in enumerate(found.contestants):
        scores = found.scores_of(place)
        grown = (f"{growth:.2f}" for growth in each.effective)
        spread = f"{100 * statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        built = each.network.resolution, len(each.network.blocks)
        rows.append((each.line, f"{each.ratio:.2f}x", *grown, *built, f"{statistics.fmean(scores):.2%}", spread))
    columns = ("<", "MACs", "depth", "width", "res.", "px", "blocks", "accuracy", "std of seeds")
    console.table(columns, rows, title=f"{found.baseline.name}: ways to scale, growths in effect")
    words = []
    for stand in found.standings or ():
        gap = stand.difference
        values = f"{100 * gap.value:+.2f} points ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})"
        words.append(f"At {stand.factor:.3g}x the multiply-adds {stand.words}: {values}.")
    console.paragraphs(words)
