"""A pretended machine with every engine, for tests of the rules and of bench."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from effnet.machine import Machine


def have_every_engine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Every engine counts as installed, on a processor of two cores that multiplies bf16; nothing was kept."""
    monkeypatch.setenv("EFFNET_CACHE", str(cache))
    monkeypatch.setattr("effnet.runtime.select.installed", lambda name: name == "native" or find_spec(name) is not None)
    machine = Machine("Processor X", 2, None, ("avx2", "avx512f", "avx512_bf16"))
    for module in ("runtime.select", "metrics.timing", "benchmarking.backends", "benchmarking.bench"):
        monkeypatch.setattr(f"effnet.{module}.this_machine", lambda: machine)
