"""What a budget chooses from: exact counts, near the curve, under any rule, and never beyond what can be counted."""

import random

import pytest

import effnet
from effnet.arch.memory import file_bytes, inference_memory, training_memory
from effnet.arch.spec import LARGEST_FACTOR
from effnet.errors import ArgumentError
from effnet.scaling.budget import Budget
from effnet.scaling.compound import Rule
from effnet.scaling.curve import BUILT, ROUNDINGS
from effnet.scaling.fit import fit_spec

LARGEST = 10**15


def test_many_are_counted_as_one_is():
    training, base = {"train_memory": "3GB", "batch": 12, "precision": "fp32"}, "lite0"
    found = fit_spec(Budget(macs="700M", params="9M", memory="60MB", file_size="40MB", **training), base).candidates
    for index in random.Random(0).sample(range(len(found["macs"])), 20):
        built = {name: found[name][index] for name in BUILT}
        network = effnet.spec(
            base,
            depth=float(built["depth"]),
            width=float(built["width"]),
            resolution=int(built["resolution"]),
            depth_rounding=ROUNDINGS[built["rounding"]],
        )
        price = effnet.cost(network)
        assert {name: int(found[name][index]) for name in set(found) - set(BUILT)} == {
            "macs": price.macs,
            "params": price.params,
            "memory": inference_memory(network),
            "train_memory": training_memory(network, 12).peak,
            "file_size": file_bytes(network),
        }


@pytest.mark.parametrize("growths", [(1.0001, 1, 1), (2, 2, 2), (100, 100, 100), (1, 1, 1.00001)])
def test_a_rule_may_grow_slowly_or_fast(growths):
    fit = fit_spec(Budget(macs="1G"), rule=Rule(*growths))
    assert 0.97 <= fit.use <= 1
    assert fit.considered < 20_000


@pytest.mark.parametrize("step", [1, 8, 64])
def test_candidates_do_not_multiply_with_small_steps(step):
    fit = fit_spec(Budget(macs="1G"), resolution_step=step)
    assert fit.spec.resolution % step == 0
    assert 0.98 <= fit.use <= 1
    assert fit.considered < 20_000


@pytest.mark.parametrize(
    "limits",
    [
        {"train_memory": "8TB", "batch": 10**9},
        {"train_memory": "8GB", "batch": 2048, "width": 100, "depth": 100},
        {"macs": "1G", "resolution": 10**6},
        {"macs": "1G", "resolution": 10**9, "width": 100},
    ],
)
def test_what_64_bits_cannot_count_is_no_fit(limits):
    with pytest.raises(ArgumentError, match=r"cannot be met.*needs [\d,]{10,}"):
        fit_spec(Budget(**limits))


def test_a_limit_beyond_everything_ends_at_the_largest_factors():
    fit = fit_spec(Budget(macs=LARGEST, params=LARGEST))
    assert fit.use <= 1
    assert max(fit.spec.width, fit.spec.depth) <= LARGEST_FACTOR
    assert fit_spec(Budget(macs=LARGEST), rule="depth").spec.depth <= LARGEST_FACTOR


def test_settled_dimensions_and_a_rule_that_grows_nothing_else():
    fit = fit_spec(Budget(macs="1G", resolution=224), rule="resolution")
    assert fit.spec.resolution == 224
    assert abs(fit.spec.width - 1) <= 0.05 + 1e-9
    assert abs(fit.spec.depth - 1) <= 0.05 + 1e-9


def test_the_largest_resolution_holds_with_any_step():
    assert fit_spec(Budget(macs="5G", max_resolution=260), resolution_step=100).spec.resolution == 200
    with pytest.raises(ArgumentError, match=r"`max_resolution` \(=64\).*one step \(=100\)"):
        fit_spec(Budget(macs="5G", max_resolution=64), resolution_step=100)
    with pytest.raises(ArgumentError, match="at least 32 pixels"):
        Budget(macs="5G", max_resolution=30)


def test_a_rounding_that_is_none():
    with pytest.raises(ArgumentError, match="ceil, nearest"):
        fit_spec(Budget(macs="1G"), depth_rounding="up")
