"""A whole training by the compiled kernels: its losses stay as near to torch's as torch's are to one another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import effnet
from effnet.arch.spec import InputSpec
from effnet.data.dataset import read_data
from effnet.data.image import load_pixels
from effnet.native import instruction_sets

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="nothing was compiled")

FASHION = Path(__file__).parents[2] / "examples" / "fashion"
STEPS, BATCH, SIDE = 200, 16, 32


@pytest.fixture(scope="module")
def clothes():
    data = read_data(FASHION)
    samples = data.subset("train").samples
    pixels = np.stack([load_pixels(data.file(sample), InputSpec(SIDE, SIDE)) for sample in samples])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5
    return images, torch.tensor([sample.label for sample in samples])


def losses(clothes, *, native=False, threads=1, backwards=False):
    """Of each step; `backwards` puts the images of a batch in the other order, which is the same but for rounding."""
    images, labels = clothes
    torch.manual_seed(0)
    spec = effnet.spec("b0", width=0.25, depth=0.25, resolution=SIDE, num_classes=10, dropout=0, drop_connect=0)
    network = effnet.create(spec).train()
    network.native(native)
    optimizer = torch.optim.SGD(network.parameters(), lr=2e-3, momentum=0.9)
    draw = torch.Generator().manual_seed(1)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,), generator=draw)
            chosen = chosen.flip(0) if backwards else chosen
            loss = torch.nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    finally:
        torch.set_num_threads(before)
    return np.array(found)


def test_losses_of_200_steps(clothes):
    """Rounding grows from step to step, so after some twenty of them two trainings by torch itself are far apart."""
    torchs, others = losses(clothes), losses(clothes, backwards=True)
    kernels = losses(clothes, native=True, threads=2)
    assert not np.array_equal(torchs, others)
    for steps in (5, 10, 200):
        apart, between = np.abs(kernels - others)[:steps].mean(), np.abs(torchs - others)[:steps].mean()
        assert apart < 4 * between, steps  # either is one draw: up to 2 was seen, and .5
    assert kernels[-50:].mean() == pytest.approx((torchs + others)[-50:].mean() / 2, rel=0.1)
    assert kernels[-50:].mean() < 0.5 * kernels[:10].mean()
