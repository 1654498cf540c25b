"""Short trainings: the same score for the same seed, better ones for networks that learn more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import draw_images, tiny_spec

from effnet.arch.spec import InputSpec
from effnet.data.dataset import Dataset, read_data, split_data
from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, DataError
from effnet.searching.score import Scorer, _moved
from effnet.training.recipe import read_recipe

INPUT = InputSpec(32, 32)
RECIPE = read_recipe("scratch", batch=16)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return split_data(read_data(draw_images(tmp_path_factory.mktemp("shapes"), 60)), val=0.3, test=0)


def test_a_score_can_be_had_again(shapes: Dataset, tmp_path: Path) -> None:
    scorer = Scorer(shapes, RECIPE, INPUT, tmp_path)
    shares = list[float]()
    first = scorer(tiny_spec(), 1, 0, shares.append)
    assert shares == [step / 7 for step in range(1, 8)]
    torch.rand(3)
    assert Scorer(shapes, RECIPE, INPUT, tmp_path / "anew")(tiny_spec(), 1, 0) == first
    assert {file.name for file in tmp_path.glob("*.npy")} == {"train-32.npy", "val-32.npy"}
    assert scorer(tiny_spec(), 1, 0) == first
    losses = {scorer(tiny_spec(), 1, seed) for seed in range(1, 4)} | {first}
    assert len(losses) > 1


def test_longer_trainings_score_better(shapes: Dataset, tmp_path: Path) -> None:
    scorer = Scorer(shapes, RECIPE, INPUT, tmp_path)
    short, long = (scorer(tiny_spec(), epochs, 0) for epochs in (0.3, 12))
    assert long > max(short, 0.6)


def test_each_network_sees_its_own_resolution(shapes: Dataset, tmp_path: Path) -> None:
    scorer = Scorer(shapes, RECIPE, INPUT, tmp_path)
    scorer(dataclasses.replace(tiny_spec(), resolution=20), 0.3, 0)
    samples = shapes.part("val").samples
    pixels = scorer.pixels(20, "val")
    assert pixels.shape == (len(samples), 20, 20, 3)
    photo = load_pixels(shapes.file(samples[4]), dataclasses.replace(INPUT, size=20, resize=20))
    assert (pixels[4].numpy() == photo).all()
    assert scorer.labels["val"].tolist() == [sample.label for sample in samples]


def test_a_broken_image_is_named(shapes: Dataset, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    samples = (*shapes.samples, dataclasses.replace(shapes.part("train").samples[0], path=str(broken)))
    with pytest.raises(DataError, match=r"broken\.png"):
        Scorer(dataclasses.replace(shapes, samples=samples), RECIPE, INPUT, tmp_path)(tiny_spec(), 1, 0)
    assert not list(tmp_path.glob("*.npy"))


def test_the_recipe_s_rates_are_taken(shapes: Dataset, tmp_path: Path) -> None:
    network = Scorer(shapes, RECIPE, INPUT, tmp_path).adapted(tiny_spec())
    assert (network.num_classes, network.drop_connect, network.dropout) == (3, 0.0, tiny_spec().dropout)


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


def test_networks_of_any_resolution_see_about_the_same() -> None:
    """A bound in whole pixels would move images of 16 px twice as far as those of 15."""

    def moved(side: int, seed: int) -> int:
        ramp = torch.arange(side, dtype=torch.int64)[None, :, None, None].expand(1, side, side, 1)
        return int(_moved(ramp, 0, torch.Generator().manual_seed(seed))[0, side // 2, 0, 0]) - side // 2

    for seed in range(60):
        shares = {side: moved(side, seed) / side for side in (14, 15, 16, 28)}
        assert max(shares.values()) - min(shares.values()) <= 0.5 / 14 + 0.5 / 16
    assert {moved(14, seed) for seed in range(60)} == {moved(16, seed) for seed in range(60)} == {-2, -1, 0, 1, 2}


def test_unsplit_data_is_refused(shapes: Dataset, tmp_path: Path) -> None:
    samples = tuple(dataclasses.replace(sample, split="") for sample in shapes.samples)
    with pytest.raises(ArgumentError, match="needs a train part"):
        Scorer(dataclasses.replace(shapes, samples=samples), RECIPE, INPUT, tmp_path)
