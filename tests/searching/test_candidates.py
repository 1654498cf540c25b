"""Triples of alpha, beta and gamma, and the networks that they build at equal cost."""

from __future__ import annotations

import pytest

import effnet
from effnet.arch.cost import cost
from effnet.errors import ArgumentError
from effnet.scaling.budget import Budget
from effnet.scaling.compound import RULES, Rule, scale
from effnet.searching.candidates import PRODUCT, WITHIN, adapt_baseline, build_candidates, effective_growth, grid

B0 = effnet.spec("b0")


def test_the_grid_of_the_paper() -> None:
    """Counted independently for alpha up to 2: 108 triples on a grid of .05 lie within .1, and one on the edge."""
    rules = grid(0.05, 0.1)
    inside = [rule for rule in rules if abs(rule.product - PRODUCT) < 0.1 - 1e-9 and rule.alpha <= 2]
    assert (len(inside), len([rule for rule in rules if rule.alpha <= 2])) == (108, 109)
    assert [rule.alpha for rule in rules if rule.alpha > 2] == [2.05, 2.1]
    assert RULES["paper"].growths in {rule.growths for rule in rules}
    assert all(min(rule.growths) >= 1 for rule in rules)
    # rounded up and at whatever they cost, they are 65 networks, few of which cost twice as much
    networks = {network.shape: network for network in (scale(B0, 1, rule, resolution_step=1) for rule in inside)}
    assert len(networks) == 65
    ratios = [cost(network).macs / cost(B0).macs for network in networks.values()]
    assert (round(min(ratios), 2), round(max(ratios), 2)) == (1.93, 3.33)
    assert sum(abs(ratio - 2) <= 0.1 for ratio in ratios) == 4


@pytest.mark.parametrize("name", ["b0", "mobilenetv2", "resnet50"])
def test_candidates_cost_the_same_and_differ(name: str) -> None:
    baseline = effnet.spec(name, resolution=112)
    rules = grid(0.1, 0.1)
    found = build_candidates(baseline, rules)
    assert all(abs(each.ratio / 2 - 1) <= WITHIN for each in found)
    assert all(each.ratio == cost(each.network).macs / cost(baseline).macs for each in found)
    assert len({each.network.shape for each in found}) == len(found)
    triples = [rule for each in found for rule in each.triples]
    assert len(set(triples)) == len(triples)
    assert set(triples) <= set(rules)
    for each in found:
        alpha, beta, gamma = each.effective
        assert alpha * beta**2 * gamma**2 == pytest.approx(2, rel=0.12)  # what is left are steps of single dimensions
        assert each.network.depth_rounding == "nearest"


def test_triples_that_rounding_makes_equal_are_one_candidate() -> None:
    small = effnet.spec("b0", resolution=224)
    few = build_candidates(small, [Rule(1.0, 1.2, 1.15), Rule(1.05, 1.2, 1.15), Rule(1.4, 1.1, 1.1)])
    assert [len(each.triples) for each in few] == [2, 1]
    assert few[0].triples[0] == Rule(1.0, 1.2, 1.15)


def test_effective_growth_has_the_rounding_in_it() -> None:
    assert effective_growth(B0, B0) == (1, 1, 1)
    alpha, beta, gamma = effective_growth(B0, effnet.spec("b0", depth=2.0))
    assert (round(alpha, 3), beta, gamma) == (2.028, 1, 1)  # multiply-adds at depth 2, counted independently
    assert effective_growth(B0, effnet.spec("b0", resolution=448))[2] == pytest.approx(3.985**0.5, abs=1e-3)


def test_nothing_beyond_the_images_own_size_or_a_budget() -> None:
    base = effnet.spec("b0", resolution=112)
    rules = grid(0.1, 0.1)
    assert max(each.network.resolution for each in build_candidates(base, rules)) > 128
    assert max(each.network.resolution for each in build_candidates(base, rules, largest=128)) <= 128
    limit = 8_000_000
    fit = build_candidates(base, rules, budget=Budget(params=limit))
    assert 0 < len(fit) < len(build_candidates(base, rules))
    assert all(cost(each.network).params <= limit for each in fit)


def test_what_leaves_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match="leaves no triple"):
        grid(0.7, 0.01)
    with pytest.raises(ArgumentError, match=r"more than 1,000,000 triples"):
        grid(0.001)
    with pytest.raises(ArgumentError, match="no network with 2 times the multiply-adds of b0 and at most 100 px"):
        build_candidates(B0, grid(0.1), largest=100)


@pytest.mark.parametrize("name", ["b0", "mobilenetv1", "mobilenetv2", "resnet50"])
def test_a_baseline_for_small_images(name: str) -> None:
    named = effnet.spec(name)
    network = adapt_baseline(named, 28)
    assert (network.resolution, network.final_size) == (14, 4)
    assert [row.channels for row in network.stages] == [row.channels for row in named.stages]
    assert adapt_baseline(named, 500) == named  # large images leave it as it is
    assert adapt_baseline(named, 300).resolution == 150
    assert adapt_baseline(named, 28, resolution=28).final_size == 4
    with pytest.raises(ArgumentError, match=r"`resolution` \(=29\) is beyond the images' own 28 px"):
        adapt_baseline(named, 28, resolution=29)


def test_strides_are_given_up_from_the_front() -> None:
    network = adapt_baseline(B0, 28)
    assert network.stem_stride == 1
    assert [row.stride for row in network.stages] == [1, 1, 1, 2, 1, 2, 1]
    assert adapt_baseline(effnet.spec("resnet50"), 28).stem_pool is False
