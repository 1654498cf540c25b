"""What works without torch, with the same answers as with it."""

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
found = []
for path, engine in json.loads(sys.argv[1]):
    with effnet.load(path, engine=engine, precision="fp32") as model:
        size = model.input.size
        pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
        found.append(model.logits(pixels).tolist())
print(json.dumps(found))
"""
COMMAND = "from effnet.cli import main; main(sys.argv[1:])"


def run(code: str, *words: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


Answers = dict[tuple[str, str], list[list[float]]]

TYPES = ("float32", "half", "bfloat16")
ENGINES = ("openvino", "onnxruntime")
CHECKPOINTS = {"new.pth": True, "old.pth": False}  # whether in the zip format of today


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle of each type of numbers and a training's checkpoint in each format."""
    folder = tmp_path_factory.mktemp("models")
    for name in TYPES:
        network = getattr(shaken(EfficientNet(tiny_spec())), {"float32": "float"}.get(name, name))()
        effnet.save(network, folder / name, input=InputSpec(32, 36))
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.4, num_classes=3)))
    held = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    content = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": held}
    for name, zipped in CHECKPOINTS.items():
        torch.save(content, folder / name, _use_new_zipfile_serialization=zipped)
    return folder


@pytest.fixture(scope="module")
def answers(models: Path) -> Answers:
    """What a process without torch answers, by model and engine."""
    asked = [(name, engine) for name in TYPES for engine in ENGINES]
    asked += [(name, "openvino") for name in ("lite0", *CHECKPOINTS)]
    paths = [(name if name == "lite0" else str(models / name), engine) for name, engine in asked]
    return dict(zip(asked, json.loads(run(BLOCKED + LOGITS, json.dumps(paths))), strict=True))


def check_answers(model: str | Path, found: list[list[float]]) -> None:
    """Whether these are torch's."""
    classifier = effnet.load(model, engine="torch")
    size = classifier.input.size
    expected = classifier.logits(np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8))
    assert np.abs(np.array(found) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TYPES)
def test_a_bundle(models: Path, answers: Answers, name: str, engine: str) -> None:
    check_answers(models / name, answers[name, engine])


def test_published_weights(answers: Answers) -> None:
    check_answers("lite0", answers["lite0", "openvino"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_a_training(models: Path, answers: Answers, name: str) -> None:
    check_answers(models / name, answers[name, "openvino"])


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


def test_torch_is_not_imported_for_another_engine(models: Path) -> None:
    code = "import sys\n" + LOGITS + "print([name for name in ('torch', 'safetensors') if name in sys.modules])"
    said = run(code, json.dumps([(str(models / name), "openvino") for name in TYPES]))
    assert said.splitlines()[-1] == "[]"
