"""Artifacts: the same answers in every format, everything that a bundle holds, refused if something is wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from limits import SETS, familiarity
from random_weights import shaken
from tiny import tiny_spec

import effnet
from effnet.arch.spec import Calibration, InputSpec, NumericPolicy
from effnet.errors import ArgumentError, ArtifactError, RefusedError
from effnet.exporting.export import export
from effnet.files import write_file
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.artifact import read_artifact
from effnet.runtime.seal import ENDS
from effnet.runtime.select import Selection, open_session, select_for
from effnet.runtime.session import Backend, Logits, Pixels
from effnet.weights.bundle import Bundle, Record, open_bundle, save

NAMES = {"openvino": "model", "onnx": "model.onnx", "torch": "model.pt2"}
CLASSES = tuple("abcde")


def noise(count: int) -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def torch_logits(bundle: Bundle, pixels: Pixels) -> Logits:
    return open_session(bundle, select_for(bundle, engine="torch"))(pixels)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    network = shaken(EfficientNet(dataclasses.replace(tiny_spec(), num_classes=5)))
    known = familiarity(network.spec.head_channels, 5)
    record = Record(Calibration(1.7, 0.4, 0.01, 100, "val"), {"data": "shapes"}, sets=SETS, familiarity=known)
    folder = tmp_path_factory.mktemp("bundle") / "b"
    save(network, folder, classes=CLASSES, input=InputSpec(32, 36), source="drawn", record=record)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def made(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of each format for 2 images."""
    root = tmp_path_factory.mktemp("made")
    for format, name in NAMES.items():
        found = export(bundle, root / name, format=format, batch=2)
        assert found.parity.difference < 1e-5
        assert found.parity.agreement == found.parity.images == 8
        assert found.bytes > 10_000
    return root


