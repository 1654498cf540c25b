"""The order of images: the same for any number of processes, parts and workers, from any step on."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from effnet.arch.spec import InputSpec, Interpolation
from effnet.data.augment import Augment
from effnet.data.dataset import Dataset, read_data
from effnet.data.image import PHOTOS, load_pixels
from effnet.data.loader import Loader, Order, TrainingImages
from effnet.errors import ArgumentError, DataError, TrainingError

INPUT = InputSpec(8, 8)


@given(st.integers(12, 60), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_processes_and_parts_see_the_same_images(images: int, world: int, part: int, epoch: int, seed: int) -> None:
    batch = 12
    whole = list(Order(images, batch, batch, seed).epoch(epoch))
    assert len(whole) == images // batch
    assert len({place for step in whole for _, place in step}) == batch * len(whole)
    orders = [Order(images, batch, part, seed, rank, world) for rank in range(world)]
    parts = orders[0].parts
    shares = [list(order.epoch(epoch)) for order in orders]
    for number, step in enumerate(whole):
        seen = [key for share in shares for each in share[number * parts : (number + 1) * parts] for key in each]
        assert sorted(seen) == sorted(step)
    start = len(whole) // 2
    assert list(orders[0].epoch(epoch, start)) == shares[0][start * parts :]


def test_epochs_differ() -> None:
    order = Order(100, 10, 10, 0)
    assert list(order.epoch(0)) != [[(0, place) for _, place in step] for step in order.epoch(1)]
    assert list(order.epoch(0)) == list(order.epoch(0))


@pytest.mark.parametrize(("batch", "part", "world"), [(101, 101, 1), (10, 3, 1), (10, 5, 4)])
def test_numbers_that_do_not_divide(batch: int, part: int, world: int) -> None:
    with pytest.raises(ArgumentError, match="batch"):
        Order(100, batch, part, 0, 0, world)


@pytest.fixture
def photos(tmp_path: Path) -> Dataset:
    draw = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (20, 16, 3), np.uint8)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    return read_data(tmp_path)


@pytest.mark.parametrize("policy", ["none", "autoaugment", "randaugment", "trivialaugment"])
def test_an_image_depends_on_seed_and_epoch_alone(photos: Dataset, policy: str) -> None:
    images, again, other = (TrainingImages(photos, Augment(INPUT, policy=policy), seed=seed) for seed in (5, 5, 6))
    first = images[(2, 3)][0]
    torch.manual_seed(123)
    assert np.array_equal(first, again[(2, 3)][0])
    assert (first.shape, first.dtype) == ((8, 8, 3), np.uint8)
    assert not any(np.array_equal(first, changed[0]) for changed in (images[(3, 3)], other[(2, 3)]))


def test_workers_give_the_same_batches_and_their_death_is_an_error(photos: Dataset) -> None:
    """One test of all that, for each worker takes seconds to start."""
    order = Order(12, 6, 3, 0)
    images = TrainingImages(photos, Augment(INPUT, policy="autoaugment"), 1)
    plain = list(Loader(images, order, 0).epoch(1))
    loader = Loader(images, order, 2)
    for start in (0, 1):
        for (pixels, labels), (others, names) in zip(plain[start * 2 :], loader.epoch(1, start), strict=True):
            assert torch.equal(pixels, others)
            assert torch.equal(labels, names)
    assert plain[0][0].shape == (3, 8, 8, 3)
    parts = loader.epoch(2)
    next(parts)
    iterator = loader._loader._iterator
    assert iterator is not None
    os.kill(iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match="a process that loads images died"):
        list(itertools.chain.from_iterable(map(loader.epoch, range(3, 100))))


def test_threads_give_the_same_batches(photos: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    images = TrainingImages(photos, Augment(INPUT, policy="trivialaugment"), 1)
    alone = list(Loader(images, Order(12, 12, 12, 0), 0).epoch(1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for _ in range(5):
        assert torch.equal(next(Loader(images, Order(12, 12, 12, 0), 0).epoch(1))[0], alone[0][0])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_crops_are_torchvisions(tmp_path: Path, interpolation: Interpolation) -> None:
    photo = Image.open(min(PHOTOS.glob("*.png"))).convert("RGB")
    photo.save(file := tmp_path / "photo.png")
    mode = InterpolationMode(interpolation)
    crop = v2.Compose([v2.RandomResizedCrop(48, (0.5, 1), (0.8, 1.25), mode), v2.RandomHorizontalFlip()])
    ours = Augment(InputSpec(48, 48, interpolation=interpolation), 0.5, 1.25)
    for seed in range(6):
        found = ours(ours.read(file), seed)
        torch.manual_seed(seed)
        differences = np.abs(found.astype(int) - np.asarray(crop(photo)))
        assert differences.max() <= (0 if interpolation == "lanczos" else 1)


def test_a_container_without_shared_memory_is_recognised(photos: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(TrainingImages(photos, Augment(INPUT), 0), Order(12, 6, 3, 0), 0)

    def killed() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")

    monkeypatch.setattr(loader, "_loader", iter(killed, None))
    with pytest.raises(TrainingError, match=r"shared memory ran out.*--shm-size"):
        next(loader.epoch(0))


def test_a_socket_has_a_short_path(photos: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = multiprocessing.current_process()._config
    monkeypatch.setitem(config, "tempdir", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("t" * 80)))
    images = TrainingImages(photos, Augment(INPUT), 0)
    Loader(images, Order(len(photos), 2, 2, 0), 1)
    assert config["tempdir"].startswith("/tmp/pymp-")
    assert tempfile.tempdir == str(tmp_path / ("t" * 80))


CLEANED_AWAY = """
import os, sys
from pathlib import Path

