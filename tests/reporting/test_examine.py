"""A model's answers with every figure that a page shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from reported import CLASSES

import effnet
from effnet.data.dataset import Sample
from effnet.errors import DataError
from effnet.metrics.evaluate import evaluate
from effnet.reporting import subject as module
from effnet.reporting.examine import examine
from effnet.reporting.subject import Subject, find_neighbours


def test_the_figures_are_those_of_the_answers(subject: Subject, bundle: Path) -> None:
    classifier, data = effnet.load(bundle, precision="fp32"), subject.data
    found = examine(classifier, data, "test", name="m", train=data)
    pixels = np.stack([classifier.read(data.file(sample)) for sample in data.samples])
    logits, scores = classifier.answer(pixels)
    assert scores is not None
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)  # type: ignore[arg-type]
    expected = evaluate(logits, subject.labels, CLASSES, temperature=1.2, threshold=0.6)
    assert found.evaluation.to_dict()["top1"] == expected.to_dict()["top1"]
    assert found.evaluation.after.temperature == 1.2
    assert found.sureness is not None
    assert [each.coverage for each in found.sureness.sets] == [0.9, 0.95]
    assert found.sureness.unfamiliar is not None
    assert found.sureness.unfamiliar.value == (scores < 0).mean()
    assert found.neighbours is not None
    assert len(found.neighbours.images) == len(data)
    on_val = examine(classifier, data, "val", name="m")
    assert on_val.sureness is not None
    assert (on_val.sureness.sets, on_val.sureness.unfamiliar, on_val.neighbours) == ((), None, None)


def test_images_that_cannot_be_read_do_not_count(subject: Subject) -> None:
    samples = (Sample("gone.png", 0, "test"), *subject.data.samples[:5])
    found = examine(subject.classifier, dataclasses.replace(subject.data, samples=samples), "test", name="m")
    assert found.data.samples == samples[1:]
    assert found.notes == ["1 of these images cannot be read and do not count."]
    with pytest.raises(DataError, match="none of the 1 images"):
        examine(subject.classifier, dataclasses.replace(subject.data, samples=samples[:1]), "test", name="m")


def test_neighbours_are_bounded_and_spread(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    macs = effnet.cost(subject.classifier.spec).macs
    monkeypatch.setattr(module, "MOST_MACS", 8.5 * macs)
    found = find_neighbours(subject.classifier, subject.data)
    assert found is not None
    assert np.bincount([sample.label for sample in found.images.samples]).tolist() == [2, 2, 2, 2]
    assert found.features.shape == (8, subject.classifier.spec.head_channels)
    monkeypatch.setattr(module, "MOST_MACS", 3.5 * macs)
    assert find_neighbours(subject.classifier, subject.data) is None
