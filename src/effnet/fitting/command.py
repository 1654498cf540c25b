"""effnet fit: from images and a budget to a trained model that keeps the budget."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effnet import console
from effnet.console import FINDING, INTERRUPTED, OK, Display, Flag
from effnet.data.shards import absolute
from effnet.errors import ArgumentError
from effnet.fitting.settings import AMOUNTS, MODEL, RESULT, FitOptions, FitPlan, amount

NOTHING = FitOptions()
SHOWN = 12  # refused networks in the table, at most


def fit(
    data: Path | None = None,
    /,
    *,
    options: FitOptions = NOTHING,
    out: Path | None = None,
    resume: Path | None = None,
    ray: str | None = None,
    dry_run: Flag = False,
    json: Flag = False,
) -> int:
    """Find the EfficientNet that learns your images best within a budget, train it, and check that it keeps the budget.

    Exit code 0: the budget is kept; 1: the trained model breaks it; 2: no network keeps it, and none was trained.

    Args:
        data: A folder of class folders, split into train, val and test or not, or a manifest (path,label,split,group).
        options: Budget, time and engine.
        out: Folder for the result. Default: runs/fit/DATA.
        resume: Folder of an interrupted fit, to go on with its own arguments; only --ray may be added.
        ray: Address of a Ray cluster for the short trainings of the choice: auto, HOST:PORT, ray://HOST:10001; local
            starts one here. The result is the same, only sooner. Default: this machine.
        dry_run: Show which networks keep the budget and how the time would be spent, and train nothing.
        json: JSON instead of tables.
    """
    if resume is not None:
        given = (
            console.given(options) | ({} if data is None else {"data": data}) | ({} if out is None else {"out": out})
        )
        if given:
            name = next(iter(given))
            raise ArgumentError(name, given[name], "cannot be changed: a resumed fit keeps its own arguments.")
    elif data is None:
        raise ArgumentError("data", "", "must be a folder of class folders or a manifest; or give --resume FOLDER.")
    elif not options.budget:
        raise ArgumentError("budget", "nothing", f"must limit something; for example {_examples(data)}.")
    from effnet.fitting import fit as fitting
    from effnet.fitting.verdict import backend_of

    with Display() as display:
        try:
            if dry_run:
                assert data is not None
                with tempfile.TemporaryDirectory() as temporary:
                    plan = FitPlan(Path(temporary), absolute(data), options)
                    _, found = fitting.consider(plan, display)
                display.close()
                _show_candidates([each.to_dict() for each in found], json)
                _show_time(options)
                console.remark(f"Next: {FitPlan(Path(), data, options).command}")
                return OK
            if resume is not None:
                result = fitting.resume(resume, ray=ray, progress=display)
            else:
                assert data is not None
                result = fitting.fit(data, options, out=out, ray=ray, progress=display)
        except KeyboardInterrupt as stopped:
            display.close()
            console.remark(str(stopped) or "Stopped.")
            return INTERRUPTED
    if json:
        sys.stdout.write(console.json_text(result.result))
    else:
        _show(result.result)
    folder = result.folder
    console.remark(f"{folder}: {MODEL}, {RESULT}, {result.report.name}")
    pins = "".join(f" --{name} {value}" for name, value in backend_of(FitPlan.read(folder).options).items())
    model = shlex.quote(str(result.model))
    for line in (f"effnet predict PHOTO --model {model}{pins}", f"effnet serve {model}"):
        console.remark(f"Next: {line}")
    return OK if result.kept else FINDING


def _examples(data: Path) -> str:
    """Three budgets that fit this machine and these images."""
    from effnet.arch.variants import spec as make_spec
    from effnet.data.dataset import read_data
    from effnet.data.image import natural_resolution
    from effnet.metrics.timing import time_network
    from effnet.training.initial_network import short_side

    side = short_side(read_data(data))
    size = min(224, natural_resolution(side))
    slowest = time_network(make_spec("lite0", resolution=size)).spread_ms[1]
    quick = max(1, round(1.5 * slowest))
    return (
        f"--latency {quick}ms (Lite0 at {size} px takes {slowest:.1f} ms here), --macs 100M (Lite0 at 112 px), or "
        "--file-size 15MB (Lite0's weights in fp32)"
    )


def _show_candidates(rows: Sequence[Mapping[str, Any]], json: bool) -> None:
    """The networks that keep the budget, and those that do not, with the limit that they exceed."""
    if json:
        sys.stdout.write(console.json_text({"candidates": list(rows)}))
        return
    kept = [row for row in rows if row["refused"] is None]
    refused = [row for row in rows if row["refused"] is not None]
    lines = []
    for row in (*kept, *refused[:SHOWN]):
        refusal, taken = row["refused"], row["slowest_tenth"]
        over = "" if refusal is None else f"{refusal['limit']} {console.amount(refusal['limit'], refusal['value'])}"
        costs = [console.amount(name, row[name]) for name in ("macs", "params", "file_size")]
        lines.append((row["name"], row["start"], *costs, "" if taken is None else f"{1e3 * taken:.3g} ms", over))
    columns = ("<network", "<starts from", "MACs", "params", "file", "slowest tenth", "<refused by")
    more = f"; {len(refused) - SHOWN} more are refused" if len(refused) > SHOWN else ""
    title = f"{len(kept)} of {len(rows)} networks keep the budget{more}"
    console.table(columns, lines, title=title)


def _show_time(options: FitOptions) -> None:
    from effnet.fitting.choice import SHARE

    choice = SHARE * options.minutes
    console.paragraphs(
        [f"Of {options.minutes:g} minutes, at most {choice:.3g} go into the choice, the rest into the training."]
    )


def _show(result: Mapping[str, Any]) -> None:
    """The verdict, the budget, the accuracy and the reason."""
    budget, measured, predicted = result["budget"], result["measured"], result["predicted"]
    rows = []
    for name in AMOUNTS:
        if name not in budget and name not in measured:
            continue
        limit = amount(name, budget[name]) if name in budget else ""
        real = measured.get("slowest_tenth" if name == "latency" else name)
        guess = predicted.get("slowest_tenth" if name == "latency" else name)
        cells = ("" if value is None else console.amount(name, value) for value in (guess, real))
        label = "latency, slowest tenth" if name == "latency" else name.replace("_", " ")
        rows.append((label, limit, *cells))
    kept = "keeps the budget" if result["kept"] else "does not keep the budget"
    console.table(("<", "budget", "predicted", "measured"), rows, title=f"{result['chosen']} {kept}")
    test = result["test"]
    top1 = test["top1"]
    console.paragraphs(
        [
            f"Top-1 on the {test['n']:,} {test['split']} images: {top1['value']:.2%} "
            f"({top1['low']:.2%} to {top1['high']:.2%}).",
            result["reason"],
            *(f"{each['limit']} is broken." for each in result["broken"]),
            *([f"Nearest: {result['nearest']}."] if result["nearest"] else []),
        ]
    )
