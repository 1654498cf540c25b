from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor import InThisProcess
from tiny import draw_images, tiny_spec

from effnet.data.dataset import read_data, split_data
from effnet.searching.candidates import Candidate
from effnet.searching.plan import CACHE, SearchOptions, SearchPlan
from effnet.searching.score import attempt
from effnet.training.recipe import read_recipe


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """Searches train here instead of in other processes."""

    def executor(plan: SearchPlan, workers: int) -> InThisProcess:
        return InThisProcess(lambda job: attempt(plan, job, plan.folder / CACHE), slots=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effnet.searching.search.LocalExecutor", executor)
        yield


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of three classes."""
    return draw_images(tmp_path_factory.mktemp("images") / "shapes", 40)


@pytest.fixture(scope="module")
def plan(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchPlan:
    """Four tiny networks of different widths, two rungs, two finalists of two seeds."""
    networks = [dataclasses.replace(tiny_spec(), width=width) for width in (1.0, 1.5, 2.0, 3.0)]
    found = tuple(Candidate.of(tiny_spec(), network, ()) for network in networks)
    options, recipe = SearchOptions(rungs=2, seeds=2, finalists=2), read_recipe("scratch", batch=16)
    data = split_data(read_data(shapes), val=0.3, test=0)
    return SearchPlan(tmp_path_factory.mktemp("plan"), options, data, recipe, tiny_spec(), found, 3.0)
