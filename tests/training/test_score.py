"""Short trainings: the same score for the same seed, better ones for networks that learn more."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from effnet.arch.spec import InputSpec
from effnet.data.folder import Dataset, read_data, split_data
from effnet.errors import ArgumentError
from effnet.training.recipe import read_recipe
from effnet.training.score import Scorer, _moved
from training.tiny import draw_images, tiny_spec

SEE = InputSpec(32, 32)
RECIPE = read_recipe("scratch", batch=16)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return split_data(read_data(draw_images(tmp_path_factory.mktemp("shapes"), 60)), val=0.3, test=0)


def test_a_score_can_be_had_again(shapes: Dataset) -> None:
    scorer = Scorer(shapes, RECIPE, SEE)
    counted: list[tuple[int, int]] = []
    first = scorer(tiny_spec(), 1, 0, lambda done, total: counted.append((done, total)))
    assert counted[-1] == (7, 7)
    torch.rand(3)
    assert Scorer(shapes, RECIPE, SEE)(tiny_spec(), 1, 0) == first
    losses = {scorer(tiny_spec(), 1, seed) for seed in range(6)}
    assert len(losses) > 1


def test_longer_trainings_score_better(shapes: Dataset) -> None:
    scorer = Scorer(shapes, RECIPE, SEE)
    short, long = (scorer(tiny_spec(), epochs, 0) for epochs in (0.3, 12))
    assert long > max(short, 0.6)


def test_each_network_sees_its_own_resolution(shapes: Dataset) -> None:
    scorer = Scorer(shapes, RECIPE, SEE)
    scorer(dataclasses.replace(tiny_spec(), resolution=20), 0.3, 0)
    pixels, labels = scorer.images(20)["val"]
    assert pixels.shape == (len(shapes.part("val")), 20, 20, 3)
    assert labels.tolist() == [sample.label for sample in shapes.part("val").samples]


def test_images_are_mirrored_and_moved() -> None:
    pixels = torch.arange(4 * 16 * 16 * 3, dtype=torch.int64).reshape(4, 16, 16, 3)
    moved = _moved(pixels, 0.5, torch.Generator().manual_seed(1))
    assert moved.shape == pixels.shape
    inner = moved[:, 4:12, 4:12]
    for image, whole in zip(inner, pixels, strict=True):
        found = [
            torch.equal(image, side[row : row + 8, column : column + 8])
            for side in (whole, whole.flip(1))
            for row in range(9)
            for column in range(9)
        ]
        assert sum(found) == 1


def test_unsplit_data_is_refused(shapes: Dataset) -> None:
    samples = tuple(dataclasses.replace(sample, split="") for sample in shapes.samples)
    with pytest.raises(ArgumentError, match="needs a train part"):
        Scorer(dataclasses.replace(shapes, samples=samples), RECIPE, SEE)
