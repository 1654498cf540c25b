"""What a model costs when it runs: time, memory and file, measured in a fresh process.

The process imports what it needs, notes its memory, opens the model as `effnet.load` does, answers one image at a time,
and reports. What it holds at most beyond that note is the model's memory: the weights as read, what the engine makes of
them, the feature maps, and the engine's own libraries where it has any.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet.arch.specfile import SUFFIXES
from effnet.arch.variants import spec as make_spec
from effnet.errors import RefusedError
from effnet.files import size_of
from effnet.machine import forget_peak, peak_memory, resident_memory
from effnet.weights.bundle import WEIGHTS, is_bundle

RUNS, WARMUP = 40, 5
AGAIN = 2  # further processes for a model that is slower than its limit: the machine may have been busy


@dataclass(frozen=True)
class Measurement:
    """What a model costs on this machine."""

    latency: float  # seconds for one image, the median
    slowest_tenth: float  # nine of ten images take at most this long
    memory: int  # bytes, at most, beyond what the process held before
    engine: str  # what ran it: native, bf16

    def breaks(self, limit: float | None) -> bool:
        """Whether it takes longer than a limit in seconds."""
        return limit is not None and self.slowest_tenth > limit


def measure(model: Path, backend: dict[str, Any], *, latency: float | None = None) -> Measurement:
    """Measure a model in a fresh process.

    Args:
        model: a bundle, an artifact, or a spec.yaml, whose network gets random weights.
        backend: engine, precision and threads, where they are chosen.
        latency: a limit in seconds; where the first process takes longer, two more measure, and the middle one counts.

    Raises:
        RefusedError: the model cannot be run; the message says why.
    """
    found = [_ask(model, backend)]
    if found[0].breaks(latency):
        found += [_ask(model, backend) for _ in range(AGAIN)]
    return sorted(found, key=lambda each: each.slowest_tenth)[len(found) // 2]


def model_bytes(model: Path) -> int:
    """The size of what has to be shipped: a bundle's file of weights, or all of an artifact."""
    return size_of(model / WEIGHTS if is_bundle(model) else model)


def _ask(model: Path, backend: dict[str, Any]) -> Measurement:
    command = [sys.executable, "-m", "effnet.fitting.measurement", str(model), json.dumps(backend)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": ""}
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RefusedError(f"{model} cannot be measured: {reason}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure the model of the command line, and print a line of JSON."""
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
        for _ in range(WARMUP):
            session(image)
        times = [timing.seconds(lambda: session(image)) for _ in range(RUNS)]
    values = {
        "latency": statistics.median(times),
        "slowest_tenth": statistics.quantiles(times, n=10, method="inclusive")[-1],
        "memory": max(0, peak_memory() - before),
        "engine": str(selection.backend),
    }
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
