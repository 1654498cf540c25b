"""int8: only training images calibrate, the part that breaks goes back to float, what drops too far is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import re
import sys
from functools import partial
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
from effnet.data.held_out import TrainVal
from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, ArtifactError, DataError, MissingExtraError, RefusedError
from effnet.exporting import int8
from effnet.exporting.int8 import Attempt, Int8Exported, export_int8, split_parts
from effnet.metrics import evaluate
from effnet.metrics.evaluate import Predicted
from effnet.metrics.intervals import compare_top1, wilson
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.artifact import Form, Int8, read_artifact
from effnet.runtime.graph import network_of
from effnet.runtime.openvino import make
from effnet.runtime.select import open_session, select_for
from effnet.runtime.session import Logits, Pixels
from effnet.weights.bundle import Bundle, BundleConfig

CLASSES = ("a", "b", "c")
INPUT = InputSpec(32, 32)
BROKEN = "stages.3.1"
SCALE = 1e4
IMAGES = 36  # of each split


def bundle_of(network: EfficientNet) -> Bundle:
    return Bundle.from_network(network, BundleConfig(network.spec, network.policy, INPUT, CLASSES))


def torch_logits(bundle: Bundle, pixels: Pixels) -> Logits:
    return open_session(bundle, select_for(bundle, engine="torch"))(pixels)


def patches() -> Pixels:
    """Pixels (600, 32, 32, 3) of coloured squares."""
    coarse = np.random.default_rng(0).integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def eight_bit_layers(model: openvino.Model) -> dict[str, bool]:
    """For every convolution and matrix product by name whether its weights are in 8 bits."""
    found = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            weights = op.input_value(1).get_node()
            while weights.get_type_name() != "Constant":
                weights = weights.input_value(0).get_node()
            found[op.get_friendly_name().rpartition(".")[0]] = weights.get_element_type().size == 1
    return found


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """A random network that names each class about as often; ReLU lets a channel's scale through."""
    made = bundle_of(shaken(EfficientNet(dataclasses.replace(tiny_spec(), num_classes=3, activation="relu")), 32))
    with torch.no_grad():
        made.network.classifier.bias -= torch.from_numpy(torch_logits(made, patches()).mean(0))
    return made


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
        for number, place in enumerate(surest[:IMAGES]):
            folder = root / ("train", "val", "test")[number % 3] / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[place]).save(folder / f"{number:03}.png")
    return read_data(root)


@pytest.fixture(scope="module")
def images(data: Dataset) -> TrainVal:
    return TrainVal(data.subset("train"), data.subset("val"))


@pytest.fixture(scope="module")
def written(bundle: Bundle, images: TrainVal, tmp_path_factory: pytest.TempPathFactory) -> Int8Exported:
    return export_int8(bundle, tmp_path_factory.mktemp("int8") / "m", images, max_drop=15, batch=4)


def test_openvino_opens_it_and_finds_8_bits(written: Int8Exported, bundle: Bundle) -> None:
    model = openvino.Core().read_model(written.path / "model.xml")
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    assert "FakeQuantize" in [op.get_type_name() for op in model.get_ops()]
    weights = [op.get_data() for op in constants if op.get_element_type() == openvino.Type.i8]
    assert max(each.size for each in weights) > 100
    sums = [each.astype(int) for each in weights if each.ndim < 5]  # over channels; depthwise ones have five
    assert max(np.abs(each).max() for each in sums) == 64  # half of the range, so that no processor cuts them off
    form = json.loads(model.get_rt_info("effnet").value)["form"]
    assert form["precision"] == "int8"
    assert form["int8"]["calibration_images"] == form["int8"]["val_images"] == IMAGES
    assert form["int8"]["kept"] == []
    assert form["int8"]["drop"] == written.attempts[0].drop.value
    assert openvino.compile_model(model)([np.zeros((4, 32, 32, 3), np.uint8)])[0].shape == (4, 3)
    quantized = eight_bit_layers(model)
    small = {f"{block.name}.se.{name}" for block in bundle.config.spec.blocks for name in ("squeeze", "excite")}
    assert {name for name, eight in quantized.items() if not eight} == small  # as NNCF leaves them


def test_nncf_cannot_report(written: Int8Exported) -> None:
    """Its report of being imported goes out before it looks whether it may; without this class there is none."""
    assert not hasattr(sys.modules["nncf.telemetry.wrapper"], "Telemetry")


def test_it_answers_nearly_as_the_network_for_any_number(written: Int8Exported, bundle: Bundle, data: Dataset) -> None:
    classifier = effnet.load(written.path)
    pixels = np.stack([np.asarray(Image.open(data.file(sample))) for sample in data.subset("test").samples])[:-1]
    logits, expected = classifier.logits(pixels), torch_logits(bundle, pixels)
    share = np.abs(logits - expected).mean() / np.abs(expected).mean()
    assert 1e-4 < share < 0.25  # 8 bits, weights 7; not fp32
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.85
    assert classifier.classes == CLASSES


