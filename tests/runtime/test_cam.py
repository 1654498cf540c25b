"""Class activation maps: exact sums, captum's numbers, and the corner in which a hand-made answer lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from corner import CELLS, CLASSES, CORNER, SIZE, Corner, bright_corner, corner_classifier
from prepared import preprocess
from random_weights import shaken

import effnet
from effnet.arch.spec import InputSpec
from effnet.errors import ArgumentError, ImageError
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.cam import SHIFTS, decompose, enlarge


def test_it_is_captums_grad_cam_of_the_head(tmp_path, photos) -> None:
    """For this head the gradient of a logit is W_c / (h w) at every place, so Grad-CAM without ReLU is the CAM."""
    network = shaken(EfficientNet(effnet.spec("b0", width=0.25, depth=0.5, resolution=96, num_classes=5)))
    folder = effnet.save(network, tmp_path / "m", classes=list("abcde"), input=InputSpec(96, 110))
    classifier = effnet.load(folder, engine="openvino", precision="fp32", decode="exact")
    image = torch.from_numpy(preprocess(photos / "coffee.png", classifier.input))[None]
    for label in range(5):
        found = classifier.explain(photos / "coffee.png", label)
        expected = LayerGradCam(network, network.head).attribute(image, label, relu_attributions=False)
        expected = expected[0, 0].detach()
        cells = found.map - network.classifier.bias[label].item() / found.map.size
        np.testing.assert_allclose(cells, expected, atol=1e-5 * float(expected.abs().max()))
        assert (found.index, found.label, found.map.shape) == (label, "abcde"[label], (3, 3))
        assert found.residual < 1e-5
    logits = network(image)[0].detach().numpy()
    best = classifier.explain(photos / "coffee.png")
    assert best.index == logits.argmax()
    assert best.logit == pytest.approx(logits.max(), rel=1e-4)


def test_one_class_against_another(photos) -> None:
    lite0 = effnet.load("lite0", engine="openvino", precision="fp32")
    image = photos / "chelsea.png"
    one, other = (lite0.explain(image, label) for label in ("tabby", "tiger cat"))
    for both, sign in (
        (lite0.explain(image, "tabby", "tiger cat"), 1),
        (lite0.explain(image, "tiger cat", "tabby"), -1),
    ):
        np.testing.assert_allclose(both.map, sign * (one.map - other.map), atol=1e-7)
        assert both.logit == pytest.approx(sign * (one.logit - other.logit), abs=1e-5)
        assert both.map.sum() == pytest.approx(both.logit, abs=1e-4)
    assert both.title == "tiger cat against tabby"
    (first, second) = lite0.explain_pixels(lite0.read(image), versus="tiger cat", topk=2)
    assert "tiger cat" not in (first.label, second.label)


def test_a_corner() -> None:
    classifier = corner_classifier()
    found = classifier.explain(bright_corner())
    assert (found.label, found.logit, found.residual) == ("corner", pytest.approx(6), pytest.approx(0, abs=1e-6))
    expected = np.full((CELLS, CELLS), -4 / CELLS**2)  # the bias of the class is spread evenly
    expected[:CORNER, :CORNER] += 10 / CORNER**2
    np.testing.assert_allclose(found.map, expected, rtol=1e-6)
    against = classifier.explain(bright_corner(), "nothing", "corner")
    np.testing.assert_allclose(against.map, 1 / CELLS**2 - expected, rtol=1e-6)
    assert against.logit == pytest.approx(1 - 6)


@pytest.mark.parametrize("side", [32, 33, 224, 7])
def test_pixels_sum_to_what_the_cells_sum_to(side: int) -> None:
    values = np.random.default_rng(0).normal(0.3, 1, (7, 5))
    found = enlarge(values, side)
    assert found.shape == (side, side)
    assert found.sum() == pytest.approx(values.sum(), rel=1e-12)
    flat = enlarge(np.full((7, 7), 2.0), side) * side**2 / 49
    assert flat == pytest.approx(2, rel=0.05)
    if side == 224:  # 32 whole pixels a cell
        assert flat == pytest.approx(2, rel=1e-12)
        middle = enlarge(np.eye(7), side)[3 * 32 + 15 : 3 * 32 + 17, 3 * 32 + 15 : 3 * 32 + 17] * 32 * 32
        assert middle == pytest.approx((1 - 1 / 64) ** 2 + (1 / 64) ** 2, rel=0.05)


@pytest.mark.parametrize(("row", "column"), [(16, 16), (21, 25)])
def test_a_fine_map_is_the_mean_over_shifted_inputs(row: int, column: int) -> None:
    """A bright spot as large as a fine cell, far from the sides: by hand, its share spreads over a cell around it."""
    step = SIZE // CELLS // SHIFTS
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[row : row + step, column : column + step] = 255
    session = Corner()
    shifts = [step * k for k in range(-(SHIFTS // 2), SHIFTS - SHIFTS // 2)]
    moved = np.stack([np.roll(pixels, (down, right), (0, 1)) for down in shifts for right in shifts])
    expected = session(moved).mean(0)
    logits, explain = decompose(session.maps, pixels, session.linear, fine=True)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    logit, residual, found = explain(1, None)
    assert found.shape == (CELLS * SHIFTS,) * 2
    assert (logit, residual) == (pytest.approx(expected[1]), pytest.approx(0, abs=1e-6))
    assert found.sum() == pytest.approx(expected[1])
    assert np.unravel_index(found.argmax(), found.shape) == (row // step, column // step)
    coarse = decompose(session.maps, pixels, session.linear, fine=False)[1](1, None)[2]
    assert coarse.shape == (CELLS, CELLS)
    assert found.max() > 0.9 * coarse.max() / SHIFTS**2


def test_labels_that_are_not_there(tmp_path) -> None:
    classifier = corner_classifier()
    assert classifier.explain(bright_corner(), 1).label == classifier.explain(bright_corner(), "1").label == CLASSES[1]
    with pytest.raises(ArgumentError, match=r"`label` \(='cornr'\) .* 3 classes\. Did you mean 'corner'"):
        classifier.explain(bright_corner(), "cornr")
    with pytest.raises(ArgumentError, match=r"`versus` \(=3\)"):
        classifier.explain(bright_corner(), 0, 3)
    with pytest.raises(ArgumentError, match="is the class itself"):
        classifier.explain(bright_corner(), "corner", "corner")
    with pytest.raises(ImageError, match="does not exist"):
        classifier.explain(tmp_path / "none.jpg")
