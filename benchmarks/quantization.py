"""Accuracy, size and speed of int8 for trained bundles, with the commands of a user.

    python benchmarks/quantization.py BUNDLE... [--data benchmarks/data/fashion] [--max-drop 0.5] [--batch 1]
        [--out benchmarks/runs/int8]

For each bundle: `effnet export` in fp32 and, with the guard, in int8; if the guard kept parts in float or refused, also
int8 without it. `effnet val` compares each with fp32 on the test split, which no export has seen. Times are medians of
interleaved rounds in this process; artifacts that are already in --out are reused.

The figures for Fashion-MNIST are of bundles trained on it: effnet train benchmarks/data/fashion --model b0
--resolution 32 --val 0.05 --epochs 4 --recipe scratch, and lite0 in the same way with --resolution 64 and its weights.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from effnet import console
from effnet.files import size_of
from effnet.machine import this_machine
from effnet.metrics.timing import time_rounds, time_turn
from effnet.runtime.artifact import read_artifact
from effnet.runtime.select import open_session, select_for

ROOT = Path(__file__).resolve().parent
UNGUARDED = 99  # points that every version keeps within


def typed(*words: object, codes: tuple[int, ...] = (0,)) -> tuple[int, str]:
    """Run effnet as a user does; return its exit code, which must be one of `codes`, and its output."""
    command = [str(word) for word in words]
    console.remark(f"$ effnet {shlex.join(command)}")
    done = subprocess.run([sys.executable, "-m", "effnet", *command], capture_output=True, text=True)
    console.remark(done.stderr.strip())
    if done.returncode not in codes:
        sys.exit(done.returncode)
    return done.returncode, done.stdout


def exported(bundle: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The artifacts of one bundle by row name."""
    place = options.out / bundle.parent.name
    made: dict[str, Path] = {"fp32": place / "fp32"}
    if not made["fp32"].exists():
        typed("export", bundle, "--batch", options.batch, "--out", made["fp32"])
    int8 = ("export", bundle, options.data, "--precision", "int8", "--batch", options.batch)
    for name, limit in ((f"int8, at most {options.max_drop:g}", options.max_drop), ("int8, no guard", UNGUARDED)):
        artifact = place / f"int8-{limit:g}"
        if not artifact.exists():
            code, words = typed(*int8, "--max-drop", limit, "--out", artifact, codes=(0, 1))  # 1: refused
            sys.stdout.write(words)
            if code:
                continue
        made[name] = artifact
        if not read_artifact(artifact).form.int8.kept:
            break
    return made


def rows_of(bundle: Path, options: argparse.Namespace) -> list[tuple[Any, ...]]:
    """A row for each artifact: accuracy on the test split, the difference from fp32, size, time, parts in float."""
    made = exported(bundle, options)
    opened = {name: read_artifact(path) for name, path in made.items()}
    see = opened["fp32"].config.input
    pixels = np.random.default_rng(0).integers(0, 256, (options.batch, see.size, see.size, see.channels), np.uint8)
    sessions = {
        name: open_session(artifact, select_for(artifact, batch=options.batch)) for name, artifact in opened.items()
    }
    timings = time_rounds(lambda: [time_turn(partial(session, pixels)) for session in sessions.values()])
    times = {name: timing.median_ms for name, timing in zip(sessions, timings, strict=True)}
    rows = []
    for name, path in made.items():
        lost, found, said = "", None, opened[name].form.int8
        if said:
            val = ("val", made["fp32"], path, options.data, "--split", "test", "--json")
            found = json.loads(typed(*val)[1])
            low, high = (-100 * found["accuracy"][end] for end in ("high", "low"))
            lost = f"{-100 * found['accuracy']['value']:+.2f} ({low:+.2f} to {high:+.2f})"
            if len(rows) == 1:
                rows[0] = (*rows[0][:2], f"{found['accuracy_a']['value']:.2%}", *rows[0][3:])
        top1 = f"{found['accuracy_b']['value']:.2%}" if found else ""
        kept = ", ".join(said.kept) or "none" if said else ""
        size, took = console.size(size_of(path)), f"{times[name]:.2f}"
        rows.append((bundle.parent.name, name, top1, lost, size, took, f"{said.drop:+.2f}" if said else "", kept))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "fashion", help="the data of their training")
    parser.add_argument("--max-drop", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "int8", help="where to keep the artifacts")
    options = parser.parse_args()
    lines = [row for bundle in options.bundles for row in rows_of(bundle, options)]
    columns = "<bundle", "<precision", "top-1", "points lost", "size", "ms", "on val", "<parts in float"
    note = f"Test images; ms for {options.batch} at once. {this_machine()}"
    console.table(columns, lines, title="int8 against fp32 in OpenVINO", note=note)
