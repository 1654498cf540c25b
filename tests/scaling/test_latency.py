"""A latency beside other limits: the network that makes most of those is asked first."""

from types import SimpleNamespace

import pytest

import effnet
from effnet.scaling.budget import Budget
from effnet.scaling.fitting import fit_spec


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
    assert len(fit.candidates) > 1000


def test_time_that_does_not_grow_evenly_with_size():
    log = []
    steps = stopwatch(log, lambda price: 5 + 4 * (price.macs // 150_000_000))  # a staircase
    fit = fit_spec(Budget(latency="20ms"), measure=steps)
    assert 13 <= fit.timed.median_ms <= 20
    assert len(log) <= 20


def test_every_trial_is_in_the_report():
    log = []
    fit = fit_spec(Budget(latency="9ms", macs="2G"), measure=stopwatch(log))
    assert [trial.spec for trial in fit.trials] == log
    assert fit.timed.macs == effnet.cost(fit.spec).macs
    for trial in fit.to_dict()["trials"]:
        assert trial["median_ms"] > 0
