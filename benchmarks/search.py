"""The studies of docs/searching.md, as user commands; they take an hour on two cores.

    python benchmarks/search.py studies [NAME ...]    all of STUDIES, or only these
    python benchmarks/search.py imagenet              estimate the time of a search on ImageNet from a step of B0
        [--data benchmarks/data] [--out runs/search] [--results benchmarks/results/search]

benchmarks/datasets.py makes the data. An interrupted study is resumed; a finished one only writes its results again.
Its trainings, networks, verdict and picture are copied to --results, from which python docs/draw.py makes the tables of
docs/searching.md.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import effnet
from effnet import console
from effnet.machine import this_machine
from effnet.metrics.timing import random_images, seconds
from effnet.searching.candidates import build_candidates, grid
from effnet.searching.halving import make_rungs

ROOT = Path(__file__).resolve().parents[1]
BASELINES = "examples/baselines"
SEARCH, CLAIM = ("-m", "effnet", "search"), ("benchmarks/claim.py",)
STUDIES = {  # arguments of Python, and options
    "separable": (SEARCH, f"--from {BASELINES}/separable.yaml --epochs 0.75"),
    "mbconv": (SEARCH, f"--from {BASELINES}/mbconv.yaml --epochs 0.75"),
    # trainings four times as long, partly paid for by the compiled kernels
    "mbconv-long": (SEARCH, f"--from {BASELINES}/mbconv.yaml --epochs 3"),
    "compare": (CLAIM, f"--from {BASELINES}/separable.yaml --epochs 0.75 --seeds 4"),
    # every candidate trained in full, to see what halving costs
    "separable-whole": (SEARCH, f"--from {BASELINES}/separable.yaml --epochs 0.75 --rungs 1 --seeds 1"),
}
KEPT = ("candidates.csv", "trials.csv", "verdict.json", "rule.yaml", "search.png", "compare.png")
BATCH, STEPS = 16, 7
SEEDS = 5
IMAGES, EPOCHS = 1_281_167, 350  # ImageNet's training split, and the paper's epochs
PUBLISHED = ("an RTX 3090, mixed precision", 1779.0)  # timm's train benchmark of tf_efficientnet_b0, images a second


def study(name: str, data: Path, out: Path, results: Path) -> None:
    """Run or resume a study, and copy its results."""
    program, options = STUDIES[name]
    words = [*program, str(shown(data)), *shlex.split(options), "--out", str(shown(out / name))]
    if program == SEARCH and (out / name / "args.yaml").exists():
        words = [*program, "--resume", str(shown(out / name))]
    console.remark(f"$ python {shlex.join(words)}")
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    (results / name).mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (out / name / file).exists():
            shutil.copy(out / name / file, results / name)


def shown(path: Path) -> Path:
    """The path from the repository's root, if it is inside: rule.yaml records it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def imagenet() -> None:
    """The time of a search at B0's own size with the paper's epochs, on this machine and on a GPU."""
    from networks import training_step

    network = effnet.create("b0").to(memory_format=torch.channels_last).train()
    pixels = random_images(BATCH, 224)
    here = BATCH / statistics.median([seconds(lambda: training_step(network, pixels)) for _ in range(STEPS)][1:])
    found = build_candidates(effnet.spec("b0"), grid())
    rungs = make_rungs(len(found), seeds=SEEDS)
    trainings = 2 * sum(rung.share * rung.trainings for rung in rungs)  # of twice B0's multiply-adds
    rows = []
    for device, speed in ((f"this machine, float32 ({this_machine()})", here), PUBLISHED):
        one = IMAGES * EPOCHS / speed / 86_400
        days = trainings * one
        rows.append((device, f"{speed:.4g}", f"{2 * one:,.1f}", f"{days:,.0f}", f"{days / 365:.1f}"))
    last = f"{rungs[-1].candidates} finalists of {SEEDS} seeds"
    title = f"{len(found)} candidates of B0 at 224 px, {last}, {EPOCHS} epochs of ImageNet at the last rung"
    columns = ("<device", "B0, images/s", "one training, days", "a search, days", "years")
    console.table(columns, rows, title=title, note="The GPU's speed is published (timm), not measured here.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("studies", "imagenet"))
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--data", type=Path, default=ROOT / "benchmarks" / "data", help="the folder of datasets.py")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "search", help="folder for the studies")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "search")
    options = parser.parse_args()
    if unknown := set(options.names) - set(STUDIES):
        parser.error(f"no study is called {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    if options.what == "imagenet":
        imagenet()
        sys.exit()
    if not (options.data / "fashion").is_dir():
        sys.exit(f"{options.data / 'fashion'} is missing. Make it with: python benchmarks/datasets.py fashion")
    for name in options.names or STUDIES:
        study(name, options.data / "fashion", options.out, options.results)
