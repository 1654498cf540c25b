"""On another device a model gives the CPU's answers without extra synchronization; see support/pretend.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretend
import pytest
import torch
from ran import Run
from tiny import CLASSES, draw_images, tiny_spec

import effnet
from effnet.errors import ArgumentError
from effnet.runtime.load import read_model
from effnet.runtime.select import select
from effnet.runtime.session import Backend
from effnet.weights.bundle import save

PROGRAM = """
import json, numpy as np, pretend, torch
from pathlib import Path
import effnet
from effnet.runtime.torch import read_program, write
from effnet.weights.bundle import save
pretend.register()
torch.set_num_threads(1)
folder, said = Path(FOLDER), {}
pixels = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
there = effnet.load(folder / "bundle", device="pretend", precision="fp32", batch=4)
here = effnet.load(folder / "bundle", engine="torch", precision="fp32", batch=4)
said["device"] = str(there.network.classifier.weight.device)
there.logits(pixels[:1]), there.maps(pixels[:1])
moved = sum(pretend.waits.values())
said["logits"] = np.array_equal(there.logits(pixels), here.logits(pixels))
said["waits"] = sum(pretend.waits.values()) - moved  # batches of 4, 4 and 3
said["places"] = sorted({name.split()[0] for name in pretend.waits})
said["maps"] = all(map(np.array_equal, there.maps(pixels), here.maps(pixels)))
said["explained"] = [float(np.abs(a.map - b.map).max()) for a, b in zip(
    there.explain_pixels(pixels[0], topk=3, fine=True), here.explain_pixels(pixels[0], topk=3, fine=True), strict=True)]
low = effnet.load(folder / "bundle", device="pretend", precision="bf16").logits(pixels)
said["bf16"] = [float(np.abs(low - here.logits(pixels)).max()), bool(np.array_equal(low, here.logits(pixels)))]
save(there.network, folder / "again", input=there.input)
write(there.network, there.input, None, {}, folder / "program.pt2")
said["still"] = str(there.network.classifier.weight.device)
program = read_program(folder / "program.pt2")
said["program"] = [str(next(program.parameters()).device), float(np.abs(
    program(torch.from_numpy(pixels)).detach().numpy() - here.logits(pixels)).max())]
(folder / "said.json").write_text(json.dumps(said))
"""


COMMANDS = """
import contextlib, io, json, os, re, signal, threading, time, urllib.request
from pathlib import Path
import pretend, torch
from effnet.cli import main
pretend.register()
torch.set_num_threads(1)
words, said = WORDS, {}

def run(name):
    pretend.waits.clear()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        threading.Thread(target=ask, args=[err], daemon=True).start() if name == "serve" else None
        try:
            main([*words[name], "--device", "pretend", "--precision", "fp32", "--threads", "1", "--batch", "4"])
        except SystemExit as left:
            said[name] = left.code, out.getvalue(), err.getvalue(), dict(pretend.waits)

def ask(err):
    try:
        while not (found := re.findall(r"Serving at (\\S+);", err.getvalue())):
            time.sleep(0.01)
        with urllib.request.urlopen(f"{found[0]}/predict", Path(words["photo"][0]).read_bytes()) as reply:
            said["reply"] = json.loads(reply.read())
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

for name in ("predict", "val", "explain", "serve"):
    run(name)
