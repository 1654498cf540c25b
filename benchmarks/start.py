"""Time from process start to the first printed answer, and memory: effnet predict against bare scripts of the engines.

    python benchmarks/start.py [--model b0] [--rounds 15]

The scripts do the minimum: open the exported file in their engine, prepare one photo with Pillow, print the indices of
the top five classes. `effnet predict` prepares the photo exactly, prints a table with class names and, for a bundle,
checks the weights' sha256 and runs them in the engine that its rule chooses. Weights are random, which takes as long.

All are started in turn, with the files in the system's cache and modules compiled; figures are medians. "answer" is the
time of the first output, "end" that of the process's exit, "CPU" is user and system time, "memory" is the peak of the
process including its libraries.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import effnet
from effnet import console
from effnet.machine import load_average, this_machine

PHOTO = Path(effnet.__file__).parent / "data" / "photos" / "coffee.png"
SECONDS, RATIO, MIB = 0.25, 1.1, 100  # limits for BUNDLE; the ratio is to BARE
BUNDLE, BARE = "effnet predict, a bundle", "a bare script of ONNX Runtime"
PHOTO_LINES = """
import sys, numpy as np
from PIL import Image
photo = Image.open(sys.argv[2]).convert("RGB")
scale = {resize} / min(photo.size)
photo = photo.resize([int(side * scale) for side in photo.size], Image.Resampling.BICUBIC)
left, top = ((side - {size}) // 2 for side in photo.size)
pixels = np.asarray(photo.crop((left, top, left + {size}, top + {size})))[None]
{engine}
odds = np.exp(logits - logits.max())
for index in np.argsort(-odds)[:5]:
    print(index, odds[index] / odds.sum(), flush=True)
"""
ENGINES = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
logits = session.run(None, {session.get_inputs()[0].name: pixels})[0][0]
""",
    "openvino": """
import openvino
compiled = openvino.Core().compile_model(sys.argv[1] + "/model.xml", "CPU", {"PERFORMANCE_HINT": "LATENCY"})
logits = compiled([pixels])[0][0]
""",
}
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}


class Run(NamedTuple):
    """Times and memory of one process."""

    answer: float  # seconds
    end: float
    processor: float
    memory: float  # MiB


def main() -> None:
    """Measure all in turn and print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", default="b0")
    asked.add_argument("--rounds", type=int, default=15)
    options = asked.parse_args()
    before = load_average()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EFFNET_CACHE"] = folder
        # Linux counts the parent's memory at the fork, so torch is loaded in another process.
        with ProcessPoolExecutor(1, get_context("spawn")) as other:
            commands = other.submit(commands_for, options.model, Path(folder)).result()
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for number in range(options.rounds + 1):
            for name, command in commands.items():
                found = start(command)
                if number:  # the first round compiles modules and fills the system's cache
                    runs[name].append(found)
    medians = {name: Run(*map(statistics.median, zip(*each, strict=True))) for name, each in runs.items()}
    ratios = {name: each.answer / medians[BARE].answer for name, each in medians.items()}
    rows = [
        (name, f"{each.answer:.3f}", f"{ratios[name]:.2f}x", *(f"{x:.3f}" for x in each[1:3]), f"{each.memory:.0f}")
        for name, each in medians.items()
    ]
    found = medians[BUNDLE]
    missed = [
        text
        for text, kept in (
            (f"{SECONDS} s", found.answer <= SECONDS),
            (f"{RATIO}x", ratios[BUNDLE] <= RATIO),
            (f"{MIB} MiB", found.memory <= MIB),
        )
        if not kept
    ]
    title = f"{options.model}: from a process's start, one photo\n{this_machine()}, load {before or 0:.1f} before"
    columns = "<", "answer, s", "of ONNX Runtime's script", "end, s", "CPU, s", "memory, MiB"
    verdict = f"MISSED: {', '.join(missed)}" if missed else f"kept: {SECONDS} s, {RATIO}x and {MIB} MiB"
    console.table(columns, rows, title=title, note=f"{options.rounds} rounds in turn. {BUNDLE}: {verdict}.")


def commands_for(model: str, folder: Path) -> dict[str, list[str]]:
    """The commands to start, by name; writes the files that they need to `folder`."""
    from effnet.exporting.export import export
    from effnet.weights.load import open_model

    network = effnet.create(model).eval()
    path = effnet.save(network, folder / "bundle", classes=[f"class {k}" for k in range(network.spec.num_classes)])
    bundle, predict = open_model(path), [sys.executable, "-m", "effnet", "predict", str(PHOTO), "--model"]
    see = bundle.config.input
    commands = {BUNDLE: [*predict, str(path)]}
    for format, lines in ENGINES.items():
        file = str(
            export(bundle, folder / ("m.onnx" if format == "onnx" else "m"), format=format, precision="fp32").path
        )
        code = PHOTO_LINES.format(resize=see.resize, size=see.size, engine=lines)
        commands[f"a bare script of {NAMES[format]}"] = [sys.executable, "-c", code, file, str(PHOTO)]
        commands[f"effnet predict, {NAMES[format]}'s file"] = [*predict, file]
    return commands


def start(command: list[str]) -> Run:
    """Start a process, read its output, and wait until it has ended."""
    unset = "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "OMP_NUM_THREADS"  # rarely set, and each affects the start
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout
        first = os.read(process.stdout.fileno(), 1)
        answer = time.perf_counter() - began
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        end = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not first:
        sys.exit(f"failed: {' '.join(command[:4])}")
    return Run(answer, end, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


if __name__ == "__main__":
    main()
