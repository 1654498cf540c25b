"""The published network for a budget; accuracies by hand from Table 2 of the paper and the official READMEs."""

from types import SimpleNamespace

import pytest

import effnet
from effnet.errors import ArgumentError, UnknownNameError
from effnet.scaling.budget import Budget
from effnet.scaling.fit import fit_spec

FAMILY = [*(f"b{number}" for number in range(9)), "l2", *(f"lite{number}" for number in range(5))]


def best(step=8, baseline="b0", **limits):
    return fit_spec(Budget(**limits), baseline, resolution_step=step, among=FAMILY).published


@pytest.mark.parametrize(
    ("limits", "name", "resolution"),
    [
        ({"macs": "1G"}, "b2", 260),  # .994 G, 80.1 %; lite2 has 77.6
        ({"params": "5M"}, "lite0", 224),  # B0 has 5.29 M, Lite0 4.65
        ({"params": "8.5M"}, "lite3", 280),  # 8.2 M, 79.8 %, and not B1's 7.8 M, 79.1 %
        ({"macs": "10T"}, "l2", 800),
        ({"macs": "1G", "max_resolution": 239}, "b0", 224),  # 77.1 % as published before B1's 79.1 % at less
    ],
)
def test_by_hand(limits, name, resolution):
    found = best(**limits)
    assert (found.variant.name, found.spec.resolution) == (name, resolution)
    assert found.as_published


@pytest.mark.parametrize("step", [1, 8, 50])
def test_smaller_images_where_none_fits_as_published(step):
    found = best(macs="100M", step=step)
    assert not found.as_published
    assert found.spec.resolution % step == 0
    assert effnet.cost(found.spec).macs <= 10**8
    larger = effnet.spec(found.variant.name, resolution=found.spec.resolution + step)
    assert effnet.cost(larger).macs > 10**8


def test_classes_and_channels_are_the_baselines():
    grey = effnet.spec("b0", num_classes=10, in_channels=1)
    fit = fit_spec(Budget(params="4.1M"), grey, among=["b0", "lite0"])
    assert (fit.spec.name, fit.spec.num_classes, fit.spec.in_channels) == ("b0", 10, 1)  # 4.02 M: 990 classes less
    assert fit_spec(Budget(params="4.1M"), grey).published.variant.name == "b0"


def test_images_shrink_for_a_latency_too():
    log = []

    def measure(spec):
        log.append(spec)
        median = effnet.cost(spec).macs / 1e6
        return SimpleNamespace(median_ms=median, spread_ms=(median, median))

    fit = fit_spec(Budget(latency="100ms"), measure=measure, among=["b0", "b7", "l2"])
    assert fit.spec.resolution < 224
    assert fit.timed.median_ms <= 100
    assert effnet.cost(effnet.spec("b0", resolution=fit.spec.resolution + 8)).macs > 100e6
    assert len(log) <= 8
    assert max(effnet.cost(spec).macs for spec in log) < 40e9  # nobody waits for L2
    with pytest.raises(ArgumentError, match="32 px or more"):
        fit_spec(Budget(latency="1ms"), measure=measure, among=["b0"])


def test_deep_networks_with_tiny_images_are_not_timed_for_a_latency():
    log = []

    def measure(spec):
        log.append(spec)
        median = 2.5 * len(spec.blocks) + effnet.cost(spec).macs / 5e6
        return SimpleNamespace(median_ms=median, spread_ms=(median, median))

    # At 32 px B7 and B8 have fewer multiply-adds than B0 at 192, and take longer.
    found = fit_spec(Budget(latency="70ms", macs="300M"), measure=measure).published
    assert found.variant.name in ("b0", "lite0")
    assert 2.5 * 16 + effnet.cost(found.spec).macs / 5e6 <= 70
    assert not [spec for spec in log if spec.resolution == 32]


def test_what_a_published_network_cannot_settle():
    with pytest.raises(UnknownNameError, match="Did you mean 'b8'"):
        fit_spec(Budget(macs="1G"), among=["b9"])
    with pytest.raises(ArgumentError, match=r"`width`.*have their own"):
        fit_spec(Budget(macs="1G", width=1.1), among=["b0"])
    assert fit_spec(Budget(macs="1G", resolution=128), among=["b0", "b1"]).spec.resolution == 128
