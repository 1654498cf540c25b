"""effnet profile, as a person types it. No test asserts a time."""

import json
import sys

import pytest

import effnet
from effnet.arch.specfile import spec_text
from effnet.exporting.export import export
from effnet.profiling import compare as compared
from effnet.weights.bundle import open_bundle

COMMAND = "profile"  # what `run` runs

SMALL = effnet.spec("b0", width=0.25, depth=0.4, resolution=32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(spec_text(SMALL))
    return tmp_path


def test_a_network_block_by_block(run, folder) -> None:
    code, out, err = run("small.yaml", "--runs", 2, "--threads", 1, "--plot", "small.png")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert {"stem", *(block.name for block in SMALL.blocks), "head", "classifier", "sum", "whole"} <= set(lines)
    for row in ("sum", "whole"):
        assert f"{effnet.cost(SMALL).macs:,}" in lines[row]
    assert "1 thread, batch 1, float32, channels_last, torch" in out
    assert "random weights" in out
    assert (folder / "small.png").read_bytes().startswith(b"\x89PNG")
    assert "Drawn: small.png" in err
    assert err.endswith("Next: effnet profile --compare\n")


@pytest.mark.parametrize(("engine", "precision"), [("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32")])
def test_a_network_inside_an_engine(run, engine: str, precision: str) -> None:
    words = "--engine", engine, "--precision", precision
    code, out, _ = run("small.yaml", *words, "--runs", 3, "--threads", 1, "--json")
    told = json.loads(out)
    assert (code, told["dtype"], told["threads"], told["whole"]["runs"]) == (0, precision, 1, 3)
    assert [block["name"] for block in told["blocks"]] == [
        "stem",
        *(b.name for b in SMALL.blocks),
        "head",
        "classifier",
    ]
    assert all(block["median_ms"] > 0 and block["runs"] == 3 for block in told["blocks"])


def test_an_artifact_inside_its_engine(run, folder) -> None:
    network = effnet.create(SMALL)
    bundle = open_bundle(effnet.save(network, folder / "small", classes=None))
    export(bundle, folder / "small.onnx", format="onnx", batch=2)
    export(bundle, folder / "small.pt2", format="torch")
    code, out, _ = run("small.onnx", "--runs", 2, "--json")
    assert (code, json.loads(out)["batch"], json.loads(out)["macs"]) == (0, 2, 2 * effnet.cost(SMALL).macs)
    assert run("small.onnx", "--engine", "openvino", "--runs", 2)[0] == 0
    for words, message in (
        (("small.pt2",), "says nothing of its blocks"),
        (("small.onnx", "--batch", 3), "`batch` (=3) cannot be chosen: small.onnx was exported for 2"),
        (("small.onnx", "--engine", "torch"), "can be run by onnxruntime or openvino"),
        (("small.yaml", "--precision", "bf16"), "is OpenVINO's alone"),
        (("--compare", "--engine", "openvino"), "is for a MODEL"),
    ):
        code, _, err = run(*words)
        assert (code, message in err) == (2, True), err


def test_json_stands_alone(run) -> None:
    code, out, err = run("small.yaml", "--runs", 1, "--batch", 2, "--json")
    assert code == 0
    values = json.loads(out)
    assert values["batch"] == 2
    assert sum(block["macs"] for block in values["blocks"]) == values["macs"] == 2 * effnet.cost(SMALL).macs
    assert err.endswith("Next: effnet profile small.yaml --plot profile.png\n")


def test_progress_is_shown_to_a_person_and_taken_away(run, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, out, err = run("small.yaml", "--runs", 2)
    assert "2 of 2 rounds\r" in err
    assert "rounds" not in out
    shown = err.rpartition("\r")[0].split("\r")
    assert not shown[-1].strip()
    assert len(shown[-2]) >= max(map(len, shown[:-2]))


def test_networks_side_by_side(run, monkeypatch) -> None:
    monkeypatch.setattr(compared.compare, "__kwdefaults__", {**compared.compare.__kwdefaults__, "runs": 1})
    monkeypatch.setattr(compared.compare, "__defaults__", (("b0", "lite0", "ShuffleNetV2"),))
    code, out, err = run("--compare", "--threads", 1)
    assert code == 0
    order = [line.split()[0] for line in out.splitlines() if line.split()[1:2] == ["224"]]
    assert order == ["ShuffleNetV2", "lite0", "b0"]  # by multiply-adds
    assert "Pearson's r" in out
    assert "torchvision" in out
    assert err.endswith("Next: effnet profile --compare --plot times.png\n")


def test_the_papers_table(run) -> None:
    code, out, err = run("--paper", "--runs", 1)
    assert code == 0
    assert "5.65x" in out
    assert "here, NCHW" in out
    assert "here, channels_last" in out
    assert "cannot be repeated" in out
    assert "Next: effnet" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "effnet profile b0"),
        (["b0", "--compare"], "does not go with --compare"),
        (["b0", "--paper"], "does not go with --paper"),
        (["--compare", "--paper"], "choose one"),
        (["--paper", "--plot", "x.png"], "leave it or --paper out"),
        (["--paper", "--threads", "2"], "leave out threads"),
        (["--paper", "--batch", "2", "--threads", "2"], "leave out batch and threads"),
        (["b0", "--plot", "x.gif"], ".png, .svg, .pdf"),
        (["b0", "--runs", "0"], "`runs` (=0) must be a positive whole number"),
        (["b0", "--threads", "0"], "`threads` (=0)"),
        (["b0", "--batch", "-1"], "`batch` (=-1)"),
        (["b9"], "`network` (='b9') is not known"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_measured(run, words, message, monkeypatch) -> None:
    monkeypatch.setattr("effnet.metrics.timing.time_rounds", lambda *_, **__: pytest.fail("measured"))
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert out == ""


def test_without_torch_the_extra_is_named(run, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("effnet.profiling")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("effnet.metrics.timing")  # else the import finds it on the package
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run("b0")
    assert code == 2
    assert "measuring needs an optional part of effnet; install it with: pip install 'effnet[torch]'" in err
