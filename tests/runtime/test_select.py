"""The rules, opening of models, and the choices that `effnet bench --keep` saved."""

from __future__ import annotations

import dataclasses
import sys
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
from effnet.runtime import select as selecting
from effnet.runtime.artifact import Artifact, Form, Int8, read_artifact
from effnet.runtime.select import (
    Selection,
    keep_selection,
    kept_selection,
    open_session,
    select,
    select_for,
)
from effnet.runtime.session import Backend
from effnet.weights.bundle import Bundle, BundleConfig, open_bundle

ALL = ("torch", "openvino", "onnxruntime")
OURS = ("native", *ALL)
ZEN4 = Machine("Zen 4", 2, None, ("avx2", "avx512f", "avx512_bf16"))
ZEN3 = Machine("Zen 3", 2, None, ("avx2",))
B0 = effnet.spec("b0")
FP32 = {"precision": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=64, num_classes=3)))
    return effnet.save(network, tmp_path_factory.mktemp("models") / "m", classes=["a", "b", "c"])


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return open_bundle(folder)


def of_form(format: str, precision: str = "fp32", batch: int | None = 1) -> Artifact:
    """An artifact of B0 that is only described."""
    int8 = Int8(300, (), 0.1, 0.0, 0.2, 1000, 1) if precision == "int8" else None
    config = BundleConfig(B0, effnet.NumericPolicy(), InputSpec())
    return Artifact(Path("m"), config, Form(format, precision, batch, int8))


@pytest.mark.parametrize(
    ("machine", "installed", "pins", "expected"),
    [
        (ZEN4, OURS, {}, ("native", "bf16")),
        (ZEN3, OURS, {}, ("native", "fp32")),
        (Machine("Intel(R) Xeon(R)", 2, None, ZEN4.features), OURS, {}, ("native", "fp32")),
        (Machine("Intel(R) Xeon(R)", 2, None, (*ZEN4.features, "amx_bf16")), OURS, {}, ("openvino", "bf16")),
        (Machine("Intel(R) Xeon(R)", 2, None, (*ZEN4.features, "amx_bf16")), ("native",), {}, ("native", "fp32")),
        (Machine("Intel(R) Xeon(R)", 2, None, (*ZEN4.features, "amx_bf16")), OURS, FP32, ("native", "fp32")),
        (Machine("Old", 2, None, ()), OURS, {}, ("openvino", "fp32")),
        (Machine("Old", 2, None, ()), ("native", "torch"), {}, ("native", "fp32")),
        (ZEN4, (), FP32, ("native", "fp32")),  # which says how it is installed
        (ZEN4, ALL, {}, ("openvino", "bf16")),
        (Machine("Intel(R) Xeon(R)", 2, None, ZEN4.features), ALL, {}, ("openvino", "fp32")),
        (ZEN3, ALL, {}, ("onnxruntime", "fp32")),
        (ZEN3, ("openvino", "torch"), {}, ("openvino", "fp32")),
        (ZEN4, ("onnxruntime", "torch"), {}, ("onnxruntime", "fp32")),
        (ZEN4, ("torch",), {}, ("torch", "fp32")),
        (ZEN4, ALL, FP32, ("openvino", "fp32")),
        (ZEN3, ALL, {"precision": "bf16"}, ("openvino", "bf16")),
        (ZEN4, ALL, {"engine": "onnxruntime"}, ("onnxruntime", "fp32")),
        (ZEN4, ALL, {"engine": "torch"}, ("torch", "fp32")),
    ],
)
def test_engine_and_precision_of_a_network(
    machine: Machine, installed: tuple, pins: dict, expected: tuple[str, str]
) -> None:
    backend = select(B0, machine=machine, installed=installed, **pins).backend
    assert (backend.engine, backend.precision) == expected


