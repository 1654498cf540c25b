"""Artifacts: same answers in every format, all that a bundle knows inside, refused where something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from random_weights import shaken

import effnet
from effnet.arch.spec import Calibration, InputSpec, NumericPolicy
from effnet.errors import ArgumentError, ArtifactError, RefusedError
from effnet.exporting import export as exporting
from effnet.exporting.export import export
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.artifact import read_artifact
from effnet.runtime.select import Selection, open_session
from effnet.runtime.session import Backend
from effnet.weights.bundle import Bundle, Record, open_bundle, save

NAMES = {"openvino": "model", "onnx": "model.onnx", "torch": "model.pt2"}
CLASSES = tuple("abcde")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    network = EfficientNet(effnet.spec("b0", width=0.5, depth=0.5, resolution=64, num_classes=5))
    network = shaken(network)
    record = Record(Calibration(1.7, 0.4, 0.01, 100, "val"), {"data": "shapes"})
    folder = tmp_path_factory.mktemp("bundle") / "b"
    save(network, folder, classes=CLASSES, input=InputSpec(64, 72), source="drawn", record=record)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def made(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for format, name in NAMES.items():
        found = export(bundle, root / name, format=format, batch=2)
        assert found.difference < 1e-5
        assert found.agreement == found.images == 8
        assert found.bytes > 10_000
    return root


@pytest.mark.parametrize("format", NAMES)
def test_the_same_answers_for_any_number_of_photos(bundle, made, photos, format) -> None:
    artifact = read_artifact(made / NAMES[format])
    session = open_session(artifact)
    assert (artifact.form.format, artifact.form.precision, artifact.form.batch) == (format, "fp32", 2)
    pixels = np.random.default_rng(1).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    expected = exporting.torch_logits(bundle, pixels)
    assert np.abs(session(pixels) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert session(pixels[:1]).shape == (1, 5)
    pixels.flags.writeable = False
    assert session(pixels).shape == (5, 5)
    classifier = effnet.load(made / NAMES[format])
    assert (classifier.classes, classifier.input) == (CLASSES, bundle.config.input)
    assert classifier.calibration == bundle.config.calibration
    assert artifact.config.provenance == {"data": "shapes"}
    ours, torch_s = (
        each.predict(sorted(photos.glob("*.png")), topk=5) for each in (classifier, exporting_classifier(bundle))
    )
    for one, other in zip(ours, torch_s, strict=True):
        assert [score.label for score in one] == [score.label for score in other]
        assert [score.probability for score in one] == pytest.approx([score.probability for score in other], rel=1e-3)


def exporting_classifier(bundle: Bundle) -> effnet.Classifier:
    return effnet.Classifier(open_session(bundle, engine="torch"), bundle.config)


def test_any_batch_is_opt_in(bundle, tmp_path) -> None:
    for format, name in NAMES.items():
        export(bundle, tmp_path / name, format=format, batch=None)
        artifact = read_artifact(tmp_path / name)
        session = open_session(artifact)
        pixels = np.random.default_rng(1).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
        assert artifact.form.batch is None
        assert session(pixels).shape == (70, 5)
        assert np.allclose(session(pixels)[-1], session(pixels[-1:])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, None])
@pytest.mark.parametrize(
    ("format", "engine"), [("openvino", "openvino"), ("onnx", "openvino"), ("onnx", "onnxruntime")]
)
def test_batches_go_through_in_parts(bundle, tmp_path, monkeypatch, format, engine, batch) -> None:
    """Requests are of a part, or of what a file for ONNX Runtime was exported for; answers are the network's."""
    name, asked = "m" if format == "openvino" else "m.onnx", []
    export(bundle, tmp_path / name, format=format, batch=batch)
    artifact, fixed = read_artifact(tmp_path / name), engine == "onnxruntime" and batch is not None
    alone, part = (batch, batch) if fixed else (1, 3)
    cls = "OnnxGraph" if engine == "onnxruntime" else "OpenVinoGraph"
    module = import_module(f"effnet.runtime.{'onnx' if engine == 'onnxruntime' else engine}")

    class Graph(getattr(module, cls)):
        def __call__(self, pixels):
            asked.append(len(pixels))
            return super().__call__(pixels)

    monkeypatch.setattr(module, cls, Graph)
    pixels = np.random.default_rng(2).integers(0, 256, (19, 64, 64, 3), dtype=np.uint8)
    expected = exporting.torch_logits(bundle, pixels)
    for streams in (1, 2):
        run = open_session(artifact, Selection(Backend(engine, threads=2, streams=streams, part=part), 12, ""))
        for count, requests in ((12, [part] * (12 // part)), (1, [alone]), (5, None), (17, None), (19, None)):
            asked.clear()
            assert np.abs(run(pixels[:count]) - expected[:count]).max() <= 5e-5 * np.abs(expected).max()
            assert requests in (None, asked)
        run.close()


def test_other_readers_open_them(made) -> None:
    """ONNX Runtime, OpenVINO and torch alone, without effnet."""
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    onnx.checker.check_model(str(made / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(made / "model.onnx")
    assert session.run(None, {"images": pixels})[0].shape == (2, 5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["effnet"])["classes"] == list(CLASSES)
    model = openvino.Core().read_model(made / "model" / "model.xml")
    assert openvino.compile_model(model)([pixels])[0].shape == (2, 5)
    assert json.loads(model.get_rt_info("effnet").value)["classes"] == list(CLASSES)
    program = torch.export.load(made / "model.pt2")
    assert program.module()(torch.from_numpy(pixels)).shape == (2, 5)


def test_threads_may_share_one(bundle, made) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    for name in NAMES.values():
        session = open_session(read_artifact(made / name), threads=None if name.endswith("pt2") else 1)
        alone = [session(part) for part in np.split(pixels, 8)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(session, np.split(pixels, 8)))
        assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_bf16_is_openvinos(bundle, tmp_path) -> None:
    found = export(bundle, tmp_path / "model", precision="bf16")
    assert found.form.precision == read_artifact(tmp_path / "model").form.precision == "bf16"
    assert found.difference < 0.1
    with pytest.raises(ArgumentError, match=r"`precision` \(='bf16'\) is OpenVINO's alone; onnx computes in fp32"):
        export(bundle, tmp_path / "model.onnx", format="onnx", precision="bf16")


def test_other_answers_are_refused_and_leave_nothing(bundle, tmp_path, monkeypatch) -> None:
    wrong = dataclasses.replace(bundle.config, policy=NumericPolicy(bn_eps=0.1))
    (tmp_path / "model.onnx").write_text("what effnet wrote there")
    with pytest.raises(RefusedError, match=r"model\.onnx was not written: logits differ by at most"):
        export(Bundle(bundle.network, wrong), tmp_path / "model.onnx", format="onnx")
    assert (tmp_path / "model.onnx").read_text() == "what effnet wrote there"
    with pytest.raises(RefusedError):
        export(Bundle(bundle.network, wrong), tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_that_would_run_code_is_refused(made, tmp_path) -> None:
    """torch.export follows a file that asks for a pickle; here it asks for one that writes a file."""
    hostile, touched = tmp_path / "hostile.pt2", tmp_path / "touched"
    blob = pickle.dumps(Touch(touched))
    with zipfile.ZipFile(made / "model.pt2") as old, zipfile.ZipFile(hostile, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("_weights_config.json"):
                config = json.loads(content)
                entry = next(iter(config["config"].values()))
                entry["use_pickle"] = True
                poisoned = entry["path_name"]
                content = json.dumps(config).encode()
            new.writestr(name, content)
        place = next(name for name in old.namelist() if name.endswith(f"/{poisoned}"))
    with zipfile.ZipFile(hostile) as half, zipfile.ZipFile(tmp_path / "whole.pt2", "w", zipfile.ZIP_STORED) as whole:
        for name in half.namelist():
            whole.writestr(name, blob if name == place else half.read(name))
    with pytest.raises(ArtifactError, match=r"whole\.pt2 cannot be read by torch\.export"):
        open_session(read_artifact(tmp_path / "whole.pt2"))
    assert not touched.exists()


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_is_in_the_way_is_kept(bundle, made, tmp_path) -> None:
    for name in ("theirs/model.xml", "theirs/model.bin", "theirs.onnx", "theirs.pt2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("somebody else's")
    for format, name in (("openvino", "theirs"), ("onnx", "theirs.onnx"), ("torch", "theirs.pt2")):
        with pytest.raises(ArgumentError, match=r"`out` .* exists"):
            export(bundle, tmp_path / name, format=format)
    assert {file.read_text() for file in tmp_path.rglob("*.*") if file.is_file()} == {"somebody else's"}
    for name in ("model.onnx", "model.xml", "model.pth"):
        with pytest.raises(ArgumentError, match=r"must name a folder; \.\w+ is the name of a file"):
            export(bundle, tmp_path / name)
    shutil.copy(made / "model.onnx", tmp_path)
    export(bundle, tmp_path / "model.onnx", format="onnx", batch=3)
    assert read_artifact(tmp_path / "model.onnx").form.batch == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ArgumentError, match="exists and holds something else"):
        export(bundle, tmp_path / "mine")
    with pytest.raises(ArgumentError, match=r"`out` .* must end with \.pt2"):
        export(bundle, tmp_path / "model", format="torch")
    with pytest.raises(ArgumentError, match=r"`batch` \(=0\)"):
        export(bundle, tmp_path / "model", batch=0)
    export(bundle, tmp_path / "model")
    export(bundle, tmp_path / "model", batch=3)  # an artifact takes the place of an artifact
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "model.bin").write_text("hello")
    with pytest.raises(ArgumentError, match="holds something else"):
        export(bundle, tmp_path / "strangers")
    assert (tmp_path / "strangers" / "model.bin").read_text() == "hello"
    assert read_artifact(tmp_path / "model").form.batch == 3


def test_foreign_and_damaged_files_are_refused(made, tmp_path) -> None:
    model = onnx.load(made / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ArtifactError, match=r"foreign\.onnx was not exported by effnet: it does not say how images"):
        read_artifact(tmp_path / "foreign.onnx")
    for name in ("cut.onnx", "cut.pt2", "cut.xml"):
        (tmp_path / name).write_bytes(b"cut")
        with pytest.raises(ArtifactError, match=rf"{name} cannot be read (by|as)"):
            read_artifact(tmp_path / name)
    whole = (made / "model.onnx").read_bytes()
    for part in (b"", whole[: len(whole) // 2], whole[:-1]):
        (tmp_path / "cut.onnx").write_bytes(part)
        with pytest.raises(ArtifactError, match="cannot be read as onnx"):
            read_artifact(tmp_path / "cut.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ArtifactError, match="is a folder, not a file"):
        read_artifact(tmp_path / "folder.onnx")
    with pytest.raises(ArtifactError, match="does not exist"):
        read_artifact(tmp_path / "none.onnx")
    about = json.loads(next(p.value for p in onnx.load(made / "model.onnx").metadata_props if p.key == "effnet"))
    precise = about["form"] | {"precision": "fp8"}
    changes = (
        (about | {"format": 99}, "has format 99"),
        (about | {"classes": ["a"]}, "was changed: `classes`"),
        (about | {"form": precise}, "was changed: `precision` .*='fp8'"),
        ([1], "was changed"),
    )
    for changed, words in (*((json.dumps(value), words) for value, words in changes), ("{", "was changed")):
        model = onnx.load(made / "model.onnx")
        onnx.helper.set_model_props(model, {"effnet": changed})
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(ArtifactError, match=words):
            read_artifact(tmp_path / "changed.onnx")
    with pytest.raises(ArgumentError, match="must be a file"):
        read_artifact(tmp_path)


def test_threads_may_open_programs_together(made) -> None:
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_session(read_artifact(made / "model.pt2")), range(4)))
    assert {session(np.zeros((2, 64, 64, 3), np.uint8)).shape for session in opened} == {(2, 5)}
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before


@pytest.mark.parametrize("name", ["model", "model.onnx"])
def test_they_answer_without_torch(made, photos, tmp_path, name) -> None:
    shutil.copytree(made, tmp_path / "made")
    code = (
        "import sys; sys.modules['torch'] = None; import effnet; "
        f"print(effnet.load({str(tmp_path / 'made' / name)!r}).predict({str(photos / 'coffee.png')!r}).label)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in CLASSES
