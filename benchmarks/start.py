"""From a process's start to its first printed prediction: effnet predict on artifacts beside bare scripts.

    python benchmarks/start.py [--model lite0] [--rounds 15]

The scripts do the least: open the file in its engine, prepare one photo with Pillow, print the best class's number.
`effnet predict` prepares it exactly, names it and prints a table; its choice was made before. All start in turn, with
the files in the system's cache; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import effnet
from effnet import console
from effnet.exporting.export import export
from effnet.machine import load_average, this_machine
from effnet.weights.load import open_model

PHOTO = Path(effnet.__file__).parent / "data" / "photos" / "coffee.png"
EFFNET = Path(sys.executable).with_name("effnet")
PHOTO_LINES = """
import sys, numpy as np
from PIL import Image
photo = Image.open(sys.argv[2]).convert("RGB")
scale = {resize} / min(photo.size)
photo = photo.resize([int(side * scale) for side in photo.size], Image.Resampling.BICUBIC)
left, top = ((side - {size}) // 2 for side in photo.size)
pixels = np.asarray(photo.crop((left, top, left + {size}, top + {size})))[None]
"""
SCRIPTS = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(session.run(None, {session.get_inputs()[0].name: pixels})[0].argmax())
""",
    "openvino": """
import openvino
compiled = openvino.Core().compile_model(sys.argv[1] + "/model.xml", "CPU", {"PERFORMANCE_HINT": "LATENCY"})
print(compiled([pixels])[0].argmax())
""",
}
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def main() -> None:
    """Measure all in turn and print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", default="lite0")
    asked.add_argument("--rounds", type=int, default=15)
    options = asked.parse_args()
    before, bundle = load_average(), open_model(options.model)
    see = bundle.config.input
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EFFNET_CACHE"] = folder
        commands: dict[str, list[str]] = {}
        for format, script in SCRIPTS.items():
            file = export(bundle, Path(folder) / ("m.onnx" if format == "onnx" else "m"), format=format).path
            code = PHOTO_LINES.format(resize=see.resize, size=see.size) + script
            commands[f"a bare script of {NAMES[format]}"] = [sys.executable, "-c", code, str(file), str(PHOTO)]
            words = ["--model", str(file), "--engine", "onnxruntime" if format == "onnx" else format]
            commands[f"effnet predict, {NAMES[format]}"] = [str(EFFNET), "predict", str(PHOTO), *words]
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(options.rounds + 1):
            for name, command in commands.items():
                taken = started(command)
                if number:  # the first ones choose and fill the system's cache
                    times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    bare = medians["a bare script of ONNX Runtime"]
    rows = [(name, f"{each:.3f}", f"{min(times[name]):.3f}", f"{each / bare:.2f}x") for name, each in medians.items()]
    machine = f"{this_machine()}, load {before or 0:.1f} before"
    title = f"{options.model}: from a process's start to its end, one photo\n{machine}"
    columns = "<", "median, s", "least, s", "of ONNX Runtime's script"
    console.table(columns, rows, title=title, note=f"{options.rounds} rounds in turn.")


def started(command: list[str]) -> float:
    """Seconds until a process has answered and left."""
    before = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - before


if __name__ == "__main__":
    main()
