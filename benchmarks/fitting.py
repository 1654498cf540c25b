"""effnet fit compared with fine-tuning by hand, on the same split and for the same time.

    python benchmarks/fitting.py fashion     60,000 + 10,000 pieces of clothing of 28 px
    python benchmarks/fitting.py tuxpaint    191 photo cut-outs of 6 classes
        [--minutes 30] [--budget macs] [--data-folder benchmarks/data] [--out benchmarks/runs/fit]

For each of three budgets, a tight latency, a tight file size, and multiply-adds only:
    fit          effnet fit DATA --LIMIT VALUE --minutes M
    (a) largest  the largest published variant with local weights that keeps the budget, by multiply-adds, fine-tuned
                 at its own resolution or else at the largest multiple of 32 px that keeps the limit; in 8 bits if only
                 that keeps the limit
    (b) default  Lite0 at 224 px, fine-tuned, whatever it costs
The models are compared on the same test images (`effnet val A B`), and the budget is measured once more in a fresh
process at the end. Runs that are finished in --out are reused. The data come from benchmarks/datasets.py; the machine
should be otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet import console
from effnet.fitting.candidates import Facts, FitCandidate, find_candidates
from effnet.fitting.measurement import measure, model_bytes
from effnet.fitting.settings import FitOptions, FitPlan
from effnet.machine import this_machine

ROOT = Path(__file__).resolve().parent
BUDGETS = {
    "fashion": {"latency": "1ms", "file-size": "4.5MB", "macs": "100M"},
    "tuxpaint": {"latency": "3ms", "file-size": "4.5MB", "macs": "250M"},
}
OWN = {"lite0": 224, "lite1": 240, "lite2": 260}  # pixels
SMALLER = tuple(range(192, 0, -32))
FEW = {"tuxpaint": "--recipe few --fit squash", "fashion": ""}
FIT = {"tuxpaint": ["--fit", "squash"], "fashion": []}


@dataclass(frozen=True)
class Case:
    """A data set with a budget."""

    data: Path
    limit: str
    value: str
    minutes: float
    out: Path

    @property
    def folder(self) -> Path:
        """The folder of its fit."""
        return self.out / f"{self.data.name}-{self.limit}"

    @property
    def result(self) -> dict[str, Any]:
        """Its fit.json."""
        found: dict[str, Any] = json.loads((self.folder / "fit.json").read_text())
        return found

    def fit(self) -> None:
        """Run the command, or resume it."""
        if (self.folder / "fit.json").exists():
            return
        begun = (self.folder / "plan.yaml").exists()
        words = [str(self.data), f"--{self.limit}", self.value, "--minutes", str(self.minutes), *FIT[self.data.name]]
        effnet("fit", *(["--resume", str(self.folder)] if begun else [*words, "--out", str(self.folder)]))

    def largest(self) -> tuple[str, Path]:
        """Name and model of (a)."""
        facts, place = self.facts(), self.out / f"largest-{self.data.name}-{self.limit}"
        place.mkdir(parents=True, exist_ok=True)
        limits: dict[str, Any] = {self.limit.replace("-", "_"): self.value}
        found: list[FitCandidate] = []
        for sizes in (OWN.values(), *((size,) for size in SMALLER)):
            for size in sizes:
                folder = place / f"candidates-{size}"
                folder.mkdir(exist_ok=True)
                plan = FitPlan(folder, self.data, FitOptions(**limits, resolution=size))
                whole = [each for each in find_candidates(plan, facts) if each.whole and each.weights]
                found += [each for each in whole if not each.refused and size in (OWN[each.weights], *SMALLER)]
            if found:
                break
        best = max(found, key=lambda each: each.costs["macs"])
        run = train(self, best.weights, best.spec.resolution)
        if not best.int8:
            return best.name, run
        small = place / "int8"
        if not small.exists():
            effnet("export", str(run), str(self.folder / "data.csv"), "--precision", "int8", "--out", str(small))
        return best.name, small

    def facts(self) -> Facts:
        """The facts that the candidates depend on, as recorded by the fit."""
        sizes = self.result["sizes"]
        return Facts(len(self.result["classes"]), sizes["train"], sizes["side"])


def effnet(*words: str) -> str:
    """Run a command and return its output."""
    console.remark(f"$ effnet {' '.join(words)}")
    done = subprocess.run([sys.executable, "-m", "effnet", *words], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        sys.exit(done.returncode)
    return done.stdout


def train(case: Case, model: str, resolution: int) -> Path:
    """Train on the split of the fit for the same time, and return the bundle."""
    folder = case.out / f"{case.data.name}-{model}-{resolution}"
    if not (folder / "metrics.json").exists():
        begun = (folder / "last.ckpt").exists()
        time = f"--minutes {case.minutes}" if not FEW[case.data.name] else FEW[case.data.name]
        network = f"--model {model} --resolution {resolution} {time}"
        words = [str(case.folder / "data.csv"), *network.split(), "--out", str(folder)]
        effnet("train", *(["--resume", str(folder)] if begun else words))
    return folder / "best"


def compare(case: Case, other: Path) -> str:
    """The gain of fit's model on the test images, in points."""
    words = ("val", str(other), str(case.folder / "model"), str(case.folder / "data.csv"), "--split", "test", "--json")
    found = json.loads(effnet(*words))
    gain = found["accuracy"]
    text = f"{100 * gain['value']:+.2f} ({100 * gain['low']:+.2f} to {100 * gain['high']:+.2f})"
    return f"{text}{'' if found['significant'] else ', no difference'}"


