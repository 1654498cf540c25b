"""What learns: a network with its loss, the moving average of its weights, and how well they answer."""

from __future__ import annotations

import copy
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
from effnet.models.blocks import ConvNormAct
from effnet.models.efficientnet import EfficientNet
from effnet.progress import SILENT, Progress
from effnet.training.recipe import Recipe
from effnet.training.sanity_checks import DIVERGED

CLASSES = 1000  # of ImageNet
HEAD_STAGE = 9  # of the paper's Table 1; frozen with it, only the classifier learns


class Learner(nn.Module):
    """Pixels and labels -> the loss: normalising, mixing, the network, cross entropy.

    Args:
        network: what learns.
        recipe: its loss and mixing.
        input_spec: how pixels are normalised.
        weights: of the classes, (K,), mean 1; None for equal ones.
        frozen: the stages 1 ... `frozen` of the paper's Table 1 keep their weights and statistics.
    """

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
        """Training mode for what learns; frozen parts stay as in evaluation."""
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
        loss = functional.cross_entropy(
            logits.float(),
            targets,
            weight=self.class_weights if isinstance(self.class_weights, Tensor) else None,
            label_smoothing=self.recipe.label_smoothing,
            reduction="sum",
        )
        return loss / len(labels), logits


class Normalise(nn.Module):
    """Pixels (N, H, W, C) uint8 -> images (N, C, H, W) float32 in channels_last, normalised by an InputSpec."""

    def __init__(self, input_spec: InputSpec) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(input_spec, name)).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(pixels / 255 - mean) / std."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        return images.sub_(self.get_buffer("mean")).div_(self.get_buffer("std"))


class Average:
    """The exponential moving average of a network's weights and statistics: steadier, and what is kept."""

    def __init__(self, network: EfficientNet) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.network.recompute(None)

    @torch.no_grad()
    def update(self, network: EfficientNet, decay: float) -> None:
        """Move towards the network: average = decay * average + (1 - decay) * network."""
        state, averaged = network.state_dict(), self.network.state_dict()
        names = [name for name, tensor in averaged.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([averaged[name] for name in names], [state[name] for name in names], 1 - decay)
        for name in averaged.keys() - set(names):
            averaged[name].copy_(state[name])


def frozen_parts(network: EfficientNet, frozen: int) -> list[nn.Module]:
    """Stages 1 ... `frozen`: the stem, blocks and the head."""
    parts: list[nn.Module] = [network.stem] if frozen >= 1 else []
    parts += [stage for number, stage in network.stages.items() if int(number) <= frozen]
    return parts + ([network.head] if frozen >= HEAD_STAGE else [])


def class_weights(counts: tuple[int, ...]) -> Tensor:
    """(K,): the inverse of each class's share, 1 on average over the images; a class without images counts nothing."""
    images = torch.tensor(counts, dtype=torch.float64)
    present = images > 0
    weights = torch.where(present, images.sum() / (present.sum() * images.clamp(min=1)), 0.0)
    return weights.float()


def spread(logits: Tensor) -> float:
    """How much the outputs differ from image to image, against their size."""
    values = logits.detach().float()
    if len(values) < 2:
        return 1.0
    return float(values.std(0).mean() / values.abs().mean().clamp(min=1e-12))


def augment_of(recipe: Recipe, input_spec: InputSpec) -> Augment:
    """How a recipe changes images."""
    return Augment(input_spec, recipe.crop_area, recipe.crop_ratio, recipe.flip, recipe.augmentation)


def init_classifier(network: EfficientNet) -> None:
    """Draw a fresh classifier's weights.

    The official start, 1 / sqrt(classes), is made for 1000 of them: with ten, the first loss would be 3 ln(10).
    """
    bound = max(network.spec.num_classes, CLASSES) ** -0.5
    nn.init.uniform_(network.classifier.weight, -bound, bound)


def set_momentum(network: EfficientNet, momentum: float) -> None:
    """Give batch normalisation the recipe's momentum, but for 0; other norms have none."""
    if not momentum:
        return
    norms = [module.norm for module in network.modules() if isinstance(module, ConvNormAct)]
    if all(isinstance(norm, nn.modules.batchnorm._BatchNorm) for norm in norms):
        network.use_policy(dataclasses.replace(network.policy, bn_momentum=momentum))


def _mixing(recipe: Recipe, num_classes: int) -> Any:
    """torchvision's MixUp and CutMix, one of them at random, or None."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    from torchvision.transforms import v2

    ways = [
        transform(alpha=alpha, num_classes=num_classes)
        for transform, alpha in ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
        if alpha
    ]
    return v2.RandomChoice(ways) if len(ways) > 1 else ways[0]


class Answering:
    """A network as evaluation calls it: pixels in, logits out, both numpy."""

    def __init__(self, network: EfficientNet, input_spec: InputSpec, classes: tuple[str, ...]) -> None:
        self.network, self.input, self.classes = network, input_spec, classes
        self._normalise = Normalise(input_spec).to(network.classifier.weight.device)

    @torch.inference_mode()
    def logits(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(N, size, size, C) uint8 -> (N, K) float32."""
        training = self.network.training
        self.network.eval()
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        answer = self.answer(self._normalise(pixels.to(self.network.classifier.weight.device)))
        self.network.train(training)
        logits: np.ndarray[Any, Any] = answer.float().cpu().numpy()
        return logits

    def answer(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, size, size) -> (N, K)."""
        logits: Tensor = self.network(images)
        return logits


def predict_part(
    answering: Answering, part: Dataset, task: str, *, batch: int, progress: Progress = SILENT
) -> Predicted:
    """The logits of every image of a part; `task` is what the progress calls it.

    Raises:
        TrainingError: an image cannot be read.
    """
    found = predict_logits(answering.logits, answering.input, part, batch=batch, progress=progress, task=task)
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        raise TrainingError(f"{path} cannot be read: {reason} Find all such files with: effnet check DATA")
    return found


def score(
    answering: Answering, part: Dataset, *, batch: int, rank: int = 0, world: int = 1, progress: Progress = SILENT
) -> tuple[float, float]:
    """Accuracy and mean cross entropy over a part, of which each process looks at its share.

    Raises:
        TrainingError: an image cannot be read, or a logit is not finite.
    """
    if world > 1:  # each process has its own running statistics; rank 0's are kept
        for buffer in answering.network.buffers():
            dist.broadcast(buffer, 0)
    mine = dataclasses.replace(part, samples=part.samples[rank::world])
    try:
        found = predict_part(answering, mine, "validating", batch=batch, progress=progress)
    except CheckpointError as error:
        raise TrainingError(f"the network's logits are not finite: {DIVERGED}") from error
    shifted = found.logits.astype(np.float64) - found.logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(shifted)), found.labels]
    sums = torch.tensor(
        [float((found.logits.argmax(1) == found.labels).sum()), float(losses.sum()), float(len(losses))],
        dtype=torch.float64,
    )
    if world > 1:
        dist.all_reduce(sums)
    correct, loss, count = sums.tolist()
    return correct / count, loss / count
