"""A short training that returns a score: what a search compares networks by.

It is the loop of a run without its folder: no checkpoints, no time budget, one process. Images are decoded once for
each resolution and kept; they are mirrored and moved by up to an eighth, because a short training needs no more than
that. The score is the accuracy on the val part. The same network, data, recipe, epochs and seed give the same score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.folder import Dataset
from effnet.data.preprocess import load_pixels
from effnet.errors import ArgumentError
from effnet.models.efficientnet import EfficientNet
from effnet.training.module import Average, Learner, Normalise, set_momentum
from effnet.training.optimizer import make_optimizer, set_rate
from effnet.training.recipe import Recipe
from effnet.training.schedule import Horizon
from effnet.training.watch import Watch

MOVED = 8  # an image is moved by up to this part of its side
BATCH = 256  # images that are evaluated together

Steps = Callable[[int, int], None]  # steps done, steps in all


class Scorer:
    """Trains networks briefly on one data set.

    Args:
        data: split, with a train and a val part.
        recipe: how networks are trained.
        see: how images are prepared; each network sees them at its own resolution.
    """

    def __init__(self, data: Dataset, recipe: Recipe, see: InputSpec) -> None:
        for part in ("train", "val"):
            if part not in data.splits:
                raise ArgumentError("data", str(data.root), f"needs a {part} part; effnet search splits what has none.")
        self.data, self.recipe, self.see = data, recipe, see
        self.batch = min(recipe.batch, len(data.part("train")))
        self._kept: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}

    def __call__(self, spec: NetworkSpec, epochs: float, seed: int, progress: Steps | None = None) -> float:
        """The val accuracy of `spec` after a training of so many epochs.

        Raises:
            TrainingError: it cannot come to anything, see watch.py.
            ImageError: an image cannot be read.
        """
        pixels, labels = self.images(spec.resolution)["train"]
        torch.manual_seed(seed)
        network = EfficientNet(dataclasses.replace(spec, num_classes=len(self.data.classes)))
        network.to(memory_format=torch.channels_last)
        set_momentum(network, self.recipe.bn_momentum)
        learner = Learner(network, self.recipe, self.see).train()
        optimizer = make_optimizer(network, self.recipe)
        average = Average(network) if self.recipe.ema else None
        watch = Watch(len(self.data.classes))
        per_epoch = len(labels) // self.batch
        horizon = Horizon.of(round(epochs * per_epoch))
        for step in range(horizon.total):
            if step % per_epoch == 0:
                order = torch.randperm(len(labels), generator=_generator(seed, step))
            chosen = order[step % per_epoch * self.batch :][: self.batch]
            set_rate(optimizer, self.recipe.scaled_lr * self.recipe.lr_at(horizon.progress(step + 1)))
            loss, _ = learner(
                _moved(pixels[chosen], self.recipe.flip, _generator(seed, step, 1)), labels[chosen], False
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), self.recipe.clip or float("inf"))
            watch.look(step, float(loss.detach()), 1.0, float(norm))
            optimizer.step()
            if average:
                average.update(network, self.recipe.ema_at(step))
            if progress:
                progress(step + 1, horizon.total)
        return self._accuracy(average.network if average else network)

    def images(self, size: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The pixels (N, size, size, C) uint8 and labels (N,) of the train and the val part at a resolution."""
        if size not in self._kept:
            see = dataclasses.replace(self.see, size=size, resize=size)
            parts = {}
            for name in ("train", "val"):
                part = self.data.part(name)
                pixels = np.stack([load_pixels(self.data.file(sample), see) for sample in part.samples])
                parts[name] = torch.from_numpy(pixels), torch.tensor([sample.label for sample in part.samples])
            self._kept[size] = parts
        return self._kept[size]

    @torch.inference_mode()
    def _accuracy(self, network: EfficientNet) -> float:
        pixels, labels = self.images(network.spec.resolution)["val"]
        normalise = Normalise(self.see)
        network.eval()
        right = 0
        for start in range(0, len(labels), BATCH):
            some, truth = pixels[start : start + BATCH], labels[start : start + BATCH]
            right += int((network(normalise(some)).argmax(1) == truth).sum())
        return right / len(labels)


def _moved(pixels: Tensor, flip: float, random: torch.Generator) -> Tensor:
    """Images (N, H, W, C), a share of them mirrored, each batch moved by a few pixels with its edges repeated."""
    mirrored = torch.rand(len(pixels), generator=random) < flip  # one in two
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
    reach = pixels.shape[1] // MOVED
    down, right = torch.randint(-reach, reach + 1, (2,), generator=random).tolist()
    places = [(torch.arange(pixels.shape[1]) + by).clamp(0, pixels.shape[1] - 1) for by in (down, right)]
    return pixels[:, places[0]][:, :, places[1]]


def _generator(*numbers: int) -> torch.Generator:
    value = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator().manual_seed(value)
