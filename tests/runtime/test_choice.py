"""The choice of an engine: who takes part, who wins, what a lower precision has to show, and what is remembered.

Times are made up here, for a choice by the clock of a shared machine would be another one each time.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from every_engine import have_every_engine
from random_weights import shaken

import effnet
from effnet.arch.spec import InputSpec
from effnet.errors import ArgumentError, MissingExtraError
from effnet.exporting.export import export
from effnet.machine import Machine
from effnet.models.efficientnet import EfficientNet
from effnet.runtime import choice
from effnet.runtime.choice import Choice, Question, choose, views, ways_of_network
from effnet.runtime.engines import Batches, Way
from effnet.weights.bundle import open_bundle

TORCH, ONNX = Way("torch"), Way("onnxruntime")
FP32, BF16 = Way("openvino"), Way("openvino", "bf16")
SEE = InputSpec(size=32, resize=32)


class Clock:
    """Sessions that take as long as they are told to, an image, by a clock of their own; parts as a whole does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ms: dict[Way, float], wrong: float = 0) -> None:
        self.ms, self.wrong, self.now, self.opened = ms, wrong, 0.0, 0
        monkeypatch.setattr("effnet.metrics.timing.time.perf_counter", lambda: self.now)

    def open(self, way: Way, batch: int) -> Batches:
        """In bf16 a share of the images is named otherwise."""
        self.opened += 1

        def run(pixels: np.ndarray) -> np.ndarray:
            self.now += self.ms.get(way, self.ms[Way(way.engine, way.precision)]) * len(pixels) / 1e3
            logits = np.eye(2, dtype=np.float32)[np.zeros(len(pixels), int)]
            if way.precision == "bf16":
                logits[: round(self.wrong * len(pixels))] = (0, 1)
            return logits

        return Batches(lambda *_: run, batch, rest="together")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    have_every_engine(monkeypatch, tmp_path / "cache")


def in_parts(way: Way, part: int, streams: int = 2) -> Way:
    return dataclasses.replace(way, part=part, streams=streams)


def question(*ways: Way, **values: object) -> Question:
    return Question("a network", SEE, ways, **values)


def test_who_may_run_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ways_of_network(None, None) == (TORCH, FP32, ONNX, BF16)
    assert ways_of_network(None, "fp32") == (TORCH, FP32, ONNX)
    assert ways_of_network(None, "bf16") == (BF16,)
    assert ways_of_network("onnxruntime", None) == (ONNX,)
    with pytest.raises(ArgumentError, match="calibrate"):
        ways_of_network(None, "int8")
    with pytest.raises(ArgumentError, match=r"is OpenVINO's alone"):
        ways_of_network("torch", "bf16")
    monkeypatch.setattr(choice, "this_machine", lambda: Machine("Processor Y", 2, None, ("avx2",)))
    assert ways_of_network(None, None) == (TORCH, FP32, ONNX)
    monkeypatch.setattr(choice, "installed", lambda name: name == "onnxruntime")  # without onnx nothing can be written
    assert ways_of_network(None, None) == (TORCH,)
    with pytest.raises(MissingExtraError, match=r"effnet\[openvino\]"):
        ways_of_network(None, "bf16")


def test_the_fastest_wins_in_its_best_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {in_parts(FP32, part): ms for part, ms in ((1, 2.7), (2, 2.5), (4, 2.3), (8, 2.4))}
    clock = Clock(monkeypatch, {TORCH: 9, FP32: 3, ONNX: 3.1, in_parts(ONNX, 2): 2.6, **parts})
    found = choose(question(TORCH, FP32, ONNX), clock.open)
    assert (found.way, found.batch) == (in_parts(FP32, 4), 16)
    order = [in_parts(FP32, part) for part in (4, 8, 2)] + [in_parts(ONNX, 2), in_parts(FP32, 1)]
    assert [lap.way for lap in found.measured] == order  # torch was left behind after one image
    assert [lap.ms for lap in found.measured] == pytest.approx([36.8, 38.4, 40, 41.6, 43.2])
    assert str(found) == (
        "OpenVINO, fp32, 2 streams of 4 images: 2.30 ms an image in batches of 16; "
        "ONNX Runtime, fp32, 2 streams of 2 images took 1.13 times as long"
    )
    clock.ms[ONNX] = 1
    assert choose(question(TORCH, FP32, ONNX, batch=1), clock.open).way == ONNX


