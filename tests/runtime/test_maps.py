"""The last feature map: every engine and artifact gives the same one, and its average makes the logits."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from random_weights import shaken
from tiny import tiny_spec

import effnet
from effnet.arch.spec import InputSpec
from effnet.errors import ArgumentError, ArtifactError
from effnet.exporting.export import export
from effnet.exporting.int8 import quantize
from effnet.models.efficientnet import EfficientNet
from effnet.runtime import onnx_file, openvino
from effnet.runtime.artifact import read_artifact
from effnet.runtime.graph import network_of
from effnet.runtime.native import NativeGraph
from effnet.runtime.options import EngineName
from effnet.runtime.select import Selection, open_session, select_for
from effnet.runtime.session import Backend, BatchedSession, Linear, Session
from effnet.weights.bundle import Bundle, open_bundle

SPECS = {
    "tiny": tiny_spec(),
    "no head": dataclasses.replace(tiny_spec(), head=0),
    "odd size": effnet.spec("b0", width=0.25, depth=0.5, resolution=70, num_classes=7),
}
FORMATS = {"model": "openvino", "model.onnx": "onnx", "model.pt2": "torch"}


def bundle_of(network: EfficientNet, folder: Path) -> Bundle:
    size = network.spec.resolution
    return open_bundle(effnet.save(network, folder, input=InputSpec(size, size + 4)))


@pytest.fixture(scope="module", params=SPECS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(shaken(EfficientNet(SPECS[request.param])), tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(shaken(EfficientNet(tiny_spec())), tmp_path_factory.mktemp("models") / "m")


def noise(bundle: Bundle, count: int = 3) -> np.ndarray:
    size = bundle.config.input.size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def reference(bundle: Bundle, pixels: np.ndarray) -> np.ndarray:
    """The map before the average, by the network's own modules in double precision."""
    network, given = open_bundle_network(bundle), bundle.config.input
    kept: list[torch.Tensor] = []
    network.pool.register_forward_pre_hook(lambda module, arguments: kept.append(arguments[0]))
    images = torch.from_numpy(pixels).double().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (given.mean, given.std))
    with torch.inference_mode():
        network((images - mean) / std)
    return kept[0].numpy()


def open_bundle_network(bundle: Bundle) -> EfficientNet:
    network = EfficientNet(bundle.config.spec, policy=bundle.config.policy)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in bundle.weights.items()})
    return network.double().eval()


def check(session: Session, bundle: Bundle, pixels: np.ndarray) -> None:
    """The maps are torch's within 1e-5 of the largest value, and the logits follow from them."""
    expected = reference(bundle, pixels)
    logits, maps = session.maps(pixels)
    assert (maps.dtype, maps.flags.c_contiguous, maps.shape) == (np.float32, True, expected.shape)
    assert np.abs(maps - expected).max() <= 1e-5 * np.abs(expected).max()
    weight, bias = session.linear
    assert (weight.dtype, bias.dtype) == (np.float32, np.float32)
    found = maps.mean((2, 3), dtype=np.float64) @ weight.T.astype(np.float64) + bias
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()
    assert np.abs(session(pixels) - logits).max() <= 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("engine", ["torch", "native", "openvino", "onnxruntime"])
def test_every_engine_gives_the_map_of_a_bundle(bundle: Bundle, engine: EngineName) -> None:
    with open_session(bundle, Selection(Backend(engine), 2, "")) as session:
        check(session, bundle, noise(bundle))


@pytest.mark.parametrize("batch", [1, 2, None])
@pytest.mark.parametrize("name", FORMATS)
def test_every_artifact_gives_it(bundle: Bundle, name: str, batch: int | None, tmp_path: Path) -> None:
    export(bundle, tmp_path / name, format=FORMATS[name], batch=batch)
    artifact = read_artifact(tmp_path / name)
    engines = {"model": ("openvino",), "model.onnx": ("onnxruntime", "openvino"), "model.pt2": ("torch",)}[name]
    for engine in engines:
        with open_session(artifact, select_for(artifact, engine=engine)) as session:
            check(session, bundle, noise(bundle))


