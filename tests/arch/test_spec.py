"""A network as numbers, against the paper's Table 1, the official block strings and the official rounding rules."""

import copy
import dataclasses
import json
import math
import pickle
import re
from types import SimpleNamespace

import pytest
from efficientnet_pytorch.utils import round_filters, round_repeats
from hypothesis import given, settings
from hypothesis import strategies as st

import effnet
from effnet.arch.blocks import round_channels, round_layers
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.variants import B0_STAGES, VARIANTS
from effnet.errors import ArgumentError, EffnetError
from effnet.fields import read_fields

# efficientnet_builder.py of tensorflow/tpu: repeats, kernel, strides, expansion, input, output, squeeze ratio
OFFICIAL_BLOCKS = (
    "r1_k3_s11_e1_i32_o16_se0.25",
    "r2_k3_s22_e6_i16_o24_se0.25",
    "r2_k5_s22_e6_i24_o40_se0.25",
    "r3_k3_s22_e6_i40_o80_se0.25",
    "r3_k5_s11_e6_i80_o112_se0.25",
    "r4_k5_s22_e6_i112_o192_se0.25",
    "r1_k3_s11_e6_i192_o320_se0.25",
)

# As official networks are built: stem, stages 2-8, head; blocks per stage
BUILT = {
    "b0": ([32, 16, 24, 40, 80, 112, 192, 320, 1280], [1, 2, 2, 3, 3, 4, 1]),
    "b1": ([32, 16, 24, 40, 80, 112, 192, 320, 1280], [2, 3, 3, 4, 4, 5, 2]),
    "b2": ([32, 16, 24, 48, 88, 120, 208, 352, 1408], [2, 3, 3, 4, 4, 5, 2]),
    "b3": ([40, 24, 32, 48, 96, 136, 232, 384, 1536], [2, 3, 3, 5, 5, 6, 2]),
    "b4": ([48, 24, 32, 56, 112, 160, 272, 448, 1792], [2, 4, 4, 6, 6, 8, 2]),
    "b5": ([48, 24, 40, 64, 128, 176, 304, 512, 2048], [3, 5, 5, 7, 7, 9, 3]),
    "b6": ([56, 32, 40, 72, 144, 200, 344, 576, 2304], [3, 6, 6, 8, 8, 11, 3]),
    "b7": ([64, 32, 48, 80, 160, 224, 384, 640, 2560], [4, 7, 7, 10, 10, 13, 4]),
    "b8": ([72, 32, 56, 88, 176, 248, 424, 704, 2816], [4, 8, 8, 11, 11, 15, 4]),
    "l2": ([136, 72, 104, 176, 344, 480, 824, 1376, 5504], [6, 11, 11, 16, 16, 22, 6]),
}

coefficients = st.floats(0.05, 9)


def channels_and_layers(network):
    stages = {block.stage: block.out_channels for block in network.blocks}
    return [network.stem_channels, *stages.values(), network.head_channels], list(network.layers)


def test_stages_are_the_official_blocks():
    for row, text in zip(B0_STAGES, OFFICIAL_BLOCKS, strict=True):
        official = dict(re.fullmatch(r"([a-z]+)([\d.]+)", part).groups() for part in text.split("_"))
        assert [row.layers, row.kernel_size, row.expand_ratio, row.channels] == [int(official[k]) for k in "rkeo"]
        assert f"{row.stride}{row.stride}" == official["s"]


def test_b0_is_table_1():
    """Each stage's operator, input resolution, channels and layers, as printed in v5."""
    b0 = effnet.spec("b0")
    printed = {
        2: ("MBConv1, k3x3", 112, 16, 1),
        3: ("MBConv6, k3x3", 112, 24, 2),
        4: ("MBConv6, k5x5", 56, 40, 2),
        5: ("MBConv6, k3x3", 28, 80, 3),
        6: ("MBConv6, k5x5", 14, 112, 3),
        7: ("MBConv6, k5x5", 14, 192, 4),
        8: ("MBConv6, k3x3", 7, 320, 1),
    }
    for stage, row in printed.items():
        first, *others = (block for block in b0.blocks if block.stage == stage)
        operator = f"MBConv{first.expand_ratio}, k{first.kernel_size}x{first.kernel_size}"
        assert (operator, first.input_size, first.out_channels, 1 + len(others)) == row
    assert (b0.resolution, b0.stem_channels, b0.final_size, b0.head_channels) == (224, 32, 7, 1280)