def test_no_sum_is_cut_off(written: Int8Exported, data: Dataset) -> None:
    """The answers are those of the same ranges with sums in float, also on a processor without VNNI."""
    pixels = np.stack([np.asarray(Image.open(data.file(sample))) for sample in data.subset("test").samples])
    how = {"LP_TRANSFORMS_MODE": "NO", "INFERENCE_PRECISION_HINT": "f32"}
    compute = openvino.Core().compile_model(written.path / "model.xml", "CPU", how)
    exact = np.concatenate([compute([pixels[i : i + 4]])[0] for i in range(0, len(pixels) - 3, 4)])
    logits = effnet.load(written.path).logits(pixels[: len(exact)])
    assert np.abs(logits - exact).mean() < 0.045 * np.abs(exact).mean()


def test_the_drop_and_its_interval(written: Int8Exported) -> None:
    (last,) = written.attempts
    about = written.form.int8
    assert about.attempts == 1
    assert last.found.n == last.found.accuracy_a.value * IMAGES == IMAGES
    assert last.drop.value == pytest.approx(100 * (1 - last.found.accuracy_b.value))
    assert last.agreement.value == last.found.accuracy_b.value  # fp32 is always right
    assert (about.low, about.high) == (-100 * last.found.accuracy.high, -100 * last.found.accuracy.low)
    assert about.low <= about.drop <= about.high
    assert written.fp32_bytes > 0 < written.bytes


def test_no_loss_is_0_and_not_minus_0() -> None:
    logits = np.eye(3, dtype=np.float32)
    same = compare_top1(logits, logits, np.arange(3))
    assert "+0.00 points lost" in str(Attempt((), same, wilson(3, 3)))


def test_the_part_that_breaks_goes_back_to_float(broken: Bundle, images: TrainVal, tmp_path: Path, monkeypatch) -> None:
    found: list[dict[str, float]] = []
    few = {part: layers for part, layers in split_parts(broken.config.spec).items() if part in (BROKEN, "head")}
    monkeypatch.setattr(int8, "split_parts", lambda _: few)
    monkeypatch.setattr(int8, "RANKING", 4)
    monkeypatch.setattr(int8, "CALIBRATION", 8)
    measure = int8.measure_parts
    monkeypatch.setattr(int8, "measure_parts", lambda *args: found.append(measure(*args)) or found[0])
    exported = export_int8(broken, tmp_path / "m", images, max_drop=15, batch=None)
    first, second = exported.attempts
    assert first.drop.value > 15 >= second.drop.value
    assert (first.kept, second.kept, exported.form.int8.kept) == ((), (BROKEN,), (BROKEN,))
    (errors,) = found
    assert errors.keys() == {"nothing", *few}
    assert next(iter(errors)) == BROKEN
    assert errors[BROKEN] < errors["nothing"] / 2
    assert list(errors.values()) == sorted(errors.values())
    artifact = read_artifact(tmp_path / "m")
    assert artifact.form == exported.form
    assert open_session(artifact)(np.zeros((5, 32, 32, 3), np.uint8)).shape == (5, 3)
    eight = eight_bit_layers(openvino.Core().read_model(tmp_path / "m" / "model.xml"))
    assert not any(there for name, there in eight.items() if name.startswith(f"{BROKEN}."))
    assert eight["stages.3.0.expand"]
    assert eight["head"]


@pytest.mark.parametrize(("most", "tried"), [(1, ["nothing"]), (3, ["nothing", "head", "head, stem"])])
def test_a_refusal_says_what_was_tried_and_leaves_nothing(bundle, images, tmp_path, monkeypatch, most, tried) -> None:
    """Whatever int8 answers is another class than fp32's, which is right."""

    def evaluate(model, input_spec, val, version, progress) -> Predicted:
        labels = np.array([sample.label for sample in val.samples])
        return Predicted(np.eye(4, dtype=np.float32)[labels + (version != "fp32")], labels, {})

    errors = {"head": 0.8, "stem": 0.85, BROKEN: 0.88, "nothing": 0.9, "classifier": 0.95}
    monkeypatch.setattr(int8, "_evaluate", evaluate)
    monkeypatch.setattr(int8, "quantize", lambda model, *_: model)
    monkeypatch.setattr(int8, "measure_parts", lambda *_: errors)
    monkeypatch.setattr(int8, "ATTEMPTS", most)
    with pytest.raises(RefusedError) as refused:
        export_int8(bundle, tmp_path / "m", images, max_drop=15)
    message = str(refused.value)
    assert f"{IMAGES} val images" in message
    assert "more than 15 points" in message
    lost = re.findall(r"([^;.]+) in float: \+100\.00 points lost \(\+", message)
    assert [kept.removeprefix(" Tried:").strip() for kept in lost] == tried
    assert f"head 80.0%, stem 85.0%, {BROKEN} 88.0%, nothing 90.0%" in message
    assert list(tmp_path.iterdir()) == []


