"""The closed-form costs: to the unit against published implementations, and against what torch counts on the module."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import effnet
from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.models.efficientnet import EfficientNet

# Counted on torchvision 0.29 (b0-b7) and timm 1.0.31 (b8, l2, lite), 1000 classes.
# name: parameters, multiply-adds, activations at the variant's own resolution
COUNTED = {
    "b0": (5_288_548, 385_814_752, 6_747_036),
    "b1": (7_794_184, 686_802_832, 10_883_328),
    "b2": (9_109_994, 993_561_872, 13_831_834),
    "b3": (12_233_232, 1_827_141_392, 23_830_296),
    "b4": (19_341_616, 4_393_771_024, 49_488_032),
    "b5": (30_389_784, 10_266_384_752, 98_856_400),
    "b6": (43_040_704, 19_067_593_536, 167_392_400),
    "b7": (66_347_960, 37_745_884_192, 289_938_464),
    "b8": (87_413_142, 62_597_461_568, 442_885_462),
    "l2": (480_309_308, 475_703_653_280, 1_707_389_020),
    "lite0": (4_652_008, 385_187_552, 6_737_696),
    "lite1": (5_416_680, 600_185_232, 10_142_128),
    "lite2": (6_092_072, 859_736_272, 12_894_600),
    "lite3": (8_197_096, 1_383_321_872, 18_984_304),
    "lite4": (13_006_568, 2_553_034_336, 28_838_304),
}
# name, resolution: multiply-adds, activations
COUNTED_ELSEWHERE = {
    ("b1", 224): (569_651_680, None),
    ("b2", 224): (658_963_440, None),
    ("b3", 224): (962_708_240, None),
    ("b4", 224): (1_503_710_432, None),
    ("b5", 224): (2_356_493_184, None),
    ("b6", 224): (3_360_166_848, None),
    ("b7", 224): (5_169_865_152, None),
    ("lite3", 300): (1_607_554_544, 21_845_416),
    ("lite4", 380): (3_943_564_112, 45_658_608),
}
# Paper, Table 2 (v5): parameters in millions, multiply-adds in billions
TABLE_2 = {
    "b0": (5.3, 0.39),
    "b1": (7.8, 0.70),
    "b2": (9.2, 1.0),
    "b3": (12, 1.8),
    "b4": (19, 4.2),
    "b5": (30, 9.9),
    "b6": (43, 19),
    "b7": (66, 37),
}
# Official Lite README: the same two; its multiply-adds include batch normalisation's
LITE_README = {"lite0": (4.7, 0.407), "lite1": (5.4, 0.631), "lite2": (6.1, 0.899), "lite3": (8.2, 1.44)} | {
    "lite4": (13.0, 2.64)
}

B0_MACS = COUNTED["b0"][1]

stages = st.builds(
    StageSpec,
    expand_ratio=st.sampled_from([1, 2, 6]),
    kernel_size=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    channels=st.integers(1, 64),
    layers=st.integers(1, 3),
)
networks = st.builds(
    NetworkSpec,
    name=st.just("random"),
    stages=st.lists(stages, min_size=1, max_size=4).map(tuple),
    width=st.floats(0.1, 2),
    depth=st.floats(0.2, 2.5),
    resolution=st.integers(1, 300),
    num_classes=st.integers(1, 50),
    in_channels=st.integers(1, 6),
    depth_rounding=st.sampled_from(["ceil", "nearest"]),
    squeeze_ratio=st.sampled_from([0, 0.05, 0.25, 1]),
    fixed_ends=st.booleans(),
    stem=st.integers(1, 64),
    head=st.integers(1, 128),
    stem_stride=st.integers(1, 2),
)


def judged(spec: NetworkSpec) -> dict[str, tuple[int, int, int]]:
    """Parameters, multiply-adds and activations of each part of the built module, as torch counts them."""
    with torch.device("meta"):  # shapes without memory, so even L2 is cheap
        network = EfficientNet(spec).eval()
        images = torch.empty(1, spec.in_channels, spec.resolution, spec.resolution)
    written = {}
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, _, output: written.update({module: output.numel()}))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    flops = counter.get_flop_counts()

    def part(name: str) -> tuple[int, int, int]:
        module = network.get_submodule(name)
        path = f"EfficientNet.{name}" if name else "EfficientNet"
        return (
            sum(weight.numel() for weight in module.parameters()),
            sum(flops[path].values()) // 2,
            sum(written.get(layer, 0) for layer in module.modules()),
        )

    stages = [f"stages.{number}" for number in network.stages]
    blocks = [block.name for block in spec.blocks]
    return {name: part(name) for name in ["", "stem", *stages, *blocks, "head", "classifier"]}


def numbers(cost):
    return cost.params, cost.macs, cost.activations


def compare_with_judge(spec):
    price, judge = effnet.cost(spec), judged(spec)
    assert numbers(price) == judge[""]
    assert {part.name: numbers(part) for part in price.blocks} == {
        name: judge[name] for name in ["stem", *(block.name for block in spec.blocks), "head", "classifier"]
    }
    last = f"stage{len(spec.stages) + 2}"
    assert {part.name: numbers(part) for part in price.stages} == {
        "stage1": judge["stem"],
        **{name.replace("stages.", "stage"): judge[name] for name in judge if name.count(".") == 1},
        last: tuple(map(sum, zip(judge["head"], judge["classifier"], strict=True))),
    }


@pytest.mark.parametrize("name", COUNTED)
def test_variants_to_the_unit(name):
    assert numbers(effnet.cost(effnet.spec(name))) == COUNTED[name]


@pytest.mark.parametrize(("name", "resolution"), COUNTED_ELSEWHERE)
def test_other_resolutions_to_the_unit(name, resolution):
    price = effnet.cost(effnet.spec(name, resolution=resolution))
    macs, activations = COUNTED_ELSEWHERE[name, resolution]
    assert price.macs == macs
    assert activations in (None, price.activations)
    assert price.params == COUNTED[name][0]


@pytest.mark.parametrize("name", ["b0", "b8", "lite0"])
def test_a_stem_stride_of_1_costs_what_twice_the_resolution_costs(name):
    """The stem's output has the size of the input, as with twice the pixels and a stride of 2: the counted one here."""
    small = effnet.spec(name, resolution=effnet.spec(name).resolution // 2, stem_stride=1)
    assert numbers(effnet.cost(small)) == COUNTED[name]
    compare_with_judge(small)


def test_l2_at_475():
    price = effnet.cost(effnet.spec("l2", resolution=475))
    assert (round(price.macs / 1e9, 3), round(price.activations / 1e6, 3)) == (170.893, 609.887)


@pytest.mark.parametrize("name", TABLE_2 | LITE_README)
def test_published_sizes(name):
    """Published figures are rounded to two digits, and up to 6 % larger where they hold batch normalisation."""
    price = effnet.cost(effnet.spec(name))
    millions, billions = (TABLE_2 | LITE_README)[name]
    assert price.params / 1e6 == pytest.approx(millions, rel=0.02)
    assert price.macs / 1e9 == pytest.approx(billions, rel=0.055)


@pytest.mark.parametrize("name", ["b0", "b7", "l2", "lite4"])
def test_variants_as_torch_counts_them(name):
    compare_with_judge(effnet.spec(name))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(networks)
def test_any_network_as_torch_counts_it(spec):
    compare_with_judge(spec)


def test_parts_add_up_and_flops_are_twice_the_macs():
    price = effnet.cost(effnet.spec("b3", resolution=211, num_classes=10))
    for parts in (price.stages, price.blocks):
        assert tuple(map(sum, zip(*map(numbers, parts), strict=True))) == numbers(price)
    assert len(price.stages) == 9
    assert price.flops == 2 * price.macs


def test_costs_as_json():
    price = effnet.cost(effnet.spec("b0"))
    written = json.loads(json.dumps(price.to_dict()))
    assert (written["name"], written["macs"], written["flops"]) == ("b0", B0_MACS, 2 * B0_MACS)
    assert [stage["name"] for stage in written["stages"]] == [f"stage{number}" for number in range(1, 10)]
    assert sum(block["params"] for block in written["blocks"]) == written["params"]


def compound(phi):
    """d = 1.2^phi, w = 1.1^phi, r = 1.15^phi."""
    return {"depth": 1.2**phi, "width": 1.1**phi, "resolution": round(224 * 1.15**phi)}


@pytest.mark.parametrize(
    ("changes", "ratio", "allowed"),
    [
        # depth scales a little more than linearly, width less than squared (depthwise and SE), resolution squared
        ({"depth": 2}, 2.028, 5e-4),
        ({"depth": 4}, 4.083, 5e-4),
        ({"depth": 8}, 8.193, 5e-4),
        ({"width": 2}, 3.758, 5e-4),
        ({"width": 1.4}, 1.928, 5e-4),
        ({"width": 0.5}, 0.311, 5e-4),
        ({"resolution": 448}, 3.985, 5e-4),
        ({"resolution": 256}, 1.305, 5e-4),
        ({"resolution": 320}, 2.036, 5e-4),
        ({"resolution": 600}, 7.275, 5e-4),
        # rounding makes more than the 2^phi of the paper's equation 3, and to the nearest depth it comes closer
        *(
            (compound(phi), ratio, 4e-3 * ratio)
            for phi, ratio in enumerate((2.57, 4.69, 8.43, 16.4, 29.5, 52.1, 102.8), start=1)
        ),
        (compound(1) | {"depth_rounding": "nearest"}, 2.05, 5e-3),
        (compound(0.5) | {"depth_rounding": "nearest"}, 1.27, 5e-3),
        (compound(0.5), 1.90, 5e-3),
        # Table 7: of the paper's four networks of "1.8B", only the compound one has them
        ({"depth": 4}, 1.575e9 / B0_MACS, 5e5 / B0_MACS),
        ({"width": 2}, 1.450e9 / B0_MACS, 5e5 / B0_MACS),
        ({"resolution": 448}, 1.538e9 / B0_MACS, 5e5 / B0_MACS),
        ({"depth": 1.4, "width": 1.2, "resolution": 291}, 1.800e9 / B0_MACS, 5e5 / B0_MACS),
    ],
)
def test_scaling(changes, ratio, allowed):
    assert effnet.cost(effnet.spec("b0", **changes)).macs / B0_MACS == pytest.approx(ratio, abs=allowed)


def test_odd_maps_cost_a_jump():
    """A map of 257 pixels halves to 129 like one of 258: 14 % more than 256."""
    millions = {size: effnet.cost(effnet.spec("b0", resolution=size)).macs / 1e6 for size in (224, 228, 240, 256, 260)}
    assert millions == pytest.approx({224: 385.8, 228: 450.2, 240: 462.5, 256: 503.3, 260: 576.5}, abs=0.05)
    assert effnet.cost(effnet.spec("b0", resolution=257)).macs / 1e6 / millions[256] == pytest.approx(1.14, abs=5e-3)
