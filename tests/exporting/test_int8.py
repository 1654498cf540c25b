"""int8: calibrated on training images alone, the part that breaks goes back to float, what drops too far is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from PIL import Image
from random_weights import shaken
from tiny import tiny_spec

import effnet
from effnet.arch.spec import InputSpec
from effnet.data.dataset import Dataset, read_data
from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, ArtifactError, DataError, MissingExtraError, RefusedError
from effnet.exporting import int8 as quantize
from effnet.exporting.export import Exported, export, torch_logits
from effnet.exporting.int8 import Guard, parts_of
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.artifact import Form, Int8, read_artifact
from effnet.runtime.graph import network_of
from effnet.runtime.openvino import make
from effnet.runtime.select import open_session
from effnet.weights.bundle import Bundle, BundleConfig

CLASSES = ("a", "b", "c")
SEE = InputSpec(32, 32)
BROKEN = "stages.3.1"
SCALE = 1e4


def bundle_of(network: EfficientNet) -> Bundle:
    return Bundle(network, BundleConfig(network.spec, network.policy, SEE, CLASSES))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """A random network that names each class about as often; ReLU lets a channel's scale through."""
    made = bundle_of(shaken(EfficientNet(dataclasses.replace(tiny_spec(), num_classes=3, activation="relu")), 32))
    with torch.no_grad():
        made.network.classifier.bias -= torch.from_numpy(torch_logits(made, patches()).mean(0))
    return made


def patches() -> np.ndarray:
    """Pixels (600, 32, 32, 3) of coloured squares."""
    coarse = np.random.default_rng(0).integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def broken(bundle: Bundle) -> Bundle:
    """The same function, but one channel of one map is so large that 8 bits see nothing of the others."""
    network = EfficientNet(bundle.network.spec)
    network.load_state_dict(bundle.network.state_dict())
    block = network.get_submodule(BROKEN)
    with torch.no_grad():
        block.depthwise.norm.weight[0] *= SCALE
        block.depthwise.norm.bias[0] *= SCALE
        block.se.squeeze.weight[:, 0] /= SCALE
        block.project.conv.weight[:, 0] /= SCALE
    return bundle_of(network.eval())


