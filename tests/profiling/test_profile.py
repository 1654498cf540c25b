"""A network's profile: its rows, what they add up to, and that the network is left alone. No test asserts a time."""

import json
import re
from pathlib import Path

import pytest
import torch

import effnet
from effnet.errors import ArgumentError
from effnet.models.efficientnet import EfficientNet
from effnet.plots.figures import profile_blocks
from effnet.profiling.profile import _parts, profile

SMALL = effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=7, in_channels=1)


@pytest.fixture(scope="module")
def measured():
    return profile(EfficientNet(SMALL), batch=3, threads=1, runs=2, warmup=1)


def test_rows_are_the_blocks(measured) -> None:
    names = [block.row.name for block in measured.blocks]
    assert names == ["stem", *(block.name for block in SMALL.blocks), "head", "classifier"]
    assert {len(block.time.seconds) for block in measured.blocks} == {2} == {len(measured.whole.seconds)}
    assert (measured.name, measured.resolution) == (SMALL.name, 32)


def test_macs_and_bytes_add_up_to_the_networks(measured) -> None:
    price = effnet.cost(SMALL)
    assert sum(block.macs for block in measured.blocks) == 3 * price.macs == measured.macs
    assert sum(block.bytes for block in measured.blocks) == 4 * (price.params + 3 * 2 * price.activations)


def test_shares_and_speed(measured) -> None:
    assert sum(map(measured.time_share, measured.blocks)) == pytest.approx(1)
    assert sum(map(measured.macs_share, measured.blocks)) == pytest.approx(1)
    head = measured.blocks[-2]
    assert measured.time_share(head) == pytest.approx(head.time.median_ms / measured.sum_ms)
    assert head.gmacs_per_second == pytest.approx(head.macs / (head.time.median_ms / 1e3) / 1e9)


def test_the_parts_are_the_network() -> None:
    network = EfficientNet(SMALL).eval()
    images = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        x = images
        for part in _parts(network):
            x = part(x)
        torch.testing.assert_close(x, network(images))


def test_the_network_and_torch_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, threads, asked = EfficientNet(SMALL).train().double(), torch.get_num_threads(), []
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)  # more threads than cores take long
    profile(network, threads=7, runs=1, warmup=1)
    assert network.training
    assert network.stem.conv.weight.dtype == torch.float64
    assert network.stem.conv.weight.is_contiguous()
    assert asked == [7, threads]


def test_json(measured) -> None:
    values = json.loads(json.dumps(measured.to_dict()))
    assert (values["threads"], values["batch"], values["dtype"], values["layout"]) == (1, 3, "float32", "channels_last")
    assert values["versions"] == [f"torch {torch.__version__}"]
    assert values["machine"]["processor"]
    assert values["blocks"][0].keys() >= {"name", "operator", "macs", "bytes", "median_ms", "p10_ms", "time_share"}
    assert sum(block["median_ms"] for block in values["blocks"]) == pytest.approx(values["blocks_sum_ms"])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"`batch` \(=0\)"):
        profile(EfficientNet(SMALL), batch=0)


def test_the_picture_names_every_block(measured, tmp_path: Path) -> None:
    profile_blocks(measured, tmp_path / "profile.svg")
    texts = " ".join(re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "profile.svg").read_text("utf-8")))
    for block in measured.blocks:
        assert block.row.name in texts
    assert "1 thread, batch 3, float32" in texts
