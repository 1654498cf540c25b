"""The classifier that is fitted before the first step, and the momentum of batch normalisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import draw_images, tiny_spec
from torch import nn

import effnet
from effnet.arch.spec import InputSpec
from effnet.data.dataset import Dataset, read_data
from effnet.data.image import load_pixels
from effnet.errors import TrainingError
from effnet.training.initial_network import fit_classifier, set_momentum
from effnet.training.learner import Learner, class_weights
from effnet.training.recipe import Recipe

INPUT = InputSpec(32, 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
WEIGHTS = class_weights((7, 7, 3))


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    for spare in sorted((draw_images(tmp_path, 7) / "square").iterdir())[3:]:
        spare.unlink()
    return read_data(tmp_path)


def learner_of(recipe: Recipe) -> Learner:
    torch.manual_seed(0)
    return Learner(effnet.create(tiny_spec(), num_classes=3), recipe, INPUT, WEIGHTS)


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_it_is_where_the_learners_penalised_loss_is_least(data: Dataset, flip: float) -> None:
    recipe = Recipe(linear_probe=2.0, flip=flip, dropout=0.0)
    learner = learner_of(recipe).train()
    untouched = {name: value.clone() for name, value in learner.network.state_dict().items()}
    share, seen = fit_classifier(learner, data, batch=4)
    assert seen == 17
    learner.eval()
    pixels = torch.from_numpy(np.stack([load_pixels(data.file(sample), INPUT) for sample in data.samples]))
    labels = torch.tensor([sample.label for sample in data.samples])
    if flip:
        pixels, labels = torch.cat([pixels, pixels.flip(2)]), torch.cat([labels, labels])
    head = learner.network.classifier

    def slope() -> tuple[torch.Tensor, torch.Tensor]:
        head.zero_grad()
        loss = learner(pixels, labels, True)[0] * len(labels)
        (loss + recipe.linear_probe * head.weight.square().sum()).backward()
        assert head.weight.grad is not None
        assert head.bias.grad is not None
        return head.weight.grad.abs().max(), head.bias.grad.abs().max()

    fitted = {name: value.clone() for name, value in head.state_dict().items()}
    right = learner(pixels, labels, True)[1].argmax(1) == labels
    assert share == pytest.approx(float(right.double().mean()))
    least = slope()
    head.load_state_dict({name: torch.zeros_like(value) for name, value in fitted.items()})
    for here, at_zero in zip(least, slope(), strict=True):
        assert here < 1e-3 * at_zero
    head.load_state_dict(fitted)
    changed = {name for name, value in learner.network.state_dict().items() if not torch.equal(value, untouched[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_an_image_that_cannot_be_read_is_named(data: Dataset) -> None:
    data.file(data.samples[5]).write_bytes(b"not an image")
    with pytest.raises(TrainingError, match=data.samples[5].path):
        fit_classifier(learner_of(Recipe(linear_probe=1.0)), data, batch=16)


def test_momentum_is_set_where_there_is_one() -> None:
    network = effnet.create(tiny_spec())
    set_momentum(network, 0.3)
    assert {module.momentum for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {0.3}
    set_momentum(effnet.create(tiny_spec(), norm=lambda channels: nn.GroupNorm(4, channels)), 0.3)
