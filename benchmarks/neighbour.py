"""What a busy neighbour does to the time of one image: with a thread for each core, and with a core left alone.

    python benchmarks/neighbour.py [--model lite0] [--rounds 60]

The neighbour is a process that computes without pause on one core. Each way of running the network is measured alone
and beside it, in turn: median and 90th percentile of single images, after one that does not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import effnet
from effnet import console
from effnet.data.image import views
from effnet.machine import this_machine
from effnet.metrics.timing import Timing, seconds

BUSY = "while True: sum(range(10000))"
PARTS = 4  # of a measurement
WAYS = ("torch", "fp32"), ("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")


def main() -> None:
    """Measure every way and print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", default="lite0")
    asked.add_argument("--rounds", type=int, default=60)
    options = asked.parse_args()
    machine, rows = this_machine(), []
    for engine, precision in WAYS:
        if precision == "bf16" and not machine.bf16:
            continue
        for threads in dict.fromkeys((machine.cores, max(1, machine.cores - 1))):
            how = {"engine": engine, "precision": precision, "threads": threads, "batch": 1}
            with console.Display(f"{engine}, {precision}, {threads} threads"):
                alone, beside = measure(effnet.load(options.model, **how), options.rounds // PARTS)
            shown = [f"{each.median_ms:.1f} ({each.spread_ms[1]:.1f})" for each in (alone, beside)]
            rows.append((engine, precision, threads, *shown, f"{beside.median_ms / alone.median_ms:.2f}x"))
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    columns = "<engine", "<precision", "threads", "alone, ms", "beside, ms", "ratio"
    note = f"Medians of {PARTS * (options.rounds // PARTS)} single images, in brackets the 90th percentile."
    console.table(columns, rows, title=f"{options.model} beside a busy process on one core\n{machine}{load}", note=note)


def measure(network: effnet.Classifier, count: int) -> tuple[Timing, Timing]:
    """Single images alone and beside the neighbour, which comes and goes, so that other disturbances meet both."""
    image = views(network.input, 1)

    def rounds() -> list[float]:
        network.logits(image)
        return [seconds(lambda: network.logits(image)) for _ in range(count)]

    alone, beside = [], []
    for _ in range(PARTS):
        alone += rounds()
        neighbour = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            time.sleep(0.3)
            beside += rounds()
        finally:
            neighbour.kill()
            neighbour.wait()
    return Timing(tuple(alone)), Timing(tuple(beside))


if __name__ == "__main__":
    main()
