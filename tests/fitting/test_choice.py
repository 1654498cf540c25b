"""The rule of the choice: the best, or a cheaper one where the images show no difference."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from machines import Machines
from short_run import Recorder

from effnet import spec as make_spec
from effnet.cluster import ClusterJob
from effnet.data.dataset import read_data, split_data
from effnet.errors import ClusterError
from effnet.fitting import choice, probes
from effnet.fitting.candidates import FitCandidate
from effnet.fitting.choice import ScoreRecord, choose, decide
from effnet.fitting.probes import Right
from effnet.fitting.settings import CHOICE, FitOptions, FitPlan
from effnet.progress import Progress


def candidate(name: str, macs: float) -> FitCandidate:
    return FitCandidate(name, make_spec("lite0", resolution=32), "lite0", costs={"macs": macs})


def right(wrong: int, n: int = 1000) -> Right:
    """n images, of which the first ones are wrong."""
    return np.arange(n) >= wrong


LARGE, SMALL = candidate("large", 2e8), candidate("small", 1e8)


def test_a_clearly_better_network_is_taken() -> None:
    order, reason = decide([LARGE, SMALL], {"large": right(50), "small": right(100)}, "on 1,000 images")
    assert [each.name for each in order] == ["large", "small"]
    assert "+5.00 points" in reason


def test_a_cheaper_one_is_taken_where_no_difference_is_found() -> None:
    mixed = right(50).copy()
    mixed[40:60] = ~mixed[40:60]  # each gets ten right that the other gets wrong
    order, reason = decide([LARGE, SMALL], {"large": right(50), "small": mixed}, "on 1,000 images")
    assert order[0].name == "small"
    assert "no difference from large was found (+0.00 points" in reason


def test_a_cheaper_one_that_is_probably_worse_is_not_taken() -> None:
    """The interval holds 0, but the cheaper one gets eight more of a thousand wrong."""
    worse = right(50).copy()
    worse[50:70] = False
    worse[:12] = True
    order, reason = decide([LARGE, SMALL], {"large": right(50), "small": worse}, "on 1,000 images")
    assert order[0].name == "large"
    assert "cannot prove" in reason


def test_a_dearer_one_is_not_taken_for_nothing() -> None:
    order, _ = decide([SMALL, LARGE], {"large": right(51), "small": right(50)}, "on 1,000 images")
    assert order[0].name == "small"


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_scores_are_read_as_they_were_written(tmp_path: Path, n: int) -> None:
    drawn = np.random.default_rng(n).random(n) < 0.5
    ScoreRecord(tmp_path / "choice.json").get("probe a", lambda: drawn)

    def again() -> Right:
        raise AssertionError("scored twice")

    assert (ScoreRecord(tmp_path / "choice.json").get("probe a", again) == drawn).all()


def entrants(classes: int) -> list[FitCandidate]:
    """Lite0 with its weights, at two resolutions, and a narrower network that inherits them."""
    own = make_spec("lite0", num_classes=classes)
    made = [
        FitCandidate(f"lite0-{size}", dataclasses.replace(own, resolution=size), "lite0", costs={"macs": size * 1e5})
        for size in (32, 64)
    ]
    narrow = make_spec(own, width=0.5, resolution=64)
    return [*made, FitCandidate("narrow", narrow, "lite0", whole=False, costs={"macs": 9e6})]


def test_networks_that_inherit_their_weights_are_compared_where_no_whole_one_is_left(shapes: Path) -> None:
    """The widest of them, at resolutions up to four times the images' own, the cheapest first."""

    def inherited(width: float, size: int) -> FitCandidate:
        costs = {"macs": width * size, "params": width}
        spec = make_spec("lite0", width=width, resolution=size)
        return FitCandidate(f"w{width}-{size}", spec, "lite0", whole=False, costs=costs)

    narrow = [inherited(width, size) for width in (0.5, 0.35) for size in (32, 64, 128, 192, 224)]
    names = [each.name for each in choice._without_probe(narrow, [], read_data(shapes))]
    assert names == ["w0.5-32", "w0.5-64", "w0.5-128"]


