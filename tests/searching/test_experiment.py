"""A search and a comparison from beginning to end, on tiny networks and images."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import draw_images

from effnet.arch.cost import cost
from effnet.arch.specfile import read_spec
from effnet.errors import ArgumentError, DataError
from effnet.progress import SILENT
from effnet.scaling.budget import Budget
from effnet.scaling.compound import Rule, read_rule, scale
from effnet.searching import experiment as contest
from effnet.searching.compare import compare
from effnet.searching.experiment import Contest, Terms, _some
from effnet.searching.search import Question, search

BASE = read_spec(Path(__file__).parents[2] / "examples" / "baselines" / "separable.yaml")
QUESTION = Question(step=0.2, tolerance=0.2, rungs=2, seeds=2, finalists=2)
QUICK: dict[str, Any] = {"epochs": 0.5, "workers": 2, "val": 0.3}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("shapes") / "shapes", 40)


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_a_search_from_beginning_to_end(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    half = search(shapes, BASE, question=QUESTION, out=out, trials=3, **QUICK)
    assert half.verdict is None
    with pytest.raises(ArgumentError, match="is not there yet"):
        _ = half.rule
    before = rows(out / "trials.csv")
    found = search(shapes, BASE, question=QUESTION, out=out, **QUICK)
    assert found.verdict is not None
    assert [row for row in rows(out / "trials.csv") if row in before] == before  # nothing was repeated
    assert len(rows(out / "trials.csv")) == len(found.scores)
    listed = rows(out / "candidates.csv")
    assert [int(row["macs"]) for row in listed] == [cost(each.network).macs for each in found.candidates]
    assert all(each.network.num_classes == 3 for each in found.candidates)
    assert all(abs(float(row["ratio"]) - 2) <= 0.04 for row in listed)
    assert {file.name for file in out.iterdir()} == {
        *("split.csv", "study.sqlite3", "trials.csv", "candidates.csv"),
        *("baseline.yaml", "rule.yaml", "verdict.json", "search.png"),
    }
    rule = read_rule(out / "rule.yaml")
    assert rule == found.rule
    assert scale(BASE, 1, rule).name
    told = yaml.safe_load((out / "rule.yaml").read_text())["found"]
    assert (told["candidates"], told["trainings"]) == (len(found.candidates), len(found.scores))
    judged = json.loads((out / "verdict.json").read_text())
    assert list(judged["means"].values()) == list(found.verdict.means.values())
    assert len(judged["kendall_tau_between_rungs"]) == 1
    (out / "search.png").unlink()
    again = search(shapes, BASE, question=QUESTION, out=out, **QUICK)  # only the answer is written anew
    assert again.scores == found.scores
    assert (out / "search.png").exists()
    with pytest.raises(ArgumentError, match="differs in its epochs"):
        search(shapes, BASE, question=QUESTION, out=out, **QUICK | {"epochs": 1.0})
    with pytest.raises(ArgumentError, match="differs in its val"):
        search(shapes, BASE, question=QUESTION, out=out, **QUICK | {"val": 0.2})


def test_a_comparison_from_beginning_to_end(shapes: Path, tmp_path: Path) -> None:
    found = compare(shapes, BASE, rule="1.2,1.2,1.2", seeds=2, out=tmp_path / "c", **QUICK)
    assert found.standings is not None
    assert len(found.standings) == 6
    assert {len(found.scores_of(place)) for place in range(len(found.contestants))} == {2}
    judged = json.loads((tmp_path / "c" / "verdict.json").read_text())["compound"]
    assert [row["words"] for row in judged] == [stand.words for stand in found.standings]
    assert (tmp_path / "c" / "compare.png").exists()
    assert [row["line"] for row in rows(tmp_path / "c" / "candidates.csv")][:3] == ["baseline", "width", "depth"]


def test_budgets_filter_the_candidates(shapes: Path, tmp_path: Path) -> None:
    triples = (Rule(1, 1.4, 1), Rule(1.7, 1.1, 1), Rule(1, 1, 1.4))
    most = Question(triples=triples, budget=Budget(params=150_000), rungs=1, seeds=1)
    found = search(shapes, BASE, question=most, out=tmp_path / "p", trials=1, **QUICK)
    assert found.candidates
    assert all(cost(each.network).params <= 150_000 for each in found.candidates)
    tight = dataclasses.replace(most, budget=Budget(params=1_000))
    with pytest.raises(
        ArgumentError, match=r"`budget` .* is met by none of the 3 networks: they take at least [\d,]+ params"
    ):
        search(shapes, BASE, question=tight, out=tmp_path / "t", **QUICK)
    assert not (tmp_path / "t").exists()
    slow = dataclasses.replace(most, budget=Budget(latency=1e-6))
    with pytest.raises(ArgumentError, match=r"`latency` .* is met by no candidate: the fastest takes"):
        search(shapes, BASE, question=slow, out=tmp_path / "l", **QUICK)
    fast = dataclasses.replace(most, budget=Budget(latency=10.0))
    begun = search(shapes, BASE, question=fast, out=tmp_path / "f", trials=1, **QUICK)
    gone_on = search(shapes, BASE, question=fast, out=tmp_path / "f", **QUICK)
    assert begun.candidates == gone_on.candidates


def test_the_minutes_become_epochs(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "LEAST_STEPS", 5)  # which a busy machine does in the time, too
    question = Question(triples=(Rule(1, 1.4, 1), Rule(1.7, 1.1, 1)), rungs=1, seeds=1)
    terms = {"val": 0.3, "workers": 1, "trials": 1}
    search(shapes, BASE, question=question, out=tmp_path / "s", minutes=0.2, **terms)
    epochs = Contest(Terms(str(shapes), BASE, out=tmp_path / "s"), "search", SILENT).study.about["epochs"]  # type: ignore[index]
    assert epochs > 1
    found = search(shapes, BASE, question=question, out=tmp_path / "s", minutes=0.1, **terms)
    assert found.verdict is not None  # it went on with the epochs that it began with
    with pytest.raises(ArgumentError, match=r"`minutes` \(=0.0001\) leaves trainings of fewer than 5 steps"):
        search(shapes, BASE, question=question, out=tmp_path / "t", minutes=0.0001, **terms)


def test_images_are_taken_evenly(shapes: Path, tmp_path: Path) -> None:
    contest = Contest(Terms(str(shapes), BASE, out=tmp_path / "s", images=12, val=0.3), "search", SILENT)
    assert contest.data.part("train").counts == (4, 4, 4)
    assert contest.data.part("val").counts == (4, 4, 4)
    samples = contest.data.part("train").samples
    assert _some(samples, 100, 0) == list(samples)
    assert _some(samples, 7, 0) != _some(samples, 7, 1)
    assert contest.native == 32


def test_what_is_in_the_way(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("split.csv", "args.yaml"):
        (tmp_path / "run" / name).write_text("of a training")
    with pytest.raises(ArgumentError, match=r"`out` .* exists and holds something else"):
        search(shapes, BASE, out=tmp_path / "run")
    assert (tmp_path / "run" / "split.csv").read_text() == "of a training"
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"`out` .* exists and holds something else"):
        search(shapes, BASE, out=tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        search(tmp_path / "nothing", BASE, out=tmp_path / "n")
    assert not (tmp_path / "n").exists()
    with pytest.raises(ArgumentError, match=r"`device` \(='cuda'\) is not there"):
        search(shapes, BASE, out=tmp_path / "d", device="cuda")
