"""Engines in memory: any number of images, one compiled graph for each size, the network's answers."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from random_weights import shaken

import effnet
from effnet.errors import ArgumentError
from effnet.exporting.export import export
from effnet.machine import Machine
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.engines import Batches, EngineName, Way, compiler, engine, network_of
from effnet.weights.bundle import open_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=64, num_classes=3)))
    return effnet.save(network, tmp_path_factory.mktemp("models") / "m", classes=["a", "b", "c"])


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_the_same_answers_as_torch(folder: Path, photos: Path, engine: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), dtype=np.uint8)
    expected = effnet.load(folder).logits(pixels)
    classifier = effnet.load(folder, engine=engine, precision="fp32", batch=4, threads=1)
    for count in (1, 3, 4, 9, 11):
        logits = classifier.logits(pixels[:count])
        assert np.abs(logits - expected[:count]).max() <= 5e-5 * np.abs(expected).max()
    assert classifier.predict(photos / "coffee.png").label == effnet.load(folder).predict(photos / "coffee.png").label
    assert classifier.logits(pixels[:0]).shape == (0, 3)


def test_sizes_are_compiled_when_they_are_needed() -> None:
    opened: list[int] = []

    def open_size(size: int, streams: int):
        opened.append(size)
        return lambda pixels: pixels.reshape(len(pixels), -1).astype(np.float32) * (not size or len(pixels) % size == 0)

    pixels = np.arange(1, 20, dtype=np.uint8).reshape(-1, 1, 1, 1)
    run = Batches(open_size, 8)
    for count, sizes in ((1, [1]), (4, [1]), (5, [1, 8]), (8, [1, 8]), (17, [1, 8]), (19, [1, 8])):
        assert run(pixels[:count]).ravel().tolist() == pixels[:count].ravel().tolist()
        assert opened == sizes
    opened.clear()
    assert Batches(open_size, 8, rest="padded", step=8)(pixels[:9]).ravel().tolist() == pixels[:9].ravel().tolist()
    assert opened == [8]
    opened.clear()
    assert Batches(open_size, 8, rest="together")(pixels[:13]).ravel().tolist() == pixels[:13].ravel().tolist()
    assert opened == [8, 0]


def test_threads_may_share_it(folder: Path) -> None:
    run = effnet.load(folder, engine="onnxruntime", batch=4, threads=1)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    alone = [run.logits(part) for part in np.split(pixels, 8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run.logits, np.split(pixels, 8)))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_it_closes(folder: Path) -> None:
    with effnet.load(folder, engine="onnxruntime", batch=2) as classifier:
        assert classifier.logits(np.zeros((3, 64, 64, 3), np.uint8)).shape == (3, 3)
    with pytest.raises(ArgumentError, match=r"`classifier`.*cannot be asked any more"):
        classifier.logits(np.zeros((3, 64, 64, 3), np.uint8))


SIGNALLED = """
import gc, signal, sys
import numpy as np
import effnet

def begin():
    classifier = effnet.load(sys.argv[1], engine="openvino")
    classifier.logits(np.zeros((1, 64, 64, 3), np.uint8))
    return classifier

classifier = begin()
for _ in range(3):
    another = begin()
    classifier.close()
    gc.collect()
    classifier = another