def test_a_small_batch_goes_as_a_whole_or_in_single_images(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, {FP32: 3, in_parts(FP32, 1): 2, in_parts(FP32, 2): 4})
    assert choose(question(FP32, batch=4), clock.open).way == in_parts(FP32, 1)
    clock.ms[FP32] = 1
    assert choose(question(FP32, batch=5), clock.open).way == FP32


def test_parts_that_fail_and_fixed_ones_are_not_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, parts = Clock(monkeypatch, {ONNX: 3, in_parts(ONNX, 4): 1, in_parts(ONNX, 2): 2}), set[int | None]()

    def no_four(way: Way, batch: int) -> Batches:
        if way.part == 4:
            raise RuntimeError("no memory")
        parts.add(way.part)
        return clock.open(way, batch)

    assert choose(question(ONNX, batch=16), no_four).way == in_parts(ONNX, 2)
    assert "ONNX Runtime, fp32, 2 streams of 4 images is left out, for it fails: no memory" in caplog.text
    assert parts == {None, 1, 2}
    parts.clear()
    assert choose(question(ONNX, batch=16, fixed=("onnxruntime",)), no_four).way == in_parts(ONNX, 1)
    assert parts == {None, 1}


def test_an_engine_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch, {TORCH: 9, ONNX: 2})

    def broken(way: Way, batch: int) -> Batches:
        if way.engine == "openvino":
            raise RuntimeError("CPU plugin: unsupported")
        return clock.open(way, batch)

    assert choose(question(TORCH, FP32, ONNX), broken).way == in_parts(ONNX, 2)
    assert "OpenVINO, fp32 is left out, for it fails: CPU plugin: unsupported" in caplog.text
    with pytest.raises(RuntimeError, match="unsupported"):
        choose(question(FP32, batch=16), broken)


def test_a_batch_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, {ONNX: 150, FP32: 150})
    assert choose(question(ONNX, FP32), clock.open).batch == 6
    assert choose(question(ONNX, FP32, step=4), clock.open).batch == 4
    assert choose(question(ONNX, FP32, batch=32), clock.open).batch == 32


@pytest.mark.parametrize(("wrong", "way"), [(0.04, BF16), (0.06, FP32)])
def test_a_lower_precision_has_to_agree(monkeypatch: pytest.MonkeyPatch, wrong: float, way: Way) -> None:
    parts = {in_parts(BF16, part): ms for part, ms in ((1, 2.2), (2, 2), (4, 2.1))}
    clock = Clock(monkeypatch, {TORCH: 9, FP32: 3, BF16: 2, **parts}, wrong)
    found = choose(question(TORCH, FP32, BF16, batch=64), clock.open)
    assert found.way == in_parts(way, 2)
    if way == BF16:
        assert (found.same, found.views, found.refused) == (61, 64, ())
        assert "61 of 64 views of photos are named as in fp32 (at least 87%)" in str(found)
    else:
        words = "OpenVINO, bf16, 2 streams of 2 images is faster, but names 4 of 64 views of photos otherwise"
        assert found.refused == (words,)
        assert found.refused[0] in str(found)
    clock.ms |= {BF16: 4, in_parts(BF16, 2): 4, in_parts(FP32, 1): 4}
    slow = choose(question(FP32, BF16, batch=64), clock.open)
    assert (slow.way, slow.views) == (in_parts(FP32, 2), 0)


def test_what_was_measured_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, {TORCH: 3, ONNX: 2})
    asked = question(TORCH, ONNX)
    found, opened = choose(asked, clock.open), clock.opened
    assert choose(asked, clock.open) == found
    assert clock.opened == opened
    (file,) = (tmp_path / "cache" / "choices").iterdir()
    assert json.loads(file.read_text())["conditions"]["versions"].keys() == {"torch", "onnxruntime"}
    for other in (question(TORCH, ONNX, threads=1), question(TORCH, ONNX, batch=4), question(ONNX, TORCH)):
        choose(other, clock.open)
        assert clock.opened > opened
        opened = clock.opened
    monkeypatch.setattr(choice, "version", lambda name: "9.9")
    choose(asked, clock.open)
    assert clock.opened > opened
    opened = clock.opened
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    choose(asked, clock.open)
    assert clock.opened > opened


