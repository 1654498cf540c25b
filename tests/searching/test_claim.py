"""The networks that test compound scaling, and what their scores say."""

from __future__ import annotations

import pytest
from scipy import stats

import effnet
from effnet.arch.cost import cost
from effnet.errors import ArgumentError
from effnet.scaling.compound import RULES
from effnet.searching.candidates import WITHIN
from effnet.searching.claim import SINGLE, SWEEP_SEEDS, contestants, jobs, standings
from effnet.searching.halving import Job

B0 = effnet.spec("b0", resolution=112)
FOUND = contestants(B0, RULES["paper"], 4.0)
MAIN = [place for place, each in enumerate(FOUND) if "=" not in each.line]


def test_the_lines_cost_the_same() -> None:
    assert [each.line for each in FOUND[:9]] == ["baseline", *("width", "depth", "resolution", "compound") * 2]
    assert [each.factor for each in FOUND[:9]] == [1, *[2.0] * 4, *[4.0] * 4]
    for each in FOUND[:9]:
        assert each.ratio == cost(each.network).macs / cost(B0).macs
        assert each.ratio == pytest.approx(each.factor, rel=WITHIN)
    assert len({each.network.shape for each in FOUND}) == len(FOUND)
    assert len({each.network.name for each in FOUND}) == len(FOUND)


def test_the_width_is_swept_as_in_the_papers_figure_4() -> None:
    swept = [each for each in FOUND if "=" in each.line]
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
    return {job: 0.8 - gap.get(FOUND[job.candidate].line, (0,) * 9)[job.seed] for job in jobs(FOUND, 3, {})}


def test_every_seed_of_the_lines_and_some_of_the_sweeps() -> None:
    wanted = jobs(FOUND, 3, {})
    assert len(set(wanted)) == len(wanted) == 3 * 9 + SWEEP_SEEDS * 7
    assert wanted[:9] == tuple(Job(0, 0, place) for place in MAIN)
    assert jobs(FOUND, 3, {wanted[0]: 0.5}) == wanted[1:]
    assert len(jobs(FOUND, 1, {})) == 9 + 7


def test_the_verdict_is_the_one_that_the_numbers_allow() -> None:
    found = standings(FOUND, 3, scores({"width": (0.05, 0.052, 0.051), "depth": (0.02, -0.02, 0.0)}))
    assert [(each.factor, each.line) for each in found] == [(factor, line) for factor in (2.0, 4.0) for line in SINGLE]
    words = {each.line: each.words for each in found}
    assert words["width"] == "compound is better than width alone"
    assert words["depth"] == "no difference between compound and depth alone was found"
    low, high = stats.t.interval(1 - 0.05 / 6, 2, 0.051, stats.sem([0.05, 0.052, 0.051]))
    assert (found[0].difference.low, found[0].difference.high) == pytest.approx((low, high))
    worse = standings(FOUND, 3, scores({"resolution": (-0.03, -0.031, -0.03)}))
    assert worse[2].words == "resolution alone is better than compound"


def test_what_is_missing_is_not_guessed() -> None:
    some = scores({})
    some.pop(Job(0, 1, 3))
    with pytest.raises(ArgumentError, match=r"lack 1 of the comparison"):
        standings(FOUND, 3, some)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"`factor` \(=1.0\) must be more than 1"):
        contestants(B0, RULES["paper"], 1.0)
    with pytest.raises(ArgumentError, match=r"cannot be reached by resolution from b0-r112 at 112 px: .* 150 px"):
        contestants(B0, RULES["paper"], 4.0, largest=150)