def top1(case: Case, model: Path) -> str:
    """The accuracy on the test images with its interval."""
    found = json.loads(effnet("val", str(model), str(case.folder / "data.csv"), "--split", "test", "--json"))["top1"]
    return f"{found['value']:.2%} ({found['low']:.2%} to {found['high']:.2%})"


def again(case: Case) -> str:
    """The limited cost, measured again in a fresh process."""
    limit, model = case.limit.replace("-", "_"), case.folder / "model"
    if limit == "latency":
        return f"{1e3 * measure(model, {}).slowest_tenth:.3f} ms"
    return (
        console.size(model_bytes(model)) if limit == "file_size" else console.millions(case.result["measured"][limit])
    )


def main() -> None:
    """Do the missing runs, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=BUDGETS)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--budget", action="append", choices=("latency", "file-size", "macs"))
    parser.add_argument("--data-folder", type=Path, default=ROOT / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fit")
    given = parser.parse_args()
    rows, costs = [], []
    for limit, value in BUDGETS[given.data].items():
        if given.budget and limit not in given.budget:
            continue
        case = Case(given.data_folder / given.data, limit, value, given.minutes, given.out)
        case.fit()
        result = case.result
        name, largest = case.largest()
        default = train(case, "lite0", 224)
        same = " (the same network)" if name == result["chosen"] else ""
        rows += [
            (f"{limit} {value}", f"fit: {result['chosen']}", top1(case, case.folder / "model"), ""),
            ("", f"(a) {name}{same}", top1(case, largest), compare(case, largest)),
            ("", "(b) lite0-224", top1(case, default), compare(case, default)),
        ]
        key = "slowest_tenth" if limit == "latency" else limit.replace("-", "_")
        figures = (f"{result[kind][key]:.4g}" for kind in ("predicted", "measured"))
        costs.append((f"{limit} {value}", result["chosen"], *figures, again(case), "yes" if result["kept"] else "no"))
        console.remark(f"{limit} {value}: {result['reason']}")
    note = f"{given.minutes:g} minutes each. {this_machine()}"
    console.table(("<budget", "<model", "<top-1 on test", "<fit's gain, points"), rows, title=given.data, note=note)
    columns = ("<budget", "<chosen", "predicted", "measured", "<at another moment", "<kept")
    console.table(columns, costs, title="Costs (seconds, bytes or counts)")


if __name__ == "__main__":
    main()
