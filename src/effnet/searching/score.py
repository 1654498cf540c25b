"""A short training that returns a score: what a search compares networks by.

It has no checkpoints, no time budget and one process. Images are decoded once for each resolution; they are mirrored
and moved by up to an eighth, because a short training needs no more than that. The score is the accuracy on the val
part. The same network, data, recipe, epochs, seed and threads give the same score to the bit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.dataset import Dataset
from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, DataError, EffnetError, ImageError, TrainingError
from effnet.files import write_file
from effnet.models.efficientnet import EfficientNet
from effnet.searching.halving import FAILED, Job, Trial
from effnet.searching.plan import SearchPlan
from effnet.training.module import Average, Learner, Normalise, init_classifier, set_momentum, spread
from effnet.training.optimizer import make_optimizer, set_rate
from effnet.training.recipe import Recipe
from effnet.training.sanity_checks import SanityChecks

PARTS = ("train", "val")
MOVED = 1 / 8  # of its side, by which an image is moved at most
BATCH = 256  # images that are evaluated together


class Scorer:
    """Trains networks briefly on one data set.

    Args:
        data: split, with a train and a val part.
        recipe: how networks are trained.
        input_spec: how images are prepared, but for their size: each network gets its own resolution.
        cache: a folder for decoded images, which the workers of one machine share.
        device: where it trains.
        decoded: called for each decoded image.
    """

    def __init__(
        self,
        data: Dataset,
        recipe: Recipe,
        input_spec: InputSpec,
        cache: Path,
        device: str = "cpu",
        decoded: Callable[[], None] = lambda: None,
    ) -> None:
        for part in PARTS:
            if part not in data.splits:
                raise ArgumentError("data", str(data.root), f"needs a {part} part.")
        self.data, self.recipe, self.input_spec, self.cache = data, recipe, input_spec, cache
        self.device, self.decoded = torch.device(device), decoded
        self.labels = {name: torch.tensor([sample.label for sample in data.part(name).samples]) for name in PARTS}
        self.batch = min(recipe.batch, len(self.labels["train"]))

    def __call__(
        self, spec: NetworkSpec, epochs: float, seed: int, on_step: Callable[[float], None] = lambda share: None
    ) -> float:
        """The val accuracy of `spec` after a training of so many epochs.

        Args:
            spec: the network.
            epochs: passes over the training part; parts of one count.
            seed: of weights, order, mirroring and moving.
            on_step: called after each step, with the share of the steps that are done.

        Raises:
            TrainingError: the loss diverges, or the network does not learn.
            DataError: an image cannot be read.
        """
        pixels, labels = self.pixels(spec.resolution, "train"), self.labels["train"]
        torch.manual_seed(seed)
        network = EfficientNet(self.adapted(spec))
        init_classifier(network)
        network.to(self.device).to(memory_format=torch.channels_last)
        set_momentum(network, self.recipe.bn_momentum)
        learner = Learner(network, self.recipe, self.input_spec).to(self.device).train()
        optimizer = make_optimizer(network, self.recipe)
        average = Average(network) if self.recipe.ema else None
        sanity_checks = SanityChecks(len(self.data.classes))
        per_epoch = len(labels) // self.batch
        total = max(1, round(epochs * per_epoch))
        for step in range(total):
            if step % per_epoch == 0:
                order = torch.randperm(len(labels), generator=_generator(seed, step))
            chosen = order[step % per_epoch * self.batch :][: self.batch]
            set_rate(optimizer, self.recipe.scaled_lr * self.recipe.lr_at((step + 1) / total))
            images = _moved(pixels[chosen], self.recipe.flip, _generator(seed, step, 1))
            loss, logits = learner(images.to(self.device), labels[chosen].to(self.device), False)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), self.recipe.clip or float("inf"))
            sanity_checks.check(step, float(loss.detach()), spread(logits), float(norm))
            optimizer.step()
            if average:
                average.update(network, self.recipe.ema_at(step))
            on_step((step + 1) / total)
        return self._accuracy(average.network if average else network)

    def adapted(self, spec: NetworkSpec) -> NetworkSpec:
        """The network with the data's classes and the recipe's rates."""
        rates = {name: getattr(self.recipe, name) for name in ("dropout", "drop_connect")}
        given = {name: rate for name, rate in rates.items() if rate is not None}
        return dataclasses.replace(spec, num_classes=len(self.data.classes), **given)

    def pixels(self, size: int, part: str) -> Tensor:
        """The images (N, size, size, C) uint8 of a part, decoded once and then mapped from the cache's file."""
        file = self.cache / f"{part}-{size}.npy"
        if not file.exists():
            input_spec = dataclasses.replace(self.input_spec, size=size, resize=size)
            samples = self.data.part(part).samples
            with write_file(file) as temporary:
                shape = (len(samples), size, size, input_spec.channels)
                rows = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
                for row, sample in zip(rows, samples, strict=True):
                    try:
                        row[...] = load_pixels(self.data.file(sample), input_spec)
                    except ImageError as error:
                        raise DataError(f"{self.data.file(sample)} {error}") from error
                    self.decoded()
                rows.flush()
        return torch.from_numpy(np.load(file, mmap_mode="c"))

    @torch.inference_mode()
    def _accuracy(self, network: EfficientNet) -> float:
        pixels, labels = self.pixels(network.spec.resolution, "val"), self.labels["val"]
        normalise = Normalise(self.input_spec).to(self.device)
        network.eval()
        right = 0
        for start in range(0, len(labels), BATCH):
            answers = network(normalise(pixels[start : start + BATCH].to(self.device))).argmax(1).cpu()
            right += int((answers == labels[start : start + BATCH]).sum())
        return right / len(labels)


def attempt(
    plan: SearchPlan,
    job: Job,
    cache: Path,
    on_step: Callable[[float], None] = lambda share: None,
    on_image: Callable[[], None] = lambda: None,
) -> Trial | EffnetError:
    """Train a candidate and score it, on one thread of a processor or on a GPU.

    Args:
        plan: the search.
        job: which candidate, for how long, with which seed.
        cache: a folder for decoded images.
        on_step: called after each step, with the share of the training that is done.
        on_image: called for each decoded image.

    Returns:
        The trial, with the score FAILED where the network cannot be trained; or the error for which no training can go
        on, such as an image that cannot be read.
    """
    options = plan.options
    if options.device == "cpu":
        torch.set_num_threads(1)  # the score depends on the number of threads
    scorer = Scorer(plan.data, plan.recipe, plan.input_spec, cache, options.device, on_image)
    seed = int(np.random.SeedSequence((options.seed, job.rung, job.seed)).generate_state(1)[0])
    network, epochs = plan.candidates[job.candidate].network, plan.epochs * plan.rungs[job.rung].share
    started = time.monotonic()
    try:
        score = scorer(network, epochs, seed, on_step)
    except TrainingError as error:
        return Trial(job, FAILED, time.monotonic() - started, str(error))
    except EffnetError as error:
        return error
    return Trial(job, score, time.monotonic() - started)


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