def test_only_training_images_calibrate(bundle, images, data, tmp_path, monkeypatch) -> None:
    """The files that are opened for calibration are drawn from the train split; test files are never opened."""
    calibrating: list[Path] = []
    evaluated: list[Path] = []

    for module, opened in ((int8, calibrating), (evaluate, evaluated)):
        spy = partial(lambda opened, file, see: opened.append(file) or load_pixels(file, see), opened)
        monkeypatch.setattr(module, "load_pixels", spy)
    monkeypatch.setattr(int8, "CALIBRATION", 8)
    export_int8(bundle, tmp_path / "m", images, max_drop=99)
    train, val = ({data.file(sample) for sample in data.subset(name).samples} for name in ("train", "val"))
    assert len(calibrating) == 8
    assert set(calibrating) <= train
    assert set(evaluated) & val == val
    assert not any("test" in file.relative_to(data.root).parts for file in (*calibrating, *evaluated))
    assert read_artifact(tmp_path / "m").form.int8.calibration_images == 8


def test_nncf_is_silent(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    logger_class = logging.getLoggerClass()
    int8.quantize(make(network_of(bundle), 1, {}), patches()[:4], bundle.config.spec, ("classifier",))
    assert capfd.readouterr() == ("", "")
    assert logging.getLoggerClass() is logger_class


def test_unreadable_images_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="none of the 1 training images"):
        int8.read_calibration(read_data(tmp_path).subset("train"), INPUT)
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "a" / "fine.png")
    assert int8.read_calibration(read_data(tmp_path).subset("train"), INPUT).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("name", "parts", "count"),
    [
        ("b0", ["stem", "squeeze-and-excitation", "stages.2.0", "stages.8.0", "head", "classifier"], 16 + 4),
        ("b7", ["stem", "squeeze-and-excitation", "stages.2", "stages.8", "head", "classifier"], 7 + 4),
        ("lite0", ["stem", "stages.2.0", "stages.8.0", "head", "classifier"], 16 + 3),
    ],
)
def test_parts(name: str, parts: list[str], count: int) -> None:
    found, blocks = split_parts(effnet.spec(name)), [block.name for block in effnet.spec(name).blocks]
    assert set(parts) <= set(found)
    assert len(found) == count
    assert [layer for part, layers in found.items() if part.startswith("stages.") for layer in layers] == blocks
    assert len(found.get("squeeze-and-excitation", ())) == (len(blocks) if name != "lite0" else 0)


def test_what_is_refused_before_anything_is_read(bundle, images, data, tmp_path, monkeypatch) -> None:
    for limit in (-0.1, 100, float("nan")):
        with pytest.raises(ArgumentError, match="`max_drop`"):
            export_int8(bundle, tmp_path / "m", images, max_drop=limit)
    with pytest.raises(DataError, match="both to calibrate int8 and to evaluate"):
        export_int8(bundle, tmp_path / "m", TrainVal(data, images.val))
    empty = dataclasses.replace(data, samples=())
    for wrong in (TrainVal(empty, images.val), TrainVal(images.train, empty)):
        with pytest.raises(DataError, match="none of the 0"):
            export_int8(bundle, tmp_path / "m", wrong)
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingExtraError, match=r"int8 needs .*pip install 'effnet\[int8\]'"):
        export_int8(bundle, tmp_path / "m", images)
    assert list(tmp_path.iterdir()) == []


def test_the_metadata_of_int8_is_checked(written: Int8Exported, tmp_path: Path) -> None:
    for precision, about in (("int8", None), ("fp32", written.form.int8)):
        with pytest.raises(ArgumentError, match="`int8`"):
            Form("openvino", precision, 1, about)
    for change in ({"drop": float("nan")}, {"kept": "stem"}, {"attempts": 0}, {"low": "1"}):
        with pytest.raises(ArgumentError, match=f"`{next(iter(change))}`"):
            Int8(**{**dataclasses.asdict(written.form.int8), **change})
    for change, fact in (({"drop": 101}, "`drop`"), ({"more": 1}, "Int8 field")):
        model = openvino.Core().read_model(written.path / "model.xml")
        about = json.loads(model.get_rt_info("effnet").value)
        about["form"]["int8"] |= change
        model.set_rt_info(json.dumps(about), ["effnet"])
        openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
        with pytest.raises(ArtifactError, match=f"was changed: .*{fact}"):
            read_artifact(tmp_path / "model.xml")


def test_a_full_folder_of_temporary_files_is_named(
    bundle: Bundle, images: TrainVal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO does not say why it cannot write, so the disk is asked."""

    def fail(*_: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr("effnet.exporting.int8.write_artifact", fail)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match=r"No space left.*fp32"):
        export_int8(bundle, tmp_path / "m", images, max_drop=99)
    assert [*tmp_path.iterdir()] == []
