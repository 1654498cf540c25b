"""Plans with torch's modules; for the kernels see test_segments.py."""

from functools import partial

import pytest

import effnet
from effnet.arch import recompute
from effnet.arch.memory import training_memory
from effnet.arch.recompute import RecomputePlan
from effnet.arch.segments import Keep
from effnet.errors import ArgumentError

extra_work, find_plan = (partial(function, kernels=False) for function in (recompute.extra_work, recompute.find_plan))


def peak(spec, batch, plan=None):
    return training_memory(spec, batch, plan=plan, kernels=False).peak


@pytest.mark.parametrize(("name", "batch"), [("b0", 16), ("b4", 8), ("lite0", 8)])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_plans_fit_and_use_what_they_may(name, batch, share):
    spec = effnet.spec(name)
    limit = int(share * peak(spec, batch))
    plan = find_plan(spec, limit, batch)
    assert peak(spec, batch, plan) <= limit
    # each part that could still keep more would not fit
    for part, keep in plan.items():
        if keep < Keep.ACTIVATIONS:
            richer = RecomputePlan({**plan, part: Keep(keep + 1)})
            cheaper = extra_work(spec, richer).equivalent_macs < extra_work(spec, plan).equivalent_macs
            assert not cheaper or peak(spec, batch, richer) > limit


def test_less_memory_is_more_work():
    spec = effnet.spec("b0")
    works = [
        extra_work(spec, find_plan(spec, int(share * peak(spec, 16)), 16)).equivalent_macs for share in (0.8, 0.5, 0.3)
    ]
    assert works == sorted(works)
    assert works[0] < works[-1]


def test_plenty_of_memory_repeats_no_convolution():
    spec = effnet.spec("b0")
    plan = find_plan(spec, 2 * peak(spec, 16), 16)
    assert extra_work(spec, plan).macs == 0
    assert set(plan.values()) == {Keep.ACTIVATIONS}


def test_work_of_the_levels_by_hand():
    """One block: stage 3's first, 112 px, 16 -> 96 channels, k3 stride 2, from the paper's Table 1."""
    spec = effnet.spec("b0")
    name, expanded, wide = "stages.3.0", 96 * 112**2, 96 * 56**2
    quiet = RecomputePlan.uniform(spec, Keep.ACTIVATIONS)

    def added(keep):
        plan = RecomputePlan({**quiet, name: keep})
        more, less = extra_work(spec, plan), extra_work(spec, quiet)
        return more.macs - less.macs, more.elements - less.elements

    assert added(Keep.CONVOLUTIONS) == (0, expanded + 2 * wide)
    assert added(Keep.DEPTHWISE) == (16 * expanded, 2 * expanded + 2 * wide)
    assert added(Keep.BOTTLENECKS) == (16 * expanded + 9 * wide, 2 * expanded + 3 * wide)


def test_too_little_memory_says_what_is_needed():
    spec = effnet.spec("b0")
    with pytest.raises(ArgumentError, match=r"too little for b0 at batch 16: [\d,]+ bytes at least") as caught:
        find_plan(spec, 10**8, 16)
    least = int(str(caught.value).split(": ")[1].split(" ")[0].replace(",", ""))
    assert peak(spec, 16, find_plan(spec, least, 16)) <= least