def test_in_8_bits_the_logits_follow_from_the_map_but_for_their_rounding(tiny: Bundle, tmp_path: Path) -> None:
    pixels = noise(tiny, 16)
    model = quantize(openvino.make(network_of(tiny), 1, {}), pixels, tiny.config.spec)
    openvino.write(model, tmp_path / "model.xml")
    model = openvino.read(tmp_path / "model.xml")
    weight, bias = openvino.read_linear(model)
    graph = openvino.OpenVinoGraph(openvino.with_maps(model))
    logits, maps = (np.concatenate(each) for each in zip(*(graph.maps(image[None]) for image in pixels), strict=True))
    expected = reference(tiny, pixels)
    assert 0.95 < np.corrcoef(maps.ravel(), expected.ravel())[0, 1] < 1 - 1e-6
    assert np.abs(weight - tiny.weights["classifier.weight"]).max() < 0.01 * np.abs(weight).max()
    found = maps.mean((2, 3)) @ weight.T + bias
    assert 0 < np.abs(found - logits).mean() < 0.05 * np.abs(logits).mean()  # the means are in 8 bits, too


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_parts_and_streams_give_the_same_maps(tiny: Bundle, engine: EngineName) -> None:
    pixels = noise(tiny, 9)
    with open_session(tiny, Selection(Backend(engine, part=2, streams=2), 4, "")) as session:
        check(session, tiny, pixels)


def test_a_session_that_is_not_asked_compiles_no_graph_for_maps(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(
        openvino, "with_maps", lambda model, real=openvino.with_maps: (made.append("maps"), real(model))[1]
    )
    with open_session(tiny, Selection(Backend("openvino"), 2, "")) as session:
        session(noise(tiny))
        assert not made
        for _ in range(2):
            session.maps(noise(tiny, 2))
        assert made == ["maps"]


def test_what_refuses(tiny: Bundle, tmp_path: Path) -> None:
    plain = effnet.Classifier(lambda pixels: np.zeros((len(pixels), 10), np.float32), tiny.config)
    batched = BatchedSession(lambda images, streams: lambda pixels: np.zeros((len(pixels), 10)), Backend("torch"), 1)
    for ask in (lambda: plain.maps(noise(tiny)), lambda: plain.linear, lambda: batched.maps(noise(tiny))):
        with pytest.raises(ArgumentError, match="gives only logits"):
            ask()
    with effnet.load(effnet.save(tiny.network, tmp_path / "m")) as model:
        with pytest.raises(ArgumentError, match=r"must be \(N, 32, 32, 3\) uint8"):
            model.maps(noise(tiny)[0])
        with pytest.raises(ArgumentError, match="at least one"):
            model.maps(noise(tiny)[:0])
        logits, maps = model.maps(noise(tiny))
        assert (logits.shape, maps.shape) == ((3, 1000), (3, 32, 8, 8))
    with pytest.raises(ArgumentError, match="closed"):
        model.maps(noise(tiny))


def test_a_foreign_onnx_file_is_refused_in_one_line() -> None:
    node = onnx.helper.make_node("Relu", ["images"], ["logits"])
    value = onnx.helper.make_tensor_value_info
    ends = [[value(name, onnx.TensorProto.FLOAT, (1,))] for name in ("images", "logits")]
    content = onnx.helper.make_model(onnx.helper.make_graph([node], "x", *ends)).SerializeToString()
    for read, kind in ((onnx_file.with_maps, "GlobalAveragePool"), (onnx_file.read_linear, "Gemm")):
        with pytest.raises(ArtifactError, match=f"no {kind}.*export the model again"):
            read(content)
        with pytest.raises(ArtifactError, match="damaged"):
            read(content[:-1])


def test_the_added_output_is_what_the_package_onnx_would_add(tiny: Bundle) -> None:
    from effnet.runtime.onnx import make

    content = make(network_of(tiny), 2, {})
    model = onnx.load_from_string(onnx_file.with_maps(content))
    pool = [node for node in model.graph.node if node.op_type == "GlobalAveragePool"][-1]
    assert [output.name for output in model.graph.output] == ["logits", pool.input[0]]
    onnx.checker.check_model(model, full_check=True)
    found = onnx_file.read_linear(content)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    expected = Linear(*(tensors[name] for name in gemm.input[1:]))
    assert all(map(np.array_equal, found, expected))


def test_threads_may_ask_for_maps_and_logits(tiny: Bundle) -> None:
    pixels, errors = noise(tiny), list[Exception]()
    with open_session(tiny, Selection(Backend("native"), 2, "")) as session:

        def ask() -> None:
            try:
                check(session, tiny, pixels)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not errors


def test_who_asks_for_no_maps_pays_nothing(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are given no place for the map, so they write none, and the logits are the same bits."""
    pixels, places = noise(tiny), []
    graph = NativeGraph(network_of(tiny), "fp32", 1)
    run = graph._network._run

    def spy(network: int, given: int, images: int, logits: int, features: int | None) -> int:
        places.append(features)
        return int(run(network, given, images, logits, features))

    monkeypatch.setattr(graph._network, "_run", spy)
    logits = graph(pixels)
    with_maps, _ = graph.maps(pixels)
    assert (places[0], places[1] is None) == (None, False)
    assert np.array_equal(logits, with_maps)
