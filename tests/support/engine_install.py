"""Checks of an install with one engine and no torch, run by `make check` in its own virtual environment.

    python tests/engine_install.py ARTIFACT    an artifact of lite0, which this environment's engine runs

Prints how large the environment is, and the seconds from a process's start to its first printed prediction: no test
asserts a time.
"""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

EFFNET = Path(sys.executable).with_name("effnet")
PHOTOS = Path(__file__).parents[2] / "src" / "effnet" / "data" / "photos"

assert find_spec("torch") is None, "torch is installed here, so this run shows nothing"
seconds = []
for _ in range(3):  # the first one reads the files from disk
    started = time.perf_counter()
    words = [EFFNET, "predict", PHOTOS, "--model", sys.argv[1], "--topk", "1", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    seconds.append(time.perf_counter() - started)
    answers = map(json.loads, done.stdout.splitlines())
    told = {Path(answer["file"]).name: answer["predictions"][0]["label"] for answer in answers}
    assert told == {"chelsea.png": "tiger cat", "coffee.png": "espresso"}, told
    assert "fp32" in done.stderr
if find_spec("openvino"):  # which runs weights, too; ONNX Runtime needs the package onnx for that
    words = [EFFNET, "predict", PHOTOS / "coffee.png", "--model", "lite0", "--topk", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "espresso" in done.stdout, done.stdout
size = sum(file.stat().st_size for file in Path(sys.prefix).rglob("*") if file.is_file() and not file.is_symlink())
shown = ", ".join(f"{value:.2f}" for value in seconds)
print(f"{sys.argv[1]} answers without torch; environment {size / 1e6:,.0f} MB; seconds of three runs: {shown}")
