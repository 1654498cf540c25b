"""A bench: the contestants, the report, and failing contestants. No test asserts a time."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from every_engine import have_every_engine
from PIL import Image
from random_weights import shaken
from tiny import tiny_spec

import effnet
from effnet.arch.spec import InputSpec
from effnet.benchmarking import bench as benching
from effnet.benchmarking.backends import INT8, list_absent, list_backends, measure_cold_start
from effnet.benchmarking.bench import BenchPlan, bench
from effnet.benchmarking.report import AGREE, VIEWS
from effnet.data.dataset import read_data
from effnet.data.image import load_pixels, views
from effnet.errors import ArgumentError, MissingExtraError
from effnet.exporting.export import export
from effnet.exporting.int8 import export_int8
from effnet.machine import Machine
from effnet.metrics.intervals import compare_top1, wilson
from effnet.models.efficientnet import EfficientNet
from effnet.runtime import select
from effnet.runtime.load import read_model
from effnet.runtime.select import Selection, open_session, select_for
from effnet.runtime.session import Backend, Pixels
from effnet.weights.bundle import open_bundle

CLASSES = ("a", "b", "c")
TORCH, ONNX, FP32, BF16 = Backend("torch"), Backend("onnxruntime"), Backend("openvino"), Backend("openvino", "bf16")
NATIVE = Backend("native"), Backend("native", "bf16")
ALL = (TORCH, *NATIVE, FP32, BF16, ONNX)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    network = shaken(EfficientNet(dataclasses.replace(tiny_spec(), num_classes=3)))
    folder = tmp_path_factory.mktemp("bench") / "m"
    return str(effnet.save(network, folder, classes=CLASSES, input=InputSpec(32, 36)))


@pytest.fixture(scope="module")
def exported(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An .onnx file for 2 images."""
    return str(export(open_bundle(model), tmp_path_factory.mktemp("onnx") / "m.onnx", format="onnx", batch=2).path)