@pytest.mark.parametrize(
    ("artifact", "machine", "installed", "pins", "expected"),
    [
        (of_form("onnx"), ZEN4, ALL, {}, ("onnxruntime", "fp32")),
        (of_form("onnx"), ZEN4, ("openvino",), {}, ("openvino", "fp32")),
        (of_form("onnx"), ZEN4, ALL, {"precision": "bf16"}, ("openvino", "bf16")),
        (of_form("onnx"), ZEN4, (), {}, ("onnxruntime", "fp32")),
        (of_form("openvino"), ZEN4, ALL, {}, ("openvino", "fp32")),
        (of_form("openvino", "bf16"), ZEN4, ALL, {}, ("openvino", "bf16")),
        (of_form("openvino", "bf16"), ZEN3, ALL, {}, ("openvino", "fp32")),
        (of_form("openvino", "int8"), ZEN3, ALL, {}, ("openvino", "int8")),
        (of_form("torch"), ZEN4, ALL, {}, ("torch", "fp32")),
    ],
)
def test_engine_and_precision_of_an_artifact(
    artifact: Artifact, machine: Machine, installed: tuple, pins: dict, expected: tuple[str, str]
) -> None:
    backend = select(B0, machine=machine, installed=installed, artifact=artifact, **pins).backend
    assert (backend.engine, backend.precision) == expected


@pytest.mark.parametrize(
    ("spec", "machine", "pins", "part", "streams", "batch"),
    [  # a part's largest map: of B0 at 224 px 4.6 MiB in fp32, of B4 at 380 px 19.8 MiB
        (B0, ZEN4, {}, 4, 2, 16),
        (B0, ZEN4, {"precision": "fp32"}, 2, 2, 16),
        (B0, ZEN4, {"batch": 1}, None, 1, 1),
        (B0, ZEN4, {"batch": 5}, 2, 2, 5),
        (B0, ZEN4, {"batch": 2}, 1, 2, 2),
        (B0, ZEN4, {"threads": 1}, 4, 1, 16),
        (B0, ZEN4, {"engine": "torch", "batch": 32}, None, 1, 32),
        (effnet.spec("b0", resolution=64), ZEN4, {}, 8, 2, 16),
        (effnet.spec("b4"), ZEN4, {"precision": "fp32"}, 1, 2, 14),
        (effnet.spec("b7"), ZEN4, {}, None, 1, 1),
        (B0, Machine("64", 64, None, ZEN4.features), {"batch": 32}, 1, 32, 32),
        (B0, ZEN4, {"artifact": of_form("onnx", batch=3)}, 3, 2, 15),
        (B0, ZEN4, {"artifact": of_form("openvino", "int8", 1)}, 1, 2, 16),
        (B0, ZEN4, {"artifact": of_form("openvino", "fp32", 3)}, 2, 2, 16),
        (B0, ZEN4, {"artifact": of_form("onnx", batch=48)}, None, 1, 48),
        (B0, ZEN4, {"artifact": of_form("torch", batch=4)}, 4, 2, 16),
    ],
)
def test_parts_streams_and_batch(spec, machine, pins, part, streams, batch) -> None:
    found = select(spec, machine=machine, installed=ALL, **pins)
    assert (found.backend.part, found.backend.streams, found.batch) == (part, streams, batch)


def test_what_cannot_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"`precision` \(='int8'\).* calibrate"):
        select(B0, precision="int8")
    for engine in ("torch", "onnxruntime"):
        with pytest.raises(ArgumentError, match=r"`precision`.*needs engine native or openvino"):
            select(B0, engine=engine, precision="bf16")
    for name, value in (("batch", 0), ("threads", 99), ("threads", -2)):
        with pytest.raises(ArgumentError, match=rf"`{name}` \(={value}\)"):
            select(B0, machine=ZEN4, **{name: value})
    onnx = of_form("onnx", batch=2)
    for name, value, fact in (
        ("engine", "torch", "onnxruntime or openvino"),
        ("batch", 3, "multiple"),
        ("precision", "int8", "fp32"),
    ):
        with pytest.raises(ArgumentError, match=rf"`{name}` .* cannot be chosen: .*{fact}"):
            select(B0, machine=ZEN4, artifact=onnx, **{name: value})
    for package, extra in (("onnx", "export"), ("onnxruntime", "onnx")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=rf"effnet\[{extra}\]"):
            open_session(bundle, select_for(bundle, engine="onnxruntime"))
        monkeypatch.undo()


def test_a_network_that_no_memory_holds_is_not_opened(bundle: Bundle) -> None:
    config = dataclasses.replace(bundle.config, spec=effnet.spec(bundle.config.spec, resolution=10**6))
    with pytest.raises(ArgumentError, match=r"`resolution` \(=1000000\) is too large: one map takes [0-9,.]+ GB"):
        open_session(dataclasses.replace(bundle, config=config))


