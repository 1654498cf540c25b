"""A latency is met by timing a handful of networks; with other limits, the best network for those is timed first."""

from types import SimpleNamespace

import pytest

import effnet
from effnet.errors import ArgumentError
from effnet.scaling.budget import Budget
from effnet.scaling.fit import fit_spec


def stopwatch(log, milliseconds=lambda price: price.activations / 1e6):
    """Times networks by their costs: 6.7 ms for B0."""

    def measure(spec):
        log.append(spec)
        median = milliseconds(effnet.cost(spec))
        return SimpleNamespace(median_ms=median, spread_ms=(median, median))

    return measure


@pytest.mark.parametrize("limits", [{"macs": "500M"}, {"macs": "100M"}, {"params": "3M", "file_size": "12MB"}])
def test_without_effect_it_changes_nothing_and_costs_little(limits):
    log = []
    fit = fit_spec(Budget(**limits, latency="10s"), measure=stopwatch(log), among=None)
    assert fit.spec.shape == fit_spec(Budget(**limits)).spec.shape
    assert fit.binding in limits
    on_the_curve = [spec for spec in log if spec.name.startswith("b0-") and spec.name.endswith("m")]
    assert len(on_the_curve) <= 3
    assert fit.considered > 1000


def test_time_that_does_not_grow_evenly_with_size():
    log = []
    steps = stopwatch(log, lambda price: 5 + 4 * (price.macs // 150_000_000))  # a staircase
    fit = fit_spec(Budget(latency="20ms"), measure=steps)
    assert 13 <= fit.timed.median_ms <= 20
    assert len(log) <= 20


def test_every_trial_is_in_the_report():
    log = []
    fit = fit_spec(Budget(latency="9ms", macs="2G"), measure=stopwatch(log))
    assert [trial.spec for trial in fit.timings] == log
    assert fit.timed.macs == effnet.cost(fit.spec).macs
    for trial in fit.to_dict()["trials"]:
        assert trial["median_ms"] > 0


@pytest.mark.parametrize("milliseconds", [0.6, 6.7, 80])
def test_latency_is_met_by_measuring_a_handful(milliseconds):
    log = []
    fit = fit_spec(Budget(latency=f"{milliseconds}ms"), measure=stopwatch(log))
    assert fit.timed.median_ms <= milliseconds
    assert fit.timed.median_ms >= 0.8 * milliseconds
    assert fit.binding == "latency"
    assert len(log) <= 20
    assert len({spec.shape for spec in log}) == len(log)  # none twice
    assert fit.to_dict()["latency_ms"] == fit.timed.median_ms
    if fit.published:
        at_that_size = effnet.spec(fit.published.variant.spec, resolution=fit.published.spec.resolution)
        assert effnet.cost(at_that_size).activations / 1e6 <= milliseconds


def test_latency_beside_other_limits():
    fit = fit_spec(Budget(latency=0.05, params="5M"), measure=stopwatch([]))
    assert fit.binding == "params"
    assert effnet.cost(fit.spec).params <= 5 * 10**6


def test_latency_out_of_reach():
    with pytest.raises(ArgumentError, match=r"`latency`.*the smallest takes"):
        fit_spec(Budget(latency="1us"), measure=stopwatch([]))
    with pytest.raises(ArgumentError, match="needs `measure`"):
        fit_spec(Budget(latency="1ms"))
