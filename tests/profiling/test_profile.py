"""A network's profile: its rows and sums, and torch's settings, which stay unchanged. No test asserts a time."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_spec

import effnet
from effnet.errors import ArgumentError
from effnet.exporting.export import export
from effnet.metrics.timing import random_bundle
from effnet.models.efficientnet import EfficientNet
from effnet.profiling.profile import TimingOptions, _blocks, profile
from effnet.runtime.artifact import Form, read_artifact

SMALL = dataclasses.replace(tiny_spec(), num_classes=7, in_channels=1)
NAMES = ["stem", *(block.name for block in SMALL.blocks), "head", "classifier"]


@pytest.fixture(scope="module")
def measured():
    return profile(SMALL, TimingOptions(batch=3, threads=1, runs=2))


def test_rows_are_the_blocks_and_add_up_to_the_network(measured) -> None:
    price = effnet.cost(SMALL)
    assert [block.row.name for block in measured.blocks] == NAMES
    assert {len(block.time.seconds) for block in measured.blocks} == {2} == {len(measured.whole.seconds)}
    assert (measured.name, measured.resolution) == (SMALL.name, 32)
    assert sum(block.macs for block in measured.blocks) == 3 * price.macs == measured.macs
    assert sum(block.bytes for block in measured.blocks) == 4 * (price.params + 3 * 2 * price.activations)


def test_shares_and_speed(measured) -> None:
    assert sum(map(measured.time_share, measured.blocks)) == pytest.approx(1)
    assert sum(map(measured.macs_share, measured.blocks)) == pytest.approx(1)
    head = measured.blocks[-2]
    assert measured.time_share(head) == pytest.approx(head.time.median_ms / measured.sum_ms)
    assert head.gmacs_per_second == pytest.approx(head.macs / (head.time.median_ms / 1e3) / 1e9)


def test_the_timed_blocks_are_the_network() -> None:
    network = EfficientNet(SMALL).eval()
    x = images = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        for block in _blocks(network):
            x = block(x)
        torch.testing.assert_close(x, network(images))


def test_threads_are_torchs_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, asked = torch.get_num_threads(), []
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)  # more threads than cores take long
    profile(SMALL, TimingOptions(threads=7, runs=1))
    assert asked == [7, threads]


@pytest.mark.parametrize(("engine", "precision"), [("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32")])
def test_a_network_inside_an_engine(engine, precision) -> None:
    found = profile(SMALL, TimingOptions(threads=1, runs=3), engine=engine, precision=precision)
    assert (found.conditions.dtype, found.conditions.threads, len(found.whole.seconds)) == (precision, 1, 3)
    assert [block.row.name for block in found.blocks] == NAMES
    assert all(block.time.median_ms > 0 and len(block.time.seconds) == 3 for block in found.blocks)


def test_an_artifact_inside_its_engine(tmp_path: Path) -> None:
    artifact = read_artifact(export(random_bundle(SMALL), tmp_path / "small.onnx", format="onnx", batch=2).path)
    found = profile(artifact, TimingOptions(runs=1))
    assert (found.conditions.batch, found.macs) == (2, 2 * effnet.cost(SMALL).macs)
    assert "OpenVINO" in str(profile(artifact, TimingOptions(runs=1), engine="openvino").conditions)
    with pytest.raises(ArgumentError, match=r"`batch` .*=3.* exported for 2"):
        profile(artifact, TimingOptions(batch=3))
    with pytest.raises(ArgumentError, match="onnxruntime or openvino"):
        profile(artifact, engine="torch")
    with pytest.raises(ArgumentError, match="blocks"):
        profile(dataclasses.replace(artifact, form=Form("torch", "fp32", None)))


def test_json(measured) -> None:
    values = json.loads(json.dumps(measured.to_dict()))
    assert (values["threads"], values["batch"], values["dtype"], values["layout"]) == (1, 3, "float32", "channels_last")
    assert values["versions"] == [f"torch {torch.__version__}"]
    assert values["machine"]["processor"]
    assert values["blocks"][0].keys() >= {"name", "operator", "macs", "bytes", "median_ms", "p10_ms", "time_share"}
    assert sum(block["median_ms"] for block in values["blocks"]) == pytest.approx(values["blocks_sum_ms"])


@pytest.mark.parametrize("name", ["batch", "threads", "runs"])
def test_options_are_positive(name) -> None:
    with pytest.raises(ArgumentError, match=rf"`{name}` \(=0\)"):
        TimingOptions(**{name: 0})


def test_the_picture_names_every_block(measured, tmp_path: Path) -> None:
    measured.draw(tmp_path / "profile.svg")
    texts = " ".join(re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "profile.svg").read_text("utf-8")))
    for block in measured.blocks:
        assert block.row.name in texts
    assert "1 thread, batch 3, float32" in texts