from effnet.arch.spec import InputSpec
from effnet.data.augment import Augment
from effnet.data.dataset import read_data
from effnet.data.loader import Loader, Order, TrainingImages

if __name__ == "__main__":
    photos = read_data(sys.argv[1])
    loader = Loader(TrainingImages(photos, Augment(InputSpec(8, 8)), 0), Order(len(photos), 2, 2, 0), 1)
    for _ in loader.epoch(0):
        pass
    for folder in Path(os.environ["TMPDIR"]).iterdir():
        folder.rename(folder.with_name(f"cleaned-{folder.name}"))
"""


def test_sockets_that_cannot_be_removed_are_not_spoken_of(photos: Dataset, tmp_path: Path) -> None:
    """A cleaner of /tmp was there, or its disk became read-only: what was asked for is done all the same."""
    (script := tmp_path / "script.py").write_text(CLEANED_AWAY)
    with tempfile.TemporaryDirectory() as folder:  # its path is short enough for sockets
        words, settings = [sys.executable, str(script), str(photos.root)], os.environ | {"TMPDIR": folder}
        run = subprocess.run(words, env=settings, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, "")
        assert list(Path(folder).glob("cleaned-pymp-*/listener-*"))


def test_an_unreadable_image_is_named(photos: Dataset) -> None:
    (photos.root / "a" / "4.png").write_bytes(b"no image")
    loader = Loader(TrainingImages(photos, Augment(INPUT), 0), Order(12, 6, 6, 0), 0)
    with pytest.raises(DataError, match=r"a/4.png: is not an image.*effnet check"):
        list(loader.epoch(0))


def test_whole_images_are_prepared_as_in_evaluation(photos: Dataset) -> None:
    plain = Augment(INPUT, crop_area=1, flip=0)
    file = photos.file(photos.samples[0])
    assert np.array_equal(plain(plain.read(file), 0), load_pixels(file, INPUT))


def test_grey_images(photos: Dataset) -> None:
    input_spec = InputSpec(8, 8, (0.5,), (0.5,))
    augment = Augment(input_spec, policy="autoaugment")
    assert augment(augment.read(photos.file(photos.samples[0])), 0).shape == (8, 8, 1)


def test_small_data_are_decoded_once(photos: Dataset) -> None:
    size = TrainingImages(photos, Augment(INPUT), 0).augment.read(photos.file(photos.samples[0])).nbytes
    order, augment = Order(12, 6, 6, 0), Augment(INPUT)
    keeps, forgets, lacks = (TrainingImages(photos, augment, 0, keep) for keep in (12 * size, 0, 12 * size - 1))
    for epoch in range(2):
        parts = [list(Loader(images, order, 0).epoch(epoch)) for images in (keeps, forgets)]
        for (found, _), (expected, _) in zip(*parts, strict=True):
            assert torch.equal(found, expected)
    list(Loader(lacks, order, 0).epoch(0))
    for sample in photos.samples:
        photos.file(sample).unlink()
    assert len(list(Loader(keeps, order, 0).epoch(2))) == 2
    with pytest.raises(DataError, match="does not exist"):
        list(Loader(lacks, order, 0).epoch(1))


@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_photo_that_is_not_cropped_is_seen_whole_but_for_its_rim(tmp_path: Path, fit: str, channels: int) -> None:
    pixels = np.zeros((40, 160, 3), np.uint8)
    pixels[:, :16] = pixels[:, -16:] = 255  # both ends of a long image
    Image.fromarray(pixels).save(tmp_path / "long.png")
    whole, cropped = (
        Augment(InputSpec(64, 64, (0.0,) * channels, (1.0,) * channels, fit=each), crop_area=0.8, crop_ratio=1.1)
        for each in (fit, "crop")
    )
    for seed in range(4):
        seen = whole(whole.read(tmp_path / "long.png"), seed)
        assert seen.shape == (64, 64, channels)
        middle = seen[20:44, :, 0].astype(float)
        assert middle[:, :8].max() > 200 or middle[:, -8:].max() > 200
        assert middle[:, 28:36].max() < 50
    assert cropped(cropped.read(tmp_path / "long.png"), 0).max() < 50  # only the middle
