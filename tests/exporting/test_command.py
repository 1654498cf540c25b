"""The command effnet export: its files, its output and its errors."""

from __future__ import annotations

import json
import re

import pytest
import torch
from ran import Run
from tiny import CLASSES, draw_images, tiny_spec

import effnet
from effnet.data.dataset import manifest, read_data, split_data
from effnet.errors import RefusedError
from effnet.exporting import int8
from effnet.runtime.artifact import read_artifact
from effnet.weights.bundle import Record

COMMAND = "export"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("typed")
    torch.manual_seed(0)
    small = effnet.create(tiny_spec(), num_classes=3)
    effnet.save(small, root / "mine", classes=["x", "y", "z"])
    data = split_data(read_data(draw_images(root / "shapes", 12)), val=0.25, test=0.25)
    record = Record(provenance={"data": str(root / "shapes")}, split=manifest(data))
    effnet.save(small, root / "learned", classes=CLASSES, record=record)
    effnet.save(small, root / "nameless")
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
    def labels(model, *words):
        ran = Run(capsys, "predict", photos, "--model", model, "--json", *words)
        return ran.code, [line["predictions"][0]["label"] for line in map(json.loads, ran.out.splitlines())]

    exact = "--engine", "openvino", "--precision", "fp32", "--threads", 1, "--batch", 2
    assert Run(capsys, "export", "mine", "--format", "onnx", "--out", "again.onnx").code == 0
    assert labels("mine") == labels("mine", *exact) == labels("again.onnx", "--engine", "onnxruntime")


def test_int8_beside_fp32(run, folder):
    """An untrained network names one class or nearly, so a limit of 99 points holds."""
    code, out, err = run("learned", "shapes", "--precision", "int8", "--max-drop", 99)
    assert code == 0
    assert out.startswith("wrote learned-openvino: openvino, int8, batch 1, ")
    for precision in ("fp32", "int8"):
        assert re.search(rf"{precision} +\d+\.\d\d% +\d+\.\d\d% to \d+\.\d\d% +\d.* kB", out)
    assert re.search(r"int8 loses [+-]\d+\.\d\d points of top-1 \([+-].* to [+-].*\); the limit is 99", out)
    assert "on the 9 val images" in out
    assert "18 training images" in " ".join(out.split())
    assert err == "Next: effnet val learned learned-openvino shapes --split test\n"
    form = read_artifact("learned-openvino").form
    assert (form.precision, form.int8.calibration_images, form.int8.val_images) == ("int8", 18, 9)


def test_a_refused_int8_leaves_nothing(run, folder, monkeypatch):
    def refuse(bundle, out, data, **_):
        raise RefusedError(f"calibrated on {len(data.train)}, evaluated on {len(data.val)}")

    monkeypatch.setattr(int8, "export_int8", refuse)
    before = sorted(folder.rglob("*"))
    code, out, err = run("learned", "shapes", "--precision", "int8", "--out", "refused")
    assert (code, out) == (1, "")
    assert "calibrated on 18, evaluated on 9" in err
    assert sorted(folder.rglob("*")) == before


def test_val_evaluates_an_artifact_as_the_network(run, folder, capsys):
    assert run("learned", "--format", "onnx", "--batch", 4)[0] == 0
    figures = []
    for model in ("learned", "learned.onnx"):
        found = json.loads(Run(capsys, "val", model, "shapes", "--split", "all", "--json").out)
        figures.append({name: found[name] for name in ("n", "top1", "macro_f1")})
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("mine", "--batch", "many"), ["`batch`", "'many'", "dynamic"]),
        (("mine", "--batch", "0"), ["`batch`", "'0'"]),
        (("mine", "--format", "onx"), ["onx"]),
        (("mine", "--format", "onnx", "--precision", "bf16"), ["`precision`", "'bf16'", "openvino"]),
        (("mine", "--format", "onnx", "--out", "here"), ["`out`", ".onnx"]),
        (("mine", "--out", "here.onnx"), ["`out`", "folder"]),
        (("mien",), ["mien"]),
        (("mine", "--precision", "int8"), ["`data`", "effnet export mine DATA"]),
        (("mine", "shapes"), ["`data`", "'shapes'", "--precision int8"]),
        (("mine", "--max-drop", "1"), ["`max_drop`", "1.0", "--precision int8"]),
        (("mine", "shapes", "--precision", "int8", "--max-drop", "-1"), ["classes", "mine"]),
        (("learned", "shapes", "--precision", "int8", "--max-drop", "-1"), ["`max_drop`", "-1.0"]),
        (("learned", "shapes", "--precision", "int8", "--format", "onnx"), ["`precision`", "openvino", "onnx"]),
        (("nameless", "shapes", "--precision", "int8"), ["nameless", "outputs"]),
    ],
)
def test_wrong_usage_leaves_nothing(run, folder, words, facts):
    before = sorted(folder.rglob("*"))
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert all(fact in err for fact in facts), err
    assert sorted(folder.rglob("*")) == before