Path(FOLDER, "answered.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    torch.manual_seed(0)
    network = effnet.create(effnet.spec(tiny_spec(), num_classes=len(CLASSES))).train()
    for _ in range(3):  # statistics that are not those of a fresh network
        network(torch.randn(4, 3, 32, 32))
    save(network.eval(), folder / "bundle", classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    done, found = pretend.run(folder / "said.json", code=PROGRAM.replace("FOLDER", repr(str(folder))))
    assert done.returncode == 0, done.stderr
    return dict(found)


def test_answers_maps_and_explanations_are_the_cpus_to_the_bit(said: dict[str, Any]) -> None:
    assert said["device"] == "pretend:0"
    assert said["logits"]
    assert said["maps"]
    assert said["explained"] == [0, 0, 0]


def test_it_is_waited_for_once_a_batch_for_the_answers(said: dict[str, Any]) -> None:
    assert said["waits"] == 3
    assert said["places"] == ["download", "upload"]  # of weights


def test_bf16_is_autocasts(said: dict[str, Any]) -> None:
    difference, same = said["bf16"]
    assert 0 < difference < 0.02
    assert not same


def test_a_network_on_it_is_saved_and_exported_for_the_cpu(folder: Path, said: dict[str, Any]) -> None:
    assert said["still"] == "pretend:0"  # the network itself stays there
    device, difference = said["program"]
    assert device == "cpu"
    assert difference < 1e-5
    here, again = (read_model(folder / name).weights for name in ("bundle", "again"))
    assert here.keys() == again.keys()
    assert all((here[name] == again[name]).all() for name in here)


@pytest.fixture(scope="module")
def commands(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the commands are given, without where they compute."""
    data, model = draw_images(tmp_path_factory.mktemp("data"), 4), str(folder / "bundle")
    photo = str(data / "disc" / "000.png")
    return {
        "predict": ["predict", str(data), "--model", model, "--json"],
        "val": ["val", model, str(data), "--split", "all", "--json", "--report", str(folder / "report.html")],
        "explain": ["explain", photo, "--model", model, "--json", "--topk", "2"],
        "serve": ["serve", model, "--port", "0", "--grace", "1ms"],
        "photo": [photo],
    }


@pytest.fixture(scope="module")
def answered(folder: Path, commands: dict[str, list[str]]) -> dict[str, Any]:
    """What they say on the pretend device, all in one fresh process."""
    program = COMMANDS.replace("WORDS", repr(commands)).replace("FOLDER", repr(str(folder)))
    done, found = pretend.run(folder / "answered.json", code=program)
    assert done.returncode == 0, done.stderr
    return dict(found)


@pytest.mark.parametrize("name", ["predict", "val", "explain"])
def test_a_command_says_the_same(
    name: str, commands: dict[str, list[str]], answered: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    here = Run(capsys, *commands[name], "--engine", "torch", "--precision", "fp32", "--threads", "1", "--batch", "4")
    code, out, err, waits = answered[name]
    assert (code, here.code) == (0, 0), here.err
    assert out == here.out
    assert name == "val" or "torch, pretend, fp32" in err  # which does not say what computed
    assert [wait for wait in waits if wait.startswith("download")]  # it was computed there


def test_a_server_answers_the_same(
    commands: dict[str, list[str]], answered: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err, waits = answered["serve"]
    assert code == 0
    assert "bundle: torch, pretend, fp32" in err
    assert [wait for wait in waits if wait.startswith("download")]
    here = Run(capsys, "predict", *commands["photo"], *commands["predict"][2:], "--engine", "torch", "--threads", "1")
    assert answered["reply"]["predictions"] == json.loads(here.out)["predictions"]


def test_a_gpu_is_for_torch_and_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"`device` \(='cuda:7'\) is not one that torch can use here: cpu"):
        effnet.load(folder / "bundle", device="cuda:7")
    for engine in ("native", "openvino", "onnxruntime"):
        with pytest.raises(
            ArgumentError, match=rf"`device` \(='cuda'\) needs engine torch; {engine} computes on the CPU"
        ):
            effnet.load(folder / "bundle", device="cuda", engine=engine)
        with pytest.raises(ArgumentError, match="needs engine torch"):
            Backend(engine, device="cuda")  # type: ignore[arg-type]  # of a tuple
    artifact: Any = SimpleNamespace(path="a.onnx", form=None)
    with pytest.raises(ArgumentError, match=r"is for weights and bundles; a\.onnx is run on the CPU"):
        select(tiny_spec(), device="cuda", artifact=artifact, installed=["torch"])
    with pytest.raises(ArgumentError, match="is for artifacts"):
        select(tiny_spec(), device="cuda", precision="int8")


def test_the_rule_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effnet.runtime.select.check_device", lambda device: None)
    for capability, precision in (((8, 0), "bf16"), ((7, 5), "fp32")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, it=capability: it)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
        chosen = select(effnet.spec("b0"), device="cuda:1")
        assert chosen.backend == Backend("torch", precision, device="cuda:1")  # type: ignore[arg-type]  # of a tuple
        assert "a GPU has compute capability" in chosen.reason
        assert (chosen.batch, select(effnet.spec("b7"), device="cuda").batch) == (64, 27)
    assert str(chosen.backend) == "torch, cuda:1, fp32"
