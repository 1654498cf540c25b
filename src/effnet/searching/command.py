"""effnet search: alpha, beta and gamma for a baseline on your images."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from effnet import console
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.console import FINDING, INTERRUPTED, OK, Flag
from effnet.errors import ArgumentError
from effnet.scaling import compound
from effnet.searching.halving import Verdict
from effnet.searching.plan import RULE, VERDICT, SearchOptions, WorkOptions
from effnet.searching.search import SearchResult, resume
from effnet.searching.search import search as begin
from effnet.weights.bundle import read_network

FAMILY = (1, 2, 3, 4)  # phis of the family that a rule spans
NEW, WORK = SearchOptions(), WorkOptions()

search = App(name="search", help="Search alpha, beta and gamma for a baseline on your images.")


@search.command
@search.default
def run(
    data: Path | None = None,
    /,
    *,
    from_: Annotated[str, Parameter(name="--from")] = "b0",
    options: Annotated[SearchOptions, Parameter(name="*")] = NEW,
    work: Annotated[WorkOptions, Parameter(name="*")] = WORK,
    out: Path | None = None,
    resume_: Annotated[Path | None, Parameter(name="--resume")] = None,
    json: Flag = False,
) -> int:
    """Search alpha, beta and gamma for a baseline on your images: step 1 of the paper.

    Triples become networks of equal cost, which are trained briefly; the better third goes on to trainings three times
    as long, and the finalists are trained with several seeds.

    Args:
        data: A folder with a sub-folder for each class, split or not, or a manifest.
        from_: The baseline: a variant (b0 ...), mobilenetv1, mobilenetv2, resnet50, or a spec.yaml of your own rows.
        options: What is compared, and how networks are trained.
        work: Who trains, and for how long.
        out: The search's folder. Default: in runs/search.
        resume_: The folder of a search, which goes on as it was begun. Only --minutes, --trials, --workers and --ray
            can be given with it, and DATA where the images were moved.
        json: Print the verdict as JSON instead of tables.
    """
    with console.Display("preparing the search") as display:
        try:
            if resume_ is not None:
                changed = console.given(options) | {
                    name: value for name, value in (("from", from_), ("out", out)) if value not in ("b0", None)
                }
                for name, value in changed.items():
                    raise ArgumentError(name, value, "cannot be given with --resume: a search goes on as it was begun.")
                found = resume(resume_, work, data=data, progress=display)
            elif data is None:
                raise ArgumentError("data", "", "must be a folder of class folders or a manifest; or give --resume.")
            else:
                found = begin(data, read_network(from_), options, work, out=out, progress=display)
        except KeyboardInterrupt as stopped:
            display.close()
            console.remark(str(stopped) or "Stopped.")
            return INTERRUPTED
    plan, folder = found.plan, shlex.quote(str(found.plan.folder))
    if found.verdict is None:
        console.remark(f"No training is finished yet. Next: effnet search --resume {folder}")
        return FINDING
    if json:
        sys.stdout.write((plan.folder / VERDICT).read_text(encoding="utf-8"))
    else:
        _show(found, found.verdict)
    console.remark(f"{plan.folder}: rule.yaml, search.png, verdict.json, trials.csv, candidates.csv, baseline.yaml")
    if found.verdict.complete:
        console.remark(f"Next: effnet scale --from {folder}/baseline.yaml --rule {folder}/{RULE} --phi 2")
        return OK
    minutes = found.minutes or 1
    rungs = [f"{n} of rung {number}" for number, n in enumerate(found.missing, start=1) if n]
    console.remark(f"Trainings that are missing: {', '.join(rungs)}; by what was measured about {minutes:.2g} minutes.")
    console.remark(f"Next: effnet search --resume {folder} --minutes {math.ceil(minutes)}")
    return OK


def _show(found: SearchResult, verdict: Verdict) -> None:
    """The compared candidates, the verdict in words, and the family that the rule spans."""
    plan, gaps = found.plan, {each.candidate: each for each in verdict.differences}
    rows = []
    for place, mean in verdict.means.items():
        each, gap = plan.candidates[place], gaps.get(place)
        judged = "best" if gap is None else "level with the best" if gap.level else "worse"
        finite = gap is not None and math.isfinite(gap.low)
        shown = f"{100 * gap.value:+.2f}" if gap else ""
        shown += f" ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})" if gap and finite else ""
        growths = (f"{growth:.3g}" for growth in (*each.rule.growths, *each.effective))
        rows.append((*growths, each.network.resolution, len(each.network.blocks), f"{mean:.2%}", shown, judged))
    compared = "Finalists" if verdict.complete else f"Candidates at rung {verdict.rung + 1} of {len(plan.rungs)}"
    console.table(
        ("alpha", "beta", "gamma", "depth", "width", "res.", "px", "blocks", "accuracy", "less the best", "<"),
        rows,
        title=f"{compared} of {len(plan.candidates)} networks of {plan.baseline.name}; growths asked, and in effect",
    )
    console.paragraphs(_sentences(verdict))
    _show_family(plan.baseline, found.rule)


def _sentences(verdict: Verdict) -> list[str]:
    others, level = len(verdict.means) - 1, len(verdict.level) - 1
    texts = []
    if not verdict.complete:
        texts.append(f"Not all trainings are finished: this stands on {verdict.seeds} of each candidate.")
    if not others:
        texts.append("There was one candidate, and nothing to compare it with.")
    elif verdict.seeds == 1:
        texts.append("Each was trained once, so nothing is known of how far luck moves a score: all may be the best.")
    elif not level:
        texts.append("No other candidate is level with the best.")
    else:
        texts.append(f"{level} of {others} other candidates may be as good as the best: their intervals hold 0.")
        if level == others:
            texts.append("No significant difference was found.")
    for name, taus in (("rungs", verdict.between_rungs), ("seeds", verdict.between_seeds)):
        if taus and others:
            listed = ", ".join("all tied" if math.isnan(tau) else f"{tau:+.2f}" for tau in taus)
            texts.append(f"Kendall's tau between the rankings of two {name} (1: the same, 0: by chance): {listed}.")
    if not math.isnan(verdict.noise):
        texts.append(f"A seed moves a score by {100 * verdict.noise:.2f} points (standard deviation).")
    if any(verdict.close_calls):
        listed = ", ".join(f"{count} at rung {rung}" for rung, count in enumerate(verdict.close_calls, start=1))
        texts.append(f"Left after one training, though within that noise of one that went on: {listed}.")
    return texts


def _show_family(baseline: NetworkSpec, rule: compound.Rule) -> None:
    steps = compound.tabulate(baseline, FAMILY, rule, resolution_step=1, depth_rounding="nearest")
    networks = [(baseline.name, baseline), *((f"phi {row.phi:g}", row.network) for row in steps)]
    rows = []
    for name, network in networks:
        price = cost(network)
        sizes = f"{network.depth:.3g}", f"{network.width:.3g}", network.resolution, len(network.blocks)
        rows.append((name, *sizes, console.millions(price.params), console.millions(price.macs)))
    sys.stdout.write("\n")
    title = f"The family of alpha {rule.alpha:g}, beta {rule.beta:g}, gamma {rule.gamma:g}"
    console.table(("<", "depth", "width", "px", "blocks", "params", "MACs"), rows, title=title)
