"""What answers where torch is not installed, and that it answers as it does where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_weights import shaken
from tiny import tiny_spec

import effnet
from effnet.arch.spec import InputSpec
from effnet.models.efficientnet import EfficientNet

# None in sys.modules makes every import of torch fail, wherever it is tried
BLOCKED = "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
LOGITS = """
import json, numpy as np, effnet
with effnet.load(sys.argv[1], engine=sys.argv[2], precision="fp32") as model:
    size = model.input.size
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    print(json.dumps(model.logits(pixels).tolist()))
"""
COMMAND = "from effnet.cli import main; main(sys.argv[1:])"


def run(code: str, *words: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["float32", "half", "bfloat16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = getattr(shaken(EfficientNet(tiny_spec())), {"float32": "float"}.get(request.param, request.param))()
    return effnet.save(network, tmp_path_factory.mktemp("bundle") / "b", input=InputSpec(32, 36))


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_bundle_answers_as_with_torch(bundle: Path, engine: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = effnet.load(bundle, engine="torch").logits(pixels)
    found = np.array(json.loads(run(BLOCKED + LOGITS, bundle, engine)))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_commands(bundle: Path, photos: Path) -> None:
    assert "coffee.png" in run(BLOCKED + COMMAND, "predict", photos / "coffee.png", "--model", bundle)


def test_torch_is_not_imported_for_another_engine(bundle: Path) -> None:
    code = "import sys\n" + LOGITS + "print([name for name in ('torch', 'safetensors') if name in sys.modules])"
    assert run(code, bundle, "openvino").splitlines()[-1] == "[]"
