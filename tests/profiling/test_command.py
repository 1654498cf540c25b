"""The command effnet profile. No test asserts a time."""

import json

import pytest
from tiny import tiny_spec

import effnet
from effnet.arch.cost import Cost
from effnet.arch.specfile import spec_text
from effnet.metrics.timing import Timing
from effnet.profiling import compare as compared

COMMAND = "profile"  # what `run` runs

SMALL = tiny_spec()


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


def test_json_in_an_engine(run) -> None:
    words = "--engine", "openvino", "--precision", "fp32"
    code, out, err = run("small.yaml", "--runs", 1, "--batch", 2, *words, "--json")
    values = json.loads(out)
    assert (code, values["batch"], values["dtype"]) == (0, 2, "fp32")
    assert sum(block["macs"] for block in values["blocks"]) == values["macs"] == 2 * effnet.cost(SMALL).macs
    assert err.endswith(f"Next: effnet profile small.yaml {' '.join(words)} --plot profile.png\n")


def test_networks_side_by_side(run, monkeypatch) -> None:
    monkeypatch.setattr(compared, "COMPARED", ("b0", "lite0", "ShuffleNetV2"))
    pair = (compared.Contestant(Cost(name, 1, 1, 1), 224, Timing((1.0,))) for name in "ab")
    monkeypatch.setattr(compared.Comparison, "inversions", [(2.0, *pair)])
    code, out, err = run("--compare", "--threads", 1, "--runs", 1)
    assert code == 0
    order = [line.split()[0] for line in out.splitlines() if line.split()[1:2] == ["224"]]
    assert order == ["ShuffleNetV2", "lite0", "b0"]  # by multiply-adds
    assert "Pearson's r" in out
    assert "yet slower: a than b (2.00x)" in out
    assert "torchvision" in out
    assert err.endswith("Next: effnet profile --compare --plot profile.png\n")


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ([], ["`model`", "effnet profile b0"]),
        (["b0", "--compare"], ["`model`", "--compare"]),
        (["--compare", "--engine", "openvino"], ["`engine`", "openvino"]),
        (["small.yaml", "--precision", "bf16"], ["`precision`", "bf16"]),
        (["b0", "--plot", "x.gif"], [".png, .svg, .pdf"]),
        (["b0", "--runs", "0"], ["runs", "0"]),
        (["b9"], ["b9"]),
        (["missing.yaml"], ["missing.yaml"]),
    ],
)
def test_wrong_usage_is_reported_before_anything_is_measured(run, words, facts, monkeypatch) -> None:
    monkeypatch.setattr("effnet.metrics.timing.seconds", lambda *_: pytest.fail("measured"))
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert all(fact in err for fact in facts), err
