"""The loss, mixing, and what is frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prepared import normalise
from torch import nn

import effnet
from effnet.arch.spec import InputSpec
from effnet.training.initial_network import set_momentum
from effnet.training.learner import (
    Learner,
    Normalise,
    class_weights,
    frozen_parts,
    spread,
)
from effnet.training.recipe import Recipe

Batch = tuple[torch.Tensor, torch.Tensor]
INPUT = InputSpec(32, 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
PLAIN = Recipe(label_smoothing=0.1)


@pytest.fixture
def network() -> effnet.EfficientNet:
    torch.manual_seed(0)
    return effnet.create(effnet.spec("b0", num_classes=3, resolution=32, width=0.25, depth=0.3))


@pytest.fixture
def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (6, 32, 32, 3), generator=draw, dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1, 0])


def test_normalising_is_preprocessings(batch: Batch) -> None:
    ours = Normalise(INPUT)(batch[0])
    np.testing.assert_allclose(ours.numpy(), normalise(batch[0].numpy(), INPUT), rtol=1e-6, atol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_label_smoothing_by_its_formula(network: effnet.EfficientNet, batch: Batch) -> None:
    loss, logits = Learner(network.eval(), PLAIN, INPUT).eval()(*batch, False)
    log = logits.log_softmax(1)
    wanted = -(0.9 * log[range(6), batch[1]] + 0.1 * log.mean(1)).mean()
    torch.testing.assert_close(loss, wanted)


def test_parts_of_equal_size_average_to_the_whole(network: effnet.EfficientNet, batch: Batch) -> None:
    weights = class_weights((30, 20, 10))
    assert weights.tolist() == pytest.approx([60 / 90, 1, 2])
    assert class_weights((4, 0, 4)).tolist() == [1, 0, 1]
    learner = Learner(network, PLAIN, INPUT, weights).eval()
    pixels, labels = batch
    whole = learner(pixels, labels, False)[0]
    parts = [learner(pixels[i : i + 3], labels[i : i + 3], False)[0] for i in (0, 3)]
    torch.testing.assert_close(whole, sum(parts) / 2)


def test_only_the_classifier_has_gradients_at_first(network: effnet.EfficientNet, batch: Batch) -> None:
    learner = Learner(network, PLAIN, INPUT)
    learner(*batch, True)[0].backward()
    learned = {name for name, param in network.named_parameters() if param.grad is not None}
    assert learned == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("frozen", [0, 1, 4, 9])
def test_frozen_stages_neither_learn_nor_count(network: effnet.EfficientNet, batch: Batch, frozen: int) -> None:
    learner = Learner(network, PLAIN, INPUT, frozen=frozen).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    learner(*batch, False)[0].backward()
    still = [network.stem, *network.stages.values(), network.head][:frozen]
    assert len(frozen_parts(network, frozen)) == frozen
    for part in still:
        assert all(param.grad is None for param in part.parameters())
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    parts = ["stem", *(f"stages.{number}." for number in network.stages), "head"]
    assert all(any(name.startswith(part) for name in moved) == (place >= frozen) for place, part in enumerate(parts))


@pytest.mark.parametrize("more", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_changes_images_and_targets(network: effnet.EfficientNet, batch: Batch, more: dict[str, float]) -> None:
    learner = Learner(network, Recipe(**more), INPUT).eval()
    torch.manual_seed(1)
    mixed = learner(*batch, False)[0]
    torch.manual_seed(1)
    assert torch.equal(mixed, learner(*batch, False)[0])
    torch.manual_seed(2)
    assert not torch.equal(mixed, learner(*batch, False)[0])


def test_spread() -> None:
    assert spread(torch.ones(4, 3)) == 0
    assert spread(torch.eye(3)) > 0.1


def test_without_momentum_batch_normalisation_stays_as_in_evaluation(
    network: effnet.EfficientNet, batch: Batch
) -> None:
    few = Recipe(bn_momentum=0.0)
    set_momentum(network, few.bn_momentum)
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    network.dropout.p = 0.0
    learner = Learner(network, few, INPUT).train()
    assert network.training
    loss, _ = learner(*batch, False)
    loss.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.named_buffers())
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.weight.grad is not None  # which learns
    assert norm.momentum == network.policy.bn_momentum > 0
