"""Faithfulness of maps where the truth is known: a network that looks only at one corner."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from corner import CELLS, CORNER, SIZE, bright_corner, corner_classifier
from PIL import Image, ImageFilter
from scipy.special import softmax

from effnet.explaining.faithfulness import Faithfulness, from_centre, measure, summarise
from effnet.metrics.intervals import Interval


def test_a_true_map_beats_chance_and_its_reverse_loses() -> None:
    classifier = corner_classifier()
    found = classifier.explain(bright_corner())
    true = measure(classifier.logits, found)
    # Of 64 cells in 10 groups 6, 13, 19 ... are gone; the corner's 9 go first, row by row, and the rest is black.
    blurred = np.asarray(Image.fromarray(bright_corner()).filter(ImageFilter.GaussianBlur(SIZE / 7)))
    step, gone = SIZE // CELLS, np.zeros((CELLS, CELLS), bool)
    deleted, inserted = [], []
    for count in (0, 6, 9):
        gone.ravel()[[row * CELLS + column for row in range(CORNER) for column in range(CORNER)][:count]] = True
        mask = np.kron(gone, np.ones((step, step), bool))[..., None]
        for curve, images in ((deleted, (bright_corner(), blurred)), (inserted, (blurred, bright_corner()))):
            curve.append(softmax(classifier.logits(np.where(mask, *images[::-1])[None])[0])[0])
    for found_area, curve in ((true.deletion, deleted), (true.insertion, inserted)):
        first, second, rest = ((curve[0] + curve[1]) / 2 * 6, (curve[1] + curve[2]) / 2 * 7, curve[2] * (64 - 13))
        assert found_area == pytest.approx((first + second + rest) / 64, abs=1e-6)
    assert true.gain.value == pytest.approx(true.insertion - true.deletion)
    assert true.beats_chance
    assert true.gain.value > true.centre
    worst = measure(classifier.logits, dataclasses.replace(found, map=-found.map))
    assert worst.gain.value < -0.5
    assert not worst.beats_chance


def test_back_to_front_the_curves_change_places() -> None:
    """So a random order's gain is 0 on average, which is what the interval is about."""
    classifier, random = corner_classifier(), np.random.default_rng(3)
    found = classifier.explain(bright_corner())
    order = random.permutation(CELLS**2).reshape(CELLS, CELLS).astype(float)
    one, other = (measure(classifier.logits, dataclasses.replace(found, map=sign * order)) for sign in (1, -1))
    assert one.insertion == pytest.approx(other.deletion, abs=1e-6)
    assert one.gain.value == pytest.approx(-other.gain.value, abs=1e-6)
    assert one.gain.high - one.gain.low == pytest.approx(other.gain.high - other.gain.low)


def test_a_map_of_something_else_is_no_better_than_chance() -> None:
    classifier = corner_classifier()
    found = dataclasses.replace(classifier.explain(bright_corner()), index=2)  # "nothing" is what a bright corner hides
    assert not measure(classifier.logits, found).beats_chance


def test_one_class_against_another_is_measured_between_the_two() -> None:
    classifier = corner_classifier()
    found = classifier.explain(bright_corner(), "corner", "nothing")
    true = measure(classifier.logits, found)
    logits = classifier.logits(bright_corner()[None])[0]
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