@pytest.mark.parametrize("format", NAMES)
def test_the_same_answers_for_any_number_of_photos(bundle, made, photos, format) -> None:
    artifact, pixels = read_artifact(made / NAMES[format]), noise(5)
    session, expected = open_session(artifact), torch_logits(bundle, pixels)
    assert (artifact.form.format, artifact.form.precision, artifact.form.batch) == (format, "fp32", 2)
    assert artifact.config.provenance == {"data": "shapes"}
    pixels.flags.writeable = False
    assert np.abs(session(pixels) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert session(pixels[:1]).shape == (1, 5)
    classifier = effnet.load(made / NAMES[format])
    assert (classifier.classes, classifier.input) == (CLASSES, bundle.config.input)
    assert classifier.calibration == bundle.config.calibration
    assert (classifier.sets, classifier.familiarity) == (SETS, bundle.config.familiarity)
    reference = effnet.Classifier(open_session(bundle, select_for(bundle, engine="torch")), bundle.config)
    both = (each.predict(sorted(photos.glob("*.png")), topk=5, sets=0.9) for each in (classifier, reference))
    for one, other in zip(*both, strict=True):
        assert one.familiarity == pytest.approx(other.familiarity, rel=1e-3)
        assert (one.unsure, one.labels) == (other.unsure, other.labels)
        assert [score.label for score in one] == [score.label for score in other]
        assert [score.probability for score in one] == pytest.approx([score.probability for score in other], rel=1e-3)


@pytest.mark.parametrize("format", NAMES)
def test_any_batch(bundle, tmp_path, format) -> None:
    export(bundle, tmp_path / NAMES[format], format=format, batch=None)
    artifact, pixels = read_artifact(tmp_path / NAMES[format]), noise(70)
    session = open_session(artifact)
    assert artifact.form.batch is None
    assert session(pixels).shape == (70, 5)
    assert np.allclose(session(pixels)[-1], session(pixels[-1:])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "size", "changes"),
    [
        ("openvino", 33, {"in_channels": 1, "num_classes": 1}),
        ("onnx", 33, {"in_channels": 1, "num_classes": 1}),
        ("torch", 33, {"in_channels": 1, "num_classes": 1}),
        ("openvino", 1, {"num_classes": 2}),
        ("onnx", 31, {"stem_stride": 1, "in_channels": 4}),
    ],
)
def test_odd_networks(tmp_path, format, size, changes) -> None:
    spec = effnet.spec(dataclasses.replace(tiny_spec(), num_classes=3), resolution=size, **changes)
    input_spec = InputSpec(size, size).with_channels(spec.in_channels)
    odd = open_bundle(save(shaken(EfficientNet(spec)), tmp_path / "b", input=input_spec))
    out = export(odd, tmp_path / NAMES[format], format=format, batch=None).path
    pixels = np.random.default_rng(1).integers(0, 256, (5, size, size, spec.in_channels), dtype=np.uint8)
    expected = torch_logits(odd, pixels)
    assert np.abs(effnet.load(out).logits(pixels) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_network_whose_logits_are_all_0(bundle, tmp_path) -> None:
    silent = EfficientNet(bundle.config.spec)
    torch.nn.init.zeros_(silent.classifier.weight)
    torch.nn.init.zeros_(silent.classifier.bias)
    made = export(open_bundle(save(silent, tmp_path / "b", input=InputSpec(32, 36))), tmp_path / "m")
    assert made.parity.difference == 0


@pytest.mark.parametrize(("name", "engine"), [("m", "openvino"), ("m.onnx", "openvino"), ("m.onnx", "onnxruntime")])
@pytest.mark.parametrize("batch", [2, None])
def test_batches_go_through_in_parts(bundle, tmp_path, name, engine, batch) -> None:
    export(bundle, tmp_path / name, format="onnx" if "." in name else "openvino", batch=batch)
    pixels, part = noise(19), 2 if engine == "onnxruntime" and batch else 3
    expected = torch_logits(bundle, pixels)
    backend = Backend(engine, threads=2, streams=2, part=part)
    with open_session(read_artifact(tmp_path / name), Selection(backend, 12, "")) as session:
        for count in (12, 1, 5, 19):
            assert np.abs(session(pixels[:count]) - expected[:count]).max() <= 5e-5 * np.abs(expected).max()


def test_other_readers_open_them(made) -> None:
    """ONNX Runtime, OpenVINO and torch, without effnet."""
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    onnx.checker.check_model(str(made / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(made / "model.onnx")
    assert session.run(None, {"images": pixels})[0].shape == (2, 5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["effnet"])["classes"] == list(CLASSES)
    model = openvino.Core().read_model(made / "model" / "model.xml")
    assert openvino.compile_model(model)([pixels])[0].shape == (2, 5)
    assert json.loads(model.get_rt_info("effnet").value)["classes"] == list(CLASSES)
    program = torch.export.load(made / "model.pt2")
    assert program.module()(torch.from_numpy(pixels)).shape == (2, 5)


def test_threads_may_open_programs_together(made) -> None:
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(lambda _: open_session(read_artifact(made / "model.pt2")), range(2)))
    assert {session(noise(2)).shape for session in opened} == {(2, 5)}
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before


def test_only_openvino_computes_in_bf16(bundle, tmp_path) -> None:
    found = export(bundle, tmp_path / "model", precision="bf16")
    assert found.form.precision == read_artifact(tmp_path / "model").form.precision == "bf16"
    assert found.parity.difference < 0.1
    with pytest.raises(ArgumentError, match=r"`precision` \(='bf16'\) .*openvino.*onnx"):
        export(bundle, tmp_path / "model.onnx", format="onnx", precision="bf16")


def test_other_answers_are_refused_and_leave_nothing(bundle, tmp_path) -> None:
    wrong = Bundle.from_network(bundle.network, dataclasses.replace(bundle.config, policy=NumericPolicy(bn_eps=0.1)))
    (tmp_path / "model.onnx").write_text("what effnet wrote there")
    with pytest.raises(RefusedError, match=r"model\.onnx was not written: .*0\.0001"):
        export(wrong, tmp_path / "model.onnx", format="onnx")
    assert (tmp_path / "model.onnx").read_text() == "what effnet wrote there"
    with pytest.raises(RefusedError):
        export(wrong, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_program_names_no_folder_of_this_machine(made) -> None:
    with zipfile.ZipFile(made / "model.pt2") as archive:
        for name in archive.namelist():
            assert str(Path(torch.__file__).parent).encode() not in archive.read(name), name


@pytest.mark.parametrize("name", ["model.onnx", "model/model.xml", "model/model.bin", "model.pt2"])
def test_no_changed_byte_is_answered_with(made, tmp_path, name: str) -> None:
    """Bytes of the weights, which an engine would compute with: neither OpenVINO nor ONNX compares a checksum."""
    shutil.copytree(made, tmp_path / "made")
    file = tmp_path / "made" / name
    content = bytearray(file.read_bytes())
    opened = file.with_suffix(".xml") if file.suffix == ".bin" else file
    for place in (len(content) // 3, len(content) // 2):
        content[place] ^= 1
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match=re.escape(opened.name)):
            open_session(read_artifact(opened))
        content[place] ^= 1
    file.write_bytes(content)
    open_session(read_artifact(opened)).close()


@pytest.mark.parametrize("name", ["model.onnx", "model/model.xml"])
def test_an_artifact_of_before_the_seal_is_read(made, tmp_path, name: str) -> None:
    shutil.copytree(made, tmp_path / "made")
    file = tmp_path / "made" / name
    content, (before, behind) = file.read_bytes(), ENDS[file.suffix]
    file.write_bytes(content[: -len(before) - 8 - len(behind)])
    assert before not in file.read_bytes()
    with open_session(read_artifact(file)) as session:
        assert np.isfinite(session(noise(1))).all()


def test_what_is_in_the_way_is_kept(bundle, made, tmp_path) -> None:
    places = {"theirs.onnx": "theirs.onnx", "notes": "notes/notes.txt", "half": "half/model.bin"}
    for name, theirs in places.items():
        (tmp_path / theirs).parent.mkdir(exist_ok=True)
        (tmp_path / theirs).write_text("somebody else's")
        with pytest.raises(ArgumentError, match=r"`out` .* exists"):
            export(bundle, tmp_path / name, format="onnx" if "." in name else "openvino")
        assert (tmp_path / theirs).read_text() == "somebody else's"
    for name in ("model.onnx", "model.xml", "model.pth"):
        with pytest.raises(ArgumentError, match=r"must name a folder; \.\w+"):
            export(bundle, tmp_path / name)
    with pytest.raises(ArgumentError, match=r"`out` .*\.pt2"):
        export(bundle, tmp_path / "model", format="torch")
    with pytest.raises(ArgumentError, match=r"`batch` \(=0\)"):
        export(bundle, tmp_path / "model", batch=0)
    shutil.copy(made / "model.onnx", tmp_path)
    shutil.copytree(made / "model", tmp_path / "model")
    for format in ("onnx", "openvino"):  # an artifact takes the place of an artifact
        export(bundle, tmp_path / NAMES[format], format=format, batch=3)
        assert read_artifact(tmp_path / NAMES[format]).form.batch == 3


def test_foreign_and_damaged_files_are_refused(made, tmp_path) -> None:
    whole = (made / "model.onnx").read_bytes()
    damaged = {"cut.pt2": b"cut", "cut.xml": b"cut", "empty.onnx": b""}
    damaged |= {"half.onnx": whole[: len(whole) // 2], "short.onnx": whole[:-1], "shorter.onnx": whole[:-20]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"{name} (cannot be read|was .* cut short)"):
            read_artifact(tmp_path / name)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ArtifactError, match="is a folder"):
        read_artifact(tmp_path / "folder.onnx")
    with pytest.raises(ArtifactError, match="does not exist"):
        read_artifact(tmp_path / "none.onnx")
    with pytest.raises(ArgumentError, match="`model`"):
        read_artifact(tmp_path)
    model = onnx.load(made / "model.onnx")
    about = json.loads(next(p.value for p in model.metadata_props if p.key == "effnet"))
    for changed, fact in (
        (None, "was not exported by effnet"),
        ("{", "was changed"),
        ("[1]", "was changed"),
        (json.dumps(about | {"format": 99}), "has format 99"),
        (json.dumps(about | {"classes": ["a"]}), "was changed: `classes`"),
        (json.dumps(about | {"form": about["form"] | {"precision": "fp8"}}), "was changed: `precision` .*='fp8'"),
    ):
        del model.metadata_props[:]
        if changed:
            onnx.helper.set_model_props(model, {"effnet": changed})
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(ArtifactError, match=fact):
            read_artifact(tmp_path / "changed.onnx")


def test_an_artifact_answers_without_torch(made, photos) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import effnet; "
        f"print(effnet.load({str(made / 'model')!r}).predict({str(photos / 'coffee.png')!r}).label)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in CLASSES


def test_what_is_missing_or_full_is_named(made, tmp_path) -> None:
    bare = tmp_path / "bare" / "model.xml"
    bare.parent.mkdir()
    shutil.copy(made / "model" / "model.xml", bare)
    with pytest.raises(ArtifactError, match=r"bare/model\.xml .*model\.bin is missing"):
        effnet.load(bare)
    with pytest.raises(OSError, match=r"No space left.*full\.onnx"), write_file(tmp_path / "full.onnx"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]
