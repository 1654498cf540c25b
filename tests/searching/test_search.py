"""A search from beginning to end, on tiny networks and images."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from forked import Forked
from ranges import serve
from tiny import draw_images

from effnet.arch.cost import cost
from effnet.arch.specfile import read_spec
from effnet.data.dataset import read_data
from effnet.errors import ArgumentError, DataError, TrainingError
from effnet.packing.pack import pack
from effnet.scaling.compound import read_rule, scale
from effnet.searching.plan import SearchOptions, WorkOptions, split_images
from effnet.searching.search import SearchResult, resume, search

BASELINE = Path(__file__).parents[2] / "examples" / "baselines" / "separable.yaml"
BASE = read_spec(BASELINE)
QUICK = {"epochs": 0.5, "val": 0.3}
OPTIONS = SearchOptions(triple=("1,1.4,1", "1.7,1.1,1", "1,1,1.4"), rungs=2, seeds=2, finalists=2, **QUICK)
ONE = WorkOptions(workers=1)

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def finished(in_this_process: None, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """An uninterrupted search."""
    return search(shapes, BASE, OPTIONS, ONE, out=tmp_path_factory.mktemp("finished") / "s")


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_what_a_finished_search_leaves(finished: SearchResult) -> None:
    out = finished.plan.folder
    assert finished.verdict.complete
    assert finished.missing == (0, 0)
    assert len(rows(out / "trials.csv")) == len(finished.scores) == 3 + 2 * 2
    listed = rows(out / "candidates.csv")
    assert [int(row["macs"]) for row in listed] == [cost(each.network).macs for each in finished.plan.candidates]
    assert all(each.network.num_classes == 3 for each in finished.plan.candidates)
    assert all(abs(float(row["ratio"]) - 2) <= 0.04 for row in listed)
    assert {file.name for file in out.iterdir()} == {
        *("args.yaml", "split.csv", "trials.csv", "candidates.csv"),
        *("baseline.yaml", "rule.yaml", "verdict.json", "search.png"),
    }
    rule = read_rule(out / "rule.yaml")
    assert rule == finished.rule
    assert scale(read_spec(out / "baseline.yaml"), 1, rule).num_classes == 3
    kept = yaml.safe_load((out / "rule.yaml").read_text())["found"]
    assert (kept["complete"], kept["epochs"], kept["baseline"]) == (True, 0.5, "separable")
    judged = json.loads((out / "verdict.json").read_text())
    assert list(judged["means"].values()) == list(finished.verdict.means.values())
    assert len(judged["kendall_tau_between_rungs"]) == 1
    (out / "search.png").unlink()
    again = resume(out)  # only the answer is written anew
    assert (again.scores, again.plan.candidates) == (finished.scores, finished.plan.candidates)
    assert (out / "search.png").exists()


@pytest.mark.parametrize("where", ["shards", "url"])
def test_a_search_in_shards_scores_as_in_the_folder(
    finished: SearchResult, shapes: Path, tmp_path: Path, where: str
) -> None:
    pack(read_data(shapes), tmp_path / "shards", 100_000)
    with serve(tmp_path) as (address, _):
        data = str(tmp_path / "shards") if where == "shards" else f"{address}/shards"
        search(data, BASE, OPTIONS, WorkOptions(workers=1, trials=3), out=tmp_path / "s")
        found = resume(tmp_path / "s", ONE)
        assert found.scores == finished.scores
        assert yaml.safe_load((tmp_path / "s" / "rule.yaml").read_text())["found"]["data"] == data


def test_the_verdict_of_a_search_whose_time_is_over(finished: SearchResult, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    begun = search(shapes, BASE, OPTIONS, WorkOptions(workers=1, trials=2), out=out)
    assert (begun.verdict.complete, len(begun.verdict.means)) == (False, 2)
    assert begun.missing == (1, 4)
    taken = [float(row["seconds"]) for row in rows(out / "trials.csv")]
    mean = sum(taken) / len(taken)
    assert begun.minutes == pytest.approx((1 + 4 * 3) * mean / 60, abs=0.01)  # the last are 3 times as long
    kept = yaml.safe_load((out / "rule.yaml").read_text())
    assert kept["found"]["complete"] is False
    assert read_rule(out / "rule.yaml") == begun.rule
    assert (out / "search.png").exists()
    before = rows(out / "trials.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effnet.searching.search.LocalExecutor", None)  # nothing is to be trained
        # reading the plan takes longer than 1e-6 minutes
        for none in (WorkOptions(minutes=1e-6), WorkOptions(minutes=0), WorkOptions(trials=0)):
            (out / "verdict.json").unlink()
            again = resume(out, none)
            assert (again.scores, repr(again.verdict), again.missing) == (begun.scores, repr(begun.verdict), (1, 4))
            assert (out / "verdict.json").exists()
    done = resume(out, ONE)
    assert rows(out / "trials.csv")[:2] == before
    assert (done.scores, repr(done.verdict)) == (finished.scores, repr(finished.verdict))  # nan is not nan


def test_killed_with_all_its_processes(finished: SearchResult, shapes: Path, tmp_path: Path) -> None:
    words = ["search", "run", str(shapes), "--from", str(BASELINE), "--out", str(tmp_path / "s"), "--workers", "1"]
    words += ["--epochs", "0.5", "--val", "0.3", "--rungs", "2", "--seeds", "2", "--finalists", "2"]
    words += [word for triple in OPTIONS.triple for word in ("--triple", triple)]
    process = Forked.command(tmp_path / "log", *words)
    file, deadline = tmp_path / "s" / "trials.csv", time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(60)
    before = rows(file)
    done = resume(tmp_path / "s", ONE)
    assert rows(file)[: len(before)] == before
    assert len(rows(file)) == len(done.scores)
    assert done.scores == finished.scores


def test_a_search_that_was_killed_before_its_plan_was_whole_begins_anew(
    finished: SearchResult, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    (out / ".candidates.csv.abcdefgh").mkdir(parents=True)
    for name in ("split.csv", "baseline.yaml"):
        shutil.copy(finished.plan.folder / name, out)
    begun = search(shapes, BASE, OPTIONS, WorkOptions(workers=1, trials=1), out=out)
    assert begun.scores.items() <= finished.scores.items()
    assert not list(out.glob(".*"))


def test_what_cannot_be_gone_on_with(finished: SearchResult, shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"holds a run; .*effnet search --resume {finished.plan.folder}"):
        search(shapes, BASE, OPTIONS, out=finished.plan.folder)
    with pytest.raises(ArgumentError, match="is not a search's folder"):
        resume(tmp_path)
    edited = tmp_path / "edited"
    shutil.copytree(finished.plan.folder, edited)
    args = (edited / "args.yaml").read_text()
    (edited / "args.yaml").write_text(re.sub("(?m)^sha256.*\n", "", args))
    with pytest.raises(ArgumentError, match="older effnet"):
        resume(edited)
    for old, new, refused in (("epochs: 0.5", "epochs: 5.0", True), (f"data: {shapes}", "data: /gone", False)):
        (edited / "args.yaml").write_text(args.replace(old, new))
        with pytest.raises(ArgumentError, match=r"args\.yaml that was edited") if refused else nullcontext():
            assert resume(edited, data=shapes).scores == finished.scores
    moved = tmp_path / "moved"
    shapes_copy = draw_images(moved, 40)
    assert resume(finished.plan.folder, data=shapes_copy).scores == finished.scores
    next(shapes_copy.rglob("*.png")).write_bytes(b"changed")
    with pytest.raises(DataError, match="has changed since the search began"):
        resume(finished.plan.folder, data=shapes_copy)


def test_budgets_filter_the_candidates(shapes: Path, tmp_path: Path) -> None:
    def options(**budget: object) -> SearchOptions:
        return SearchOptions(triple=OPTIONS.triple, rungs=1, seeds=1, **QUICK, **budget)  # type: ignore[arg-type]

    found = search(shapes, BASE, options(params=150_000), WorkOptions(workers=1, trials=1), out=tmp_path / "p")
    assert 0 < len(found.plan.candidates) < 3
    assert all(cost(each.network).params <= 150_000 for each in found.plan.candidates)
    with pytest.raises(ArgumentError, match=r"`budget` .* all 3 networks: they need at least [\d,]+ params"):
        search(shapes, BASE, options(params=1_000), out=tmp_path / "t")
    with pytest.raises(ArgumentError, match=r"`latency` .* all candidates: the fastest takes"):
        search(shapes, BASE, options(latency=1e-6), out=tmp_path / "l")
    assert {path.name for path in tmp_path.iterdir()} == {"p"}


def test_the_length_of_trainings(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effnet.searching.search.STEPS", 3)
    for rungs, least, steps in ((1, 2, 3), (2, 2, 6)):  # of 84 images, fewer than two batches, an epoch is a step
        monkeypatch.setattr("effnet.searching.search.LEAST_STEPS", least)
        options = SearchOptions(triple=OPTIONS.triple, rungs=rungs, seeds=1, val=0.3)
        assert search(shapes, BASE, options, WorkOptions(trials=1), out=tmp_path / f"{rungs}").plan.epochs == steps
    with pytest.raises(TrainingError, match="no training is finished; go on: effnet search --resume"):
        search(shapes, BASE, OPTIONS, WorkOptions(minutes=0), out=tmp_path / "u")
    for wrong in ({"minutes": -1}, {"trials": -1}, {"workers": 0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            WorkOptions(**wrong)


def test_two_classes_of_which_nothing_is_learned(finished: SearchResult, shapes: Path, tmp_path: Path) -> None:
    data, messages = tmp_path / "two", list[str]()
    for split, name, count in (("train", "disc", 20), ("train", "ring", 20), ("val", "disc", 6)):
        (data / split / name).mkdir(parents=True)
        for file in sorted((shapes / name).iterdir())[:count]:
            (data / split / name / file.name).symlink_to(file)
    progress = SimpleNamespace(message=messages.append, update=lambda *_: None)
    options = SearchOptions(triple=OPTIONS.triple[:2], rungs=1, seeds=1, epochs=0.5)
    found = search(data, BASE, options, ONE, out=tmp_path / "s", progress=progress)
    assert "no image in val of 'ring': the figures there do not show how well it is recognised" in messages
    assert (found.guessing, found.learned) == (1.0, False)
    assert json.loads((tmp_path / "s" / "verdict.json").read_text())["better_than_guessing"] is False
    assert finished.guessing == pytest.approx(1 / 3)
    n = len(finished.plan.data.subset("val"))
    for mean, learned in ((1 / 3, False), (1 / 3 + 1 / n, False), (0.9, True)):
        verdict = dataclasses.replace(finished.verdict, means=dict.fromkeys(finished.verdict.means, mean))
        assert dataclasses.replace(finished, verdict=verdict).learned is learned
    shutil.rmtree(data / "val")
    shutil.rmtree(data / "train" / "ring")
    with pytest.raises(DataError, match="has one class, at least two are needed: 'disc'"):
        search(data / "train", BASE, options, out=tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_images_are_taken_evenly(shapes: Path) -> None:
    data = split_images(shapes, SearchOptions(images=12, val=0.3))
    assert data.subset("train").counts == data.subset("val").counts == (4, 4, 4)
    assert split_images(shapes, SearchOptions(images=1000, val=0.3)) == split_images(shapes, SearchOptions(val=0.3))
    parts = [split_images(shapes, SearchOptions(images=7, seed=seed, val=0.3)).samples for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert len(read_data(shapes)) == 120


def test_what_is_in_the_way(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "split.csv").write_text("of a training")
    with pytest.raises(ArgumentError, match=r"`out` .* exists and holds something else"):
        search(shapes, BASE, out=tmp_path / "run")
    assert (tmp_path / "run" / "split.csv").read_text() == "of a training"
    with pytest.raises(DataError, match="does not exist"):
        search(tmp_path / "nothing", BASE, out=tmp_path / "n")
    with pytest.raises(ArgumentError, match=r"`device` \(='mps'\) .* can use here: cpu"):
        search(shapes, BASE, SearchOptions(device="mps"), out=tmp_path / "n")
    assert not (tmp_path / "n").exists()
