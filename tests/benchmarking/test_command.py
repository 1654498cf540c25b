"""`effnet bench` as it is typed. No test asserts a time."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from every_engine import have_every_engine
from PIL import Image
from ran import Run
from random_weights import shaken
from tiny import CLASSES, draw_images

import effnet
from effnet.arch.spec import InputSpec
from effnet.benchmarking.cold_start import ColdStart
from effnet.data.dataset import manifest, read_data, split_data
from effnet.exporting.export import export
from effnet.exporting.int8 import export_int8
from effnet.runtime.session import TITLES
from effnet.weights.bundle import Record, open_bundle

COMMAND = "bench"  # what `run` runs

ROWS = [["torch", "fp32"], ["OpenVINO", "fp32"], ["OpenVINO", "bf16"], ["ONNX Runtime", "fp32"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """shapes; a bundle "m" that was split on them, "nameless", an artifact "m.onnx"."""
    folder = tmp_path_factory.mktemp("bench")
    data = split_data(read_data(draw_images(folder / "shapes", 12)), val=0.25, test=0.25)
    network = shaken(effnet.EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=32, num_classes=3)))
    record = Record(files={"split.csv": manifest(data)})
    effnet.save(network, folder / "m", classes=CLASSES, input=InputSpec(32, 36), record=record)
    effnet.save(network, folder / "nameless", input=InputSpec(32, 36))
    export(open_bundle(folder / "m"), folder / "m.onnx", format="onnx", batch=2)
    return folder


@pytest.fixture(autouse=True)
def folder(made, tmp_path, monkeypatch):
    """A folder with links to what was made."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    have_every_engine(monkeypatch, tmp_path / "cache")
    start = ColdStart(0.5, 90_000_000)
    monkeypatch.setattr("effnet.benchmarking.bench.measure_cold_start", lambda *_: start)  # real ones: test_bench.py
    return tmp_path


def rows_of(out):
    """Engine and precision of each row of each table, and the rows' other words."""
    found = re.findall(r"^ *(torch|OpenVINO|ONNX Runtime) +(fp32|bf16|int8) +(.*)$", out, re.M)
    return [[engine, precision] for engine, precision, _ in found], [words.split() for *_, words in found]


def test_every_engine_side_by_side(run, folder):
    code, out, err = run("m", "--rounds", 1, "--batch", "2,1", "--plot", "m.svg")
    assert code == 0
    names, words = rows_of(out)
    assert names == ROWS + ROWS
    assert "Processor X, 2 cores" in out
    assert re.search(r"2 threads, torch [\d.]+\S*, openvino [\d.]+, onnxruntime [\d.]+", out)
    size = (folder / "m" / "model.safetensors").stat().st_size
    assert words[4][:5] == [f"{size / 1e3:#.4g}", "kB", "90.00", "MB", "0.50"]
    assert [row.count("*") for row in words[:4]] == [0, 0, 2, 0]  # the rule's choice: OpenVINO in bf16
    assert "effnet bench m DATA --int8" in out
    assert "Drawn: m.svg" in err
    drawing = (folder / "m.svg").read_text()
    assert all(text in drawing for text in ("OpenVINO bf16", "images per second, 2 at a time", "same class as torch"))
    assert re.search(r"Next: effnet export m --format (torch|openvino|onnx) --precision (fp32|bf16) --batch 1\n$", err)
    assert sorted(path.name for path in folder.iterdir()) == ["m", "m.onnx", "m.svg", "nameless", "shapes"]


def test_what_is_kept_is_used_and_its_file_named(run, folder, capsys):
    code, _, err = run("m", "--rounds", 1, "--batch", 2, "--keep")
    assert code == 0
    (kept,) = (folder / "cache").rglob("*.json")
    assert str(kept) in err
    selection = effnet.load("m", batch=2).selection
    assert selection.kept
    assert f"Kept for batches of 2: {selection}" in err
    assert TITLES[selection.backend.engine] in Run(capsys, "predict", folder / "shapes", "--model", "m").err