@pytest.mark.parametrize("name", BUILT)
def test_channels_and_layers_as_built(name):
    assert channels_and_layers(effnet.spec(name)) == BUILT[name]


@pytest.mark.parametrize("number", range(5))
def test_lite_scales_all_but_its_ends(number):
    """Lite has the B network's stages, but stem 32, head 1280 and one block in the first and the last stage."""
    (_, *stages, _), (_, *layers, _) = BUILT[f"b{number}"]
    assert channels_and_layers(effnet.spec(f"lite{number}")) == ([32, *stages, 1280], [1, *layers, 1])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([16, 24, 32, 40, 80, 112, 192, 320, 1280]), coefficients)
def test_rounding_is_the_official_one(value, coefficient):
    params = SimpleNamespace(
        width_coefficient=coefficient, depth_coefficient=coefficient, depth_divisor=8, min_depth=None
    )
    assert round_channels(value * coefficient) == round_filters(value, params)
    assert round_layers(value * coefficient, "ceil") == round_repeats(value, params)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(0.01, 10_000), st.floats(0, 100))
def test_rounding_keeps_its_promises(exact, more):
    rounded = round_channels(exact)
    assert rounded % 8 == 0
    assert rounded == 8 or 0.9 * exact <= rounded < exact + 8
    assert rounded <= round_channels(exact + more)
    layers = round_layers(exact, "nearest")
    assert layers >= 1
    assert layers == 1 or abs(layers - exact) <= 0.5


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(["b0", "lite0"]), st.floats(0.1, 3), st.floats(0.1, 4), st.integers(1, 700), st.floats(0, 0.9))
def test_blocks_form_a_chain(name, width, depth, resolution, drop_connect):
    network = effnet.spec(name, width=width, depth=depth, resolution=resolution, drop_connect=drop_connect)
    assert len(network.blocks) == sum(network.layers)
    channels, size = network.stem_channels, math.ceil(resolution / 2)
    for number, block in enumerate(network.blocks):
        assert (block.in_channels, block.input_size) == (channels, size)
        assert block.stride == (B0_STAGES[block.stage - 2].stride if block.index == 0 else 1)
        assert block.output_size == math.ceil(size / block.stride)
        assert block.expanded_channels == channels * B0_STAGES[block.stage - 2].expand_ratio
        assert block.squeeze_channels == (channels // 4 if name == "b0" else 0)
        assert block.has_shortcut == (block.stride == 1 and block.out_channels == channels)
        assert block.drop_rate == pytest.approx(drop_connect * number / sum(network.layers))
        assert block.name == f"stages.{block.stage}.{block.index}"
        channels, size = block.out_channels, block.output_size
    assert network.final_size == size == math.ceil(resolution / 32)


def test_a_squeeze_has_at_least_one_channel():
    narrow = dataclasses.replace(effnet.spec("b0", width=0.1), squeeze_ratio=0.05)
    assert narrow.blocks[0].squeeze_channels == 1  # max(1, int(8 * .05))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "`width` (=0) must be a positive finite number."),
        ({"width": math.nan}, "`width` (=nan) must be a positive finite number."),
        ({"width": "1.0"}, "`width` (='1.0') must be a number."),
        ({"depth": -1}, "`depth` (=-1) must be a positive finite number."),
        ({"resolution": 0}, "`resolution` (=0) must be a positive whole number."),
        ({"resolution": 224.0}, "`resolution` (=224.0) must be a positive whole number."),
        ({"num_classes": True}, "`num_classes` (=True) must be a positive whole number."),
        ({"stem_stride": 3}, "`stem_stride` (=3) must be 1 or 2."),
        ({"head": "1280"}, "`head` (='1280') must be a positive whole number."),
        ({"dropout": 1}, "`dropout` (=1) must be a rate: at least 0 and below 1."),
        ({"drop_connect": -0.1}, "`drop_connect` (=-0.1) must be a rate: at least 0 and below 1."),
        ({"squeeze_ratio": -1}, "`squeeze_ratio` (=-1) must be at least 0 and at most 1."),
        ({"stages": [3]}, "`stages` (=[3]) must hold at least one StageSpec and nothing else."),
        ({"depth_rounding": "floor"}, "`depth_rounding` (='floor') is not known; choose from ceil, nearest."),
        (
            {"activation": "relu7"},
            "`activation` (='relu7') is not known; choose from silu, relu6, relu. Did you mean 'relu'?",
        ),
    ],
)
def test_argument_value_and_rule_are_named(changes, message):
    with pytest.raises(ArgumentError) as error:
        dataclasses.replace(effnet.spec("b0"), **changes)
    assert str(error.value) == message
    assert str(pickle.loads(pickle.dumps(error.value))) == message  # worker processes send errors home


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expand_ratio": 0}, "`expand_ratio` (=0) must be a positive whole number."),
        ({"kernel_size": 4}, "`kernel_size` (=4) must be odd"),
        ({"stride": 3}, "`stride` (=3) must be 1 or 2."),
        ({"channels": "16"}, "`channels` (='16') must be a positive whole number."),
        ({"layers": 0}, "`layers` (=0) must be a positive whole number."),
    ],
)
def test_impossible_stages_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(B0_STAGES[1], **changes)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"size": 0}, "size"),
        ({"resize": 200}, "resize"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": 0.5}, "mean"),
        ({"mean": (math.nan, 0, 0)}, "mean"),
        ({"std": (0.2, 0.2, 0)}, "std"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"fit": "stretch"}, "fit"),
    ],
)
def test_impossible_inputs_are_refused(changes, argument):
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        InputSpec(**changes)


