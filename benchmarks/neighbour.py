"""Effect of a busy neighbour process on the time of one image, with a thread per core and with one core left free;
and on a training step, depending on how long threads spin before they sleep.

    python benchmarks/neighbour.py [--model lite0] [--rounds 60]
    python benchmarks/neighbour.py --training [--rounds 60]

The neighbour keeps one core busy. Each way of running the network is measured alternately alone and next to it: median
and 90th percentile of single images, after an untimed one, or of steps of B0 at 64 px with 32 images on all cores.
`effnet` sets GOMP_SPINCOUNT, which torch's OpenMP reads when it is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO

import effnet
from effnet import console
from effnet.data.image import views
from effnet.machine import this_machine
from effnet.metrics.timing import Timing, seconds

BUSY = "while True: sum(range(10000))"
PARTS = 4  # of a measurement
WAYS = ("torch", "fp32"), ("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")


SPINS = "", "10000", "1000", "100"  # GOMP_SPINCOUNT; "": OpenMP's default, 300,000 with a core per thread
BATCH, SIDE = 32, 64


def main() -> None:
    """Measure every variant and print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", default="lite0")
    asked.add_argument("--rounds", type=int, default=60)
    asked.add_argument("--training", action="store_true")
    asked.add_argument("--trainer", action="store_true", help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.trainer:
        train(options.rounds // PARTS)
    elif options.training:
        time_training(options.rounds)
    else:
        time_images(options)


def time_images(options: argparse.Namespace) -> None:
    """Print the table of single images."""
    machine, rows = this_machine(), []
    for engine, precision in WAYS:
        if precision == "bf16" and not machine.bf16:
            continue
        for threads in dict.fromkeys((machine.cores, max(1, machine.cores - 1))):
            how = {"engine": engine, "precision": precision, "threads": threads, "batch": 1}
            with console.Display(f"{engine}, {precision}, {threads} threads"):
                alone, beside = measure(singles(effnet.load(options.model, **how), options.rounds // PARTS))
            rows.append((engine, precision, threads, *shown(alone, beside)))
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    columns = "<engine", "<precision", "threads", "alone, ms", "beside, ms", "ratio"
    note = f"Medians of {PARTS * (options.rounds // PARTS)} single images, in brackets the 90th percentile."
    console.table(columns, rows, title=f"{options.model} beside a busy process on one core\n{machine}{load}", note=note)


def singles(network: effnet.Classifier, count: int) -> Callable[[], list[float]]:
    """A function that runs a round of single images, after an untimed one, and returns their seconds."""
    image = views(network.input, 1)

    def round() -> list[float]:
        network.logits(image)
        return [seconds(lambda: network.logits(image)) for _ in range(count)]

    return round


def measure(round: Callable[[], list[float]]) -> tuple[Timing, Timing]:
    """Alternate rounds without and with the neighbour, so that other disturbances affect both."""
    alone, beside = [], []
    for _ in range(PARTS):
        alone += round()
        neighbour = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            time.sleep(0.3)
            beside += round()
        finally:
            neighbour.kill()
            neighbour.wait()
    return Timing(tuple(alone)), Timing(tuple(beside))


def shown(alone: Timing, beside: Timing) -> tuple[str, str, str]:
    """Both times, and their ratio."""
    times = [f"{each.median_ms:.1f} ({each.spread_ms[1]:.1f})" for each in (alone, beside)]
    return times[0], times[1], f"{beside.median_ms / alone.median_ms:.2f}x"


def time_training(rounds: int) -> None:
    """Print the table of training steps; each variant is a process, which waits while another is measured."""
    rows = []
    for spin in SPINS:
        own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
        own |= {"GOMP_SPINCOUNT": spin} if spin else {}
        words = [sys.executable, __file__, "--trainer", "--rounds", str(rounds)]
        with (
            console.Display(f"steps of training, {spin or 'its own number of'} spins"),
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own) as trainer,
        ):
            inlet, outlet = trainer.stdin, trainer.stdout
            assert inlet
            assert outlet

            def round(inlet: IO[str] = inlet, outlet: IO[str] = outlet) -> list[float]:
                inlet.write("\n")
                inlet.flush()
                return json.loads(outlet.readline())

            rows.append((spin or "its own", *shown(*measure(round))))
    note = f"Medians of {PARTS * (rounds // PARTS)} steps, in brackets the 90th percentile."
    title = f"A step of training (B0, {SIDE} px, {BATCH} images) beside a busy process on one core\n{this_machine()}"
    console.table((">GOMP_SPINCOUNT", "alone, ms", "beside, ms", "ratio"), rows, title=title, note=note)


def train(count: int) -> None:
    """Do `count` steps for each input line and write their seconds; the first step is not counted."""
    import torch

    torch.set_num_threads(this_machine().cores)
    network = effnet.EfficientNet(effnet.spec("b0", resolution=SIDE, num_classes=10)).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    for _ in sys.stdin:
        step()
        print(json.dumps([seconds(step) for _ in range(count)]), flush=True)


if __name__ == "__main__":
    main()