def test_what_was_measured_on_a_busy_machine_is_measured_again_on_a_quiet_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked, opened = Clock(monkeypatch, {TORCH: 3, ONNX: 2}), question(TORCH, ONNX), [0]
    for load, again, words in ((3.0, True, True), (2.0, False, True), (None, True, False), (5.0, False, False)):
        monkeypatch.setattr(choice, "load_average", lambda load=load: load)
        found = choose(asked, clock.open)
        assert (clock.opened > opened[-1]) is again
        assert ("measured on a busy machine" in str(found)) is words
        opened.append(clock.opened)


def test_an_engine_under_another_name_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "version", lambda name: version(f"{name}-of-another-name"))
    clock = Clock(monkeypatch, {TORCH: 3, ONNX: 2})
    assert choose(question(TORCH, ONNX), clock.open).way == in_parts(ONNX, 2)


BATCH_OF_MINUS_4 = '{"choice": {"way": {"engine": "torch"}, "batch": -4, "measured": [], "refused": []}}'


@pytest.mark.parametrize("damage", ["", "{}", BATCH_OF_MINUS_4, '{"choice": {"way": {"engine": "torch"}}}', "[1]"])
def test_a_damaged_memory_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    clock = Clock(monkeypatch, {TORCH: 3, ONNX: 2})
    found = choose(question(TORCH, ONNX), clock.open)
    (file,) = (tmp_path / "cache" / "choices").iterdir()
    file.write_text(damage)
    assert choose(question(TORCH, ONNX), clock.open) == found


def test_a_home_that_cannot_be_written_to_costs_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFNET_CACHE", str(tmp_path / "file"))
    clock = Clock(monkeypatch, {TORCH: 3, ONNX: 2})
    assert choose(question(TORCH, ONNX), clock.open).way == in_parts(ONNX, 2)


def test_nothing_is_measured_where_nothing_is_to_choose() -> None:
    assert choose(question(TORCH), lambda way, batch: pytest.fail("opened")) == Choice(TORCH, 16)
    assert choose(question(TORCH, step=3), lambda way, batch: pytest.fail("opened")) == Choice(TORCH, 15)
    assert choose(question(TORCH, batch=4), lambda way, batch: pytest.fail("opened")) == Choice(TORCH, 4)
    assert choose(question(FP32), lambda way, batch: pytest.fail("opened")) == Choice(in_parts(FP32, 2), 16)
    assert choose(question(FP32, batch=1), lambda way, batch: pytest.fail("opened")) == Choice(FP32, 1)


def test_views_are_photos_where_the_network_sees_photos() -> None:
    seen = views(SEE, 9)
    assert (seen.shape, seen.dtype) == ((9, 32, 32, 3), np.uint8)
    assert np.array_equal(seen, views(SEE, 9))
    assert len({view.tobytes() for view in seen}) == 9
    assert views(SEE.with_channels(1), 2).shape == (2, 32, 32, 1)
    assert views(SEE.with_channels(5), 2).shape == (2, 32, 32, 5)


def test_an_onnx_artifact_is_run_by_openvino_where_that_is_all_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=64, num_classes=3)))
    bundle = open_bundle(effnet.save(network, tmp_path / "m", classes=None))
    model = export(bundle, tmp_path / "m.onnx", format="onnx", batch=3).path
    monkeypatch.setattr(choice, "installed", lambda name: name == "openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    classifier = effnet.load(model)
    assert classifier.chosen is not None
    assert (classifier.chosen.way.engine, classifier.chosen.batch) == ("openvino", 15)
    assert classifier.logits(np.zeros((4, 64, 64, 3), np.uint8)).shape == (4, 3)


@pytest.mark.parametrize("suffix", ["", ".onnx"])
def test_a_real_choice_answers_as_torch_does(tmp_path: Path, photos: Path, suffix: str) -> None:
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=64, num_classes=3)))
    model = effnet.save(network, tmp_path / "m", classes=["a", "b", "c"])
    expected = effnet.load(model, engine="torch")
    if suffix:
        model = export(open_bundle(model), tmp_path / f"m{suffix}", format="onnx", batch=2).path
    classifier = effnet.load(model, precision="fp32")
    assert classifier.chosen is not None
    assert classifier.chosen.way in [lap.way for lap in classifier.chosen.measured]
    assert effnet.load(model, precision="fp32").chosen == classifier.chosen
    assert classifier.group == 16
    for count in (1, 3, 19):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        difference = np.abs(classifier.logits(pixels) - expected.logits(pixels)).max()
        assert difference <= 1e-4 * np.abs(expected.logits(pixels)).max()
    assert classifier.predict(photos / "coffee.png").label == expected.predict(photos / "coffee.png").label
