"""A network with its loss and mixing, as it is trained; and its evaluation after each epoch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from effnet.arch.spec import InputSpec
from effnet.data.augment import Augment
from effnet.data.dataset import Dataset
from effnet.errors import CheckpointError, TrainingError
from effnet.metrics.evaluate import Predicted, predict_logits
from effnet.models.efficientnet import EfficientNet
from effnet.progress import Progress
from effnet.runtime.session import Run
from effnet.runtime.torch import compile_network
from effnet.training.fabric import Fabric
from effnet.training.optimizer import DIVERGED
from effnet.training.recipe import Recipe
from effnet.training.settings import STAGES


class Learner(nn.Module):
    """From pixels and labels to the loss: normalising, mixing, the network, cross entropy.

    Args:
        network: the network to train.
        recipe: its loss and mixing.
        input_spec: how pixels are normalised.
        weights: class weights, (K,), mean 1; None for equal ones.
        frozen: stages 1 ... `frozen` of the paper's Table 1 keep their weights and statistics.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        network: EfficientNet,
        recipe: Recipe,
        input_spec: InputSpec,
        weights: Tensor | None = None,
        *,
        frozen: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.recipe, self.input, self.frozen = network, recipe, input_spec, frozen
        self.normalise = Normalise(input_spec)
        self.register_buffer("class_weights", weights, persistent=False)
        self.mix = _mixing(recipe, network.spec.num_classes)
        for part in frozen_parts(network, frozen):
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Learner:
        """Set the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in frozen_parts(self.network, self.frozen):
            part.eval()
        if not self.recipe.bn_momentum:
            for norm in self.network.modules():
                if isinstance(norm, nn.modules.batchnorm._NormBase):
                    norm.eval()
        return self

    def forward(self, pixels: Tensor, labels: Tensor, head_only: bool) -> tuple[Tensor, Tensor]:
        """The mean loss and the logits (N, K) of pixels (N, size, size, C) uint8 and labels (N,)."""
        images, targets = self.normalise(pixels), labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)
        if head_only:
            with torch.no_grad():
                features = self.network.embed(images)
            logits = self.network.classifier(self.network.dropout(features))
        else:
            logits = self.network(images)
        return self.loss(logits.float(), targets) / len(labels), logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of logits (N, K) for labels (N,) or shares of the classes (N, K)."""
        weight = None if self.class_weights is None else self.class_weights.to(logits)
        smoothing = self.recipe.label_smoothing
        return functional.cross_entropy(logits, targets, weight, label_smoothing=smoothing, reduction="sum")


class Normalise(nn.Module):
    """Pixels (N, H, W, C) uint8 -> images (N, C, H, W) float32 in channels_last, normalised by an InputSpec."""

    def __init__(self, input_spec: InputSpec) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(input_spec, name)), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(pixels / 255 - mean) / std on whole rows, in a third of the time that torch takes over three channels."""
        mean, std = (self.get_buffer(name).repeat(pixels.shape[2]) for name in ("mean", "std"))
        rows = pixels.flatten(2).to(torch.float32).div_(255).sub_(mean).div_(std)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)


def frozen_parts(network: EfficientNet, frozen: int) -> list[nn.Module]:
    """The modules of stages 1 ... `frozen`: stem, blocks and head."""
    parts: list[nn.Module] = [network.stem] if frozen >= 1 else []
    parts += [stage for number, stage in network.stages.items() if int(number) <= frozen]
    return parts + ([network.head] if frozen >= STAGES else [])


def class_weights(counts: tuple[int, ...]) -> Tensor:
    """Inverse class frequencies (K,), 1 on average over the images; 0 for a class without images."""
    images = torch.tensor(counts, dtype=torch.float64)
    present = images > 0
    weights = torch.where(present, images.sum() / (present.sum() * images.clamp(min=1)), 0.0)
    return weights.float()


def spread(logits: Tensor) -> Tensor:
    """Standard deviation of the outputs over the images, relative to their mean absolute value, (); 1 for one image."""
    values = logits.detach().float()
    return values.new_ones(()) if len(values) < 2 else values.std(0).mean() / values.abs().mean().clamp(min=1e-12)


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed derived from several numbers, such as a run's seed and a step."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def augment_of(recipe: Recipe, input_spec: InputSpec) -> Augment:
    """The augmentation of a recipe."""
    return Augment(input_spec, recipe.crop_area, recipe.crop_ratio, recipe.flip, recipe.augmentation)


def _mixing(recipe: Recipe, num_classes: int) -> Any:
    """torchvision's MixUp and CutMix, one of them at random, or None."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    from torchvision.transforms import v2

    pairs = ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
    return v2.RandomChoice([transform(alpha=alpha, num_classes=num_classes) for transform, alpha in pairs if alpha])


def predict(
    run: Run, input_spec: InputSpec, images: Dataset, *, batch: int, progress: Progress, task: str
) -> Predicted:
    """The outputs of `run` for every image, as from `predict_logits`.

    Raises:
        TrainingError: an image cannot be read.
    """
    found = predict_logits(run, input_spec, images, batch=batch, progress=progress, task=task)
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        raise TrainingError(f"{path} cannot be read: {reason} Find all such files with: effnet check DATA")
    return found


def score(
    network: EfficientNet, input_spec: InputSpec, images: Dataset, *, batch: int, fabric: Fabric, progress: Progress
) -> tuple[float, float]:
    """Accuracy and mean cross entropy of a network on images; each process evaluates its share of them.

    Raises:
        TrainingError: an image cannot be read, or a logit is not finite.
    """
    rank, world = fabric.global_rank, fabric.world_size
    if world > 1:  # each process has its own running statistics; rank 0's are kept
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    mine = dataclasses.replace(images, samples=images.samples[rank::world])
    run = compile_network(network.eval(), input_spec)
    try:
        found = predict(run, input_spec, mine, batch=batch, progress=progress, task="validating")
    except CheckpointError as error:
        raise TrainingError(f"the network's logits are not finite: {DIVERGED}") from error
    logits, labels = torch.from_numpy(found.logits).double(), torch.from_numpy(found.labels)
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    sums = torch.stack([(logits.argmax(1) == labels).sum().double(), loss, torch.tensor(float(len(labels)))])
    if world > 1:
        dist.all_reduce(sums)
    correct, total, count = sums.tolist()
    return correct / count, total / count