@pytest.mark.parametrize("images", [1000, 10_000])
def test_a_network_that_cannot_be_trained_for_long_enough_is_left_out(images: int) -> None:
    """Three epochs and 150 steps are needed; where no network has the time, the quickest one is left."""
    sizes = {size: FitCandidate(f"lite0-{size}", make_spec("lite0", resolution=size), "lite0") for size in (32, 224)}
    recipe, step = sizes[224].pace(images)
    lasts = max(3 * (images // recipe.batch), 150) * step
    both = list(sizes.values())
    assert choice._learnable(both, images, 1.01 * lasts) == both
    assert choice._learnable(both, images, 0.99 * lasts) == [sizes[32]]
    assert choice._learnable(both, images, 0.0) == [sizes[32]]


def test_the_last_entrants_are_given_up_where_the_time_is_short(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "LEAST_VAL", 5)
    monkeypatch.setattr(choice, "_affordable_steps", lambda entrants, *_: 60 if len(entrants) == 2 else 59)
    monkeypatch.setattr(choice, "_train_one", lambda *_: right(1, 8))
    plan, data = FitPlan(tmp_path, shapes, FitOptions(macs="100M", minutes=2)), split_data(read_data(shapes))
    found = choose(plan, data, entrants(3))
    assert [name for name, kinds in found.scores.items() if "short" in kinds] == ["lite0-32", "lite0-64"]


def test_probes_and_short_trainings_choose(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is done once; a second call reads it, and comes to the same choice."""
    monkeypatch.setattr(choice, "LEAST_VAL", 5)
    monkeypatch.setattr(choice, "LEAST_STEPS", 1)
    monkeypatch.setattr(choice, "_affordable_steps", lambda *_: 4)  # in place of as many as there is time for
    plan = FitPlan(tmp_path, shapes, FitOptions(macs="100M", minutes=2))
    data = split_data(read_data(shapes))
    first = choose(plan, data, entrants(3))
    assert set(first.order) == {"lite0-32", "lite0-64", "narrow"}
    assert {name: set(kinds) for name, kinds in first.scores.items()} == {
        "lite0-32": {"probe", "short"},
        "lite0-64": {"probe", "short"},
        "narrow": {"short"},
    }
    assert "after a short training" in first.reason
    assert not list(tmp_path.glob(".pixels*"))  # decoded images are gone
    written = (tmp_path / CHOICE).read_text()
    monkeypatch.setattr(probes, "_features", lambda *_: pytest.fail("probed twice"))
    monkeypatch.setattr(choice, "_train_one", lambda *_: pytest.fail("trained twice"))
    again = choose(plan, data, entrants(3))
    assert (again.order, again.reason, again.scores) == (first.order, first.reason, first.scores)
    assert "right" in written


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as a machine of the cluster has cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
def test_a_cluster_comes_to_the_same_choice_to_the_bit_also_when_a_machine_dies(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "LEAST_VAL", 5)
    monkeypatch.setattr(choice, "LEAST_STEPS", 1)
    monkeypatch.setattr(choice, "_affordable_steps", lambda *_: 2)
    data, progress = split_data(read_data(shapes)), Recorder()
    found = []
    with Machines() as machines, machines.second_dies("_train_there"):
        for folder, address in ((tmp_path / "there", machines.address), (tmp_path / "here", None)):
            folder.mkdir()
            plan = FitPlan(folder, shapes, FitOptions(macs="100M"))
            with monkeypatch.context() as patch:
                if address:
                    patch.setattr(choice, "_train_one", lambda *_: pytest.fail("trained here"))
                chosen = choose(plan, data, entrants(3), progress, address)
            values = json.loads((folder / CHOICE).read_text())
            found.append((dataclasses.replace(chosen, seconds=0.0), values | {"seconds": 0.0}))
    assert progress.has("its worker or machine died")
    assert sum(name.startswith("short ") for name in found[0][1]["right"]) == 5
    assert found[0] == found[1]
    assert not list(Path(tempfile.gettempdir()).glob(f"effnet-fit-*-{os.getpid()}"))


def test_what_no_worker_survives_is_trained_here(tmp_path: Path) -> None:
    class Dying:
        each = 1

        def run(self, function: object, jobs: Iterable[ClusterJob], progress: Progress) -> Iterator[tuple[str, Right]]:
            (first, _), (second, _) = jobs
            yield first, right(1)
            raise ClusterError(f"{second}: its worker died 3 times")

    record, progress = ScoreRecord(tmp_path / CHOICE), Recorder()
    record.keep("known", right(2))
    work = [(name, ()) for name in ("known", "first", "second")]
    choice._train_elsewhere(Dying(), "scratch", work, record, progress)  # type: ignore[arg-type]
    assert set(ScoreRecord(tmp_path / CHOICE).rights) == {"known", "first"}
    assert progress.has("second: its worker died 3 times; this machine does it instead")


def test_test_images_are_not_seen(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "LEAST_VAL", 5)
    monkeypatch.setattr(choice, "LEAST_STEPS", 1)
    data = split_data(read_data(shapes))
    for sample in data.subset("test").samples:  # reading one would fail
        assert data.file(sample).is_file()
    gone = dataclasses.replace(
        data,
        samples=tuple(dataclasses.replace(s, path=f"{s.path}.gone") if s.split == "test" else s for s in data.samples),
    )
    assert choose(FitPlan(tmp_path, shapes, FitOptions(macs="100M", minutes=0.1)), gone, entrants(3)[:2]).order