classifier.close()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("heard")
"""


def test_ctrl_c_is_heard_after_classifiers_came_and_went(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "heard"), done.stderr


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_it_keeps_to_its_threads(folder: Path, engine: str) -> None:
    def busy() -> int:
        """Threads of this process that computed while it ran."""
        before = _processor_times()
        for _ in range(20):
            classifier.logits(pixels)
        after = _processor_times()
        return sum(after[thread] - before.get(thread, 0) > 2 for thread in after)

    pixels = np.zeros((16, 64, 64, 3), np.uint8)
    classifier = effnet.load(folder, engine=engine, precision="fp32", batch=16, threads=1)
    classifier.logits(pixels)
    before = torch.get_num_threads()
    assert busy() == 1
    assert torch.get_num_threads() == before


def test_waves_of_parts_and_what_they_leave_over() -> None:
    """Parts of 2, 3 side by side: waves of 6, batches of 12."""
    asked: list[tuple[int, int, int]] = []

    def open_size(size: int, streams: int):
        def run(pixels: np.ndarray) -> np.ndarray:
            asked.append((size, streams, len(pixels)))
            return pixels.reshape(len(pixels), -1).astype(np.float32)

        return run

    pixels = np.arange(1, 30, dtype=np.uint8).reshape(-1, 1, 1, 1)
    run = Batches(open_size, 16, part=2, streams=3)
    assert run.batch == 12
    for count, expected in (
        (1, [(1, 1, 1)]),
        (3, [(1, 1, 3)]),
        (5, [(2, 3, 6)]),
        (6, [(2, 3, 6)]),
        (29, [(2, 3, 12), (2, 3, 12), (2, 3, 6)]),  # 24, and 5 that are padded by one
    ):
        assert run(pixels[:count]).ravel().tolist() == pixels[:count].ravel().tolist()
        assert asked == expected
        asked.clear()


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_parts_side_by_side_give_the_same_answers(folder: Path, name: EngineName) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    bundle = open_bundle(folder)
    expected = engine(bundle, Way("torch"))(pixels)
    for way in (Way(name), Way(name, streams=2, part=1), Way(name, streams=2, part=2), Way(name, part=2)):
        logits = engine(bundle, way, batch=4, threads=2)(pixels)
        assert np.abs(logits - expected).max() <= 5e-5 * np.abs(expected).max()
    nine = compiler(network_of(bundle), Way(name), threads=2)(1, 2)(pixels)  # for two requests
    assert np.abs(nine - expected).max() <= 5e-5 * np.abs(expected).max()


def test_how_batches_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = 2
    monkeypatch.setattr("effnet.runtime.engines.this_machine", lambda: Machine("X", cores, None, ()))
    way, parts = Way("openvino"), lambda streams, part: Way("openvino", streams=streams, part=part)
    assert way.divided(1) == [way]
    assert way.divided(2) == [way, parts(2, 1)]
    assert way.divided(7) == [way, parts(2, 1)]
    assert way.divided(8) == [parts(2, 2)]
    assert way.divided(8, threads=1) == [parts(1, 2)]
    assert way.divided(12, step=3, fixed=True) == [way, parts(2, 3)]
    assert way.divided(24, step=3, fixed=True) == [parts(2, 3)]
    assert way.divided(24, step=3) == [parts(2, 6)]
    assert Way("torch").divided(64) == [Way("torch")]
    cores = 64
    assert way.divided(32) == [way, parts(32, 1)]
    with pytest.raises(ArgumentError, match=r"`streams` \(=2\) needs `part`"):
        Way("openvino", streams=2)
    assert [str(each) for each in (parts(2, 4), parts(1, 1))] == [
        "OpenVINO, fp32, 2 streams of 4 images",
        "OpenVINO, fp32, parts of 1 image",
    ]


def _processor_times() -> dict[str, int]:
    """Hundredths of a second that each thread of this process has computed."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            found[task.name] = int(fields[11]) + int(fields[12])
    return found


def test_what_cannot_be_chosen(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(effnet.EffnetError, match="Did you mean 'openvino'"):
        effnet.load(folder, engine="openvio")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"`batch` \(=0\)"):
        effnet.load(folder, engine="openvino", batch=0)
    with pytest.raises(ArgumentError, match=r"`precision` \(='bf16'\) is OpenVINO's alone"):
        effnet.load(folder, engine="torch", precision="bf16")
    with pytest.raises(ArgumentError, match=r"`precision` \(='int8'\) takes images to calibrate on"):
        effnet.load(folder, precision="int8")
    with pytest.raises(ArgumentError, match=r"`threads` \(=99\) must be at most"):
        effnet.load(folder, engine="onnxruntime", threads=99)
    with pytest.raises(ArgumentError, match=r"is not to be said of .*, a bundle"):
        effnet.load(folder, model="b0")
    export(open_bundle(folder), tmp_path / "m.onnx", format="onnx", batch=2)
    assert effnet.load(tmp_path / "m.onnx", engine="onnxruntime", batch=2).classes == ("a", "b", "c")
    for name, value, rule in (
        ("engine", "torch", "can be run by onnxruntime or openvino, by its format"),
        ("batch", 3, "was exported for 2; it takes a multiple of that"),
        ("precision", "int8", "was exported in fp32; export it again with --precision"),
    ):
        with pytest.raises(ArgumentError, match=rf"`{name}` .* cannot be chosen: .*m\.onnx {rule}"):
            effnet.load(tmp_path / "m.onnx", **{name: value})
    with pytest.raises(ArgumentError, match="takes neither source nor model"):
        effnet.load(tmp_path / "m.onnx", model="b0")
    with pytest.raises(ArgumentError, match=r"`threads` \(=-2\)"):
        effnet.load(tmp_path / "m.onnx", threads=-2)
    assert effnet.load(folder, batch=24).group == 24
    assert effnet.load(folder, batch=5).group == 15
    assert effnet.load(folder, engine="onnxruntime").network is None
