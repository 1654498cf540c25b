"""Code shared by the drills: command-line options, the clock, and the one-line verdict.

Each drill attacks effnet with random tries from a seed, until --tries are done or --minutes are over. It prints each
fault as it is found, with the options that repeat it, and ends with one line and exit code 0, or 1 if it found
something or tried nothing.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scale:
    """How much a drill does: in full, and with --short, as before every merge."""

    tries: int
    minutes: float
    short_tries: int
    short_minutes: float = 0.5


@dataclass
class Drill:
    """A running drill: its random draws, its clock and its findings."""

    name: str
    seed: int
    tries: int
    minutes: float
    only: int | None = None
    short: bool = False
    done: int = 0
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)
    first_try: float | None = None  # when it began; preparation does not count towards the minutes

    def numbers(self) -> range:
        """The numbers of its tries, or of the one to repeat."""
        return range(self.tries) if self.only is None else range(self.only, self.only + 1)

    def draws(self, number: int) -> random.Random:
        """The random numbers of a try, independent of earlier tries."""
        return random.Random(f"{self.name} {self.seed} {number}")

    @property
    def over(self) -> bool:
        """Whether the minutes have passed since the first call, which is before the first try."""
        if self.first_try is None:
            self.first_try = time.monotonic()
        return time.monotonic() - self.first_try > 60 * self.minutes

    def count(self, what: str) -> None:
        """Add one to a count of the verdict."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def fault(self, number: int, what: str) -> None:
        """Record a fault, and print it with the options that repeat it."""
        self.faults.append(what)
        print(f"{self.name}: FAULT {what}  (--seed {self.seed} --only {number})", flush=True)

    def finish(self) -> int:
        """Print the verdict and return the exit code."""
        seconds = time.monotonic() - self.start
        listed = "".join(f", {value:,} {what}" for what, value in sorted(self.counts.items()))
        verdict = f"{len(self.faults):,} FAULTS" if self.faults else "no fault" if self.done else "NO RESULT"
        print(f"{self.name}: {verdict} in {self.done:,} tries{listed}; seed {self.seed}, {seconds:.0f} s", flush=True)
        return 0 if self.done and not self.faults else 1


def begin(name: str, scale: Scale, description: str) -> Drill:
    """Create the drill from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, help=f"default: {scale.tries:,}")
    parser.add_argument("--minutes", type=float, help=f"at most; default: {scale.minutes:g}")
    parser.add_argument("--short", action="store_true", help=f"{scale.short_tries:,} tries")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="repeat one try")
    asked = parser.parse_args(sys.argv[1:])
    tries, minutes = (scale.short_tries, scale.short_minutes) if asked.short else (scale.tries, scale.minutes)
    return Drill(name, asked.seed, asked.tries or tries, asked.minutes or minutes, asked.only, asked.short)
