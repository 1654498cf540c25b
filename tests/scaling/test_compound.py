"""Compound scaling against the paper's formulas, and against what it is known to build."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effnet
from effnet.errors import ArgumentError, UnknownNameError
from effnet.scaling import compound
from effnet.scaling.compound import RULES, Rule, implied_phis, nominal_ratio, read_rule, realised_ratio, scale, tabulate

B0, LITE0 = effnet.spec("b0"), effnet.spec("lite0")
PAPER = RULES["paper"]

# Of B1-B8 and L2: d w^2 r^2, counted multiply-adds (B0's being 1), and the phi by depth, width and resolution, counted
# on torchvision's networks.
FAMILY = {
    # name: nominal, realised, phi by depth, width, resolution
    "b1": (1.263, 1.780, 0.52, 0, 0.49),
    "b2": (1.956, 2.575, 1, 1, 1.07),
    "b3": (3.616, 4.736, 1.85, 1.91, 2.09),
    "b4": (10.15, 11.39, 3.22, 3.53, 3.78),
    "b5": (23.34, 26.61, 4.32, 4.93, 5.09),
    "b6": (46.81, 49.42, 5.24, 6.17, 6.14),
    "b7": (88.97, 97.83, 6.21, 7.27, 7.05),
    "b8": (156.8, 162.2, 7.03, 8.27, 7.86),
    "l2": (1250, 1233, 9.15, 15.3, 9.11),
}
PHI_BY_MACS = {"b1": 0.88, "b2": 1.45, "b3": 2.38, "b4": 3.73, "b5": 5.03, "b6": 5.98, "b7": 7.02}


# rules


def test_the_papers_rule():
    assert PAPER.product == pytest.approx(1.92027)
    depth, width, resolution = PAPER.factors(2)
    assert (depth, width, resolution) == pytest.approx((1.44, 1.21, 1.3225))
    assert PAPER.nominal(2) == pytest.approx(1.92027**2)


def test_the_fast_rule():
    """Dollar et al. 2021: of a factor s = 2 in multiply-adds, width takes s^.4, depth s^.1 and resolution s^.05."""
    assert RULES["fast"].growths == pytest.approx((2**0.1, 2**0.4, 2**0.05))
    scaled = scale(B0, 3, RULES["fast"])  # s = 8: counted on B0 with their exponents
    price, base = effnet.cost(scaled), effnet.cost(B0)
    assert price.macs / base.macs == pytest.approx(9.40, abs=0.005)
    assert price.activations / base.activations == pytest.approx(4.05, abs=0.005)
    assert price.params / base.params == pytest.approx(6.85, abs=0.005)


@pytest.mark.parametrize("name", ["fast", "width", "depth", "resolution"])
def test_rules_that_double_the_promised_cost(name):
    assert RULES[name].product == pytest.approx(2)
    assert RULES[name].phi_of_macs(8) == pytest.approx(3)


def test_one_dimension_alone():
    grown = {name: scale(B0, 2, RULES[name]) for name in ("depth", "width", "resolution")}
    sizes = {name: (network.depth, network.width, network.resolution) for name, network in grown.items()}
    assert sizes["depth"] == (4, 1, 224)
    assert sizes["width"] == (1, pytest.approx(2), 224)
    assert sizes["resolution"] == (1, 1, 448)
    assert RULES["depth"].phis(4, 1.5, 1.5) == (2, None, None)
    assert RULES["width"].phis(1.5, 2, 1.5) == (None, pytest.approx(2), None)


@pytest.mark.parametrize(
    ("growths", "message"),
    [
        ((0.9, 1.1, 1.15), r"`alpha` \(=0.9\) must be at least 1"),
        ((1.2, 0, 1.15), r"`beta` \(=0\) must be a positive finite"),
        ((1.2, 1.1, math.nan), r"`gamma` \(=nan\)"),
        ((1.2, 1.1, 1e9), r"`gamma` .* at most 100"),
        (("1.2", 1.1, 1.15), r"`alpha` \(='1.2'\) must be a number"),
        ((1, 1, 1), "must not all be 1"),
    ],
)
def test_rules_that_are_none(growths, message):
    with pytest.raises(ArgumentError, match=message):
        Rule(*growths)


@pytest.mark.parametrize("phi", [math.nan, math.inf, "1", True, None, 1e9])
def test_phis_that_are_none(phi):
    with pytest.raises(ArgumentError, match="`phi`"):
        PAPER.factors(phi)


@pytest.mark.parametrize("factor", [0, -1, math.nan])
def test_factors_that_no_phi_gives(factor):
    for factors in ((factor, 1, 1), (1, factor, 1), (1, 1, factor)):
        with pytest.raises(ArgumentError):
            PAPER.phis(*factors)
    with pytest.raises(ArgumentError):
        PAPER.phi_of_macs(factor)


def test_read_rule(tmp_path):
    assert read_rule("fast") is RULES["fast"]
    assert read_rule(PAPER) is PAPER
    assert read_rule("1.3, 1.05,1.1") == Rule(1.3, 1.05, 1.1)
    found = tmp_path / "flowers.yaml"
    found.write_text("alpha: 1.3\nbeta: 1\ngamma: 1.2\nfound: {candidates: 20, data: flowers}\n")
    assert read_rule(found) == read_rule(str(found)) == Rule(1.3, 1, 1.2, "flowers")
    found.write_text("name: mine\n" + found.read_text())
    assert read_rule(found).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht", "Did you mean 'width'"),
        ("1.2,1.1", "three numbers"),
        ("1.2,1.1,x", "three numbers"),
        ("nowhere.yaml", r"nowhere.yaml'\) does not exist"),
        ("half.yaml", r"half.yaml.* it lacks beta, gamma"),
        ("low.yaml", r"low.yaml.* `alpha` \(=0.5\)"),
    ],
)
def test_read_rule_names_what_is_wrong(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.yaml").write_text("alpha: 1.2\n")
    (tmp_path / "low.yaml").write_text("{alpha: 0.5, beta: 1, gamma: 1}")
    with pytest.raises(ArgumentError, match=message):
        read_rule(text)


# networks


@pytest.mark.parametrize(
    ("phi", "rounding", "resolution", "blocks", "ratio"),
    [
        (1, "ceil", 256, 23, 2.23),
        (1, "nearest", 256, 19, 1.78),
        (-0.5, "ceil", 208, 16, 0.86),
        (-1, "ceil", 192, 16, 0.66),
        (-2, "ceil", 168, 15, 0.45),
        (-2, "nearest", 168, 11, 0.34),
        (-3, "ceil", 144, 13, 0.26),
        (-3, "nearest", 144, 10, 0.20),
    ],
)
def test_what_is_built(phi, rounding, resolution, blocks, ratio):
    network = scale(B0, phi, depth_rounding=rounding)
    assert (network.resolution, len(network.blocks)) == (resolution, blocks)
    assert realised_ratio(B0, network) == pytest.approx(ratio, abs=0.006)


def test_depth_rounding_by_default():
    assert scale(B0, 0.5).depth_rounding == scale(B0, 0).depth_rounding == "ceil"
    assert scale(B0, -0.5).depth_rounding == "nearest"
    assert scale(B0, -2, depth_rounding="ceil").depth_rounding == "ceil"
    nearest = dataclasses.replace(B0, depth_rounding="nearest")
    assert scale(nearest, 1).depth_rounding == "nearest"


def test_phi_0_is_the_baseline():
    assert dataclasses.replace(scale(B0, 0), name="b0") == B0
    assert dataclasses.replace(scale(LITE0, 0), name="lite0") == LITE0


def test_resolution_is_a_multiple_of_the_step():
    assert scale(B0, 1, resolution_step=32).resolution == 256
    assert scale(B0, 1, resolution_step=7).resolution == 259
    assert scale(B0, -20, resolution_step=32).resolution == 32


@pytest.mark.parametrize(
    ("phi", "how", "name"),
    [
        (1.5, {}, "b0-phi1.5"),
        (-2, {}, "b0-phi-2"),
        (1, {"rule": RULES["fast"]}, "b0-phi1-fast"),
        (1, {"rule": Rule(1.3, 1, 1.2)}, "b0-phi1-a1.3-b1-g1.2"),
        (1, {"depth_rounding": "nearest"}, "b0-phi1-nearest"),
        (-1, {"depth_rounding": "nearest"}, "b0-phi-1"),
    ],
)
def test_names(phi, how, name):
    assert scale(B0, phi, **how).name == name


def test_lites_ends_do_not_scale():
    network = scale(LITE0, 3)
    assert (network.stem_channels, network.head_channels) == (32, 1280)
    assert (network.layers[0], network.layers[-1]) == (1, 1)
    assert network.layers[1] > LITE0.layers[1]


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match=r"`resolution_step` \(=0\)"):
        scale(B0, 1, resolution_step=0)
    with pytest.raises(UnknownNameError, match="`depth_rounding`"):
        scale(B0, 1, depth_rounding="up")
    limit = math.log(100) / math.log(1.2)
    assert scale(B0, limit - 0.01).depth < 100
    for phi in (limit + 0.01, -limit - 0.01):
        with pytest.raises(ArgumentError, match=r"`phi` .* between -25.3 and 25.3"):
            scale(B0, phi)


# dropout


@pytest.mark.parametrize("name", ["b0", "b3", "b7", "lite0", "lite2", "lite4"])
def test_published_coefficients_get_the_published_dropout(name):
    baseline = LITE0 if name.startswith("lite") else B0
    assert compound.interpolate_dropout(baseline, effnet.spec(name)) == (effnet.spec(name).dropout, (name,))


def test_dropout_between_variants():
    # between B1 (.2) and B2 (.3): 240 px instead of B2's 260
    network = effnet.spec("b2", resolution=240)
    b1, b2 = 1.1 * (240 / 224) ** 2, 1.2 * 1.1**2 * (260 / 224) ** 2
    here = 1.2 * 1.1**2 * (240 / 224) ** 2
    expected = 0.2 + 0.1 * math.log(here / b1) / math.log(b2 / b1)
    rate, names = compound.interpolate_dropout(B0, network)
    assert rate == pytest.approx(expected, abs=5e-4)
    assert names == ("b1", "b2")


def test_dropout_stays_within_the_family_and_never_falls():
    rates = [scale(B0, phi / 4).dropout for phi in range(-12, 41)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.2, 0.5)
    assert {scale(LITE0, phi).dropout for phi in (-2, 9)} == {0.2, 0.3}
    assert scale(B0, 3).drop_connect == 0.2


def test_a_changed_dropout_is_the_users():
    own = effnet.spec("b0", dropout=0.1)
    assert scale(own, 5).dropout == 0.1
    assert scale(effnet.spec("b0", num_classes=10, drop_connect=0.1), 7).dropout == 0.5
    assert compound.interpolate_dropout(own, scale(own, 5)) == (0.1, ())


# ratios and what they imply


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_near_one_curve(name):
    promised, built, *phis = FAMILY[name]
    network = effnet.spec(name)
    assert nominal_ratio(B0, network) == pytest.approx(promised, rel=5e-4)
    assert realised_ratio(B0, network) == pytest.approx(built, rel=5e-4)
    found = implied_phis(B0, network)
    assert (found.depth, found.width, found.resolution) == pytest.approx(
        tuple(phis), abs=0.03 if name == "l2" else 0.006
    )
    if name in PHI_BY_MACS:
        assert found.macs == pytest.approx(PHI_BY_MACS[name], abs=0.006)


def test_table():
    rows = tabulate(B0, (-2, 1), RULES["paper"])
    assert [row.phi for row in rows] == [-2, 1]
    for row in rows:
        assert row.nominal_ratio == pytest.approx(1.92027**row.phi)
        assert row.realised_ratio == effnet.cost(row.network).macs / effnet.cost(B0).macs
        assert row.excess == pytest.approx(row.realised_ratio / 1.92027**row.phi - 1)


def test_published_variants_of_a_baseline():
    ten = effnet.spec("b0", num_classes=10)
    assert [network.name for network in compound.published_variants(ten)] == [f"b{number}" for number in range(8)]
    assert {network.num_classes for network in compound.published_variants(ten)} == {10}
    assert [network.name for network in compound.published_variants(LITE0)] == [f"lite{number}" for number in range(5)]
    assert compound.published_variants(effnet.spec("b1")) == ()


rules = st.builds(Rule, *[st.floats(1.01, 1.5) for _ in range(3)])
phis = st.floats(-6, 6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(phis, rules, st.sampled_from(["b0", "b3", "lite0", "l2"]), st.sampled_from([1, 8, 32]))
def test_scaling_and_back(phi, rule, name, step):
    baseline = effnet.spec(name)
    network = scale(baseline, phi, rule, resolution_step=step)
    found = implied_phis(baseline, network, rule)
    assert found.depth == pytest.approx(phi, abs=1e-6)
    assert found.width == pytest.approx(phi, abs=1e-6)
    exact = baseline.resolution * rule.gamma**phi
    assert network.resolution % step == 0
    assert abs(network.resolution - max(step, exact)) <= step / 2 + 1e-6
