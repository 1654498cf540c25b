"""`effnet export` as it is typed: what it writes, what it prints, how it refuses."""

from __future__ import annotations

import json

import pytest
import torch

import effnet
from ran import Run
from training.tiny import CLASSES, draw_images

COMMAND = "export"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("typed")
    torch.manual_seed(0)
    network = effnet.create(effnet.spec("b0", width=0.25, depth=0.5, resolution=64, num_classes=3))
    effnet.save(network, root / "mine", classes=["x", "y", "z"])
    return root


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((), "mine-openvino"),
        (("--format", "onnx", "--batch", "dynamic"), "mine.onnx"),
        (("--format", "torch", "--out", "kept/p.pt2", "--batch", 4), "kept/p.pt2"),
    ],
)
def test_an_artifact_and_its_next_command(run, folder, photos, capsys, words, name):
    code, out, err = run("mine", *words)
    assert code == 0
    assert out.startswith(f"wrote {name}: ")
    assert "8 of 8 images get the same class" in out
    assert err.endswith(f"Next: effnet predict photo.jpg --model {name}\n")
    assert effnet.load(name).predict(photos / "coffee.png").label in "xyz"


def test_predict_takes_an_engine(folder, photos, capsys):
    def told(*words):
        ran = Run(capsys, "predict", photos, "--model", "mine", "--json", *words)
        return ran.code, [line["predictions"][0]["label"] for line in map(json.loads, ran.out.splitlines())]

    exact = "--engine", "openvino", "--precision", "fp32", "--threads", 1, "--batch", 2
    assert told() == told(*exact) == told("--engine", "onnxruntime", "--decode", "exact")
    assert Run(capsys, "export", "mine", "--format", "onnx", "--out", "again.onnx").code == 0
    ran = Run(capsys, "predict", photos, "--model", "again.onnx", "--engine", "onnxruntime", "--json")
    assert (ran.code, len(ran.out.splitlines())) == (0, 2)
    ran = Run(capsys, "predict", photos, "--model", "mine", "--threads", 1)
    assert (ran.code, "torch, fp32: nothing else is installed or fits" in ran.err) == (0, True)
    ran = Run(capsys, "predict", photos, "--model", "mine", "--engine", "openvino", "--precision", "bf16")
    assert (ran.code, "OpenVINO, bf16" in ran.err) == (0, True)


def test_val_evaluates_an_artifact_as_the_network(run, folder, capsys):
    draw_images(folder / "shapes", 6)
    network = effnet.create(effnet.spec("b0", width=0.25, depth=0.5, resolution=32, num_classes=3))
    effnet.save(network, folder / "shaped", classes=CLASSES)
    assert run("shaped", "--format", "onnx", "--batch", 4)[0] == 0
    figures = []
    for model in ("shaped", "shaped.onnx"):
        told = json.loads(Run(capsys, "val", model, "shapes", "--split", "all", "--json").out)
        figures.append({name: told[name] for name in ("n", "top1", "macro_f1")})
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mine", "--batch", "many"), "`batch` (='many') must be a positive whole number or dynamic"),
        (("mine", "--batch", "0"), "`batch` (='0')"),
        (("mine", "--format", "onx"), "onx"),
        (("mine", "--format", "onnx", "--precision", "bf16"), "is OpenVINO's alone"),
        (("mine", "--format", "onnx", "--out", "here"), "must end with .onnx"),
        (("mine", "--out", "here.onnx"), "must name a folder"),
        (("mien",), "mien"),
    ],
)
def test_wrong_usage_leaves_nothing(run, folder, words, message):
    before = sorted(folder.rglob("*"))
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert out == ""
    assert sorted(folder.rglob("*")) == before
