"""A classifier fitted to the features of a network that stays as it is: where training starts when images are few.

A fresh classifier pulls at the features until it has settled; one that is settled before the first step leaves them
what they know (Kumar et al. 2022, "Fine-tuning can distort pretrained features"). The problem is convex, and of a few
hundred images it fits into memory.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from effnet.data.dataset import Dataset
from effnet.progress import SILENT, Progress
from effnet.training.module import Answering, Learner, predict

ITERATIONS = 200  # of L-BFGS, at most
MOST = 2000  # images: more would take more time and memory than they are worth for a start


def fit_classifier(learner: Learner, data: Dataset, *, batch: int, progress: Progress = SILENT) -> tuple[float, int]:
    """Fit the classifier to images; return its accuracy on them, and their number.

    They are prepared as in evaluation, and mirrored as well if the recipe mirrors; the loss is the learner's.

    Args:
        learner: the network with its loss and its recipe, whose `linear_probe` is the weight of the penalty.
        data: the images to learn from; of more than MOST, about as many, evenly spread over their order.
        batch: images that go through the network together.
        progress: follows the images.

    Raises:
        TrainingError: an image cannot be read.
    """
    network, recipe = learner.network, learner.recipe

    def features(images: Tensor) -> Tensor:  # (N, F), or (N, 2 F) with those of the mirror images
        views = (images, images.flip(-1)) if recipe.flip else (images,)
        return torch.cat([network.embed(view) for view in views], 1)

    some = dataclasses.replace(data, samples=data.samples[:: -(-len(data) // MOST)])
    answering = Answering(network, learner.input, features)
    found = predict(answering, some, "fitting the classifier", batch, progress)
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
