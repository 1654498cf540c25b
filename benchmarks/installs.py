"""Seconds, megabytes and packages of `pip install effnet` and each extra, each in a fresh environment.

    python benchmarks/installs.py [plain serve torch ...] [--python /usr/bin/python3.13]

A wheel is built from this folder, and one environment at a time is made in a temporary folder and deleted. In an empty
folder, effnet then classifies its packaged photos, and the packages of the extra are imported. pip uses its download
cache. Megabytes are those of the whole environment including pip, as counted by `du -s --si`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from effnet.console import table
from effnet.errors import EXTRAS
from effnet.machine import this_machine

ROOT = Path(__file__).parents[1]
PIP = ("-m", "pip", "--disable-pip-version-check")
MODULES = {"keras": ("h5py",), "compare": ("torch", "torchvision"), "all": ("torch", "openvino", "fastapi", "ray")}
PHOTOS = "import effnet; print(effnet.__path__[0])"


def main() -> None:
    """Install the requested extras one by one, and print the table."""
    known = tuple(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("extras", nargs="*", help=f"plain, {', '.join(known)}; default: all but dev")
    asked.add_argument("--python", default=sys.executable, help="the Python of the environments")
    options = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, *PIP, "wheel", "-q", "--no-deps", "-w", folder, ROOT)
        (wheel,) = Path(folder).glob("effnet-*.whl")
        chosen = options.extras or ["plain", *(extra for extra in known if extra != "dev")]
        rows = [measure(extra, wheel, Path(folder), options.python) for extra in chosen]
        title = f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, {run(options.python, '--version').strip()}"
    table(("<install", "seconds", "MB", "packages", "answer, s"), rows, title=title, note=str(this_machine()))


def measure(extra: str, wheel: Path, folder: Path, python: str) -> tuple[str, ...]:
    """One row: make, fill, use and delete an environment."""
    with tempfile.TemporaryDirectory(dir=folder) as room:
        venv, empty = Path(room) / "venv", Path(room) / "empty"
        empty.mkdir()
        run(python, "-m", "venv", venv)
        inside = venv / "bin" / "python"
        what = str(wheel) + ("" if extra == "plain" else f"[{extra}]")
        start = time.monotonic()
        run(inside, *PIP, "install", "-q", "-c", ROOT / "constraints.txt", what)
        seconds = time.monotonic() - start
        size = run("du", "-s", "--si", "--block-size=1MB", venv).split()[0]
        count = len(run(inside, *PIP, "list", "--format=freeze").splitlines()) - 1  # without pip
        photos = Path(run(inside, "-c", PHOTOS, cwd=empty).strip()) / "data" / "photos"
        start = time.monotonic()
        said = run(venv / "bin" / "effnet", "predict", photos, "--topk", "1", cwd=empty)
        answer = time.monotonic() - start
        assert "tiger cat" in said, said
        assert "espresso" in said, said
        if names := MODULES.get(extra, tuple(name for name, home in EXTRAS.items() if home == extra)):
            run(inside, "-c", f"import {', '.join(names)}", cwd=empty)
    row = extra, f"{seconds:.0f}", f"{int(size):,}", str(count), f"{answer:.1f}"
    print("works:", *row, file=sys.stderr, flush=True)  # kept if the rest is interrupted
    return row


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a command, which must succeed, and return its output."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=outside, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
