"""The pictures of a search and of a comparison: every network is on them, at its score."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from scipy import stats

import effnet
from effnet.scaling.compound import RULES
from effnet.searching.candidates import candidates, grid
from effnet.searching.claim import contestants, jobs
from effnet.searching.halving import jobs_in_all, ladder, open_jobs, verdict
from effnet.searching.plots import draw_comparison, draw_search

B0 = effnet.spec("b0", resolution=112)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: (figures.append(figure), save(figure, *a, **kw)))
    return figures


def test_every_candidate_is_ranked(tmp_path: Path, drawn: list[Figure]) -> None:
    found = candidates(B0, grid(0.1, 0.1))
    rungs, scores = ladder(len(found), seeds=2, finalists=3), {}
    while missing := open_jobs(rungs, scores):
        scores |= {job: 0.8 - job.candidate / 100 + job.seed / 1000 + job.rung / 50 for job in missing}
    assert len(scores) == len(jobs_in_all(rungs))
    draw_search(found, rungs, scores, verdict(rungs, scores), tmp_path / "search.png")
    dots, triangle = drawn[0].axes
    labels = [tick.get_text() for tick in dots.get_yticklabels()]
    assert labels == [
        f"{place}:  {', '.join(f'{x:.2f}' for x in each.effective)}" for place, each in enumerate(found, 1)
    ]
    points = [tuple(point) for row in dots.collections for point in row.get_offsets()]
    assert sorted(points) == sorted((100 * score, job.candidate) for job, score in scores.items())
    assert len(triangle.collections) == len(found)
    assert len(dots.get_legend().get_texts()) == 3


def test_the_lines_have_intervals(tmp_path: Path, drawn: list[Figure]) -> None:
    found = contestants(B0, RULES["paper"], 4.0)
    scores: dict[int, list[float]] = {place: [] for place in range(len(found))}
    for job in jobs(found, 3, {}):
        scores[job.candidate].append(0.7 + job.candidate / 100 + job.seed**2 / 1000)
    draw_comparison(found, scores, tmp_path / "compare.svg")
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
    values = [100 * score for score in scores[compound[-1]]]
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, sum(values) / 3, stats.sem(values)))


def test_a_single_seed_has_no_interval(tmp_path: Path, drawn: list[Figure]) -> None:
    found = contestants(B0, RULES["paper"], 4.0)
    draw_comparison(found, {place: [0.5] for place in range(len(found))}, tmp_path / "compare.png")
    (low, high) = drawn[0].axes[0].containers[0].lines[2][0].get_segments()[0][:, 1]
    assert low == high == 50
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
