"""What a run measures of its limits, on images of three colours, which any network tells apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from prepared import preprocess
from random_weights import shaken
from short_run import Recorder
from tiny import tiny_spec

from effnet.arch.spec import InputSpec
from effnet.data.dataset import Dataset, read_data
from effnet.models.efficientnet import EfficientNet
from effnet.training import sureness
from effnet.training.loop import Loop
from effnet.training.sureness import evaluate_split, learn_familiarity, see_training_images

INPUT = InputSpec(32, 32)


def paint(root: Path) -> Dataset:
    """Noise of red, green and blue: 30 images of each to train, 8 for val."""
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 8)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (32, 32, 3))
                pixels[:, :, channel] += 130
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return read_data(root)


@pytest.fixture(scope="module")
def network() -> EfficientNet:
    return shaken(EfficientNet(tiny_spec()))


@pytest.fixture
def loop(tmp_path: Path) -> Any:
    settings, execution = SimpleNamespace(seed=0), SimpleNamespace(part=7)
    plan = SimpleNamespace(input=INPUT, settings=settings, execution=execution)
    return SimpleNamespace(plan=plan, data=paint(tmp_path / "colours"), progress=Recorder())


def test_features_are_what_the_classifier_sees(network: EfficientNet, loop: Any) -> None:
    data = loop.data.subset("val")
    found = evaluate_split(cast(Loop, loop), network, data, "looking").seen
    with torch.inference_mode():
        images = torch.stack([torch.from_numpy(preprocess(data.file(sample), INPUT)) for sample in data.samples])
        features = network.embed(images)
        np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.logits, network.classifier(features), rtol=1e-4, atol=1e-4)
    assert found.labels.tolist() == [sample.label for sample in data.samples]


def test_a_capped_number_of_training_images_is_used(
    network: EfficientNet, loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sureness, "IMAGES", 60)
    val = evaluate_split(cast(Loop, loop), network, loop.data.subset("val"), "looking").seen
    images, train = see_training_images(cast(Loop, loop), network)
    assert [sample.label for sample in images.samples] == train.labels.tolist()
    found = learn_familiarity(cast(Loop, loop), network, train, val)
    assert found is not None
    assert (found.images, found.n, found.left_out) == (60, 24, 3)
    assert found.aurocs[found.score][0] > 0.9
    assert loop.progress.has(f"Images are told by {found.score}, whose threshold accepts 95 % of 24 val images")
    assert loop.progress.has("fitted to 60 of 90 training images")


def test_small_data_is_refused(network: EfficientNet, loop: Any) -> None:
    val = evaluate_split(cast(Loop, loop), network, loop.data.subset("val"), "looking").seen
    few = val.take(np.arange(len(val.labels)) < 10)
    assert learn_familiarity(cast(Loop, loop), network, val, few) is None
    assert loop.progress.has("will not be detected: 10 images of val are too few")
