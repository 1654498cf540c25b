"""The network that a run starts from: its weights, its input, its outputs in the order of the data's classes.

The weights are pretrained or random. For few images, the recipe first fits the classifier to the features of the
unchanged network: a random classifier distorts the features until it has converged, and one that has converged before
the first step does not (Kumar et al. 2022, "Fine-tuning can distort pretrained features"). The problem is convex, and
for a few hundred images it fits in memory.
"""

from __future__ import annotations

import dataclasses
import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.specfile import SUFFIXES
from effnet.arch.variants import BASELINES, VARIANTS
from effnet.arch.variants import spec as make_spec
from effnet.data.dataset import Dataset
from effnet.data.image import natural_resolution, open_photo
from effnet.errors import ArgumentError, DownloadError, ImageError, UnknownNameError
from effnet.models.blocks import ConvNormAct
from effnet.models.efficientnet import EfficientNet
from effnet.progress import SILENT, Progress
from effnet.runtime.select import check_memory
from effnet.runtime.session import Logits, Pixels
from effnet.training.learner import Learner, predict
from effnet.training.recipe import Recipe
from effnet.training.settings import Settings
from effnet.weights.bundle import Bundle, is_bundle
from effnet.weights.inherit import inherit
from effnet.weights.load import open_model

ITERATIONS = 200  # of L-BFGS, at most
MOST = 2000  # images; more are not worth their time and memory
CLASSES = 1000  # of ImageNet
SAMPLED = 60  # images whose size is read


@dataclass(frozen=True)
class InitialNetwork:
    """What a run starts from."""

    network: EfficientNet
    input: InputSpec
    source: str  # where the weights came from
    notes: tuple[str, ...]  # what the user should know
    trained: bool  # whether it has pretrained weights
    image_side: int  # median of the images' shorter sides in pixels


def find_initial_network(settings: Settings, recipe: Recipe, data: Dataset, progress: Progress) -> InitialNetwork:
    """The network to train, its outputs in the order of the data's classes.

    Raises:
        ArgumentError, UnknownNameError, CheckpointError, BundleError, DownloadError: the model cannot be used.
    """
    model = settings.model
    bundle = is_bundle(Path(model))
    if bundle and settings.init:
        raise ArgumentError("init", settings.init, f"cannot be used with {model}, which has weights.")
    no_weights = Path(model).suffix.lower() in SUFFIXES or model.lower() in BASELINES
    untrained = bool(no_weights or settings.init or (recipe.fresh and not bundle))
    weights = settings.init if untrained else model
    given = None if weights is None else _open("init" if settings.init else "model", weights, progress)
    spec = make_spec(
        make_spec(model) if untrained or given is None else given.config.spec,
        num_classes=len(data.classes),
        resolution=settings.resolution,
        stem_stride=settings.stem_stride,
        dropout=recipe.dropout,
        drop_connect=recipe.drop_connect,
    )
    check_memory(spec)
    side = short_side(data)
    network = EfficientNet(spec, policy=NumericPolicy() if given is None else given.config.policy)
    init_classifier(network)
    notes = _size_notes(spec, side)
    if given is not None:
        unnamed = tuple(f"output {number}" for number in range(given.config.spec.num_classes))
        notes.append(str(inherit(network, given.network, classes=(data.classes, given.config.classes or unnamed))))
        source = given.config.source or str(weights)
    else:
        if not recipe.bn_momentum:
            raise ArgumentError("recipe", recipe.name, f"needs weights, and {model} has none: take scratch.")
        source = f"from scratch ({spec.name})"
        why = "it has no weights" if no_weights else f"the recipe {recipe.name} uses none"
        notes.append(f"{model} starts from scratch: {why}")
    set_momentum(network, recipe.bn_momentum)
    input_spec = InputSpec() if given is None else given.config.input
    input_spec = dataclasses.replace(input_spec, fit=settings.fit or input_spec.fit)
    input_spec = input_spec.with_channels(spec.in_channels).at(spec.resolution, side)
    return InitialNetwork(network, input_spec, source, tuple(notes), given is not None, side)


