"""Which networks are considered, what they cost, and which limit refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from effnet import cost
from effnet import spec as make_spec
from effnet.arch.memory import file_bytes
from effnet.errors import ArgumentError
from effnet.fitting.candidates import Facts, FitCandidate, find_candidates, require_any, resolutions
from effnet.fitting.settings import FitOptions, FitPlan

SMALL = Facts(classes=10, train=850, side=28)


def find(tmp_path: Path, facts: Facts = SMALL, **options: object) -> list[FitCandidate]:
    return find_candidates(FitPlan(tmp_path, tmp_path, FitOptions(**options)), facts)  # type: ignore[arg-type]


def test_costs_are_those_of_the_network_and_the_limit_decides(tmp_path: Path) -> None:
    found = {each.name: each for each in find(tmp_path, macs="100M", minutes=1)}
    lite0 = make_spec("lite0", num_classes=10, resolution=64)
    assert found["lite0-64"].costs["macs"] == cost(lite0).macs
    assert found["lite0-64"].costs["params"] == cost(lite0).params
    assert found["lite0-64"].costs["file_size"] == file_bytes(lite0)
    assert found["lite0-64"].refused is None
    refused = found["lite0-128"].refused
    assert refused is not None
    assert (refused.limit, refused.allowed) == ("macs", 100_000_000)
    assert refused.value == cost(make_spec("lite0", num_classes=10, resolution=128)).macs
    assert all((each.refused is None) == (each.costs["macs"] <= 100_000_000) for each in found.values())


def test_resolutions_follow_the_images_and_the_weights() -> None:
    assert resolutions(28, 224, None) == [32, 64, 128, 192, 224]
    assert resolutions(500, 224, None) == [32 * number for number in range(1, 10)]  # 288 px are 1.29 times 224
    assert resolutions(90, 240, None) == [32, 64, 96, 128, 192, 224]
    assert resolutions(500, 224, 200) == [200]


def test_every_limit_can_refuse(tmp_path: Path) -> None:
    found = find(tmp_path, params="1M", minutes=1)
    assert {each.refused.limit for each in found if each.refused} == {"params"}
    assert {each.weights for each in found if each.refused is None} == {"lite0"}  # sliced to half of the width
    assert not any(each.whole for each in found if each.refused is None)


def test_training_memory_can_refuse(tmp_path: Path) -> None:
    found = find(tmp_path, train_memory="20MB", resolution=32, minutes=1)
    assert {each.refused.limit for each in found if each.refused} == {"train_memory"}
    assert any(each.refused is None for each in found)


def test_only_many_images_are_learned_from_scratch(tmp_path: Path) -> None:
    many = Facts(classes=10, train=50_000, side=28)
    for name, facts, expected in (("few", SMALL, False), ("many", many, True)):
        (tmp_path / name).mkdir()
        found = find(tmp_path / name, facts, macs="100M", minutes=1)
        assert any(not each.weights for each in found) == expected


def test_an_impossible_budget_names_the_smallest_need(tmp_path: Path) -> None:
    options = FitOptions(params="100k")
    found = find(tmp_path, params="100k", minutes=1)
    with pytest.raises(ArgumentError, match=r"params.*lite0-w0\.35.*0\.565") as error:
        require_any(found, options)
    assert error.value.argument == "params"


def test_limits_that_exclude_each_other_are_named(tmp_path: Path) -> None:
    limits = {"params": "600k", "macs": "1.6M"}
    with pytest.raises(ArgumentError, match="macs"):
        require_any(find(tmp_path, minutes=1, **limits), FitOptions(**limits))


def test_latency_and_memory_are_measured(tmp_path: Path) -> None:
    found = find(tmp_path, latency="10s", memory="1GB", params="600k", resolution=32, minutes=1)
    kept = require_any(found, FitOptions(latency="10s"))
    assert {each.name for each in kept} == {"lite0-w0.35-32"}
    costs = kept[0].costs
    assert 0 < costs["latency"] <= costs["slowest_tenth"]
    assert costs["memory"] > 4 * costs["params"]  # it holds the weights at least


def test_eight_bits_are_tried_where_only_they_keep_the_file(tmp_path: Path) -> None:
    found = find(tmp_path, minutes=1, file_size="4.5MB", params="3.5M")
    made = [each for each in found if each.int8]
    assert {each.name for each in made} == {f"lite0-{size}-int8" for size in (32, 64, 128, 192, 224)}
    assert {each.refused for each in made} == {None}
    assert len({each.costs["file_size"] for each in made}) == 1  # one of them was written
    assert made[0].costs["file_size"] < 4_500_000 < file_bytes(made[0].spec)


def test_candidates_are_kept_in_a_file(tmp_path: Path) -> None:
    first = find(tmp_path, macs="100M", minutes=1)
    assert find(tmp_path, macs="1M", minutes=1) == first  # read, not made again