def test_input_spec():
    assert InputSpec(size=300, resize=200, fit="squash").size == 300  # only a crop is cut out of the resized photo
    assert (InputSpec().channels, InputSpec(mean=(0.5,), std=(0.5,)).channels) == (3, 1)
    written = json.loads(json.dumps(dataclasses.asdict(InputSpec())))
    assert read_fields(InputSpec, written) == InputSpec()


@pytest.mark.parametrize(
    ("changes", "argument"),
    [({"bn_eps": 0}, "bn_eps"), ({"bn_momentum": 1.1}, "bn_momentum"), ({"padding": "valid"}, "padding")],
)
def test_impossible_policies_are_refused(changes, argument):
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        NumericPolicy(**changes)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_through_json(name):
    network = effnet.spec(name, width=1.3, num_classes=7, depth_rounding="nearest")
    assert NetworkSpec.from_dict(json.loads(json.dumps(network.to_dict()))) == network


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values | {"widht": 1}, "Did you mean 'width'?"),
        (lambda values: {"stages": values["stages"]}, "`NetworkSpec field` (='name') is missing."),
        (lambda values: values | {"stages": None}, "must hold at least one StageSpec"),
        (lambda values: values | {"stages": [{"kernel": 3}]}, "Did you mean 'kernel_size'?"),
        (lambda values: values | {"stages": [3]}, "`StageSpec` (=3) must be a mapping"),
        (lambda values: list(values), "must be a mapping"),
    ],
)
def test_what_cannot_be_read_is_named(change, message):
    with pytest.raises(EffnetError, match=re.escape(message)):
        NetworkSpec.from_dict(change(effnet.spec("b0").to_dict()))


def test_specs_are_values():
    """Frozen, hashable and picklable, also after their blocks have been computed; equal when their numbers are."""
    network, same = effnet.spec("b0", width=1.1), effnet.spec("b0", width=1.1)
    assert network.blocks
    assert network == same
    assert len({network, same, dataclasses.replace(network, stages=list(network.stages))}) == 1
    for twin in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert (twin, twin.blocks) == (network, network.blocks)
    for value in (network, network.blocks[0], B0_STAGES[0], InputSpec(), NumericPolicy()):
        assert hash(value) == hash(pickle.loads(pickle.dumps(value)))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, 1)
