"""The picture of a search: every network is on it, at its score."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

import effnet
from effnet.searching.answer import draw_search
from effnet.searching.candidates import build_candidates, grid
from effnet.searching.halving import judge, make_rungs, open_jobs

B0 = effnet.spec("b0", resolution=112)


def test_every_candidate_is_ranked(tmp_path: Path, drawn: list[Figure]) -> None:
    found = build_candidates(B0, grid(0.1, 0.1))
    rungs, scores = make_rungs(len(found), seeds=2, finalists=3), {}
    while missing := open_jobs(rungs, scores):
        scores |= {job: 0.8 - job.candidate / 100 + job.seed / 1000 + job.rung / 50 for job in missing}
    draw_search(found, rungs, scores, judge(rungs, scores), tmp_path / "search.png")
    dots, triangle = drawn[0].axes
    labels = [tick.get_text() for tick in dots.get_yticklabels()]
    assert labels == [
        f"{place}:  {', '.join(f'{x:.2f}' for x in each.effective)}" for place, each in enumerate(found, 1)
    ]
    points = [tuple(point) for row in dots.collections for point in row.get_offsets()]
    assert sorted(points) == sorted((100 * score, job.candidate) for job, score in scores.items())
    assert len(triangle.collections) == len(found)
    assert len(dots.get_legend().get_texts()) == 3
