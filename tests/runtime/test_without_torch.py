"""What answers where torch is not installed, and that it answers as it does where it is."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
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


def check_answers(model: str | Path, engine: str) -> None:
    """Whether a process without torch answers as torch does."""
    classifier = effnet.load(model, engine="torch")
    size = classifier.input.size
    expected = classifier.logits(np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8))
    found = np.array(json.loads(run(BLOCKED + LOGITS, model, engine)))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_bundle(bundle: Path, engine: str) -> None:
    check_answers(bundle, engine)


def test_published_weights() -> None:
    check_answers("lite0", "openvino")


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_of_a_training(tmp_path: Path, old: bool) -> None:
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.4, num_classes=3)))
    held = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    content = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": held}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    check_answers(tmp_path / "a.pth", "openvino")


def test_commands(photos: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        shutil.copy(photos / "coffee.png", tmp_path / "data" / "test" / name / "1.png")
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.4, num_classes=3)))
    model = effnet.save(network, tmp_path / "m", classes=["a", "b", "c"], input=InputSpec(32, 36))
    for words, said in (
        (("predict", photos / "coffee.png", "--model", model), "coffee.png"),
        (("val", model, tmp_path / "data"), "33.3%"),
        (("bench", model, "--batch", 1, "--rounds", 1), "ONNX Runtime"),
        (("export", model, "--out", tmp_path / "openvino"), "network's in native"),
        (("predict", photos / "coffee.png", "--model", tmp_path / "openvino"), "coffee.png"),
    ):
        assert said in run(BLOCKED + COMMAND, *words), words


def test_torch_is_not_imported_for_another_engine(bundle: Path) -> None:
    code = "import sys\n" + LOGITS + "print([name for name in ('torch', 'safetensors') if name in sys.modules])"
    assert run(code, bundle, "openvino").splitlines()[-1] == "[]"
