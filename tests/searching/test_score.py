"""Short trainings: the same score for the same seed, better ones for networks that learn more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tiny import tiny_spec

from effnet.arch.spec import InputSpec
from effnet.data.image import load_pixels
from effnet.errors import DataError
from effnet.progress import Silent
from effnet.searching.halving import Job
from effnet.searching.plan import SearchPlan
from effnet.searching.score import apply_recipe, attempt, load_split, mirror_and_shift, train_and_score


class Recorder(Silent):
    def __init__(self) -> None:
        self.updates = list[tuple[str, float, float]]()

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        self.updates.append((task, done, total))


def test_the_same_seed_gives_the_same_score(plan: SearchPlan, tmp_path: Path) -> None:
    progress = Recorder()
    first = train_and_score(plan, tiny_spec(), 1, 0, tmp_path, progress)
    assert [update for update in progress.updates if update[0] == "training"] == [
        ("training", step, 5) for step in range(1, 6)
    ]
    assert {file.name for file in tmp_path.glob("*.npy")} == {"train-32.npy", "val-32.npy"}
    torch.rand(3)
    assert train_and_score(plan, tiny_spec(), 1, 0, tmp_path / "new") == first
    assert train_and_score(plan, tiny_spec(), 1, 0, tmp_path) == first
    assert len({train_and_score(plan, tiny_spec(), 1, seed, tmp_path) for seed in range(1, 4)} | {first}) > 1


def test_longer_trainings_score_better(plan: SearchPlan, tmp_path: Path) -> None:
    short, long = (train_and_score(plan, tiny_spec(), epochs, 0, tmp_path) for epochs in (0.3, 14))
    assert long > max(short, 0.6)


def test_images_have_the_network_s_resolution(plan: SearchPlan, tmp_path: Path) -> None:
    samples = plan.data.subset("val").samples
    input_spec = dataclasses.replace(plan.input_spec, size=20, resize=20)
    pixels, labels = load_split(plan.data.subset("val"), input_spec, tmp_path / "val.npy")
    assert pixels.shape == (len(samples), 20, 20, 3)
    photo = load_pixels(plan.data.file(samples[4]), input_spec)
    assert (pixels[4].numpy() == photo).all()
    assert labels.tolist() == [sample.label for sample in samples]


def test_decoded_images_take_room_as_they_are_written(plan: SearchPlan, tmp_path: Path) -> None:
    """A file that has its whole size from the start, and is mapped, kills the process where the disk is full."""
    sizes = []

    class Sizes(Silent):
        def update(self, task: str, done: float, total: float, detail: str = "") -> None:
            sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*.npy")))

    data = plan.data.subset("val")
    load_split(data, InputSpec(64, 64), tmp_path / "val.npy", Sizes())
    assert sizes == sorted(sizes)
    assert sizes[0] < 64 * 64 * 3 * len(data) / 2


def test_a_broken_image_is_named(plan: SearchPlan, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    samples = (*plan.data.samples, dataclasses.replace(plan.data.subset("train").samples[0], path=str(broken)))
    spoiled = dataclasses.replace(plan, data=dataclasses.replace(plan.data, samples=samples))
    error = attempt(spoiled, Job(0, 0, 0), tmp_path)
    assert isinstance(error, DataError)
    assert "broken.png" in str(error)
    assert not list(tmp_path.glob("*.npy"))


def test_the_recipe_s_rates_replace_the_network_s(plan: SearchPlan) -> None:
    network = apply_recipe(plan, tiny_spec())
    assert (network.num_classes, network.drop_connect, network.dropout) == (3, 0.0, tiny_spec().dropout)


def test_images_are_mirrored_and_shifted() -> None:
    pixels = torch.arange(4 * 16 * 16 * 3, dtype=torch.int64).reshape(4, 16, 16, 3)
    moved = mirror_and_shift(pixels, 0.5, torch.Generator().manual_seed(1))
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


def test_the_shift_is_about_the_same_at_any_resolution() -> None:
    """A bound in whole pixels would move images of 16 px twice as far as those of 15."""

    def shift(side: int, seed: int) -> int:
        ramp = torch.arange(side, dtype=torch.int64)[None, :, None, None].expand(1, side, side, 1)
        return int(mirror_and_shift(ramp, 0, torch.Generator().manual_seed(seed))[0, side // 2, 0, 0]) - side // 2

    for seed in range(60):
        shares = {side: shift(side, seed) / side for side in (14, 15, 16, 28)}
        assert max(shares.values()) - min(shares.values()) <= 0.5 / 14 + 0.5 / 16
    assert {shift(14, seed) for seed in range(60)} == {shift(16, seed) for seed in range(60)} == {-2, -1, 0, 1, 2}
