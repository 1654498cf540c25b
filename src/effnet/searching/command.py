"""effnet search: alpha, beta and gamma for a baseline on your images."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from effnet import console
from effnet.console import INTERRUPTED, OK, Flag
from effnet.errors import ArgumentError
from effnet.searching.answer import RULE, VERDICT, SearchResult
from effnet.searching.plan import SearchOptions, WorkOptions
from effnet.searching.search import resume
from effnet.searching.search import search as begin
from effnet.weights.bundle import read_network

NEW, WORK = SearchOptions(), WorkOptions()

search = App(name="search", help="Search alpha, beta and gamma for a baseline on your images.")


@search.command
@search.default
def run(
    data: Path | None = None,
    /,
    *,
    from_: Annotated[str | None, Parameter(name="--from")] = None,
    options: Annotated[SearchOptions, Parameter(name="*")] = NEW,
    work: Annotated[WorkOptions, Parameter(name="*")] = WORK,
    out: Path | None = None,
    resume_: Annotated[Path | None, Parameter(name="--resume")] = None,
    json: Flag = False,
) -> int:
    """Search alpha, beta and gamma for a baseline on your images: step 1 of the paper.

    Triples become networks of equal cost, which are trained briefly; the best third goes on to trainings three times as
    long, and the finalists are trained with several seeds.

    Args:
        data: A folder with a sub-folder for each class, split or not, or a manifest.
        from_: The baseline: a variant (b0 ...), mobilenetv1, mobilenetv2, resnet50, or a spec.yaml. Default: b0.
        options: What is compared, and how networks are trained.
        work: Where networks are trained, and for how long.
        out: Folder of the search. Default: a new one in runs/search.
        resume_: Folder of a search to go on with. Only --minutes, --trials, --workers and --ray may be added, and DATA
            if the images were moved.
        json: Print the verdict as JSON instead of tables.
    """
    with console.Display("preparing the search") as display:
        try:
            if resume_ is not None:
                for name, value in (console.given(options) | {"from": from_, "out": out}).items():
                    if value is not None:
                        raise ArgumentError(name, value, "cannot be changed when resuming.")
                found = resume(resume_, work, data=data, progress=display)
            elif data is None:
                raise ArgumentError("data", "", "must be a folder of class folders or a manifest; or give --resume.")
            else:
                found = begin(data, read_network(from_ or "b0"), options, work, out=out, progress=display)
        except KeyboardInterrupt as stopped:
            display.close()
            console.remark(str(stopped) or "Stopped.")
            return INTERRUPTED
    plan, folder = found.plan, shlex.quote(str(found.plan.folder))
    if json:
        sys.stdout.write((plan.folder / VERDICT).read_text(encoding="utf-8"))
    else:
        _show_verdict(found)
    console.remark(f"{plan.folder}: rule.yaml, search.png, verdict.json, trials.csv, candidates.csv, baseline.yaml")
    if found.verdict.complete:
        console.remark(f"Next: effnet scale --from {folder}/baseline.yaml --rule {folder}/{RULE}")
        return OK
    rungs = [f"{count} of rung {number}" for number, count in enumerate(found.missing, start=1) if count]
    console.remark(f"Missing trainings: {', '.join(rungs)}; they take about {found.minutes:.2g} minutes.")
    console.remark(f"Next: effnet search --resume {folder} --minutes {math.ceil(found.minutes)}")
    return OK


def _show_verdict(found: SearchResult) -> None:
    """Print the compared candidates, and how certain their order is."""
    plan, verdict = found.plan, found.verdict
    gaps = {each.candidate: each for each in verdict.differences}
    rows = []
    for place, mean in verdict.means.items():
        each, gap, shown, judged = plan.candidates[place], gaps.get(place), "", "best"
        if gap:
            judged = "level with the best" if gap.level else "worse"
            interval = f" ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})" if math.isfinite(gap.low) else ""
            shown = f"{100 * gap.value:+.2f}{interval}"
        growths = (f"{growth:.3g}" for growth in (*each.triples[0].growths, *each.effective))
        rows.append((*growths, each.network.resolution, len(each.network.blocks), f"{mean:.2%}", shown, judged))
    compared = "Finalists" if verdict.complete else f"Candidates at rung {verdict.rung + 1} of {len(plan.rungs)}"
    console.table(
        ("alpha", "beta", "gamma", "depth", "width", "res.", "px", "blocks", "accuracy", "minus the best", "<"),
        rows,
        title=f"{compared} of {len(plan.candidates)} networks of {plan.baseline.name}; depth, width, res.: in effect",
    )
    console.paragraphs(_describe(found))


def _describe(found: SearchResult) -> list[str]:
    verdict = found.verdict
    others, level = len(verdict.means) - 1, len(verdict.level) - 1
    texts = [] if verdict.complete else [f"Trainings are missing; each of these candidates has {verdict.seeds}."]
    if not found.learned:
        why = f"None is clearly better than always guessing the most common class ({found.guessing:.2%})"
        texts.append(f"{why}, so their order means nothing: train longer, with --epochs.")
    if not others:
        texts.append("There is only one candidate.")
    elif verdict.seeds == 1:
        texts.append("With one training each, the noise between seeds is unknown: any may be the best.")
    else:
        texts.append(f"{level or 'None'} of the {others} other candidates may be as good as the best.")
    for name, taus in (("rungs", verdict.between_rungs), ("seeds", verdict.between_seeds)):
        if taus and others:
            listed = ", ".join("all tied" if math.isnan(tau) else f"{tau:+.2f}" for tau in taus)
            texts.append(f"Kendall's tau between the rankings of two {name} (1: the same, 0: by chance): {listed}.")
    if not math.isnan(verdict.noise):
        texts.append(f"Standard deviation of a score over seeds: {100 * verdict.noise:.2f} points.")
    if any(verdict.close_calls):
        listed = ", ".join(f"{count} at rung {rung}" for rung, count in enumerate(verdict.close_calls, start=1))
        texts.append(f"Candidates dropped within this noise of one that was kept: {listed}.")
    return texts
