"""Engines in memory: any number of images, one compiled graph for each size, the network's answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import effnet
from effnet.deploy.engines import Batches
from effnet.errors import ArgumentError
from effnet.models.efficientnet import EfficientNet
from random_weights import shaken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=64, num_classes=3)))
    return effnet.save(network, tmp_path_factory.mktemp("models") / "m", classes=["a", "b", "c"])


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_the_same_answers_as_torch(folder: Path, photos: Path, engine: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), dtype=np.uint8)
    expected = effnet.load(folder).logits(pixels)
    classifier = effnet.load(folder, engine=engine, batch=4, threads=1)
    for count in (1, 3, 4, 9, 11):
        logits = classifier.logits(pixels[:count])
        assert np.abs(logits - expected[:count]).max() <= 5e-5 * np.abs(expected).max()
    assert classifier.predict(photos / "coffee.png").label == effnet.load(folder).predict(photos / "coffee.png").label
    assert classifier.logits(pixels[:0]).shape == (0, 3)


def test_sizes_are_compiled_when_they_are_needed() -> None:
    opened: list[int] = []

    def open_size(size: int):
        opened.append(size)
        return lambda pixels: pixels.reshape(len(pixels), -1).astype(np.float32) * (len(pixels) == size)

    pixels = np.arange(1, 20, dtype=np.uint8).reshape(-1, 1, 1, 1)
    run = Batches(open_size, 8)
    for count, sizes in ((1, [1]), (2, [1]), (3, [1, 8]), (8, [1, 8]), (17, [1, 8]), (19, [1, 8])):
        assert run(pixels[:count]).ravel().tolist() == pixels[:count].ravel().tolist()
        assert opened == sizes
    opened.clear()
    assert Batches(open_size, 8, rest="padded")(pixels[:9]).ravel().tolist() == pixels[:9].ravel().tolist()
    assert opened == [8]
    opened.clear()
    assert Batches(open_size, 8, rest="together")(pixels[:13]).ravel().tolist() == pixels[:13].ravel().tolist()
    assert opened == [8, 5]


def test_threads_may_share_it(folder: Path) -> None:
    run = effnet.load(folder, engine="onnxruntime", batch=4, threads=1)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    alone = [run.logits(part) for part in np.split(pixels, 8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run.logits, np.split(pixels, 8)))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_what_cannot_be_chosen(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(effnet.EffnetError, match="Did you mean 'openvino'"):
        effnet.load(folder, engine="openvio")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"`batch` \(=0\)"):
        effnet.load(folder, engine="openvino", batch=0)
    with pytest.raises(ArgumentError, match=r"`threads` \(=2\) is no matter of torch's engine"):
        effnet.load(folder, threads=2)
    from effnet.deploy.export import export
    from effnet.weights.bundle import open_bundle

    export(open_bundle(folder), tmp_path / "m.onnx", format="onnx", batch=2)
    assert effnet.load(tmp_path / "m.onnx", engine="onnxruntime", batch=2).classes == ("a", "b", "c")
    for name, value in (("engine", "torch"), ("batch", 3)):
        with pytest.raises(ArgumentError, match=rf"`{name}` .* cannot be chosen: .*m\.onnx was exported for"):
            effnet.load(tmp_path / "m.onnx", **{name: value})
    with pytest.raises(ArgumentError, match=r"`threads` \(=-2\)"):
        effnet.load(tmp_path / "m.onnx", threads=-2)
    assert effnet.load(tmp_path / "m.onnx").group == 16
    assert effnet.load(folder, engine="onnxruntime", batch=24).group == 24
    assert effnet.load(folder, engine="onnxruntime", batch=5).group == 15
    assert effnet.load(folder, engine="onnxruntime").network is None
