"""Costs of many networks at once equal those of each alone; requirements on kinds of blocks."""

import numpy as np
import pytest

import effnet
from effnet.arch.blocks import Layer, Op
from effnet.arch.cost import total_cost
from effnet.arch.memory import file_bytes, inference_memory, training_memory
from effnet.arch.segments import Keep
from effnet.arch.variants import B0, LITE0
from effnet.errors import ArgumentError

generator = np.random.default_rng(0)
WIDTH = generator.uniform(0.05, 4, 15)
DEPTH = generator.uniform(0.05, 4, 15)
RESOLUTION = generator.integers(8, 700, 15)


@pytest.mark.parametrize("base", [B0, LITE0, effnet.spec("b0", depth_rounding="nearest")], ids=lambda spec: spec.name)
def test_many_at_once_cost_what_each_costs_alone(base):
    many = base.shape_at(WIDTH, DEPTH, RESOLUTION)
    price, file = total_cost(many), file_bytes(many)
    inference = inference_memory(many)
    training = {keep: training_memory(many, 3, plan=keep) for keep in (None, *Keep)}
    for i, (width, depth, resolution) in enumerate(zip(WIDTH, DEPTH, RESOLUTION, strict=True)):
        spec = effnet.spec(base, width=float(width), depth=float(depth), resolution=int(resolution))
        one = effnet.cost(spec)
        assert (price.params[i], price.macs[i], price.activations[i]) == (one.params, one.macs, one.activations)
        assert {inference[i].dtype, price.macs[i].dtype} == {np.dtype("int64")}
        assert inference[i] == inference_memory(spec)
        assert file[i] == file_bytes(spec)
        for keep, held in training.items():
            assert held.peak[i] == training_memory(spec, 3, plan=keep).peak
            assert held.activations[i] == training_memory(spec, 3, plan=keep).activations


def test_a_path_must_not_end_in_a_depthwise_layer():
    depthwise = Layer("depthwise", 8, 8, 3, 8, 8, depthwise=True)
    with pytest.raises(ArgumentError, match=r"`layers` .*backwards.* depthwise layer"):
        Op("backwards", lambda block: (Layer("pointwise", 8, 8, 1, 8, 8), depthwise), lambda block: "")
    Op("forwards", lambda block: (depthwise, Layer("pointwise", 8, 8, 1, 8, 8)), lambda block: "")
