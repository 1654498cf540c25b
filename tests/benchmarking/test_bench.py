"""A bench: who takes part, what is told of each, what is done where one fails. No test asserts a time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from every_engine import have_every_engine
from PIL import Image
from random_weights import shaken

import effnet
from effnet.arch.spec import InputSpec
from effnet.benchmarking import bench as benching
from effnet.benchmarking.bench import Plan, bench
from effnet.benchmarking.cold_start import Start, start
from effnet.benchmarking.subjects import INT8, Kept, open_subject
from effnet.data.dataset import read_data
from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, MissingExtraError
from effnet.exporting.export import export, size_of
from effnet.exporting.int8 import Guard
from effnet.machine import Machine
from effnet.metrics.intervals import compare, wilson
from effnet.models.efficientnet import EfficientNet
from effnet.runtime import select
from effnet.runtime.agreement import views
from effnet.runtime.artifact import read_artifact
from effnet.runtime.select import Selection, open_session
from effnet.runtime.session import Backend, BatchedSession
from effnet.weights.bundle import WEIGHTS, open_bundle, read_config

CLASSES = ("a", "b", "c")
TORCH, ONNX, FP32, BF16 = Backend("torch"), Backend("onnxruntime"), Backend("openvino"), Backend("openvino", "bf16")
ALL = (TORCH, FP32, BF16, ONNX)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=64, num_classes=3)))
    folder = tmp_path_factory.mktemp("bench") / "m"
    return str(effnet.save(network, folder, classes=CLASSES, input=InputSpec(64, 72)))


@pytest.fixture(autouse=True)
def everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One start each."""
    have_every_engine(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(benching, "STARTS", 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Noise under the names of the classes, and a file that is no image."""
    random = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "data" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "data" / "a" / "broken.png").write_bytes(b"cut")
    return tmp_path / "data"


class Fake:
    """A model that any function is, in any way."""

    model, source, step, left_out = "fake", None, 1, ("Nothing else",)

    def __init__(self, model: str, runs: dict[Backend, object]) -> None:
        self.config, self.runs, self.ways = read_config(model), runs, tuple(runs)
        self.opened: list[tuple[Backend, int]] = []
        self.closed = 0

    def divided(self, way: Backend, batch: int) -> Backend:
        twos = dataclasses.replace(way, streams=2, part=2)
        return twos if batch == 8 and way == FP32 else way

    def keep(self, way: Backend, folder: Path, guard: object) -> Kept:
        (folder / str(way)).touch()
        return Kept(str(folder / str(way)), 7)

    def open(self, way: Backend, batch: int, kept: Kept | None) -> BatchedSession:
        self.opened.append((way, batch))
        batches = BatchedSession(lambda *_: self.runs[Backend(way.engine, way.precision)], way, batch, least=0)
        close = batches.close

        def closing() -> None:
            self.closed += 1
            close()

        batches.close = closing
        return batches


@pytest.fixture
def no_starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Starts are made up, and effnet.load takes ONNX Runtime; where the files lay that were to be started."""
    files: list[str] = []

    def started(model: str, see: InputSpec, how: dict) -> Start:
        assert Path(model).exists()
        files.append(model)
        return Start(len(files), 100 * len(files))

    classifier = SimpleNamespace(selection=Selection(ONNX, 16, ""))
    monkeypatch.setattr(benching, "start", started)
    monkeypatch.setattr(benching, "load", lambda *_, **__: nullcontext(classifier))
    return files


def says(pixels: np.ndarray) -> np.ndarray:
    """Three logits of each image, all different."""
    means = pixels.reshape(len(pixels), -1).mean(1, dtype=np.float32)
    return np.stack([means, means * 0, 100 - means], 1)


def test_every_way_of_a_network(model: str, tmp_path: Path) -> None:
    found = bench(open_subject(model), Plan((2, 1, 2), rounds=2))
    assert [row.way for row in found.rows] == list(ALL)
    assert [row.problem for row in found.rows] == [""] * 4
    assert (found.batches, found.reference, found.resolution) == ((1, 2), TORCH, 64)
    bundle, seen = open_bundle(model), views(read_config(model).input, found.views)
    expected = effnet.load(model, engine="torch", precision="fp32").logits(seen)
    for row in found.rows:
        assert [(lap.batch, len(lap.time.seconds)) for lap in row.laps] == [(1, 2), (2, 2)]
        got = effnet.load(model, engine=row.way.engine, precision=row.way.precision, batch=2).logits(seen)
        assert row.answers.difference == pytest.approx(np.abs(got - expected).max(), rel=0.2, abs=1e-4)
        assert row.answers.share == pytest.approx(row.answers.difference / np.abs(expected).max(), rel=1e-4)
        assert row.answers.same == wilson(int((got.argmax(1) == expected.argmax(1)).sum()), 64)
        assert row.accuracy is None
        assert len(row.starts) == 1
        assert 30e6 < row.peak_bytes < 3e9
    assert found.rows[0].answers.difference == 0 < found.rows[2].answers.difference
    named = (("o", "openvino"), ("x.onnx", "onnx"))
    sizes = [export(bundle, tmp_path / name, format=form).bytes for name, form in named]
    assert found.rows[0].kept.bytes == (Path(model) / WEIGHTS).stat().st_size
    assert found.rows[1].kept.bytes == pytest.approx(sizes[0], rel=0.01)  # OpenVINO numbers what it reads
    assert found.rows[2].kept.bytes == pytest.approx(sizes[0], rel=0.01)
    assert found.rows[3].kept.bytes == sizes[1]
    assert not Path(found.rows[3].kept.model).parent.exists()
    for batch in (1, 2):
        way = effnet.load(model, batch=batch).selection.backend
        assert found.chosen[batch].backend == way
        kinds = [(row.way.engine, row.way.precision) for row in found.rows if found.takes(row, batch)]
        assert kinds == [(way.engine, way.precision)]
    assert [version.split()[0] for version in found.scene.versions] == ["torch", "openvino", "onnxruntime"]


def test_the_report_as_plain_values(model: str, no_starts: list[str]) -> None:
    found = bench(Fake(model, {TORCH: says, ONNX: says}), Plan((1, 4), rounds=3))
    values = json.loads(json.dumps(found.to_dict()))
    assert values["reference"] == {"engine": "torch", "precision": "fp32", "threads": None, "part": None, "streams": 1}
    assert [each["batch"] for each in values["chosen"]] == [1, 4]
    assert (values["views"], values["images"], values["notes"]) == (64, 0, ["Nothing else"])
    assert {"machine", "threads", "load", "crowded", "versions"} <= values.keys()
    row = values["rows"][1]
    assert (row["engine"], row["precision"], row["problem"], row["top1"]) == ("onnxruntime", "fp32", None, None)
    assert (row["logit_difference"], row["same_class"]["value"], row["file_bytes"]) == (0, 1, 7)
    assert (row["cold_start_seconds"], row["peak_memory_bytes"], row["starts"]) == (2, 200, 1)
    first, last = row["batches"]
    assert (first["batch"], last["batch"], last["runs"]) == (1, 4, 3)
    assert last["images_per_second"] == pytest.approx(4e3 / last["median_ms"])
    assert last["p10_ms"] <= last["median_ms"] <= last["p90_ms"]


def test_batches_go_in_parts_and_as_effnet_load_divides_them(
    model: str, no_starts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    twos, fours = (dataclasses.replace(FP32, streams=2, part=part) for part in (2, 4))
    chosen = {8: Selection(fours, 8, "")}
    monkeypatch.setattr(
        benching, "load", lambda *_, batch, **__: nullcontext(SimpleNamespace(selection=chosen.get(batch)))
    )
    subject = Fake(model, {TORCH: says, FP32: says})
    found = bench(subject, Plan((1, 3, 8), rounds=1, threads=2))
    opened = [(TORCH, 1), (FP32, 1), (TORCH, 3), (FP32, 3), (TORCH, 8), (twos, 8), (fours, 8)]
    assert subject.opened == opened
    assert subject.closed == len(opened)
    assert [lap.batch for lap in found.rows[1].laps] == [1, 3, 8]


def test_who_fails_says_why_and_the_others_go_on(model: str, no_starts: list[str]) -> None:
    calls = 0

    def tires(pixels: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("too  much\nfor me")
        return says(pixels)

    def broken(pixels: np.ndarray) -> np.ndarray:
        raise MissingExtraError("this", "that")

    runs = {TORCH: broken, FP32: says, BF16: lambda pixels: says(pixels) * np.nan, ONNX: tires}
    subject = Fake(model, runs)
    found = bench(subject, Plan((1, 2), rounds=3))
    problems = [row.problem for row in found.rows]
    assert problems[0] == str(MissingExtraError("this", "that"))
    assert problems[1:] == ["", "its outputs are not finite numbers", "RuntimeError: too much for me"]
    assert found.reference == FP32
    assert [len(row.laps) for row in found.rows] == [0, 2, 2, 0]
    assert [row.answers is None for row in found.rows] == [True, False, True, True]
    assert [len(row.starts) for row in found.rows] == [0, 1, 0, 0]
    assert found.rows[1].starts == (Start(1, 100),)
    assert found.fastest(1).way == FP32
    assert subject.closed == len(subject.opened)
    json.dumps(found.to_dict(), allow_nan=False)


def test_nothing_runs(model: str, no_starts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "load", lambda *_, **__: 1 / 0)
    found = bench(Fake(model, {ONNX: lambda pixels: 1 / 0}), Plan((1,), rounds=1))
    assert found.rows[0].problem == "ZeroDivisionError: division by zero"
    assert (found.reference, found.fastest(1), found.chosen, no_starts) == (None, None, {}, [])
    assert found.notes == ("Nothing else", "effnet.load(..., batch=1) fails: ZeroDivisionError: division by zero")


def test_the_fastest_has_to_agree(model: str, no_starts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("effnet.metrics.timing.time.perf_counter", lambda: now)

    def slowly(pixels: np.ndarray) -> np.ndarray:
        nonlocal now
        now += 1
        return says(pixels)

    found = bench(Fake(model, {FP32: slowly, BF16: lambda pixels: -says(pixels)}), Plan((1,), rounds=1))
    assert found.rows[1].answers.same.value < 0.95
    assert found.fastest(1).way == FP32


def test_accuracy_and_what_fails_in_it(model: str, no_starts: list[str], data: Path) -> None:
    part = read_data(data)
    readable = [sample for sample in part.samples if "broken" not in sample.path]
    labels = np.array([sample.label for sample in readable])
    outputs = says(np.stack([load_pixels(part.file(sample), read_config(model).input) for sample in readable]))
    others = outputs[:, [2, 0, 1]]
    shifted = dict.fromkeys((FP32, ONNX), lambda pixels: says(pixels)[:, [2, 0, 1]])
    found = bench(Fake(model, {TORCH: says, **shifted}), Plan((1,), rounds=1, data=part))
    assert found.images == len(readable) == 12
    assert list(found.unreadable) == ["a/broken.png"]
    assert found.rows[0].accuracy == compare(outputs, outputs, labels)
    assert found.rows[1].accuracy == found.rows[2].accuracy == compare(outputs, others, labels)
    told = json.loads(json.dumps(found.to_dict()))["rows"][1]["top1"]
    assert told["value"] == float((others.argmax(1) == labels).mean())

    def only_views(pixels: np.ndarray) -> np.ndarray:
        if len(pixels) == 12:
            raise MemoryError
        return says(pixels)

    found = bench(Fake(model, {TORCH: says, ONNX: only_views}), Plan((64,), rounds=1, data=part))
    assert [row.accuracy is None for row in found.rows] == [False, True]
    assert found.rows[0].problem == ""
    assert found.rows[1].problem.startswith("MemoryError")
    found = bench(Fake(model, {TORCH: only_views, ONNX: says}), Plan((64,), rounds=1, data=part))
    assert [row.accuracy is None for row in found.rows] == [True, True]
    assert found.rows[0].problem.startswith("MemoryError")


def test_what_is_left_out_is_told(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_subject(model).left_out == (
        f"int8 is calibrated first, which takes minutes: effnet bench {model} DATA --int8",
    )
    assert open_subject(model, int8=True).ways == (TORCH, FP32, BF16, INT8, ONNX)
    exported = str(export(open_bundle(model), tmp_path / "m.onnx", format="onnx").path)
    assert open_subject(exported).ways == (ONNX, FP32, BF16)
    plain = Machine("Processor Y", 2, None, ("avx2",))
    for module in ("runtime.select", "benchmarking.subjects"):
        monkeypatch.setattr(f"effnet.{module}.this_machine", lambda: plain)
    assert open_subject(model, int8=True).left_out == ("No bf16: this processor does not multiply it",)
    assert open_subject(exported).ways == (ONNX, FP32)
    monkeypatch.setattr(select, "installed", lambda name: False)
    monkeypatch.setattr("effnet.benchmarking.subjects.installed", lambda name: False)
    assert open_subject(model, int8=True).ways == (TORCH, INT8)
    assert open_subject(model, int8=True).left_out == (
        "OpenVINO is not installed: pip install 'effnet[openvino]'",
        "ONNX Runtime is not installed: pip install 'effnet[export]'",
    )
    assert open_subject(exported).ways == (ONNX,)
    assert open_subject(exported).left_out == ("OpenVINO is not installed: pip install 'effnet[openvino]'",)


def test_int8_is_opened_as_its_file_answers(model: str, data: Path, tmp_path: Path) -> None:
    (data / "a" / "broken.png").unlink()
    images = read_data(data)
    halves = (dataclasses.replace(images, samples=images.samples[start::2]) for start in (0, 1))
    subject = open_subject(model, int8=True)
    kept = subject.keep(INT8, tmp_path, Guard(*halves, max_drop=99))
    assert kept.bytes == size_of(Path(kept.model))
    pixels = np.random.default_rng(1).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    expected = open_session(read_artifact(kept.model))(pixels)
    assert np.abs(subject.open(INT8, 4, kept)(pixels) - expected).max() <= 0.02 * np.abs(expected).max()
    with pytest.raises(ArgumentError, match="could not be calibrated"):
        subject.open(INT8, 4, None)


def test_an_artifact_in_bf16_has_an_exact_reference(model: str, tmp_path: Path) -> None:
    exported = export(open_bundle(model), tmp_path / "m", precision="bf16", batch=4).path
    subject = open_subject(str(exported))
    assert (subject.ways, subject.left_out) == ((FP32, BF16), ())
    assert subject.keep(FP32, tmp_path, None) == Kept(str(exported), size_of(exported))


@pytest.mark.parametrize(("step", "batches"), [(4, (4, 32)), (3, (3, 30)), (48, (48,))])
def test_an_artifact_takes_multiples_of_its_batch(model: str, no_starts: list[str], step: int, batches: tuple) -> None:
    subject = Fake(model, {ONNX: says})
    subject.step = step
    assert bench(subject, Plan(rounds=1)).batches == batches
    with pytest.raises(ArgumentError, match=rf"`batch` \(=2\) cannot be measured: fake was exported for {step}"):
        bench(subject, Plan((step, 2)))


def test_an_artifact_without_torch(model: str, tmp_path: Path) -> None:
    exported = export(open_bundle(model), tmp_path / "m.onnx", format="onnx", batch=2).path
    code = (
        "import json, sys; sys.modules['torch'] = None\n"
        "from effnet.benchmarking import bench\n"
        "from effnet.benchmarking.subjects import open_subject\n"
        "bench.STARTS = 1\n"
        f"found = bench.bench(open_subject({str(exported)!r}), bench.Plan((2, 4), rounds=1, threads=1))\n"
        "print(json.dumps(found.to_dict()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    values = json.loads(done.stdout)
    assert [row["engine"] for row in values["rows"]][:2] == ["onnxruntime", "openvino"]
    for row in values["rows"]:
        assert row["problem"] is None
        assert row["file_bytes"] == exported.stat().st_size
        assert [each["batch"] for each in row["batches"]] == [2, 4]
        assert row["starts"] == 1
    assert values["reference"]["engine"] == "onnxruntime"
    assert values["rows"][1]["logit_difference"] < 1e-3


def test_a_start_that_fails_says_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match=r"ArtifactError: .*none\.onnx does not exist"):
        start(str(tmp_path / "none.onnx"), InputSpec(), {})


def test_a_network_that_sees_no_photos_starts(tmp_path: Path) -> None:
    network = EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=32, in_channels=5)).eval()
    folder = effnet.save(network, tmp_path / "five")
    config = read_config(folder)
    out = export(open_bundle(folder), tmp_path / "five.onnx", format="onnx").path
    assert start(str(out), config.input, {"engine": "onnxruntime", "batch": 1}).seconds > 0


@pytest.mark.parametrize("values", [{"rounds": 0}, {"threads": 0}, {"batches": (0,)}])
def test_a_plan_of_nothing(values: dict) -> None:
    with pytest.raises(ArgumentError, match=r"\(=0\) must be a positive whole number"):
        Plan(**values)


def test_what_is_no_networks_is_refused(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = str(export(open_bundle(model), tmp_path / "m.onnx", format="onnx").path)
    for values, words in (({"int8": True}, "is an artifact"), ({"source": "timm"}, "is not to be said of")):
        with pytest.raises(ArgumentError, match=words):
            open_subject(exported, **values)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"measuring .* pip install 'effnet\[torch\]'"):
        open_subject(model)
