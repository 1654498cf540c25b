"""What tests of the choice and of the bench stand on: every installed engine, on one and the same machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from effnet.machine import Machine


def have_every_engine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Every engine is there, on a quiet processor of two cores that multiplies bf16; nothing was chosen before."""
    monkeypatch.setenv("EFFNET_CACHE", str(cache))
    monkeypatch.setattr("effnet.runtime.choice.installed", lambda name: find_spec(name) is not None)
    monkeypatch.setattr("effnet.runtime.choice.load_average", lambda: 0.5)
    machine = Machine("Processor X", 2, None, ("avx512f", "avx512_bf16"))
    for module in ("runtime.choice", "runtime.engines", "benchmarking.subjects", "benchmarking.bench"):
        monkeypatch.setattr(f"effnet.{module}.this_machine", lambda: machine)
