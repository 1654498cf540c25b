"""`effnet bench` as it is typed. No test asserts a time."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from every_engine import have_every_engine
from PIL import Image
from ran import Run
from random_weights import shaken
from tiny import CLASSES, draw_images

import effnet
from effnet.arch.spec import InputSpec
from effnet.benchmarking.cold_start import Start
from effnet.data.dataset import manifest, read_data, split_data
from effnet.runtime.session import TITLES
from effnet.weights.bundle import Record

COMMAND = "bench"  # what `run` runs

ROWS = [["torch", "fp32"], ["OpenVINO", "fp32"], ["OpenVINO", "bf16"], ["ONNX Runtime", "fp32"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """shapes; a bundle "m" that was split on them, "nameless", an artifact "m.onnx"."""
    folder = tmp_path_factory.mktemp("bench")
    data = split_data(read_data(draw_images(folder / "shapes", 12)), val=0.25, test=0.25)
    network = shaken(effnet.EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=64, num_classes=3)))
    record = Record(files={"split.csv": manifest(data)})
    effnet.save(network, folder / "m", classes=CLASSES, input=InputSpec(64, 72), record=record)
    effnet.save(network, folder / "nameless", input=InputSpec(64, 72))
    from effnet.exporting.export import export
    from effnet.weights.bundle import open_bundle

    export(open_bundle(folder / "m"), folder / "m.onnx", format="onnx", batch=2)
    return folder


@pytest.fixture(autouse=True)
def folder(made, tmp_path, monkeypatch):
    """A folder with links to what was made."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    have_every_engine(monkeypatch, tmp_path / "cache")
    made_up = Start(0.5, 90_000_000)
    monkeypatch.setattr("effnet.benchmarking.bench.start", lambda *_: made_up)  # real ones: deploy/test_bench.py
    return tmp_path


def rows_of(out):
    """Engine and precision of each row of each table, and the rows' other words."""
    found = re.findall(r"^ *(torch|OpenVINO|ONNX Runtime) +(fp32|bf16|int8) +(.*)$", out, re.M)
    return [[engine, precision] for engine, precision, _ in found], [words.split() for *_, words in found]


def test_every_engine_side_by_side(run, folder):
    code, out, err = run("m", "--rounds", 2, "--batch", "2,1", "--plot", "m.svg")
    assert code == 0
    names, words = rows_of(out)
    assert names == ROWS + ROWS
    assert "Processor X, 2 cores" in out
    assert re.search(r"2 threads, torch [\d.]+\S*, openvino [\d.]+, onnxruntime [\d.]+", out)
    assert "Medians of 2 rounds" in out
    size = (folder / "m" / "model.safetensors").stat().st_size
    assert words[4][:5] == [f"{size / 1e3:#.4g}", "kB", "90.00", "MB", "0.50"]
    assert out.count("* ") == 3  # the ways for two batches, and what that means
    for batch, place in ((1, 0), (2, 1)):
        chosen = effnet.load("m", batch=batch).selection.backend
        marked = [name for name, row in zip(names[:4], words[:4], strict=True) if _marked(row)[place]]
        assert marked == [[TITLES[chosen.engine], chosen.precision]]
    assert "int8 is calibrated first, which takes minutes: effnet bench m DATA --int8." in out
    assert "Drawn: m.svg" in err
    drawing = (folder / "m.svg").read_text()
    assert all(text in drawing for text in ("OpenVINO bf16", "images per second, 2 at a time", "same class as torch"))
    assert re.search(r"Next: effnet export m --format (torch|openvino|onnx) --precision (fp32|bf16) --batch 1\n$", err)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["m", "m.onnx", "m.svg", "nameless", "shapes"])


def _marked(row):
    """Whether the times of the first and of the second batch are marked: a star, ms, low - high, rate."""
    first = row[0] == "*"
    return first, row[5 + first :][0] == "*"


def test_accuracy_is_that_of_val(run, capsys):
    code, out, err = run("m", "shapes", "--rounds", 1, "--batch", 4, "--json")
    assert code == 0
    values = json.loads(out)
    told = json.loads(Run(capsys, "val", "m", "shapes", "--json").out)
    assert (values["split"], values["images"], values["data"]) == ("test", told["n"], "shapes")
    assert values["rows"][0]["top1"] == told["top1"]
    for row in values["rows"]:
        assert row["difference"]["n"] == told["n"]
        assert row["problem"] is None
        assert {"file_bytes", "peak_memory_bytes", "cold_start_seconds", "same_class", "logit_difference"} <= row.keys()
    assert values["rows"][1]["top1"] == told["top1"]  # fp32, too
    assert "Note: the parts are those of split.csv in m." in err
    _, out, _ = run("m", "shapes", "--rounds", 1, "--batch", 4, "--split", "val")
    val = json.loads(Run(capsys, "val", "m", "shapes", "--split", "val", "--json").out)
    assert f"Top-1: on {val['n']} images: the val part of shapes." in out
    assert f"{val['top1']['value']:.2%}" in out


