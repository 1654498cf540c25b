"""How well a model knows its limits, counted by hand."""

import json

import numpy as np
import pytest

from effnet.errors import ArgumentError
from effnet.metrics.conformal import calibrate_sets, measure_sets
from effnet.metrics.intervals import wilson
from effnet.metrics.sureness import Answered, measure_sureness
from effnet.weights.sureness import Familiarity, LabelSets

CHANCES = np.array([0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55])
LOGITS = np.log(np.stack([CHANCES, 1 - CHANCES], 1))
LABELS = np.array([0, 0, 0, 0, 1, 0, 0, 1, 0, 1])


def test_the_curve_counts_the_most_confident() -> None:
    random = np.random.default_rng(0).permutation(10)
    found = measure_sureness(LOGITS[random], LABELS[random]).curve
    assert found[0] == Answered(1.0, pytest.approx(0.55), wilson(7, 10))
    assert found[2] == Answered(0.9, pytest.approx(0.6), wilson(7, 9))
    assert found[3] == Answered(0.8, pytest.approx(0.65), wilson(6, 8))
    assert found[5] == Answered(0.5, pytest.approx(0.8), wilson(4, 5))
    warm = measure_sureness(LOGITS, LABELS, 2.0).curve[-1]
    assert warm.least == pytest.approx(0.8**0.5 / (0.8**0.5 + 0.2**0.5))


def test_what_a_model_cannot_tell_is_missing() -> None:
    found = measure_sureness(LOGITS, LABELS)
    assert (found.sets, found.unfamiliar) == ((), None)
    few = LabelSets(10, "val", (0.5,) * 41)  # reaches 90 %, not 95 %
    assert [each.coverage for each in measure_sureness(LOGITS, LABELS, sets=few).sets] == [0.9]


def test_sets_and_familiarity_are_counted() -> None:
    sets = calibrate_sets(np.tile(LOGITS, (4, 1)), np.tile(LABELS, 4))
    known = Familiarity("energy", 0.5, 100, "val", 100, 2, {"energy": (0.9, 0.8, 1.0)})
    found = measure_sureness(LOGITS, LABELS, sets=sets, told=(known, np.arange(10) / 10))
    assert found.unfamiliar == wilson(5, 10)  # .5 itself is familiar
    assert found.sets == tuple(measure_sets(LOGITS, LABELS, 1.0, sets, each) for each in (0.9, 0.95))
    assert json.loads(json.dumps(found.to_dict()))["sets"][0]["found"]["value"] == found.sets[0].found.value


def test_arrays_must_fit() -> None:
    with pytest.raises(ArgumentError):
        measure_sureness(LOGITS, LABELS[1:])
