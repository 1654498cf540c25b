"""Sessions: any number of images with graphs of fixed batch sizes, threads, closing, and needs of engines."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from random_weights import shaken

import effnet
from effnet.errors import ArgumentError
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.options import EngineName
from effnet.runtime.select import Selection, open_session, select_for
from effnet.runtime.session import Backend, BatchedSession
from effnet.weights.bundle import open_bundle

TORCH = Backend("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=64, num_classes=3)))
    return effnet.save(network, tmp_path_factory.mktemp("models") / "m", classes=["a", "b", "c"])


def test_graphs_are_compiled_when_they_are_needed() -> None:
    compiled: list[int] = []

    def compile(images: int, streams: int):
        compiled.append(images)
        return lambda pixels: pixels.reshape(len(pixels), -1).astype(np.float32) * (not images or len(pixels) == images)

    pixels = np.arange(1, 20, dtype=np.uint8).reshape(-1, 1, 1, 1)
    session = BatchedSession(compile, Backend("openvino"), 8)
    for count, sizes in ((1, [1]), (4, [1]), (5, [1, 8]), (8, [1, 8]), (17, [1, 8]), (19, [1, 8])):
        assert session(pixels[:count]).ravel().tolist() == pixels[:count].ravel().tolist()
        assert compiled == sizes
    for least, sizes in ((8, [8]), (0, [0])):
        compiled.clear()
        session = BatchedSession(compile, Backend("openvino"), 8, least=least)
        assert session(pixels[:13]).ravel().tolist() == pixels[:13].ravel().tolist()
        assert compiled == sizes


def test_a_graph_for_any_number_is_compiled_while_photos_are_read() -> None:
    compiled: list[tuple[int, threading.Thread]] = []
    begun = threading.Event()

    def compile(images: int, streams: int):
        compiled.append((images, threading.current_thread()))
        begun.set()
        if len(compiled) == failing:
            raise OSError("no room")
        return lambda pixels: pixels.reshape(len(pixels), -1).astype(np.float32)

    pixels = np.arange(1, 4, dtype=np.uint8).reshape(-1, 1, 1, 1)
    for failing in (0, 1):  # what failed there is tried again
        compiled.clear()
        begun.clear()
        session = BatchedSession(compile, Backend("openvino"), 8, least=0)
        session.prepare()
        assert begun.wait(60)
        assert session(pixels).ravel().tolist() == [1, 2, 3]
        assert [images for images, _ in compiled] == [0] * (1 + failing)
        assert compiled[0][1] is not threading.current_thread()
        compiled[0][1].join(60)
    compiled.clear()
    for backend, least in ((Backend("openvino"), 1), (Backend("torch"), 0)):
        BatchedSession(compile, backend, 8, least=least).prepare()
    assert not compiled
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(_prepare)")]


def test_waves_of_parts_and_what_they_leave_over() -> None:
    """Parts of 2, 3 side by side: waves of 6, batches of 12."""
    calls: list[tuple[int, int, int]] = []

    def compile(images: int, streams: int):
        def run(pixels: np.ndarray) -> np.ndarray:
            calls.append((images, streams, len(pixels)))
            return pixels.reshape(len(pixels), -1).astype(np.float32)

        return run

    pixels = np.arange(1, 30, dtype=np.uint8).reshape(-1, 1, 1, 1)
    session = BatchedSession(compile, Backend("openvino", part=2, streams=3), 16)
    assert session.batch == 12
    one, part = (1, 1, 1), (2, 3, 2)
    for count, expected in ((1, [one]), (3, 3 * [one]), (5, 3 * [part]), (6, 3 * [part]), (29, 15 * [part])):
        assert session(pixels[:count]).ravel().tolist() == pixels[:count].ravel().tolist()
        assert calls == expected
        calls.clear()


def test_a_backend_in_words_and_what_it_refuses() -> None:
    assert str(Backend("openvino", "bf16", part=4, streams=2)) == "OpenVINO, bf16, 2 streams of 4 images"
    assert str(Backend("onnxruntime", part=1, threads=1)) == "ONNX Runtime, fp32, parts of 1 image, 1 thread"
    for values in ({"streams": 2}, {"engine": "onnxruntime", "precision": "bf16"}, {"part": 0}, {"engine": "openvio"}):
        with pytest.raises(ArgumentError, match=r"`(streams|precision|part|engine)`"):
            Backend(**{"engine": "openvino", **values})


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_every_division_gives_the_answers_of_torch(folder: Path, name: EngineName) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), dtype=np.uint8)
    bundle = open_bundle(folder)
    expected = open_session(bundle, select_for(bundle, engine="torch"))(pixels)
    for values in ({}, {"streams": 2, "part": 1}, {"streams": 2, "part": 2}, {"part": 2, "threads": 1}):
        with open_session(bundle, Selection(Backend(name, **values), 4, "")) as session:
            for count in (1, 3, 4, 9, 11):
                assert np.abs(session(pixels[:count]) - expected[:count]).max() <= 5e-5 * np.abs(expected).max()


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
    with pytest.raises(ArgumentError, match="closed"):
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
    print("interrupted")
"""


def test_ctrl_c_works_after_classifiers_came_and_went(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


FIRST = """
import sys
import numpy as np
from effnet.runtime.load import read_model
from effnet.runtime.select import Selection, open_session
from effnet.runtime.session import Backend

session = open_session(read_model(sys.argv[1]), Selection(Backend(sys.argv[2], part=2, streams=2), 4, ""))
sys.setswitchinterval(1e-6)  # seconds: threads change places wherever they can
print(session(np.zeros((4, 64, 64, 3), np.uint8)).shape)
"""


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_two_threads_begin_at_once_in_a_new_process(folder: Path, engine: str) -> None:
    command = [sys.executable, "-c", FIRST, str(folder), engine]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip() == "(4, 3)"


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


def _processor_times() -> dict[str, int]:
    """Hundredths of a second that each thread of this process has computed."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            found[task.name] = int(fields[11]) + int(fields[12])
    return found


def test_onnx_runtime_reports_to_nobody(folder: Path, photos: Path, tmp_path: Path) -> None:
    """Since 1.29 it keeps a number of this device in the user's cache and sends it with the model's name."""
    silent = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in silent}
    words = ("predict", photos / "coffee.png", "--model", folder, "--engine", "onnxruntime")
    subprocess.run(
        [sys.executable, "-m", "effnet", *words], env={**environment, "HOME": str(tmp_path)}, check=True, timeout=120
    )
    assert not (tmp_path / ".cache" / "Microsoft").exists()