def test_accuracy_is_that_of_val(run, capsys):
    code, out, err = run("m", "shapes", "--rounds", 1, "--batch", 4, "--json")
    assert code == 0
    values = json.loads(out)
    val = json.loads(Run(capsys, "val", "m", "shapes", "--json").out)
    assert (values["split"], values["images"], values["data"]) == ("test", val["n"], "shapes")
    assert values["rows"][0]["top1"] == values["rows"][1]["top1"] == val["top1"]
    for row in values["rows"]:
        assert row["difference"]["n"] == val["n"]
        assert row["problem"] is None
        assert {"file_bytes", "peak_memory_bytes", "cold_start_seconds", "same_class", "logit_difference"} <= row.keys()
    assert "Note: the parts are those of split.csv in m." in err
    _, out, _ = run("m.onnx", "shapes", "--rounds", 1, "--batch", 4, "--split", "all")
    assert "36 images: all of shapes" in out


def test_an_artifact(run):
    code, out, err = run("m.onnx", "--rounds", 1, "--threads", 1)
    assert code == 0
    assert rows_of(out)[0] == [ROWS[3], ROWS[1], ROWS[2]] * 2
    assert "2 images" in out
    assert "32 images" in out
    assert re.search(
        r"Next: effnet predict photo.jpg --model m.onnx --engine (onnxruntime|openvino) --precision (fp32|bf16)\n$", err
    )


def test_int8_takes_part_or_says_why_not(run, monkeypatch):
    monkeypatch.setitem(export_int8.__kwdefaults__, "max_drop", 0)
    monkeypatch.setattr("effnet.exporting.int8.ATTEMPTS", 1)
    monkeypatch.setattr("effnet.exporting.int8.RANKING", 4)
    code, out, _ = run("m", "shapes", "--int8", "--rounds", 1, "--batch", "1", "--json")
    assert code == 0
    row = next(row for row in json.loads(out)["rows"] if row["precision"] == "int8")
    if row["problem"] is None:
        assert row["difference"]["n"] == 9
    else:  # a network of random weights may lose too much
        assert "points of top-1" in row["problem"]
        assert row["batches"] == []


def test_ctrl_c_leaves_nothing(folder, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    command = [sys.executable, "-m", "effnet", "bench", "m.onnx", "--rounds", "1000000", "--batch", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        waited = time.monotonic() + 60
        while not list(temporary.glob("effnet-bench-*")) and time.monotonic() < waited:
            time.sleep(0.05)
        time.sleep(0.5)
        for _ in range(4):  # an engine that is being imported may take the first for an error of its own
            child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(15)
                break
        child.kill()
        out, err = child.communicate()
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not list(temporary.glob("effnet*"))


def test_unreadable_images_are_reported(run, folder):
    (folder / "own" / "test" / "disc").mkdir(parents=True)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "own" / "test" / "disc" / "1.png")
    (folder / "own" / "test" / "disc" / "2.png").write_bytes(b"cut")
    code, _, err = run("m.onnx", "own", "--rounds", 1, "--batch", 2)
    assert code == 1
    assert "unreadable: test/disc/2.png: " in err
    assert "1 of 2 images unreadable" in err


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ([], ["--model"]),
        (["m", "--batch", "1,many"], ["--batch", "1,many"]),
        (["m", "--batch", "0"], ["--batch", "0"]),
        (["m", "--rounds", "0"], ["`rounds` (=0)"]),
        (["m", "--threads", "0"], ["`threads` (=0)"]),
        (["m", "--split", "val"], ["`split` (='val')", "effnet bench m DATA --split"]),
        (["m", "--int8"], ["`int8` (=True)", "effnet bench m DATA --int8"]),
        (["m.onnx", "shapes", "--split", "all", "--int8"], ["m.onnx is an artifact"]),
        (["m.onnx", "--source", "timm"], ["`source` (='timm')"]),
        (["m.onnx", "--batch", "3"], ["`batch` (=3)", "m.onnx was exported for 2"]),
        (["m", "--plot", "x.gif"], [".png, .svg, .pdf"]),
        (["nameless", "shapes"], ["nameless", "outputs"]),
        (["m", "shapess"], ["Did you mean 'shapes'?"]),
        (["lite9"], ["Did you mean 'lite"]),
        (["m.onnx", "shapes"], ["is not split"]),
    ],
)
def test_wrong_usage_is_reported_before_anything_is_measured(run, words, facts, monkeypatch):
    monkeypatch.setattr("effnet.benchmarking.bench.time_rounds", lambda *_, **__: pytest.fail("measured"))
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert all(fact in err for fact in facts), err
