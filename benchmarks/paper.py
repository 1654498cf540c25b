"""Table 4 of the paper on this machine: B1 against ResNet-152, one image, one thread, the mean of 20 runs.

    python benchmarks/paper.py [--runs 20]

The networks take turns. The paper used another processor and does not state its memory layout, so both layouts are
measured, with the same layout for both networks of a row. The table's other row cannot be reproduced: GPipe's network
of 557 M parameters (19.0 s against 3.1 s for B7) is not available.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from times import print_conditions, print_rows

from effnet.metrics.timing import LAYOUTS, Conditions, measure_in_turn, random_images
from effnet.profiling.compare import build_network, count
from effnet.runtime.torch import torch_threads

OURS, SECONDS, THEIRS, THEIR_SECONDS = "b1", 0.098, "ResNet-152", 0.554  # one core of a Xeon E5-2690


def main() -> None:
    """Measure both networks in both layouts, and print the published row above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    with torch_threads(1):
        conditions = Conditions.now(1, "channels_last", "torchvision")
        functions = {}
        for layout in LAYOUTS:
            for name in (OURS, THEIRS):
                memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
                network = build_network(name).to(memory_format=memory_format)
                functions[name, layout] = partial(network, random_images(1, count(name)[1], layout=layout))
        times = measure_in_turn(functions, runs=options.runs)
    print_conditions("Table 4 of the paper", conditions, "both layouts")
    print(f"Mean and standard deviation of {options.runs} runs, random weights.")
    published = f"{1e3 * SECONDS:.0f}", f"{1e3 * THEIR_SECONDS:.0f}", f"{THEIR_SECONDS / SECONDS:.2f}"
    rows = [("paper, Xeon E5-2690", *published)]
    for layout in LAYOUTS:
        pair = times[OURS, layout], times[THEIRS, layout]
        shown = (f"{time.mean_ms:.1f} ± {time.stdev_ms:.1f}" for time in pair)
        rows.append((f"here, {layout}", *shown, f"{pair[1].mean_ms / pair[0].mean_ms:.2f}"))
    print_rows(f"machine, {OURS} ms, {THEIRS} ms, ratio", rows)


if __name__ == "__main__":
    main()