def test_an_artifact(run):
    code, out, err = run("m.onnx", "--rounds", 1, "--threads", 1)
    assert code == 0
    assert rows_of(out)[0] == [ROWS[3], ROWS[1], ROWS[2]] * 2
    assert "2 images" in out
    assert "32 images" in out
    assert re.search(
        r"Next: effnet predict photo.jpg --model m.onnx --engine (onnxruntime|openvino) --precision (fp32|bf16)\n$", err
    )


def test_who_fails_is_told_below_the_row(run, monkeypatch):
    from effnet.benchmarking import subjects

    def failing(bundle, selection):
        if selection.backend.engine == "onnxruntime":
            raise RuntimeError("not today")
        return open_session(bundle, selection)

    open_session = subjects.open_session
    monkeypatch.setattr(subjects, "open_session", failing)
    code, out, _ = run("m", "--rounds", 1, "--batch", 1)
    assert code == 0
    names, words = rows_of(out)
    assert names == ROWS + ROWS
    assert set(words[3]) == {"-"}
    assert "ONNX Runtime, fp32 is not measured in full: RuntimeError: not today" in out


def test_int8_is_calibrated_and_takes_part(run, folder):
    code, out, _ = run("m", "shapes", "--int8", "--rounds", 1, "--batch", "1,4", "--json")
    assert code == 0
    values = json.loads(out)
    row = next(row for row in values["rows"] if row["precision"] == "int8")
    if row["problem"] is None:
        assert [each["batch"] for each in row["batches"]] == [1, 4]
        assert row["file_bytes"] > 100_000
        assert row["difference"]["n"] == values["images"]
        assert row["starts"] == 3
    else:  # a network of random weights may lose too much
        assert "points of top-1" in row["problem"]


def test_progress_is_shown_to_a_person_and_taken_away(run, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, out, err = run("m.onnx", "--rounds", 2, "--batch", 2)
    assert "ways in turn: 2 of 2 rounds\r" in err
    assert "starting fresh processes in turn: 9 of 9 starts\r" in err
    assert "\r" not in out
    shown = err.rpartition("\r")
    assert not shown[0].rpartition("\r")[2].strip()


def test_ctrl_c_leaves_nothing(folder, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    command = [sys.executable, "-m", "effnet", "bench", "m.onnx", "--rounds", "1000000", "--batch", "2"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic() + 60
    while not list(temporary.glob("effnet-bench-*")) and time.monotonic() < waited:
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not list(temporary.glob("effnet*"))


def test_unreadable_images_are_told(run, folder):
    (folder / "own" / "test" / "disc").mkdir(parents=True)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "own" / "test" / "disc" / "1.png")
    (folder / "own" / "test" / "disc" / "2.png").write_bytes(b"cut")
    code, _, err = run("m.onnx", "own", "--rounds", 1, "--batch", 2)
    assert code == 1
    assert "unreadable: test/disc/2.png: " in err
    assert "1 of 2 images unreadable and not counted" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "requires an argument"),
        (["m", "--batch", "1,many"], "`batch` (='1,many') must be positive whole numbers"),
        (["m", "--batch", "0"], "`batch` (='0')"),
        (["m", "--rounds", "0"], "`rounds` (=0) must be a positive whole number"),
        (["m", "--threads", "0"], "`threads` (=0)"),
        (["m", "--split", "val"], "`split` (='val') needs images: effnet bench m DATA --split"),
        (["m", "--int8"], "`int8` (=True) needs images: effnet bench m DATA --int8"),
        (["m.onnx", "shapes", "--int8"], "is made of a network, and m.onnx is an artifact"),
        (["m.onnx", "--source", "timm"], "`source` (='timm')"),
        (["m.onnx", "--batch", "3"], "`batch` (=3) cannot be measured: m.onnx was exported for 2"),
        (["m", "--plot", "x.gif"], ".png, .svg, .pdf"),
        (["nameless", "shapes"], "nameless does not name its outputs"),
        (["m", "shapess"], "Did you mean 'shapes'?"),
        (["lite9"], "Did you mean 'lite"),
        (["m.onnx", "shapes"], "is not split"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_measured(run, words, message, monkeypatch):
    monkeypatch.setattr("effnet.benchmarking.bench.time_rounds", lambda *_, **__: pytest.fail("measured"))
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert out == ""


def test_without_torch_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run("m")
    assert code == 2
    assert "pip install 'effnet[torch]'" in err
