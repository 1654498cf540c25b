"""A short training that returns a score, to compare networks in a search.

It writes no checkpoints and runs in one process. Images are decoded once for each resolution; they are mirrored and
shifted by up to an eighth, which is enough for a short training. The score is the accuracy on the val split. The same
network, plan, epochs, seed and number of threads give the same score to the bit.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.dataset import Dataset
from effnet.data.image import load_pixels
from effnet.errors import DataError, EffnetError, ImageError, TrainingError
from effnet.files import write_file
from effnet.models.efficientnet import EfficientNet
from effnet.progress import SILENT, Progress
from effnet.searching.halving import FAILED, Job, Trial
from effnet.searching.plan import DECODING, SearchPlan
from effnet.training.initial_network import init_classifier, set_momentum
from effnet.training.learner import Learner, derive_seed, spread
from effnet.training.optimizer import Updater

SHIFT = 1 / 8  # largest shift of an image, relative to its side
BATCH = 256  # images per batch of the evaluation


def attempt(plan: SearchPlan, job: Job, cache: Path, progress: Progress = SILENT) -> Trial | EffnetError:
    """Train a candidate and score it, on one thread of a processor or on a GPU.

    Returns:
        The trial, with the score FAILED if the network cannot be trained; or an error that makes every training fail,
        such as an image that cannot be read.
    """
    options = plan.options
    if options.device == "cpu":
        torch.set_num_threads(1)  # the score depends on the number of threads
    seed = int(np.random.SeedSequence((options.seed, job.rung, job.seed)).generate_state(1)[0])
    network, epochs = plan.candidates[job.candidate].network, plan.epochs * plan.rungs[job.rung].share
    started = time.monotonic()
    try:
        score, error = train_and_score(plan, network, epochs, seed, cache, progress), ""
    except TrainingError as failure:
        score, error = FAILED, str(failure)
    except EffnetError as failure:
        return failure
    return Trial(job, score, time.monotonic() - started, error)


def train_and_score(
    plan: SearchPlan, spec: NetworkSpec, epochs: float, seed: int, cache: Path, progress: Progress = SILENT
) -> float:
    """The val accuracy of a network after a training.

    Args:
        plan: data, recipe and device.
        spec: the network.
        epochs: passes over the train split; may be fractional.
        seed: of weights, order, mirroring and shifting.
        cache: a folder for decoded images, shared by a machine's workers.
        progress: receives the progress of decoding and training.

    Raises:
        TrainingError: the loss diverges, or the network does not learn.
        DataError: an image cannot be read.
    """
    device = torch.device(plan.options.device)
    input_spec = dataclasses.replace(plan.input_spec, size=spec.resolution, resize=spec.resolution)
    train, val = (
        load_split(plan.data.subset(split), input_spec, cache / f"{split}-{spec.resolution}.npy", progress)
        for split in ("train", "val")
    )
    torch.manual_seed(seed)
    network = EfficientNet(apply_recipe(plan, spec))
    init_classifier(network)
    set_momentum(network, plan.recipe.bn_momentum)
    learner = Learner(network.to(device).to(memory_format=torch.channels_last), plan.recipe, plan.input_spec)
    right = train_briefly(learner.to(device), train, val, epochs=epochs, seed=seed, progress=progress)
    return int(right.sum()) / len(right)


def train_briefly(
    learner: Learner,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    *,
    epochs: float,
    seed: int,
    progress: Progress = SILENT,
) -> Tensor:
    """Train a network; returns which val images its averaged weights get right, (N,) bool.

    Args:
        learner: the network, on its device, with its recipe.
        train: images (N, size, size, C) uint8 and labels (N,) to learn from.
        val: the same for the images to score it with.
        epochs: passes over the images; may be fractional.
        seed: of order, mirroring and shifting.
        progress: receives the steps.

    Raises:
        TrainingError: the loss diverges, or the network does not learn.
    """
    network, recipe, (pixels, labels) = learner.network, learner.recipe, train
    device = network.classifier.weight.device
    updater = Updater(network, recipe)
    learner.train()
    batch = min(recipe.batch, len(labels))
    per_epoch = len(labels) // batch
    total = max(1, round(epochs * per_epoch))
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(labels), generator=_generator(seed, step))
        chosen, done = order[step % per_epoch * batch :][:batch], (step + 1) / total
        images = mirror_and_shift(pixels[chosen], recipe.flip, _generator(seed, step, 1))
        loss, logits = learner(images.to(device), labels[chosen].to(device), done < recipe.head_first)
        loss.backward()
        updater.update(step, done, loss.detach(), spread(logits))
        progress.update("training", step + 1, total)
    updater.look()
    normalise, network = learner.normalise, updater.averaged.eval()
    right = []
    with torch.inference_mode():
        for images, answers in zip(*(torch.split(part, BATCH) for part in val), strict=True):
            right.append(network(normalise(images.to(device))).argmax(1).cpu() == answers)
    return torch.cat(right)


def apply_recipe(plan: SearchPlan, spec: NetworkSpec) -> NetworkSpec:
    """The network with the data's classes and the recipe's rates."""
    rates = {name: getattr(plan.recipe, name) for name in ("dropout", "drop_connect")}
    given = {name: rate for name, rate in rates.items() if rate is not None}
    return dataclasses.replace(spec, num_classes=len(plan.data.classes), **given)


def load_split(data: Dataset, input_spec: InputSpec, file: Path, progress: Progress = SILENT) -> tuple[Tensor, Tensor]:
    """The images (N, size, size, C) uint8 of a data set, decoded once into a .npy file, and their labels (N,).

    They are prepared by `input_spec`, which includes their size.

    Raises:
        DataError: an image cannot be read.
    """
    samples, size = data.samples, input_spec.size
    if not file.exists():
        shape = len(samples), size, size, input_spec.channels
        # Written sequentially, since a mapped file would kill this process if the disk is full.
        with write_file(file) as temporary, temporary.open("wb") as rows:
            np.lib.format.write_array_header_1_0(rows, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for place, sample in enumerate(samples):
                try:
                    rows.write(np.ascontiguousarray(load_pixels(data.file(sample), input_spec)).data)
                except ImageError as error:
                    raise DataError(f"{data.file(sample)} {error}") from error
                progress.update(DECODING, place + 1, len(samples))
    return torch.from_numpy(np.load(file, mmap_mode="c")), torch.tensor([sample.label for sample in samples])


def mirror_and_shift(pixels: Tensor, flip: float, random: torch.Generator) -> Tensor:
    """Mirror a share `flip` of the images (N, H, W, C), and shift all by a few pixels, repeating their edges.

    The shift is drawn relative to the side and then rounded, so that it is about the same at any resolution.
    """
    mirrored = torch.rand(len(pixels), generator=random) < flip
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
    side = pixels.shape[1]
    shares = SHIFT * (2 * torch.rand(2, generator=random, dtype=torch.float64) - 1)
    down, right = (side * shares).round().int().tolist()
    rows, columns = ((torch.arange(side) + by).clamp(0, side - 1) for by in (down, right))
    return pixels[:, rows][:, :, columns]


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*numbers))
