"""The parts of a report that only `effnet fit` has: the budget and the candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effnet import console
from effnet.reporting import charts
from effnet.reporting.sections import accuracy_of, clean
from effnet.reporting.words import between

LIMITS = {  # fields of fit.json: title, and unit
    "macs": ("multiply-adds", ""),
    "params": ("parameters", ""),
    "memory": ("memory", "B"),
    "train_memory": ("training memory", "B"),
    "file_size": ("file size", "B"),
    "latency": ("latency", "s"),
    "slowest_tenth": ("latency, slowest tenth", "s"),
}
CANDIDATES = 80  # most rows of the table


def amount(name: str, value: float | None) -> str:
    """A value of a resource in its unit."""
    return "-" if value is None else console.amount(name, value)


def title(name: str) -> str:
    """The display name of a resource."""
    return LIMITS.get(name, (name.replace("_", " "), ""))[0]


def tabulate_budget(fit: Mapping[str, Any]) -> dict[str, Any]:
    """Asked, predicted and measured, a row per resource."""
    asked, predicted, measured = (fit.get(name) or {} for name in ("budget", "predicted", "measured"))
    broken = {each["limit"]: each for each in fit.get("broken") or ()}
    rows = []
    for name in dict.fromkeys((*asked, *LIMITS)):
        values = asked.get(name), predicted.get(name), measured.get(name)
        if any(value is not None for value in values):
            verdict = "" if asked.get(name) is None else "broken" if name in broken else "kept"
            rows.append((title(name), *(amount(name, value) for value in values), verdict))
    return {"rows": rows, "nearest": fit.get("nearest") or ""}


def tabulate_candidates(fit: Mapping[str, Any]) -> dict[str, Any]:
    """The networks that were considered: a plot, and a table with the reasons."""
    rows = []
    for each in fit.get("candidates") or ():
        refused, short, probe = each.get("refused"), accuracy_of(each.get("short")), accuracy_of(each.get("probe"))
        reason = ""
        if refused:
            limit = refused["limit"]
            reason = f"{title(limit)} {amount(limit, refused['value'])}, allowed {amount(limit, refused['allowed'])}"
        said = [f"{kind} {between(it)}" for kind, it in (("short training", short), ("linear probe", probe)) if it]
        rows.append(
            {
                "name": clean(each["name"]),
                "start": clean(each.get("start") or ""),
                "costs": {name: each.get(name) for name in LIMITS},
                "accuracy": short or probe,
                "said": "; ".join(said) or "not tried",
                "refused": reason,
                "chosen": each["name"] == fit.get("chosen"),
            }
        )
    if not rows:
        return {}
    rows.sort(key=lambda row: (not row["chosen"], bool(row["refused"]), row["accuracy"] is None))
    budget = fit.get("budget") or {}
    orders = [each for each in dict.fromkeys((*budget, "latency", "macs", "params", "memory")) if _is_known(rows, each)]
    tried, svg, drawn = any(row["accuracy"] for row in rows), None, rows
    if orders[not tried :]:  # plot accuracy against a cost, or one cost against another
        names = orders[:1] if tried else orders[:2]
        drawn = [row for row in rows if all(row["costs"][each] for each in names)]
        points = [row | {"costs": [float(row["costs"][each]) for each in names]} for row in drawn]
        svg = charts.draw_candidates(points, [LIMITS[each] for each in names], budget.get(names[0]))
    shown = [
        each for each in dict.fromkeys((*budget, "macs", "latency")) if any(row["costs"].get(each) for row in rows)
    ]
    for row in rows:
        row["costs"] = [amount(each, row["costs"][each]) for each in shown]
    return {
        "svg": svg,
        "tried": tried,
        "undrawn": len(rows) - len(drawn),
        "columns": [title(each) for each in shown],
        "rows": rows[:CANDIDATES],
        "of": len(rows),
        "reason": fit.get("reason") or "",
        "bought": list(fit.get("bought") or ()),
    }


def _is_known(rows: list[dict[str, Any]], name: str) -> bool:
    """Whether the cost is known of the chosen network and another one; networks that are too slow may not be timed."""
    have = [row["chosen"] for row in rows if row["costs"].get(name)]
    return len(have) > 1 and any(have)
