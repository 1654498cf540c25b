"""How soon a model answers in a fresh process, and how much memory that takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

# Only what a user's program would import is imported before the first answer.
PROGRAM = """
import json, sys, time
import numpy, effnet
model, pins = json.loads(sys.argv[1])
classifier = effnet.load(model, **pins)
size, channels = classifier.input.size, classifier.input.channels
classifier.logits(numpy.zeros((1, size, size, channels), numpy.uint8))
answered = time.monotonic()
from effnet.machine import peak_memory
print(json.dumps([answered, peak_memory()]))
"""


def measure_cold_start(model: str, pins: Mapping[str, Any]) -> tuple[float, int]:
    """Start Python, load a model and have it answer once.

    Args:
        model: as effnet.load takes it.
        pins: effnet.load's other arguments.

    Returns:
        Seconds until the first answer, and the bytes that the process held at most, Python and all libraries included;
        0 where the system does not report that.

    Raises:
        ChildProcessError: the process failed; the message is the last line that it wrote.
    """
    command = [sys.executable, "-P", "-c", PROGRAM, json.dumps([model, dict(pins)])]
    started = time.monotonic()  # the same clock for all processes
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildProcessError((done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[-1])
    answered, held = json.loads(done.stdout.splitlines()[-1])
    return answered - started, held