def short_side(data: Dataset) -> int:
    """The median shorter side in pixels of some images, spread over the data set; 0 if none can be read."""
    sides: list[int] = []
    for sample in data.samples[:: max(1, len(data) // SAMPLED)]:
        with suppress(ImageError):
            sides.append(min(open_photo(data.file(sample)).size))
    return round(statistics.median(sides)) if sides else 0


def init_classifier(network: EfficientNet) -> None:
    """Initialize the classifier with random weights.

    The official range, 1 / sqrt(classes), suits 1000 classes: with ten, the first loss would be near 3 ln(10).
    """
    bound = max(network.spec.num_classes, CLASSES) ** -0.5
    nn.init.uniform_(network.classifier.weight, -bound, bound)


def set_momentum(network: EfficientNet, momentum: float) -> None:
    """Set batch normalisation's momentum to the recipe's, unless that is 0; other norms have none."""
    norms = [module.norm for module in network.modules() if isinstance(module, ConvNormAct)]
    if momentum and all(isinstance(norm, nn.modules.batchnorm._BatchNorm) for norm in norms):
        network.use_policy(dataclasses.replace(network.policy, bn_momentum=momentum))


def fit_classifier(learner: Learner, data: Dataset, *, batch: int, progress: Progress = SILENT) -> tuple[float, int]:
    """Fit the classifier to images; return its accuracy on them and their number.

    They are prepared as in evaluation, and mirrored as well if the recipe mirrors; the loss is the learner's.

    Args:
        learner: the network with its loss and its recipe, whose `linear_probe` is the weight of the penalty.
        data: the images to learn from; at most about MOST of them are used, evenly spaced.
        batch: images per forward pass.
        progress: receives the number of images.

    Raises:
        TrainingError: an image cannot be read.
    """
    network, recipe = learner.network.eval(), learner.recipe

    @torch.inference_mode()
    def features(pixels: Pixels) -> Logits:  # (N, F), or (N, 2 F) with those of the mirror images
        images = learner.normalise(
            torch.from_numpy(np.require(pixels, requirements="W")).to(network.classifier.weight.device)
        )
        views = (images, images.flip(-1)) if recipe.flip else (images,)
        return torch.cat([network.embed(view) for view in views], 1).float().cpu().numpy()

    some = dataclasses.replace(data, samples=data.samples[:: -(-len(data) // MOST)])
    task = "fitting the classifier"
    found = predict(features, learner.input, some, batch=batch, progress=progress, task=task)
    width = network.classifier.in_features
    learned = torch.from_numpy(found.logits).double().reshape(-1, width)
    labels = torch.from_numpy(found.labels).repeat_interleave(len(learned) // len(found.labels))
    weight = torch.zeros(network.spec.num_classes, width, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(network.spec.num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = learner.loss(functional.linear(learned, weight, bias), labels)
        loss = (loss + recipe.linear_probe * weight.square().sum()) / len(labels)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        network.classifier.weight.copy_(weight)
        network.classifier.bias.copy_(bias)
        right = functional.linear(learned, weight, bias).argmax(1) == labels
    return float(right.double().mean()), len(some)


def _open(argument: str, model: str, progress: Progress) -> Bundle:
    try:
        return open_model(model, progress=progress)
    except DownloadError as error:
        raise DownloadError(f"{error}; to train it from scratch: --recipe scratch") from error
    except UnknownNameError as error:
        raise UnknownNameError(argument, model, (*VARIANTS, "a bundle", "a spec.yaml")) from error


def _size_notes(spec: NetworkSpec, side: int) -> list[str]:
    size, notes = spec.resolution, []
    if side * 2 <= size:
        natural = natural_resolution(side)
        cost = f"{(size / natural) ** 2:.0f} times the work of --resolution {natural}"
        notes.append(f"the images have {side} px on their shorter side and are enlarged to {size} px: {cost}")
    if spec.final_size == 1:
        notes.append(f"at {size} px the last feature map has one pixel; --stem-stride 1 makes it two by two")
    return notes