def test_the_rule_opens_and_answers_as_torch_does(
    folder: Path, bundle: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default path of a user, for a network and an artifact; engines that are not used are not imported."""
    have_every_engine(monkeypatch, tmp_path / "cache")
    exported = export(bundle, tmp_path / "m.onnx", format="onnx", batch=2).path
    expected = effnet.load(folder, engine="torch")
    for model, engine in ((folder, "native"), (exported, "onnxruntime")):
        with effnet.load(model, precision="fp32") as classifier:
            assert classifier.selection.backend.engine == engine
            assert (classifier.group, classifier.network) == (16, None)
            for count in (1, 3, 19):
                pixels = np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
                logits = expected.logits(pixels)
                assert np.abs(classifier.logits(pixels) - logits).max() <= 1e-4 * np.abs(logits).max()
            assert classifier.predict(photos / "coffee.png").label == expected.predict(photos / "coffee.png").label
    assert effnet.load(folder).selection.backend.precision == "bf16"
    assert not (tmp_path / "cache").exists()  # nothing was measured


def test_an_onnx_artifact_runs_in_openvino_where_that_is_all_there_is(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export(bundle, tmp_path / "m.onnx", format="onnx", batch=3).path
    monkeypatch.setattr(selecting, "installed", lambda name: name == "openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with open_session(read_artifact(exported)) as session:
        assert session.backend.engine == "openvino"
        assert session(np.zeros((4, 64, 64, 3), np.uint8)).shape == (4, 3)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    have_every_engine(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


SINGLE = Selection(Backend("onnxruntime"), 1, "3 ms")
BATCHES = Selection(Backend("onnxruntime", part=4, streams=2), 32, "2 ms an image")


def test_what_bench_kept_is_followed(bundle: Bundle, folder: Path, cache: Path, monkeypatch) -> None:
    assert kept_selection(bundle, 1) is None
    assert not select_for(bundle).kept
    keep_selection(bundle, [SINGLE, BATCHES])
    assert select_for(bundle, batch=1) == dataclasses.replace(SINGLE, kept=True)
    assert select_for(bundle) == dataclasses.replace(BATCHES, batch=16, kept=True)
    assert select_for(bundle, batch=4).backend == SINGLE.backend  # two streams of four are more
    assert effnet.load(folder).selection == select_for(bundle)
    assert select_for(bundle, engine="openvino") == select(bundle.config.spec, engine="openvino")
    assert select_for(bundle, threads=1) == select(bundle.config.spec, threads=1)
    assert kept_selection(dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, sha256="")), 1) is None
    monkeypatch.setattr(selecting, "version_of", lambda name: "9.9")
    assert kept_selection(bundle, 1) is None


def test_a_cache_that_cannot_be_read_is_none(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFNET_CACHE", "x" * 300)
    assert kept_selection(bundle, 1) is None


def test_what_was_kept_of_an_artifact(bundle: Bundle, tmp_path: Path, cache: Path) -> None:
    artifact = read_artifact(export(bundle, tmp_path / "m.onnx", format="onnx").path)
    keep_selection(artifact, [Selection(Backend("openvino", part=2, streams=2), 8, "fastest")])
    with open_session(artifact, select_for(artifact, batch=8)) as session:
        assert session.backend == Backend("openvino", part=2, streams=2)
    assert kept_selection(bundle, 8) is None


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"selections": [{"backend": {"engine": "torch"}, "batch": -4}]}'])
def test_a_damaged_file_is_passed_over(bundle: Bundle, cache: Path, damage: str) -> None:
    keep_selection(bundle, [SINGLE]).write_text(damage)
    assert kept_selection(bundle, 1) is None


def test_an_instruction_set_below_the_processor_s_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa, precision in (("avx2", "fp32"), ("avx512bf16", "bf16"), ("", "bf16")):
        monkeypatch.setenv("EFFNET_ISA", isa)
        assert select(B0, machine=ZEN4, installed=OURS).backend == Backend("native", precision)


def test_where_nothing_was_compiled_it_says_how(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effnet.runtime.native.instruction_sets", lambda: ())
    found = select(B0, machine=ZEN4, installed=("openvino", "torch"))
    assert (found.backend.engine, "native was not compiled" in found.reason) == ("openvino", True)
    with pytest.raises(
        ArgumentError, match=r"`engine` \(='native'\) was not compiled .*pip install 'effnet\[openvino\]'"
    ):
        open_session(bundle, select(B0, machine=ZEN4, installed=()))
