"""What Triton and OpenVINO Model Server look for: Triton's own description of a configuration reads it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from google.protobuf import text_format
from ran import Run
from random_weights import shaken
from tiny import CLASSES, tiny_spec

import effnet
from effnet.errors import ArgumentError
from effnet.exporting.repository import write_repository
from effnet.runtime.artifact import ModelServer
from effnet.weights.bundle import Bundle, open_bundle

COMMAND = "export"
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = shaken(effnet.create(tiny_spec(), num_classes=3))
    return effnet.save(network, tmp_path_factory.mktemp("m") / "shapes", classes=CLASSES)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return open_bundle(folder)


def parse(file: Path) -> Any:
    """A config.pbtxt as Triton's client knows its fields; a field that is unknown is an error."""
    package = importlib.util.find_spec("tritonclient")
    assert package
    assert package.submodule_search_locations
    place = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"  # its package needs grpcio
    described = importlib.util.spec_from_file_location("model_config_pb2", place)
    assert described
    assert described.loader
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return text_format.Parse(file.read_text(), module.ModelConfig()), module


@pytest.mark.parametrize("batch", [None, 3])
def test_triton(bundle: Bundle, tmp_path: Path, batch: int | None) -> None:
    out = tmp_path / "repository" / "shapes"
    write_repository(bundle, out, "triton", batch=batch)
    assert {str(file.relative_to(out)) for file in out.rglob("*")} == {
        "1",
        "1/model.onnx",
        "config.pbtxt",
        "labels.txt",
    }
    config, names = parse(out / "config.pbtxt")
    assert (config.name, config.backend) == ("shapes", "onnxruntime")  # the folder's name, or Triton refuses it
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == ((64, True) if batch is None else (0, False))
    session = onnxruntime.InferenceSession(out / "1" / "model.onnx")
    kinds = {"tensor(uint8)": names.TYPE_UINT8, "tensor(float)": names.TYPE_FP32}
    for told, has in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        rest = slice(1, None) if batch is None else slice(None)  # Triton adds the batch to the dimensions
        assert [(t.name, t.data_type, list(t.dims)) for t in told] == [
            (h.name, kinds[h.type], h.shape[rest]) for h in has
        ]
    assert config.output[0].label_filename == "labels.txt"
    assert (out / "labels.txt").read_text().splitlines() == list(CLASSES)
    assert session.run(None, {"images": PIXELS})[0].shape == (3, 3)


def test_openvino_model_server(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    other = Bundle(bundle.config, {**bundle.weights, "classifier.bias": bundle.weights["classifier.bias"] + 1})
    for each, version in ((bundle, "1"), (other, "2"), (bundle, "3")):  # another network than the newest's
        assert write_repository(each, out, "ovms").path == out / version
        assert {file.name for file in (out / version).iterdir()} == {"model.xml", "model.bin"}
    assert {file.name for file in out.iterdir()} == {"1", "2", "3", "labels.txt"}
    model = openvino.Core().compile_model(out / "2" / "model.xml", "CPU")
    assert model({"images": PIXELS})["logits"].shape == (3, 3)


def test_a_folder_of_another_model(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    write_repository(bundle, out, "triton")
    with pytest.raises(ArgumentError, match=r"`out` .*config\.pbtxt differs"):
        write_repository(bundle, out, "triton", batch=2)
    assert {file.name for file in out.iterdir()} == {"1", "config.pbtxt", "labels.txt"}
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ArgumentError, match=r"labels\.txt differs"):
        write_repository(bundle, tmp_path, "ovms")


def test_a_first_export_that_was_killed_is_made_again(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    (out / ".1.abcdefgh" / "new").mkdir(parents=True)
    (out / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))  # config.pbtxt was not written yet
    write_repository(bundle, out, "triton")
    assert {"1", "config.pbtxt", "labels.txt"} <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize("server", ["triton", "ovms"])
def test_the_same_export_again_adds_nothing(bundle: Bundle, tmp_path: Path, server: ModelServer) -> None:
    first, again = (write_repository(bundle, tmp_path / "shapes", server) for _ in range(2))
    assert (first.path, first.is_new) == (again.path, not again.is_new) == (tmp_path / "shapes" / "1", True)
    assert [file.name for file in (tmp_path / "shapes").iterdir() if file.name.isdecimal()] == ["1"]
    assert [file.name for file in (tmp_path / "shapes").glob(".*")] == []


def test_as_it_is_typed(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(folder, "--server", "triton")
    assert (code, out.splitlines()[0].split(",")[0]) == (0, "wrote shapes-triton/1: onnx")
    assert err == "Next: tritonserver --model-repository=.\n"
    code, out, err = run(folder, "--server", "ovms", "--out", "models/shapes")
    assert code == 0
    assert err == "Next: ovms --model_name shapes --model_path models/shapes --rest_port 8000\n"
    code, out, err = run(folder, "--server", "ovms", "--out", "models/shapes")
    assert out.startswith("models/shapes/1 already holds the same bytes: openvino, fp32, batch dynamic, ")
    for words in (("--format", "torch"), ("--precision", "int8")):
        assert run(folder, "--server", "triton", *words)[0] == 2
