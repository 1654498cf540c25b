"""What a model costs, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_spec

from effnet import spec as make_spec
from effnet.arch.cost import cost
from effnet.arch.specfile import spec_text
from effnet.errors import RefusedError
from effnet.fitting.measurement import measure, model_bytes
from effnet.metrics.timing import random_bundle
from effnet.weights.bundle import WEIGHTS, save


def test_a_network_is_measured(tmp_path: Path) -> None:
    found = measure(write_spec(tmp_path / "spec.yaml"), {"threads": 1})
    assert 0 < found.latency <= found.slowest_tenth
    assert "1 thread" in found.engine


def test_memory_grows_with_the_weights(tmp_path: Path) -> None:
    memory = []
    for width in (0.5, 1.0):
        file = tmp_path / "spec.yaml"
        spec = make_spec("lite0", width=width, resolution=32)
        file.write_text(spec_text(spec))
        memory.append(measure(file, {"engine": "native"}).memory - 8 * cost(spec).params)
    # beside the weights, as read and as the engine packs them, a little is left
    assert all(0 < rest < 16_000_000 for rest in memory)


def test_a_bundle_ships_its_weights(tmp_path: Path) -> None:
    bundle = random_bundle(make_spec("lite0", width=0.35, resolution=32, num_classes=3))
    save(bundle.network, tmp_path / "model", classes=("a", "b", "c"))
    assert model_bytes(tmp_path / "model") == (tmp_path / "model" / WEIGHTS).stat().st_size
    assert measure(tmp_path / "model", {"engine": "native", "precision": "fp32"}).latency > 0


def test_what_cannot_be_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(RefusedError, match="model"):
        measure(tmp_path / "model", {})
