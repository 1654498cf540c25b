"""benchmarks/claim.py: the networks that test compound scaling, what their scores say, and the picture."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from scipy import stats

import effnet
from effnet.arch.cost import cost
from effnet.errors import ArgumentError
from effnet.scaling.compound import RULES
from effnet.searching.candidates import WITHIN, effective_growth
from effnet.searching.halving import Job

SPEC = importlib.util.spec_from_file_location("claim", Path(__file__).parents[2] / "benchmarks" / "claim.py")
assert SPEC
assert SPEC.loader
claim = importlib.util.module_from_spec(SPEC)
sys.modules["claim"] = claim
SPEC.loader.exec_module(claim)
SINGLE, SWEEP_SEEDS, contestants, jobs, compare_lines = (
    claim.SINGLE,
    claim.SWEEP_SEEDS,
    claim.contestants,
    claim.jobs,
    claim.compare_lines,
)
FULL = effnet.spec("b0")
B0 = effnet.spec("b0", resolution=112)


@functools.cache
def networks() -> list[Any]:
    """Those that would be compared: who only collects tests has not to compute them."""
    return contestants(B0, RULES["paper"], 4.0)


def lines() -> list[int]:
    """The places of all but those of the sweeps."""
    return [place for place, each in enumerate(networks()) if "=" not in each.line]


def test_the_lines_cost_the_same() -> None:
    assert [each.line for each in networks()[:9]] == ["baseline", *("width", "depth", "resolution", "compound") * 2]
    assert [each.factor for each in networks()[:9]] == [1, *[2.0] * 4, *[4.0] * 4]
    for each in networks()[:9]:
        assert each.ratio == cost(each.network).macs / cost(B0).macs
        assert each.ratio == pytest.approx(each.factor, rel=WITHIN)
    assert len({each.network.shape for each in networks()}) == len(networks())
    assert len({each.network.name for each in networks()}) == len(networks())


def test_the_width_is_swept_as_in_the_papers_figure_4() -> None:
    swept = [each for each in networks() if "=" in each.line]
    assert [each.line for each in swept] == [
        *["d=1, r=1"] * 2,  # the third is the baseline
        *["d=1, r=1.3"] * 2,  # here and below the wider ones cost more than the lines' dearest
        *["d=2, r=1"] * 2,
        *["d=2, r=1.3"],
    ]
    assert {(each.network.depth, each.network.resolution) for each in swept} == {(1, 112), (1, 146), (2, 112), (2, 146)}
    small = contestants(B0, RULES["width"], 1.2, largest=130)
    assert not any("r=1.3" in each.line for each in small)


def scores(gap: dict[str, tuple[float, ...]]) -> dict[Job, float]:
    return {job: 0.8 - gap.get(networks()[job.candidate].line, (0,) * 9)[job.seed] for job in jobs(networks(), 3, {})}


def test_every_seed_of_the_lines_and_some_of_the_sweeps() -> None:
    wanted = jobs(networks(), 3, {})
    assert len(set(wanted)) == len(wanted) == 3 * 9 + SWEEP_SEEDS * 7
    assert wanted[:9] == tuple(Job(0, 0, place) for place in lines())
    assert jobs(networks(), 3, {wanted[0]: 0.5}) == wanted[1:]
    assert len(jobs(networks(), 1, {})) == 9 + 7


def test_the_verdict_is_the_one_that_the_numbers_allow() -> None:
    found = compare_lines(networks(), 3, scores({"width": (0.05, 0.052, 0.051), "depth": (0.02, -0.02, 0.0)}))
    assert [(each.factor, each.line) for each in found] == [(factor, line) for factor in (2.0, 4.0) for line in SINGLE]
    words = {each.line: each.verdict for each in found}
    assert words["width"] == "compound is better than width alone"
    assert words["depth"] == "no difference between compound and depth alone was found"
    low, high = stats.t.interval(1 - 0.05 / 6, 2, 0.051, stats.sem([0.05, 0.052, 0.051]))
    assert (found[0].difference.low, found[0].difference.high) == pytest.approx((low, high))
    worse = compare_lines(networks(), 3, scores({"resolution": (-0.03, -0.031, -0.03)}))
    assert worse[2].verdict == "resolution alone is better than compound"


def test_what_is_missing_is_not_guessed() -> None:
    some = scores({})
    some.pop(Job(0, 1, 3))
    with pytest.raises(ArgumentError, match=r"lack 1 of the comparison"):
        compare_lines(networks(), 3, some)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"`factor` \(=1.0\) must be more than 1"):
        contestants(B0, RULES["paper"], 1.0)
    with pytest.raises(ArgumentError, match=r"cannot be reached by resolution from b0-r112 at 112 px: .* 150 px"):
        contestants(B0, RULES["paper"], 4.0, largest=150)


@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_reaches_a_cost_whatever_phi_that_takes(name: str) -> None:
    network = claim.reach_cost(FULL, RULES[name], 4.0)
    assert network is not None
    assert cost(network).macs / cost(FULL).macs == pytest.approx(4, rel=WITHIN)
    alpha, beta, gamma = effective_growth(FULL, network)
    grown = {"depth": alpha, "width": beta, "resolution": gamma}
    if name in grown:
        assert all(abs(growth - 1) < 0.05 for other, growth in grown.items() if other != name)
    assert network.resolution >= FULL.resolution


def test_a_rule_that_cannot_reach_a_cost() -> None:
    assert claim.reach_cost(FULL, RULES["resolution"], 4.0, 300) is None
    assert claim.reach_cost(FULL, RULES["width"], 4.0, 300) is not None


def test_two_lines_are_compared_by_a_paired_t_test() -> None:
    gaps = [-0.01, -0.005, -0.01, -0.01]
    found = claim.paired_difference(1, gaps, 1)
    low, high = stats.t.interval(0.95, 3, statistics.fmean(gaps), stats.sem(gaps))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert claim.paired_difference(1, gaps[:1], 1).level


def test_the_lines_have_intervals(tmp_path: Path, drawn: list[Figure]) -> None:
    found = networks()
    by_place: dict[int, list[float]] = {place: [] for place in range(len(found))}
    for job in jobs(found, 3, {}):
        by_place[job.candidate].append(0.7 + job.candidate / 100 + job.seed**2 / 1000)
    claim.draw_comparison(found, by_place, tmp_path / "compare.svg")
    lines, sweeps = drawn[0].axes
    assert [text.get_text() for text in lines.get_legend().get_texts()] == [
        *("width alone", "depth alone", "resolution alone", "compound")
    ]
    assert [text.get_text() for text in sweeps.get_legend().get_texts()] == [
        *("d=1, r=1", "d=1, r=1.3", "d=2, r=1", "d=2, r=1.3")
    ]
    bars = lines.containers[3]
    compound = [0, *(place for place, each in enumerate(found) if each.line == "compound")]
    assert list(bars.lines[0].get_xdata()) == [found[place].ratio for place in compound]
    (low, high) = bars.lines[2][0].get_segments()[-1][:, 1]
    values = [100 * score for score in by_place[compound[-1]]]
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, sum(values) / 3, stats.sem(values)))


def test_a_single_seed_has_no_interval(tmp_path: Path, drawn: list[Figure]) -> None:
    found = networks()
    claim.draw_comparison(found, {place: [0.5] for place in range(len(found))}, tmp_path / "compare.png")
    (low, high) = drawn[0].axes[0].containers[0].lines[2][0].get_segments()[0][:, 1]
    assert low == high == 50
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
