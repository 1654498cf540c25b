"""What a model costs to run: latency, memory and file size, measured in a fresh process.

The process imports what it needs, notes its memory, opens the model as `effnet.load` does and classifies one image at a
time. The model's memory is the peak beyond that note: the weights as read and as the engine packs them, the feature
maps, and the engine's own libraries, if any.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet.arch.specfile import SUFFIXES
from effnet.arch.variants import spec as make_spec
from effnet.errors import RefusedError
from effnet.files import size_of
from effnet.machine import forget_peak, peak_memory, resident_memory
from effnet.runtime.artifact import OPENVINO_FILE
from effnet.weights.bundle import WEIGHTS, is_bundle

ROUNDS, RUNS, WARMUP = 3, 40, 5  # the quietest round counts, since other programs may disturb some
FEWEST, LONGEST = 10, 1.0  # runs of a slow network's round, at least; seconds after which the round then ends
PAUSE = 0.05  # seconds between rounds
AGAIN, NEAR = (
    2,
    1.5,
)  # further processes for a model that takes up to so many times its limit


@dataclass(frozen=True)
class Measurement:
    """What a model costs on this machine."""

    latency: float  # median seconds for one image
    slowest_tenth: float  # nine of ten images take at most this long
    memory: int  # peak bytes beyond what the process held before
    engine: str  # engine and precision: native, bf16


def measure(model: Path, backend: dict[str, Any], *, latency: float | None = None) -> Measurement:
    """Measure a model in a fresh process.

    Args:
        model: a bundle, an artifact, or a spec.yaml, whose network gets random weights.
        backend: engine, precision and threads, if they are chosen.
        latency: a limit in seconds; if the first process takes slightly longer, two more measure, and the median
            counts.

    Raises:
        RefusedError: the model cannot be run; the message says why.
    """
    found = [_ask(model, backend)]
    if latency is not None and latency < found[0].slowest_tenth <= NEAR * latency:
        found += [_ask(model, backend) for _ in range(AGAIN)]
    return sorted(found, key=lambda each: each.slowest_tenth)[len(found) // 2]


def model_bytes(model: Path) -> int:
    """Bytes to ship: a bundle's weight file, or an artifact without its model card."""
    files = [model / WEIGHTS] if is_bundle(model) else model.glob(f"{Path(OPENVINO_FILE).stem}.*")
    return sum(map(size_of, files))


def _ask(model: Path, backend: dict[str, Any]) -> Measurement:
    command = [sys.executable, "-m", "effnet.fitting.measurement", str(model), json.dumps(backend)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RefusedError(f"{model} cannot be measured: {reason}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure the model named on the command line, and print a line of JSON."""
    path, pins = Path(sys.argv[1]), json.loads(sys.argv[2])
    import effnet.metrics.timing as timing
    from effnet.data.image import views
    from effnet.runtime.load import read_model
    from effnet.runtime.select import open_session, select_for

    forget_peak()
    before = resident_memory()
    model = timing.random_bundle(make_spec(str(path))) if path.suffix in SUFFIXES else read_model(path)
    selection = select_for(model, batch=1, **pins)
    with open_session(model, selection) as session:
        image = views(model.config.input, 1)
        once = [timing.seconds(lambda: session(image)) for _ in range(WARMUP)][-1]
        runs = max(FEWEST, min(RUNS, int(LONGEST / once)))
        rounds = []
        for _ in range(ROUNDS):
            time.sleep(PAUSE)
            rounds.append(timing.Timing(tuple(timing.seconds(lambda: session(image)) for _ in range(runs))))
    best = min(rounds, key=lambda each: each.spread_ms[1])
    values = {
        "latency": best.median_ms / 1e3,
        "slowest_tenth": best.spread_ms[1] / 1e3,
        "memory": max(0, peak_memory() - before),
        "engine": str(selection.backend),
    }
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
