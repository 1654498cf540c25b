"""The command effnet bench. No test asserts a time."""

from __future__ import annotations

import dataclasses
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
from tiny import CLASSES, draw_images, tiny_spec

import effnet
from effnet.arch.spec import InputSpec
from effnet.data.dataset import manifest, read_data, split_data
from effnet.errors import RefusedError
from effnet.exporting.export import export
from effnet.runtime.session import TITLES
from effnet.weights.bundle import Record, open_bundle

COMMAND = "bench"  # what `run` runs

NATIVE = [["native", "fp32"], ["native", "bf16"]]
ARTIFACT = [["OpenVINO", "fp32"], ["OpenVINO", "bf16"], ["ONNX Runtime", "fp32"]]
ROWS = [["torch", "fp32"], *NATIVE, *ARTIFACT]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """shapes; a bundle "m" that was split on them, "nameless", an artifact "m.onnx"."""
    folder = tmp_path_factory.mktemp("bench")
    data = split_data(read_data(draw_images(folder / "shapes", 12)), val=0.25, test=0.25)
    network = shaken(effnet.EfficientNet(dataclasses.replace(tiny_spec(), num_classes=3)))
    record = Record(split=manifest(data))
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
    monkeypatch.setattr("effnet.metrics.timing.TURN", 0)
    started = 0.5, 90_000_000
    monkeypatch.setattr("effnet.benchmarking.bench.measure_cold_start", lambda *_: started)  # real ones: test_bench.py
    return tmp_path


def rows_of(out):
    """Engine and precision of each row of each table, and the rows' other words."""
    found = re.findall(r"^ *(torch|native|OpenVINO|ONNX Runtime) +(fp32|bf16|int8) +(.*)$", out, re.M)
    return [[engine, precision] for engine, precision, _ in found], [words.split() for *_, words in found]


def test_every_engine_side_by_side(run, folder):
    code, out, err = run("m", "--rounds", 1, "--batch", "2,1", "--plot", "m.svg")
    assert code == 0
    names, words = rows_of(out)
    assert names == ROWS + ROWS
    assert "Processor X, 2 cores" in out
    assert re.search(r"2 threads, torch [\d.]+\S*, native [\d.]+\S* \(\w+\), openvino [\d.]+, onnxruntime [\d.]+", out)
    assert words[len(ROWS)][1:5] == ["kB", "90.00", "MB", "0.50"]
    assert [row.count("*") for row in words[: len(ROWS)]] == [0, 0, 2, 0, 0, 0]  # the rule's choice: native in bf16
    assert "effnet bench m DATA --int8" in out
    assert "Drawn: m.svg" in err
    drawing = (folder / "m.svg").read_text()
    assert all(text in drawing for text in ("OpenVINO bf16", "ms for 2 images", "same class as torch"))
    export = r"export m --format (openvino|onnx) --precision (fp32|bf16) --batch 1"
    predict = r"predict photo.jpg --model m --engine (torch|native) --precision (fp32|bf16)"
    assert re.search(rf"Next: effnet ({export}|{predict})\n$", err)
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
    for row in values["rows"]:
        assert (row["problem"], row["accuracy"]["n"]) == ("", val["n"])
    assert [row["accuracy"]["accuracy_b"] for row in values["rows"][:2]] == [val["top1"]] * 2
    assert "Note: the splits are those of split.csv in m." in err
    _, out, _ = run("m.onnx", "shapes", "--rounds", 1, "--batch", 4, "--split", "all")
    assert "36 images: all of shapes" in out


def test_an_artifact(run):
    code, out, err = run("m.onnx", "--rounds", 1, "--threads", 1)
    assert code == 0
    assert rows_of(out)[0] == [ARTIFACT[2], ARTIFACT[0], ARTIFACT[1]] * 2
    assert "2 images" in out
    assert "32 images" in out
    assert re.search(
        r"Next: effnet predict photo.jpg --model m.onnx --engine (onnxruntime|openvino) --precision (fp32|bf16)\n$", err
    )


def test_int8_is_calibrated_on_the_training_images(run, monkeypatch):
    def refuse(bundle, out, data, **_):
        raise RefusedError(f"calibrated on {len(data.train)}, evaluated on {len(data.val)}")

    monkeypatch.setattr("effnet.exporting.int8.export_int8", refuse)
    code, out, _ = run("m", "shapes", "--int8", "--rounds", 1, "--batch", "1", "--json")
    assert code == 0
    row = next(row for row in json.loads(out)["rows"] if row["precision"] == "int8")
    assert (row["problem"], row["batches"]) == ("calibrated on 18, evaluated on 9", [])


def test_ctrl_c_leaves_nothing(folder, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    command = [sys.executable, "-m", "effnet", "bench", "m.onnx", "--rounds", "1000000", "--batch", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        waited = time.monotonic() + 60
        while not list(temporary.glob("effnet-bench-*")) and time.monotonic() < waited:
            time.sleep(0.01)
        time.sleep(0.1)  # so that an engine is being imported
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
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
        (["m.onnx", "--source", "timm"], ["m.onnx", "artifact", "source"]),
        (["m.onnx", "--batch", "3"], ["`batch` (=3)", "exported for 2"]),
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
