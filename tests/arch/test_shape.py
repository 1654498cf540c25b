"""Many networks at once cost what each of them costs alone."""

import numpy as np
import pytest

import effnet
from effnet.arch.cost import total_cost
from effnet.arch.memory import Keep, file_bytes, inference_memory, training_memory
from effnet.arch.variants import B0, LITE0

generator = np.random.default_rng(0)
WIDTH = generator.uniform(0.05, 4, 200)
DEPTH = generator.uniform(0.05, 4, 200)
RESOLUTION = generator.integers(8, 700, 200)


@pytest.mark.parametrize("base", [B0, LITE0, effnet.spec("b0", depth_rounding="nearest")], ids=lambda spec: spec.name)
def test_two_hundred_at_once_are_two_hundred_alone(base):
    many = base.shape_at(WIDTH, DEPTH, RESOLUTION)
    price, file = total_cost(many), file_bytes(many)
    inference = inference_memory(many)
    training = {keep: training_memory(many, 3, plan=keep) for keep in (None, *Keep)}
    for i, (width, depth, resolution) in enumerate(zip(WIDTH, DEPTH, RESOLUTION, strict=True)):
        spec = effnet.spec(base, width=float(width), depth=float(depth), resolution=int(resolution))
        one = effnet.cost(spec)
        assert (price.params[i], price.macs[i], price.activations[i]) == (one.params, one.macs, one.activations)
        assert inference[i] == inference_memory(spec)
        assert file[i] == file_bytes(spec)
        for keep, held in training.items():
            assert held.peak[i] == training_memory(spec, 3, plan=keep).peak
            assert held.activations[i] == training_memory(spec, 3, plan=keep).activations


def test_arrays_stay_whole_numbers():
    many = B0.shape_at(WIDTH, DEPTH, RESOLUTION)
    for number in (many.head_channels, total_cost(many).macs, inference_memory(many), training_memory(many, 2).peak):
        assert number.dtype == np.int64
