"""benchmarks/gpu.py runs without a GPU at a tiny size."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_it_runs_on_a_cpu_with_tiny_sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--json", "--device", "cpu"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    lines = [(each["work"], each["network"]) for each in found["found"]]
    assert lines == [(work, name) for work in ("inference", "training") for name in ("timm", "effnet")]
    assert all(each["images_per_second"] > 0 for each in found["found"])
    (run,) = found["runs"]
    assert run["rules"]["part"] == 2
    assert run["forecast"] > 0
    assert run["peak"] is None  # torch counts it on CUDA only
