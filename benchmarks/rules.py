"""Cost of the rules of runtime/select.py, relative to the fastest measured engine, precision and part size.

    python benchmarks/rules.py [--rows b0@224x1,b0@224x32,...] [--rounds 7] [--busy] [--out FILE]

A row is a variant, its resolution and its batch; weights are random, since time does not depend on them. All
contestants of a row take turns in every round. A turn's time is that of the fastest call within a twentieth of a
second, after one that wakes threads; a contestant's time is the median of its turns. Contestants that take more than
twice as long as the best of the same precision drop out after the first round. The loss compares the rule's selection
with the fastest, in any precision and in fp32, which it selects if the processor lacks bf16.

For a machine that is shared, --busy gives each contestant one thread and measures the processor time of this process,
which other programs hardly affect. Several threads would mostly wait for each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import effnet
from effnet.data.image import views
from effnet.machine import this_machine
from effnet.metrics.timing import random_bundle
from effnet.runtime.select import Selection, installed_engines, open_session, select, version_of
from effnet.runtime.session import Backend, Session
from effnet.weights.bundle import Bundle

ROWS = "b0@224x1,b0@224x32,lite0@224x1,lite0@224x32,b4@380x1,b4@380x8,b0@64x1,b0@64x32,lite0@64x32"
PARTS = 1, 2, 4, 8, 16
TURN, BEHIND = 0.05, 2.0

Clock = Callable[[], float]  # seconds


def contestants(bundle: Bundle, batch: int, threads: int | None) -> dict[Backend, Session]:
    """Every engine and precision, with a whole batch and with parts of each size, one stream per core."""
    cores = threads or this_machine().cores
    whole = [Backend(engine, threads=threads) for engine in installed_engines(None)]
    if Backend("openvino", threads=threads) in whole and this_machine().bf16:
        whole.append(Backend("openvino", "bf16", threads))
    found = list(whole)
    for first in whole:
        if first.engine != "torch":
            sizes = [part for part in PARTS if part * cores <= batch]
            found += [dataclasses.replace(first, part=part, streams=cores) for part in sizes]
    return {backend: open_session(bundle, Selection(backend, batch, "")) for backend in found}


def turn(call: Callable[[], object], clock: Clock) -> float:
    """Seconds of the fastest of several calls."""
    call()
    taken: list[float] = []
    while sum(taken) < TURN:
        started = clock()
        call()
        taken.append(clock() - started)
    return min(taken)


def measure(sessions: dict[Backend, Session], pixels: np.ndarray, rounds: int, clock: Clock) -> dict[Backend, float]:
    """Milliseconds of each contestant that was not dropped."""
    turns: dict[Backend, list[float]] = {backend: [] for backend in sessions}
    for number in range(rounds):
        for backend, taken in turns.items():
            taken.append(turn(lambda backend=backend: sessions[backend](pixels), clock))
        if not number:
            best = {each.precision: min(turns[b][0] for b in turns if b.precision == each.precision) for each in turns}
            turns = {backend: t for backend, t in turns.items() if t[0] <= BEHIND * best[backend.precision]}
    return {backend: 1e3 * statistics.median(taken) for backend, taken in turns.items()}


def compare(row: str, rounds: int, busy: bool) -> list[str]:
    """The lines of a row: the rule's selection and loss, for all precisions and for fp32, then all times."""
    name, _, rest = row.partition("@")
    pixels_text, _, batch_text = rest.partition("x")
    spec, batch = effnet.spec(name, resolution=int(pixels_text)), int(batch_text)
    bundle = random_bundle(spec)
    pixels = np.resize(views(bundle.config.input, min(batch, 8)), (batch, spec.resolution, spec.resolution, 3))
    threads = 1 if busy else None
    sessions = contestants(bundle, batch, threads)
    times = measure(sessions, pixels, rounds, time.process_time if busy else time.perf_counter)
    for session in sessions.values():
        session.close()
    lines = []
    for precision in (None, "fp32"):
        mine = select(spec, batch=batch, precision=precision, threads=threads).backend
        fair = {backend: ms for backend, ms in times.items() if precision in (None, backend.precision)}
        best = min(fair, key=fair.__getitem__)
        loss = f"{fair[mine] / fair[best] - 1:+.1%}" if mine in fair else "more than twice"
        cells = row, precision or "any", mine, f"{fair.get(mine, float('nan')):.2f}", best, f"{fair[best]:.2f}", loss
        lines.append(f"| {' | '.join(map(str, cells))} |")
    details = ", ".join(f"{backend} {ms:.2f}" for backend, ms in sorted(times.items(), key=lambda item: item[1]))
    print("\n".join(lines), flush=True)
    return [*lines, f"    {details}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every row and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true", help="count the processor's time of one thread")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    versions = ", ".join(f"{name} {version_of(name)}" for name in installed_engines(None))
    heads = [f"{this_machine()}; {versions}; {options.rounds} rounds", ""]
    heads += ["| row | precision | rule | ms | best | ms | loss |", "|---|---|---|---:|---|---:|---:|"]
    print("\n".join(heads), flush=True)
    found = [compare(row, options.rounds, options.busy) for row in options.rows.split(",")]
    if options.out:
        table = [line for lines in found for line in lines[:-1]]
        details = [f"- {lines[0].split(' | ')[0].strip('| ')}: {lines[-1].strip()}" for lines in found]
        options.out.write_text(
            "\n".join([f"# {' '.join(sys.argv)}", "", *heads, *table, "", "All, ms:", "", *details, ""])
        )


if __name__ == "__main__":
    main()
