"""Whether a map is true, where the truth is known: a network that looks at one corner only."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from corner import CELLS, bright, corner_classifier
from scipy.special import softmax

from effnet.explaining.faithfulness import Faithfulness, from_centre, measure, summarise
from effnet.metrics.intervals import Interval


def test_a_true_map_beats_chance_and_its_reverse_loses() -> None:
    classifier = corner_classifier()
    found = classifier.explain(bright(0, 0))
    true = measure(classifier.logits, found)
    whole, without = (softmax(classifier.logits(pixels[None])[0])[0] for pixels in (bright(0, 0), 0 * bright(0, 0)))
    # 16 cells in 12 groups; the first to go, or to come back, is the corner: by hand, one step of a trapezium
    assert true.deletion == pytest.approx(without + (whole - without) / 2 / CELLS**2, abs=1e-6)
    assert true.insertion == pytest.approx(whole - (whole - without) / 2 / CELLS**2, abs=1e-6)
    assert true.gain.value == pytest.approx(true.insertion - true.deletion)
    assert true.beats_chance
    assert true.gain.value > true.centre
    worst = measure(classifier.logits, dataclasses.replace(found, map=-found.map))
    assert worst.gain.value < -0.5
    assert not worst.beats_chance


def test_back_to_front_the_curves_change_places() -> None:
    """So a random order's gain is 0 on average, which is what the interval is about."""
    classifier, random = corner_classifier(), np.random.default_rng(3)
    found = classifier.explain(bright(0, 0))
    order = random.permutation(CELLS**2).reshape(CELLS, CELLS).astype(float)
    one, other = (measure(classifier.logits, dataclasses.replace(found, map=sign * order)) for sign in (1, -1))
    assert one.insertion == pytest.approx(other.deletion, abs=1e-6)
    assert one.gain.value == pytest.approx(-other.gain.value, abs=1e-6)
    assert one.gain.high - one.gain.low == pytest.approx(other.gain.high - other.gain.low)


def test_a_map_of_something_else_is_no_better_than_chance() -> None:
    classifier = corner_classifier()
    found = dataclasses.replace(classifier.explain(bright(0, 0)), index=2)  # "nothing" is what a bright corner hides
    assert not measure(classifier.logits, found).beats_chance


def test_one_class_against_another_is_measured_between_the_two() -> None:
    classifier = corner_classifier()
    found = classifier.explain(bright(0, 0), "corner", "nothing")
    true = measure(classifier.logits, found)
    logits = classifier.logits(bright(0, 0)[None])[0]
    assert true.insertion < 1 / (1 + np.exp(logits[2] - logits[0]))
    assert true.beats_chance


def test_the_middle_comes_first() -> None:
    assert from_centre((3, 3)).tolist()[0] == 4
    assert set(from_centre((3, 3)).tolist()[-4:]) == {0, 2, 6, 8}
    assert from_centre((1, 4)).tolist()[:2] == [1, 2]


def test_the_mean_over_images() -> None:
    found = [
        Faithfulness(0.1, 0.4, Interval(0.3, 0.1, 0.5), 0.1),
        Faithfulness(0.1, 0.2, Interval(0.1, -0.1, 0.3), 0.2),
    ]
    both, alone = summarise(found), summarise(found[:1])
    assert both.gain is not None
    assert both.over_centre is not None
    assert both.gain.value == pytest.approx(0.2)
    assert both.gain.high - both.gain.value == pytest.approx(12.7062 * 0.1, rel=1e-4)  # Student's t of 1 degree
    assert both.over_centre.value == pytest.approx(0.05)
    assert (both.images, both.beating, both.beats_chance) == (2, 1, False)
    assert (alone.gain, alone.beats_chance) == (None, True)