@pytest.fixture(autouse=True)
def every_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    have_every_engine(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr("effnet.metrics.timing.TURN", 0)
    monkeypatch.setattr(benching, "COLD_STARTS", 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Noise under the names of the classes, and a file that is not an image."""
    random = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "data" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "data" / "a" / "broken.png").write_bytes(b"cut")
    return tmp_path / "data"


class Fakes:
    """Backends that any functions are: what was opened, what was closed, and the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: dict[Backend, object] = {}
        self.opened: list[tuple[Backend, int]] = []
        self.closed, self.started, self.now = 0, 0, 0.0
        monkeypatch.setattr(benching, "list_backends", lambda *_, **__: tuple(self.runs))
        monkeypatch.setattr(benching._Bench, "_write_file", self.write)
        monkeypatch.setattr(benching, "open_session", lambda _, selection: Fake(self, selection))
        monkeypatch.setattr(benching, "measure_cold_start", self.start)
        monkeypatch.setattr("effnet.metrics.timing.time.perf_counter", lambda: self.now)

    @staticmethod
    def write(bench: benching._Bench, row: Backend, *_: object) -> None:
        bench.files[row] = "f"
        bench._set(row, file_bytes=7)

    def start(self, *_: object) -> tuple[int, int]:
        self.started += 1
        return self.started, 100 * self.started


class Fake:
    def __init__(self, fakes: Fakes, selection: Selection) -> None:
        self.fakes, self.backend = fakes, selection.backend
        fakes.opened.append((selection.backend, selection.batch))

    def __call__(self, pixels: Pixels) -> np.ndarray:
        self.fakes.now += 1 / (1 + (self.backend.part or 0) % 3)  # parts of 2 are the fastest
        return self.fakes.runs[Backend(self.backend.engine, self.backend.precision)](pixels)

    def close(self) -> None:
        self.fakes.closed += 1


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def answer(pixels: Pixels) -> np.ndarray:
    """Three logits of each image, all different."""
    means = pixels.reshape(len(pixels), -1).mean(1, dtype=np.float32)
    return np.stack([means, means * 0, 100 - means], 1)


def test_every_backend_of_a_network(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "COLD_STARTS", 0)
    found = bench(model, BenchPlan((2, 1, 2), rounds=2))
    assert [(row.backend, row.problem) for row in found.rows] == [(backend, "") for backend in ALL]
    assert (found.batches, found.reference, found.resolution, found.kept) == ((1, 2), TORCH, 32, None)
    bundle = open_bundle(model)
    pixels = views(bundle.config.input, VIEWS)
    expected = open_session(bundle, select_for(bundle, engine="torch", precision="fp32"))(pixels)
    for row in found.rows:
        assert [(time.batch, len(time.time.seconds)) for time in row.times] == [(1, 2), (2, 2)]
        pinned = select_for(bundle, engine=row.backend.engine, precision=row.backend.precision, batch=2)
        got = open_session(bundle, pinned)(pixels)
        share = np.abs(got - expected).max() / np.abs(expected).max()
        assert row.logit_difference == pytest.approx(share, rel=0.2, abs=1e-5)
        assert row.same_class == wilson(int((got.argmax(1) == expected.argmax(1)).sum()), VIEWS)
        assert row.accuracy is None
        assert row.file_bytes > 4 * effnet.cost(bundle.config.spec).params
    assert found.rows[0].logit_difference == 0 < found.rows[2].logit_difference
    for batch in (1, 2):
        assert found.selected[batch] == select_for(bundle, batch=batch)
        assert [row.backend for row in found.rows if found.uses(row, batch)] == [NATIVE[1]]
    assert [version.split()[0] for version in found.conditions.versions] == [
        "torch",
        "native",
        "openvino",
        "onnxruntime",
    ]


def test_the_report_as_plain_values(model: str, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "COLD_STARTS", 3)
    fakes.runs = {TORCH: answer, ONNX: answer}
    values = json.loads(json.dumps(bench(model, BenchPlan((1, 4), rounds=3)).to_dict()))
    assert values["reference"]["engine"] == "torch"
    assert [each["batch"] for each in values["selected"]] == [1, 4]
    assert (values["views"], values["images"], values["kept"]) == (VIEWS, 0, None)
    assert {"machine", "threads", "load", "crowded", "versions"} <= values.keys()
    row = values["rows"][1]
    assert (row["engine"], row["precision"], row["problem"], row["accuracy"]) == ("onnxruntime", "fp32", "", None)
    assert (row["logit_difference"], row["same_class"]["value"], row["file_bytes"]) == (0, 1, 7)
    assert (row["cold_start_seconds"], row["peak_memory_bytes"]) == (4, 400)  # medians of 2, 4, 6
    first, last = row["batches"]
    assert (first["batch"], last["batch"], last["runs"]) == (1, 4, 3)
    assert last["images_per_second"] == pytest.approx(4e3 / last["median_ms"])
    assert last["p10_ms"] <= last["median_ms"] <= last["p90_ms"]


def test_batches_go_in_the_rules_parts_and_their_neighbours(model: str, fakes: Fakes, monkeypatch) -> None:
    monkeypatch.setattr(select, "CACHE", 4 * select.largest_map(open_bundle(model).config.spec, "fp32"))
    fakes.runs = {TORCH: answer, FP32: answer}
    found = bench(model, BenchPlan((1, 16), rounds=1))
    backends = [backend for backend, batch in fakes.opened if batch == 16]
    assert [(backend.part, backend.streams) for backend in backends] == [(None, 1), (4, 2), (2, 2), (8, 2)]
    assert fakes.closed == len(fakes.opened)
    assert [time.batch for time in found.rows[1].times] == [1, 16]
    assert (found.rows[1].backend, found.rows[1].times[1].backend.part) == (FP32, 2)  # the fastest stays


def test_a_failing_backend_gives_its_reason_and_the_others_go_on(model: str, fakes: Fakes) -> None:
    calls = 0

    def tires(pixels: Pixels) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("too  much\nfor me")
        return answer(pixels)

    def broken(pixels: Pixels) -> np.ndarray:
        raise MissingExtraError("this", "that")

    fakes.runs = {TORCH: broken, FP32: answer, BF16: lambda pixels: answer(pixels) * np.nan, ONNX: tires}
    found = bench(model, BenchPlan((1, 2), rounds=3))
    problems = [row.problem for row in found.rows]
    assert problems[0] == str(MissingExtraError("this", "that"))
    assert (problems[1], problems[3]) == ("", "RuntimeError: too much for me")
    assert "not finite" in problems[2]
    assert found.reference == FP32
    assert [len(row.times) for row in found.rows] == [0, 2, 2, 0]
    assert [row.same_class is None for row in found.rows] == [True, False, True, True]
    assert [row.cold_start_seconds for row in found.rows] == [None, 1, None, None]
    assert found.fastest(1).backend == FP32
    assert fakes.closed == len(fakes.opened)
    json.dumps(found.to_dict(), allow_nan=False)


def test_ctrl_c_ends_it_though_a_backend_hides_the_interrupt(model: str, fakes: Fakes) -> None:
    def hide(pixels: Pixels) -> np.ndarray:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None  # as C++ modules do
        return answer(pixels)

    before = signal.getsignal(signal.SIGINT)
    fakes.runs = {TORCH: hide, ONNX: lambda pixels: pytest.fail("went on")}
    with pytest.raises(KeyboardInterrupt):
        bench(model, BenchPlan((1,), rounds=1))
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_runs(model: str, fakes: Fakes) -> None:
    fakes.runs = {ONNX: lambda pixels: 1 / 0}
    found = bench(model, BenchPlan((1,), rounds=1, keep=True))
    assert found.rows[0].problem == "ZeroDivisionError: division by zero"
    assert (found.reference, found.fastest(1), found.kept, fakes.started) == (None, None, None, 0)


def test_what_is_kept_is_fast_and_agrees(model: str, fakes: Fakes, tmp_path: Path) -> None:
    def slowly(pixels: Pixels) -> np.ndarray:
        fakes.now += 1
        return answer(pixels)

    fakes.runs = {TORCH: slowly, BF16: lambda pixels: -answer(pixels), ONNX: answer}
    opened = read_model(model)
    found = bench(model, BenchPlan((1, 4), rounds=1, keep=True))
    assert found.rows[1].same_class.value < AGREE
    assert [found.fastest(batch).backend for batch in (1, 4)] == [ONNX, ONNX]
    assert found.kept.is_relative_to(tmp_path / "cache")
    for batch in (1, 4):
        selection = select_for(opened, batch=batch)
        assert selection == found.selected[batch]
        assert selection.kept
        assert selection.backend.engine == "onnxruntime"
    assert not select_for(opened, batch=1, engine="torch").kept


def test_accuracy_and_what_fails_in_it(model: str, fakes: Fakes, data: Path) -> None:
    part, plan = read_data(data), BenchPlan((1,), rounds=1, split="all")
    readable = [sample for sample in part.samples if "broken" not in sample.path]
    labels = np.array([sample.label for sample in readable])
    pixels = np.stack([load_pixels(part.file(sample), InputSpec(32, 36)) for sample in readable])
    outputs, others = answer(pixels), answer(pixels)[:, [2, 0, 1]]
    fakes.runs = {TORCH: answer, FP32: lambda pixels: answer(pixels)[:, [2, 0, 1]]}
    found = bench(model, plan, str(data))
    assert found.images == len(readable) == 12
    assert list(found.unreadable) == ["a/broken.png"]
    assert found.rows[0].accuracy == compare_top1(outputs, outputs, labels)
    assert found.rows[1].accuracy == compare_top1(outputs, others, labels)

    def only_views(pixels: Pixels) -> np.ndarray:
        if len(pixels) == 12:
            raise MemoryError
        return answer(pixels)

    for runs, missing in (((answer, only_views), [False, True]), ((only_views, answer), [True, True])):
        fakes.runs = dict(zip((TORCH, ONNX), runs, strict=True))
        found = bench(model, dataclasses.replace(plan, batches=(64,)), str(data))
        assert [row.accuracy is None for row in found.rows] == missing
        assert [row.problem.startswith("MemoryError") for row in found.rows] == [run is only_views for run in runs]


def test_what_is_not_measured_is_reported(model: str, exported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: str, *, int8: bool = False) -> tuple[tuple[Backend, ...], str]:
        opened = read_model(name)
        rows = list_backends(opened, int8=int8)
        return rows, " ".join(list_absent(name, opened, rows))

    assert ask(model, int8=True) == ((TORCH, *NATIVE, FP32, BF16, INT8, ONNX), "")
    assert f"effnet bench {model} DATA --int8" in ask(model)[1]
    assert ask(exported) == ((ONNX, FP32, BF16), "")
    for module in ("runtime.select", "benchmarking.backends"):
        monkeypatch.setattr(f"effnet.{module}.this_machine", lambda: Machine("Processor Y", 2, None, ("avx2",)))
    assert ask(exported)[0] == (ONNX, FP32)
    monkeypatch.setattr(select, "installed", lambda name: False)
    rows, notes = ask(model)
    assert rows == (TORCH,)
    assert "OpenVINO is not installed: pip install 'effnet[openvino]'" in notes
    assert "ONNX Runtime is not installed: pip install 'effnet[export]'" in notes
    assert ask(exported)[0] == (ONNX,)


def test_int8_is_calibrated_and_takes_part(model: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "a" / "broken.png").unlink()
    rows = [f"{path},{path.parent.name},{('train', 'val')[int(path.stem) % 2]}" for path in data.glob("*/*.png")]
    (data / "images.csv").write_text("\n".join(("path,label,split", *rows)))
    monkeypatch.setitem(export_int8.__kwdefaults__, "max_drop", 99)
    monkeypatch.setattr(benching, "list_backends", lambda *_, **__: (FP32, INT8))
    monkeypatch.setattr(benching, "COLD_STARTS", 0)
    found = bench(model, BenchPlan((4,), rounds=1, int8=True, keep=True), str(data / "images.csv"))
    assert [row.problem for row in found.rows] == ["", ""]
    assert 1e-4 < found.rows[1].logit_difference < 1
    assert found.selected[4].backend.precision == "fp32"  # int8 is another file than the model


def test_an_artifact_in_bf16_has_an_exact_reference(model: str, tmp_path: Path) -> None:
    out = export(open_bundle(model), tmp_path / "m", precision="bf16", batch=4).path
    assert list_backends(read_model(out)) == (FP32, BF16)


@pytest.mark.parametrize(("step", "batches"), [(4, (4, 32)), (3, (3, 30)), (48, (48,))])
def test_an_artifact_takes_multiples_of_its_batch(
    model: str, fakes: Fakes, tmp_path: Path, step: int, batches: tuple
) -> None:
    artifact = str(export(open_bundle(model), tmp_path / "m.onnx", format="onnx", batch=step).path)
    fakes.runs = {ONNX: answer}
    assert bench(artifact, BenchPlan(rounds=1)).batches == batches
    with pytest.raises(ArgumentError, match=rf"`batch` \(=2\) .* exported for {step}"):
        bench(artifact, BenchPlan((step, 2)))


def test_an_artifact_without_torch(exported: str) -> None:
    code = (
        "import json, sys; sys.modules['torch'] = None\n"
        "from effnet.benchmarking import bench\n"
        "bench.COLD_STARTS = 1\n"
        f"print(json.dumps(bench.bench({exported!r}, bench.BenchPlan((2,), rounds=1, threads=1)).to_dict()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    values = json.loads(done.stdout)
    assert [row["engine"] for row in values["rows"]][:2] == ["onnxruntime", "openvino"]
    for row in values["rows"]:
        assert row["problem"] == ""
        assert row["file_bytes"] == Path(exported).stat().st_size
        assert row["cold_start_seconds"] > 0
        assert 30e6 < row["peak_memory_bytes"] < 3e9
    assert values["reference"]["engine"] == "onnxruntime"
    assert values["rows"][1]["logit_difference"] < 1e-4


def test_a_cold_start_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match=r"ArtifactError: .*none\.onnx does not exist"):
        measure_cold_start(str(tmp_path / "none.onnx"), {})


@pytest.mark.parametrize("values", [{"rounds": 0}, {"threads": 0}, {"batches": (0,)}])
def test_a_plan_of_nothing(model: str, values: dict) -> None:
    with pytest.raises(ArgumentError, match=r"\(=0\) must be a positive whole number"):
        bench(model, BenchPlan(**values))


def test_an_artifact_is_not_calibrated(exported: str, data: Path) -> None:
    with pytest.raises(ArgumentError, match="is an artifact"):
        bench(exported, BenchPlan(int8=True, split="all"), str(data))
