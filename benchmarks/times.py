"""Times of the family and of other networks, as a Markdown table.

    python benchmarks/times.py [--threads 1] [--batch 1] [--runs 9]

`effnet profile --compare` shows the same figures on a terminal; benchmarks/paper.py repeats the paper's Table 4.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from effnet.metrics.timing import Conditions
from effnet.profiling.compare import Comparison, compare_networks
from effnet.profiling.profile import TimingOptions


def print_rows(columns: str, rows: Iterable[Iterable[object]]) -> None:
    """Print a table in Markdown whose first column is text."""
    names = columns.split(", ")
    print(f"\n| {' | '.join(names)} |\n|---|{'---:|' * (len(names) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def print_conditions(title: str, conditions: Conditions, layouts: str) -> None:
    """Print the conditions of a measurement as a heading and a line."""
    words = str(conditions).replace("\n", "; ").replace(conditions.layout, layouts)
    print(f"\n### {title}\n{words}")


def print_comparison(measured: Comparison) -> None:
    """Print the networks, how well costs predict their times, and pairs for which multiply-adds do not."""
    print_conditions("Networks in turn", measured.conditions, "channels_last")
    print(f"Medians of {len(measured.rows[0].time.seconds)} rounds, random weights.")
    rows = []
    for row in sorted(measured.rows, key=lambda row: row.cost.macs):
        low, high = row.time.spread_ms
        costs = f"{row.cost.macs / 1e9:.3f}", f"{row.cost.activations / 1e6:.2f}"
        rows.append((row.cost.name, row.resolution, *costs, f"{row.time.median_ms:.1f}", f"{low:.1f} - {high:.1f}"))
    print_rows("network, px, GMACs, M activations, ms, 10 to 90 %", rows)
    found = measured.correlations
    print(f"\nlog time with log MACs: r = {found['macs']:.3f}; with log activations: r = {found['activations']:.3f}")
    pairs = []
    for slowdown, fewer, more in measured.inversions:
        apart = fewer.time.spread_ms[0] > more.time.spread_ms[1]
        pairs.append((fewer.cost.name, more.cost.name, f"{slowdown:.2f}", "yes" if apart else "no"))
    print_rows("fewer multiply-adds, more, slower by, spreads apart", pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int)
    options = parser.parse_args()
    timing = TimingOptions(options.batch, options.threads, options.runs)
    print_comparison(compare_networks(timing))
