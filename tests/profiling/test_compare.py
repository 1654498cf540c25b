"""The comparison: counts against torchvision's own, correlation against its formula. No test asserts a time."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import effnet
from effnet.arch.cost import Cost
from effnet.errors import UnknownNameError
from effnet.machine import Machine
from effnet.metrics.timing import Conditions, Timing
from effnet.profiling import compare
from effnet.profiling.compare import RIVALS, Comparison, Contestant, compare_networks, count, log_correlation
from effnet.profiling.profile import TimingOptions

CONDITIONS = Conditions(
    1, ("torch 9",), 2, "channels_last", "float32", Machine("Processor X", 2, None, ("avx2",)), None
)


def contestant(name: str, macs: int, activations: int, *milliseconds: float) -> Contestant:
    taken = Timing(tuple(time / 1e3 for time in milliseconds))
    return Contestant(Cost(name, 1000, macs, activations), 224, taken)


MADE_UP = Comparison(
    CONDITIONS,
    (
        contestant("b0", 100, 900, 40, 41, 42),
        contestant("slow", 200, 300, 19, 20, 30),
        contestant("quick", 400, 300, 18, 19, 21),
        contestant("many", 800, 500, 60, 60, 61),
    ),
)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_count_as_torchvision_says(name: str) -> None:
    price, size = count(name)
    known = torchvision.models.get_model_weights(RIVALS[name]).IMAGENET1K_V1.meta
    assert size == 224
    assert price.params == known["num_params"]
    assert price.macs / 1e9 == pytest.approx(known["_ops"], abs=0.0006)


def test_resnet_50_exactly() -> None:
    # He et al. 2015 print 3.8 billion for a stride in the first convolution; torchvision has it in the second
    price, _ = count("ResNet-50")
    assert (price.macs, price.params) == (4_089_184_256, 25_557_032)
    assert price.activations == 11_113_984  # pycls' model zoo: 11.1 M


def test_ours_count_as_everywhere() -> None:
    assert count("b3") == (effnet.cost(effnet.spec("b3")), 300)


def test_correlation_is_pearsons_of_logarithms() -> None:
    xs, ys = [1.0, 10.0, 30.0, 500.0], [3.0, 8.0, 70.0, 60.0]
    x, y = np.log(xs) - np.log(xs).mean(), np.log(ys) - np.log(ys).mean()
    assert log_correlation(xs, ys) == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
    assert log_correlation(xs, [5 * x**0.6 for x in xs]) == pytest.approx(1)
    assert log_correlation(xs, [1 / x for x in xs]) == pytest.approx(-1)


def test_correlations_are_of_the_right_columns() -> None:
    times = [row.time.median_ms for row in MADE_UP.rows]
    assert MADE_UP.correlations == {
        "macs": log_correlation([100, 200, 400, 800], times),
        "activations": log_correlation([900, 300, 300, 500], times),
    }


def test_inversions() -> None:
    pairs = [(fewer.cost.name, more.cost.name) for _, fewer, more in MADE_UP.inversions]
    assert pairs == [("b0", "quick"), ("b0", "slow"), ("slow", "quick")]
    assert MADE_UP.inversions[0][0] == pytest.approx(41 / 19)


def test_networks_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, asked = torch.get_num_threads(), []
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)  # more threads than cores take long
    monkeypatch.setattr(compare, "COMPARED", ("ShuffleNetV2", "lite0"))
    measured = compare_networks(TimingOptions(threads=7, runs=1))
    assert [(row.cost.name, row.resolution) for row in measured.rows] == [("ShuffleNetV2", 224), ("lite0", 224)]
    assert asked == [7, threads]
    assert [version.split()[0] for version in measured.conditions.versions] == ["torch", "torchvision"]
    values = json.loads(json.dumps(measured.to_dict()))
    assert values["rows"][1]["macs"] == 385187552
    assert set(values["correlations"]) == {"macs", "activations"}


def test_a_network_that_is_not_known() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ResNet-50'"):
        count("ResNet-51")


def test_the_picture_names_every_network(tmp_path: Path) -> None:
    MADE_UP.draw(tmp_path / "times.svg")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "times.svg").read_text("utf-8"))
    for row in MADE_UP.rows:
        assert texts.count(row.cost.name) == 2
    assert f"log time with log multiply-adds: r = {MADE_UP.correlations['macs']:.3f}" in texts
    assert "EfficientNet" in texts
