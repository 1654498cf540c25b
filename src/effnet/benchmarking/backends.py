"""The backends that can run a model here, and the cold start of a fresh process with one of them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Container, Mapping
from typing import Any

from effnet.errors import EXTRAS, ArgumentError
from effnet.files import size_of
from effnet.machine import this_machine
from effnet.runtime import native
from effnet.runtime.artifact import ENGINES, Artifact, Model
from effnet.runtime.options import EnginePrecision
from effnet.runtime.select import NEEDED, installed_engines
from effnet.runtime.session import BF16_ENGINES, TITLES, Backend

INT8 = Backend("openvino", "int8")

# Before the first prediction it imports only what a user's program would.
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


def list_backends(model: Model, *, int8: bool = False) -> tuple[Backend, ...]:
    """List the backends that can run a model here; the first is exact, and the reference for the others.

    Args:
        model: a network or an artifact.
        int8: also include int8, for which the network is calibrated.

    Raises:
        ArgumentError: `int8` is given for an artifact.
    """
    artifact = model if isinstance(model, Artifact) else None
    here, bf16 = installed_engines(artifact), this_machine().bf16
    exact: EnginePrecision = "fp32"
    if artifact is None:
        unable = {"native"} if native.unsupported(model.config.spec) else set()
        able = [name for name in TITLES if name in here and name not in unable]
        names = able or ["torch"]  # fails, with the reason
    elif int8:
        raise ArgumentError("int8", int8, f"needs a network to calibrate, and {artifact.path} is an artifact.")
    else:
        form = artifact.form
        names = here or [ENGINES[form.format][0]]  # fails, with the reason
        exact = "int8" if form.precision == "int8" else "fp32"
        bf16 = form.precision == "bf16" or (bf16 and exact == "fp32")
    found = []
    for name in names:
        found.append(Backend(name, exact))
        found += [Backend(name, "bf16")] if bf16 and name in BF16_ENGINES else []
        found += [INT8] if int8 and name == "openvino" else []
    return tuple(found)


def list_absent(name: str, model: Model, backends: Container[Backend]) -> tuple[str, ...]:
    """Explain which engines and precisions are missing from a model's backends; `name` is as for effnet.load."""
    artifact = model if isinstance(model, Artifact) else None
    here, notes = installed_engines(artifact), []
    for engine in ENGINES[artifact.form.format] if artifact else TITLES:
        if engine == "native":
            if reason := native.missing() or native.unsupported(model.config.spec):
                notes.append(f"native {reason}")
        elif engine not in here:
            package = NEEDED[engine][0 if artifact else -1]
            notes.append(f"{TITLES[engine]} is not installed: pip install 'effnet[{EXTRAS[package]}]'")
    if artifact is None and INT8 not in backends:
        notes.append(f"int8 is calibrated first, which takes minutes: effnet bench {shlex.quote(name)} DATA --int8")
    return tuple(notes)


def bytes_of(model: Model) -> int:
    """Size of an artifact on disk, or of a network's weights."""
    if isinstance(model, Artifact):
        return size_of(model.path.parent if model.form.format == "openvino" else model.path)
    return sum(array.nbytes for array in model.weights.values())


def measure_cold_start(model: str, pins: Mapping[str, Any]) -> tuple[float, int]:
    """Start Python, load a model and predict once.

    Args:
        model: as for effnet.load.
        pins: other arguments of effnet.load.

    Returns:
        Seconds until the first prediction, and the peak memory of the process in bytes, including Python and all
        libraries; 0 if the system does not report it.

    Raises:
        ChildProcessError: the process failed; the message is its last line of output.
    """
    command = [sys.executable, "-P", "-c", PROGRAM, json.dumps([model, dict(pins)])]
    started = time.monotonic()  # the same clock for all processes
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildProcessError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    answered, held = json.loads(done.stdout.splitlines()[-1])
    return answered - started, held
