"""The doubling laws against independent counts, and their reasons against counts by another method."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import effnet
from effnet.errors import ArgumentError
from effnet.scaling.laws import laws


def counted(network, kind):
    """Multiply-adds of the module's layers of one kind, from their shapes and the size of what they write."""
    import torch

    module, found = effnet.EfficientNet(network).eval(), [0]

    def note(layer, _, output):
        found[0] += layer.weight.numel() * (output.shape[-1] ** 2 if output.dim() == 4 else 1)

    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and kind(layer):
            layer.register_forward_hook(note)
    with torch.device("cpu"), torch.no_grad():
        module(torch.zeros(1, network.in_channels, network.resolution, network.resolution))
    return found[0]


@pytest.fixture(scope="module")
def of_b0():
    return {law.dimension: law for law in laws(effnet.spec("b0"))}


@pytest.mark.parametrize(
    ("dimension", "book", "macs"), [("depth", 2, 2.028), ("width", 4, 3.758), ("resolution", 4, 3.985)]
)
def test_doubling(of_b0, dimension, book, macs):
    assert of_b0[dimension].textbook.macs == book
    assert of_b0[dimension].counted.macs == pytest.approx(macs, abs=5e-4)


def test_params_and_activations(of_b0):
    base = effnet.cost(effnet.spec("b0"))
    for name, value in (("depth", 2), ("width", 2), ("resolution", 448)):
        price = effnet.cost(effnet.spec("b0", **{name: value}))
        assert of_b0[name].counted.params == price.params / base.params
        assert of_b0[name].counted.activations == price.activations / base.activations
    assert of_b0["resolution"].counted.params == 1


def test_shares_are_what_the_module_shows(of_b0):
    network = effnet.spec("b0")
    total = counted(network, lambda layer: True)
    depthwise = counted(network, lambda layer: isinstance(layer, nn.Conv2d) and layer.groups > 1)
    stem = counted(network, lambda layer: isinstance(layer, nn.Conv2d) and layer.in_channels == 3)
    classifier = counted(network, lambda layer: isinstance(layer, nn.Linear) and layer.out_features == 1000)
    pooled = total - counted(dataclasses.replace(network, squeeze_ratio=0), lambda layer: True) + classifier
    assert total == effnet.cost(network).macs
    (linear,) = of_b0["width"].reasons
    assert linear.effect == pytest.approx(-2 * (depthwise + stem + classifier) / total)
    (same,) = of_b0["resolution"].reasons
    assert same.effect == pytest.approx(-3 * pooled / total)
    assert "12.1% of the MACs" in linear.text
    assert "0.49% of the MACs" in same.text


def test_depth_has_two_reasons(of_b0):
    ends, repeats = of_b0["depth"].reasons
    price = effnet.cost(effnet.spec("b0"))
    stem, *_, head, classifier = price.blocks
    assert ends.effect == pytest.approx(-(stem.macs + head.macs + classifier.macs) / price.macs)
    assert ends.text.startswith("stem, head and classifier, 8.3% of the MACs")
    assert repeats.effect > 0
    assert "more in stages 4, 5, 6, 7 and 8 and less in stages 2 and 3" in repeats.text


def test_lites_fixed_ends_are_named():
    reasons = {law.dimension: law.reason for law in laws(effnet.spec("lite0"))}
    assert "stem, head, classifier, stage 2 and stage 8, 18.6% of the MACs, do not deepen" in reasons["depth"]
    assert "head" in reasons["width"]
    assert "do not grow" in reasons["width"]
    assert "squeeze" not in reasons["resolution"]


# At these sizes nothing is rounded, so reasons that leave a rest for the rounding are wrong.
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(["b0", "lite0"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 8),
    st.booleans(),
)
def test_the_reasons_leave_nothing_to_the_rounding(name, width, depth, size, grey):
    network = effnet.spec(
        name, width=width, depth=depth, resolution=32 * size, num_classes=7, in_channels=1 if grey else 3
    )
    for law in laws(network):
        assert not any("rounded" in reason.text for reason in law.reasons)
        assert law.counted.macs - law.textbook.macs == pytest.approx(sum(r.effect for r in law.reasons), abs=1e-9)


@pytest.mark.parametrize("name", ["b1", "b4", "lite3", "l2"])
def test_the_rounding_has_the_rest(name):
    for law in laws(effnet.spec(name)):
        assert law.counted.macs - law.textbook.macs == pytest.approx(sum(r.effect for r in law.reasons))
        assert all(f"({reason.effect:+.3f})" in law.reason for reason in law.reasons if abs(reason.effect) > 1e-3)
    assert any("rounded" in reason.text for law in laws(effnet.spec(name)) for reason in law.reasons)


def test_stages_that_rounding_keeps_do_not_deepen():
    (depth, *_) = laws(effnet.spec("b0", depth=0.3, depth_rounding="nearest"))
    assert "stage 2, stage 3, stage 4 and stage 8" in depth.reason


def test_too_large_a_network():
    with pytest.raises(ArgumentError, match="at most 100"):
        laws(effnet.spec("b0", depth=60))