@pytest.fixture(scope="module")
def data(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Images under the names that the network gives them, so that it is never wrong; it is sure of each."""
    root, pixels = tmp_path_factory.mktemp("data"), patches()
    logits = torch_logits(bundle, pixels)
    best, second = np.sort(logits, 1)[:, :-3:-1].T
    for label, name in enumerate(CLASSES):
        surest = [place for place in np.argsort(second - best) if logits[place].argmax() == label]
        for number, place in enumerate(surest[:60]):
            folder = root / ("train", "val", "test")[number % 3] / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[place]).save(folder / f"{number:03}.png")
    return read_data(root)


@pytest.fixture(scope="module")
def guard(data: Dataset) -> Guard:
    return Guard(data.part("train"), data.part("val"), max_drop=10)


@pytest.fixture(scope="module")
def written(bundle: Bundle, guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(bundle, tmp_path_factory.mktemp("int8") / "m", precision="int8", batch=4, guard=guard)


def test_openvino_alone_opens_it_and_finds_8_bits(written: Exported, bundle: Bundle) -> None:
    model = openvino.Core().read_model(written.path / "model.xml")
    kinds = [op.get_type_name() for op in model.get_ops()]
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    assert "FakeQuantize" in kinds
    assert any(op.get_element_type() == openvino.Type.i8 and op.get_data().size > 100 for op in constants)
    said = json.loads(model.get_rt_info("effnet").value)["form"]
    assert said["precision"] == "int8"
    assert said["int8"]["calibration_images"] == 60
    assert said["int8"]["val_images"] == 60
    assert said["int8"]["kept"] == []
    assert said["int8"]["drop"] == written.beside.attempts[0].drop
    assert openvino.compile_model(model)([np.zeros((4, 32, 32, 3), np.uint8)])[0].shape == (4, 3)
    quantized = quantize.eight_bits(model)
    small = {f"{block.name}.se.{name}" for block in bundle.config.spec.blocks for name in ("squeeze", "excite")}
    assert {name for name, eight in quantized.items() if not eight} == small  # as NNCF leaves them
    assert (written.beside.eight_bits, written.beside.layers) == (len(quantized) - len(small), len(quantized))


def test_it_answers_nearly_as_the_network_for_any_number(written: Exported, bundle: Bundle, data: Dataset) -> None:
    classifier = effnet.load(written.path)
    pixels = np.stack([np.asarray(Image.open(data.file(sample))) for sample in data.part("test").samples])
    logits, expected = classifier.logits(pixels), torch_logits(bundle, pixels)
    share = np.abs(logits - expected).mean() / np.abs(expected).mean()
    assert 1e-4 < share < 0.2  # 8 bits, not fp32
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.9
    assert classifier.classes == CLASSES


def test_figures_of_both(written: Exported, data: Dataset) -> None:
    beside, last = written.beside, written.beside.attempts[-1]
    assert len(beside.attempts) == written.form.int8.attempts == 1
    assert last.found.n == last.found.accuracy_a.value * 60 == 60
    assert last.drop == pytest.approx(100 * (1 - last.found.accuracy_b.value))
    assert last.agreement.value == last.found.accuracy_b.value  # fp32 is always right
    low, high = written.form.int8.low, written.form.int8.high
    assert low <= last.drop <= high
    assert (low, high) == (-100 * last.found.accuracy.high, -100 * last.found.accuracy.low)
    assert beside.timed == 4
    assert beside.fp32_ms > 0 < beside.int8_ms
    assert beside.bytes > 0


def test_the_part_that_breaks_goes_back_to_float(broken: Bundle, guard: Guard, tmp_path: Path) -> None:
    found = export(broken, tmp_path / "m", precision="int8", batch=None, guard=guard)
    first, second = found.beside.attempts
    assert first.drop > 10 >= second.drop
    assert (first.kept, second.kept, found.form.int8.kept) == ((), (BROKEN,), (BROKEN,))
    artifact = read_artifact(tmp_path / "m")
    assert artifact.form == found.form
    assert open_session(artifact)(np.zeros((5, 32, 32, 3), np.uint8)).shape == (5, 3)
    eight = quantize.eight_bits(openvino.Core().read_model(tmp_path / "m" / "model.xml"))
    assert not any(there for name, there in eight.items() if name.startswith(f"{BROKEN}."))
    assert eight["stages.3.0.expand"]
    assert eight["head"]


def test_parts_are_measured_one_by_one(broken: Bundle, data: Dataset) -> None:
    pixels = quantize.calibration_pixels(data.part("train"), SEE)
    told: list[tuple[int, int]] = []
    model = make(network_of(broken), 1, {})
    ranked = quantize.rank(model, pixels, broken.config.spec, lambda *each: told.append(each))
    names = list(parts_of(broken.config.spec))
    assert next(iter(ranked.parts)) == BROKEN
    assert ranked.parts[BROKEN] < ranked.whole / 2
    assert set(ranked.parts) <= set(names)
    assert list(ranked.parts.values()) == sorted(ranked.parts.values())
    assert told == [(done, len(names)) for done in range(1, len(names) + 1)]
    assert not any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())  # what was given stays as it is


def test_a_refused_one_says_what_was_tried_and_leaves_nothing(broken, guard, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        quantize, "rank", lambda *given: quantize.Ranked(0.9, {"head": 0.8, "stem": 0.85, BROKEN: 0.88})
    )
    for most, tried in ((1, ["nothing"]), (3, ["nothing", "head", "head, stem"])):  # two parts are not enough
        monkeypatch.setattr(quantize, "ATTEMPTS", most)
        with pytest.raises(RefusedError) as refused:
            export(broken, tmp_path / "m", precision="int8", guard=guard)
        message = str(refused.value)
        start = "int8 was not written: on 60 val images it loses more than 10 points of top-1. Tried: "
        assert message.startswith(start)
        lost = re.findall(r"([^;]+) in float: \+(\d+\.\d\d) points lost \(\+", message.removeprefix(start))
        assert [kept.strip() for kept, _ in lost] == tried
        assert all(float(points) > 10 for _, points in lost)
        assert f"with one part in float: head 80.0%, stem 85.0%, {BROKEN} 88.0%" in message
        assert list(tmp_path.iterdir()) == []


def test_training_images_calibrate_and_no_others(bundle, guard, data, tmp_path, monkeypatch) -> None:
    """The files that are opened for calibration are drawn from the train part; test files are never opened."""
    seen: list[Path] = []
    judged: list[Path] = []

    def spied(asked, reading):
        def read(file, see):
            asked.append(file)
            return reading(file, see)

        return read

    monkeypatch.setattr(quantize, "load_pixels", spied(seen, load_pixels))
    monkeypatch.setattr("effnet.metrics.evaluate.load_pixels", spied(judged, load_pixels))
    monkeypatch.setattr(quantize, "CALIBRATING", 30)
    export(bundle, tmp_path / "m", precision="int8", guard=guard)
    train, val = ({data.file(sample) for sample in data.part(name).samples} for name in ("train", "val"))
    assert 30 <= len(seen) < 60
    assert set(seen) <= train
    assert set(judged) >= val
    assert not any("test" in file.relative_to(data.root).parts for file in (*seen, *judged))
    assert read_artifact(tmp_path / "m").form.int8.calibration_images == 30


def test_nncf_is_silent(bundle: Bundle, data: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    kind = logging.getLoggerClass()
    pixels = quantize.calibration_pixels(data.part("train"), SEE)[:4]
    quantize.quantize(make(network_of(bundle), 1, {}), pixels, bundle.config.spec, ("classifier",))
    assert capfd.readouterr() == ("", "")
    assert logging.getLoggerClass() is kind


def test_unreadable_images_are_passed_over(bundle: Bundle, data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"no image")
    torn = read_data(tmp_path).part("train")
    with pytest.raises(DataError, match=r"none of the 1 training images in .* can be read"):
        quantize.calibration_pixels(torn, SEE)
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "a" / "fine.png")
    assert quantize.calibration_pixels(read_data(tmp_path).part("train"), SEE).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("b0", ["stem", "squeeze-and-excitation", "stages.2.0", "stages.8.0", "head", "classifier"]),
        ("b7", ["stem", "squeeze-and-excitation", "stages.2", "stages.8", "head", "classifier"]),
        ("lite0", ["stem", "stages.2.0", "stages.8.0", "head", "classifier"]),
    ],
)
def test_parts(name: str, parts: list[str]) -> None:
    found = parts_of(effnet.spec(name))
    assert set(parts) <= set(found)
    assert len(found) == {"b0": 16 + 4, "b7": 7 + 4, "lite0": 16 + 3}[name]
    blocks = [layer for part, layers in found.items() if part.startswith("stages.") for layer in layers]
    assert blocks == [block.name for block in effnet.spec(name).blocks]
    if name == "b0":
        assert len(found["squeeze-and-excitation"]) == 16


def test_what_cannot_be_asked(bundle: Bundle, data: Dataset, guard: Guard, tmp_path: Path, monkeypatch) -> None:
    for limit in (-0.1, 100, float("nan")):
        with pytest.raises(ArgumentError, match=r"`max_drop` .* must be points of top-1"):
            dataclasses.replace(guard, max_drop=limit)
    with pytest.raises(DataError, match=r"would calibrate int8 and judge it"):
        Guard(data, data.part("val"))
    with pytest.raises(DataError, match="no image to judge int8 with"):
        Guard(data.part("train"), dataclasses.replace(data, samples=()))
    for format, name, reason in (("onnx", "m.onnx", "takes longer"), ("torch", "m.pt2", "in fp32 all the same")):
        with pytest.raises(ArgumentError, match=rf"`precision` .*OpenVINO's alone; .*{reason}"):
            export(bundle, tmp_path / name, format=format, precision="int8", guard=guard)
    for precision, given in (("int8", None), ("fp32", guard)):
        with pytest.raises(ArgumentError, match=r"`guard` .* for int8 and for it alone"):
            export(bundle, tmp_path / "m", precision=precision, guard=given)
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingExtraError, match=r"int8 needs .*pip install 'effnet\[int8\]'"):
        export(bundle, tmp_path / "m", precision="int8", guard=guard)
    assert list(tmp_path.iterdir()) == []


def test_what_an_artifact_says_of_int8_is_checked(written: Exported, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`int8` .* for precision int8"):
        Form("openvino", "int8", 1)
    with pytest.raises(ArgumentError, match=r"`int8` .* for precision int8"):
        Form("openvino", "fp32", 1, written.form.int8)
    for change in ({"drop": float("nan")}, {"kept": "stem"}, {"attempts": 0}, {"low": "1"}):
        with pytest.raises(ArgumentError, match=f"`{next(iter(change))}`"):
            Int8(**{**dataclasses.asdict(written.form.int8), **change})
    for change, words in (({"drop": 101}, "`drop`"), ({"more": 1}, "Int8 field")):
        model = openvino.Core().read_model(written.path / "model.xml")
        said = json.loads(model.get_rt_info("effnet").value)
        said["form"]["int8"] |= change
        model.set_rt_info(json.dumps(said), ["effnet"])
        openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
        with pytest.raises(ArtifactError, match=f"was changed: .*{words}"):
            read_artifact(tmp_path / "model.xml")
    export(bundle, tmp_path / "plain")
    said = json.loads(openvino.Core().read_model(tmp_path / "plain" / "model.xml").get_rt_info("effnet").value)
    assert said["form"] == {"format": "openvino", "precision": "fp32", "batch": 1}  # as before there was int8
