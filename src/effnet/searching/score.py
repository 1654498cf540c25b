"""A short training that returns a score: what a search compares networks by.

It is the loop of a run without its folder: no checkpoints, no time budget, one process. Images are decoded once for
each resolution; they are mirrored and moved by up to an eighth, because a short training needs no more than that. The
score is the accuracy on the val part. The same network, data, recipe, epochs, seed and threads give the same score.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.dataset import Dataset
from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, DataError, ImageError
from effnet.files import write_file
from effnet.models.efficientnet import EfficientNet
from effnet.training.module import Average, Learner, Normalise, init_classifier, set_momentum, spread
from effnet.training.optimizer import Horizon, make_optimizer, set_rate
from effnet.training.recipe import Recipe
from effnet.training.sanity_checks import SanityChecks

PARTS = ("train", "val")
MOVED = 1 / 8  # of its side, by which an image is moved at most
BATCH = 256  # images that are evaluated together

Steps = Callable[[int, int], None]  # steps done, steps in all


class Scorer:
    """Trains networks briefly on one data set.

    Args:
        data: split, with a train and a val part.
        recipe: how networks are trained.
        see: how images are prepared; each network sees them at its own resolution.
        cache: a folder for decoded images, which workers of one machine share.
        device: where it trains.
        decoded: is told of each decoded image.
    """

    def __init__(
        self,
        data: Dataset,
        recipe: Recipe,
        see: InputSpec,
        cache: Path,
        device: str = "cpu",
        decoded: Callable[[], None] = lambda: None,
    ) -> None:
        for part in PARTS:
            if part not in data.splits:
                raise ArgumentError("data", str(data.root), f"needs a {part} part.")
        self.data, self.recipe, self.see, self.cache = data, recipe, see, cache
        self.device, self.decoded = torch.device(device), decoded
        self.labels = {name: torch.tensor([sample.label for sample in data.part(name).samples]) for name in PARTS}
        self.batch = min(recipe.batch, len(self.labels["train"]))

    def __call__(self, spec: NetworkSpec, epochs: float, seed: int, progress: Steps | None = None) -> float:
        """The val accuracy of `spec` after a training of so many epochs.

        Raises:
            TrainingError: it cannot come to anything, see sanity_checks.py.
            DataError: an image cannot be read.
        """
        pixels, labels = self.pixels(spec.resolution, "train"), self.labels["train"]
        torch.manual_seed(seed)
        network = EfficientNet(self.suited(spec))
        init_classifier(network)
        network.to(self.device).to(memory_format=torch.channels_last)
        set_momentum(network, self.recipe.bn_momentum)
        learner = Learner(network, self.recipe, self.see).to(self.device).train()
        optimizer = make_optimizer(network, self.recipe)
        average = Average(network) if self.recipe.ema else None
        sanity_checks = SanityChecks(len(self.data.classes))
        per_epoch = len(labels) // self.batch
        horizon = Horizon.of(max(1, round(epochs * per_epoch)))
        for step in range(horizon.total):
            if step % per_epoch == 0:
                order = torch.randperm(len(labels), generator=_generator(seed, step))
            chosen = order[step % per_epoch * self.batch :][: self.batch]
            set_rate(optimizer, self.recipe.scaled_lr * self.recipe.lr_at(horizon.progress(step + 1)))
            images = _moved(pixels[chosen], self.recipe.flip, _generator(seed, step, 1))
            loss, logits = learner(images.to(self.device), labels[chosen].to(self.device), False)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), self.recipe.clip or float("inf"))
            sanity_checks.check(step, float(loss.detach()), spread(logits), float(norm))
            optimizer.step()
            if average:
                average.update(network, self.recipe.ema_at(step))
            if progress:
                progress(step + 1, horizon.total)
        return self._accuracy(average.network if average else network)

    def suited(self, spec: NetworkSpec) -> NetworkSpec:
        """The network with the data's classes and the recipe's rates."""
        rates = {name: getattr(self.recipe, name) for name in ("dropout", "drop_connect")}
        given = {name: rate for name, rate in rates.items() if rate is not None}
        return dataclasses.replace(spec, num_classes=len(self.data.classes), **given)

    def pixels(self, size: int, part: str) -> Tensor:
        """The images (N, size, size, C) uint8 of a part, decoded once and then mapped from the cache's file."""
        file = self.file(size, part)
        if not file.exists():
            see = dataclasses.replace(self.see, size=size, resize=size)
            samples = self.data.part(part).samples
            with write_file(file) as temporary:
                shape = (len(samples), size, size, see.channels)
                rows = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
                for row, sample in zip(rows, samples, strict=True):
                    try:
                        row[...] = load_pixels(self.data.file(sample), see)
                    except ImageError as error:
                        raise DataError(f"{self.data.file(sample)} {error}") from error
                    self.decoded()
                rows.flush()
        return torch.from_numpy(np.load(file, mmap_mode="c"))

    def missing(self, specs: Iterable[NetworkSpec]) -> int:
        """Images that have to be decoded before all of these networks are trained."""
        sizes = itertools.product({spec.resolution for spec in specs}, PARTS)
        return sum(len(self.labels[part]) for size, part in sizes if not self.file(size, part).exists())

    def file(self, size: int, part: str) -> Path:
        """Where the decoded images are kept."""
        return self.cache / f"{part}-{size}.npy"

    @torch.inference_mode()
    def _accuracy(self, network: EfficientNet) -> float:
        pixels, labels = self.pixels(network.spec.resolution, "val"), self.labels["val"]
        normalise = Normalise(self.see).to(self.device)
        network.eval()
        right = 0
        for start in range(0, len(labels), BATCH):
            answers = network(normalise(pixels[start : start + BATCH].to(self.device))).argmax(1).cpu()
            right += int((answers == labels[start : start + BATCH]).sum())
        return right / len(labels)


def _moved(pixels: Tensor, flip: float, random: torch.Generator) -> Tensor:
    """Images (N, H, W, C), a share of them mirrored, each batch moved by a few pixels with its edges repeated.

    How far is drawn as a share of the side and rounded then, so that networks of any resolution see about the same.
    """
    mirrored = torch.rand(len(pixels), generator=random) < flip  # one in two
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
    side = pixels.shape[1]
    shares = MOVED * (2 * torch.rand(2, generator=random, dtype=torch.float64) - 1)
    down, right = (side * shares).round().int().tolist()
    places = [(torch.arange(side) + by).clamp(0, side - 1) for by in (down, right)]
    return pixels[:, places[0]][:, :, places[1]]


def _generator(*numbers: int) -> torch.Generator:
    value = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator().manual_seed(value)
