"""How fully `fit_spec` uses budgets, and how fast the costs of candidates are computed.

    python benchmarks/scaling.py [--budgets 200]

Random budgets limit any of five costs, log-uniform between the needs of small and large members of the family, from B0
or Lite0, with the paper's or the fast rule. Use is the share of the binding constraint.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter

import numpy as np

import effnet
from effnet.arch.cost import total_cost
from effnet.arch.memory import file_bytes, inference_memory, training_memory
from effnet.arch.variants import B0
from effnet.errors import ArgumentError
from effnet.machine import this_machine

# resource: from about a tenth of B0's need to B7's
RANGES = {
    "macs": (4e7, 4e10),
    "params": (1e6, 7e7),
    "memory": (8e6, 4e8),
    "train_memory": (1e9, 6e10),
    "file_size": (4e6, 3e8),
}


def random_budget(dice: random.Random) -> tuple[effnet.Budget, str, str]:
    """A budget, a baseline and a rule."""
    names = dice.sample(sorted(RANGES), dice.randint(1, 3))
    limits = {name: int(RANGES[name][0] * (RANGES[name][1] / RANGES[name][0]) ** dice.random()) for name in names}
    batch = dice.choice((8, 16, 32)) if "train_memory" in limits else None
    return effnet.Budget(**limits, batch=batch), dice.choice(("b0", "lite0")), dice.choice(("paper", "fast"))


def use(budgets: int) -> None:
    """Print the share of the binding constraint over random budgets."""
    dice = random.Random(0)
    shares, seconds, impossible = [], [], 0
    binding: Counter[str] = Counter()
    while len(shares) < budgets:
        budget, baseline, rule = random_budget(dice)
        started = time.perf_counter()
        try:
            fit = effnet.fit_spec(budget, baseline, rule)
        except ArgumentError:
            impossible += 1
            continue
        seconds.append(time.perf_counter() - started)
        shares.append(fit.use)
        binding[fit.binding] += 1
    shares.sort()
    print(f"{budgets} budgets ({impossible} more were impossible): {binding}")
    print(f"use of the binding constraint: min {shares[0]:.1%}, 5th percentile {shares[budgets // 20]:.1%}, ", end="")
    print(
        f"median {statistics.median(shares):.2%}, max {shares[-1]:.3%}; {sum(share > 1 for share in shares)} over 100 %"
    )
    print(f"fit_spec, with what 10 % more would buy and the other rule: median {statistics.median(seconds):.2f} s")


def pricing(count: int = 10_000, rounds: int = 9) -> None:
    """Seconds for ten thousand networks."""
    random_numbers = np.random.default_rng(0)
    width, depth = random_numbers.uniform(0.3, 3, count), random_numbers.uniform(0.3, 3, count)
    resolution = random_numbers.integers(64, 800, count)
    times: dict[str, list[float]] = {"parameters, multiply-adds, activations": [], "memory and file size as well": []}
    for _ in range(rounds):
        started = time.perf_counter()
        shape = B0.shape_at(width, depth, resolution)
        total_cost(shape)
        times["parameters, multiply-adds, activations"].append(time.perf_counter() - started)
        inference_memory(shape), training_memory(shape, 16), file_bytes(shape)
        times["memory and file size as well"].append(time.perf_counter() - started)
    for what, taken in times.items():
        print(f"{count:,} candidates, {what}: {1e3 * statistics.median(taken):.0f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, default=200)
    options = parser.parse_args()
    print(this_machine())
    pricing()
    use(options.budgets)
