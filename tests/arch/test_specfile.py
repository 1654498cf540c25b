"""Networks in files: exact round trips, and clear errors."""

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import effnet
from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.arch.specfile import read_mapping, read_spec, spec_text
from effnet.arch.variants import VARIANTS
from effnet.errors import ArgumentError, CheckpointError, TrainingError
from effnet.scaling.compound import read_rule
from effnet.training.recipe import read_recipe
from effnet.training.run_folder import RunPlan

rates = st.floats(0, 0.99)
stages = st.lists(
    st.builds(
        StageSpec,
        st.integers(1, 8),
        st.sampled_from([3, 5, 7]),
        st.integers(1, 2),
        st.integers(1, 400),
        st.integers(1, 9),
        squeeze_ratio=st.none() | st.floats(0, 1),
    )
    | st.sampled_from([StageSpec(1, 3, 2, 99, 2, "separable"), StageSpec(4, 3, 1, 64, 2, "bottleneck")]),
    min_size=1,
    max_size=4,
)
networks = st.builds(
    NetworkSpec,
    st.text(max_size=30),
    stages.map(tuple),
    width=st.floats(1e-6, 100),
    depth=st.floats(1e-6, 100),
    resolution=st.integers(1, 10**6),
    dropout=rates,
    drop_connect=rates,
    depth_rounding=st.sampled_from(["ceil", "nearest"]),
    squeeze_ratio=st.floats(0, 1),
    fixed_ends=st.booleans(),
    stem_stride=st.integers(1, 2),
    stem_kernel=st.sampled_from([3, 7]),
    stem_pool=st.booleans(),
    head=st.just(0) | st.integers(1, 2000),
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "spec.yaml"


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_there_and_back(file, name):
    file.write_text(spec_text(effnet.spec(name)))
    assert read_spec(file) == effnet.spec(name)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(networks)
def test_any_network_there_and_back(network):
    assert NetworkSpec.from_dict(yaml.safe_load(spec_text(network))) == network


def test_a_person_can_read_it():
    lines = spec_text(effnet.spec("b0")).splitlines()
    assert lines[0].startswith("# ")
    assert "format 1" in lines[0]
    assert lines[3] == "- {expand_ratio: 1, kernel_size: 3, stride: 1, channels: 16, layers: 1}"
    assert sum(line.startswith("- {") for line in lines) == 7
    assert "resolution: 224" in lines
    assert all(len(line) <= 120 for line in lines)


def test_defaults_may_be_left_out(file):
    file.write_text("name: own\nstages:\n- {expand_ratio: 1, kernel_size: 3, stride: 1, channels: 16, layers: 1}\n")
    assert read_spec(file) == NetworkSpec("own", (StageSpec(1, 3, 1, 16, 1),))


B0_TEXT = spec_text(effnet.spec("b0"))
OWN = """name: mine
head: 0
squeeze_ratio: 0
stages:
- {op: separable, channels: 32, repeats: 1, kernel: 3, stride: 1, expansion: 1}
- {op: mbconv, channels: 64, repeats: 3, kernel: 5, stride: 2, expansion: 4, se: 0.25}
"""


def test_a_row_by_its_shorter_names(file):
    file.write_text(OWN)
    rows = (StageSpec(1, 3, 1, 32, 1, "separable"), StageSpec(4, 5, 2, 64, 3, squeeze_ratio=0.25))
    network = NetworkSpec("mine", rows, head=0, squeeze_ratio=0)
    assert read_spec(file) == network
    assert [block.squeeze_channels for block in network.blocks] == [0, 8, 16, 16]
    file.write_text(spec_text(network))
    assert read_spec(file) == network


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: [b0", "is not YAML: .*line 1"),
        ("day: 2021-99-99", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
        ("", "must hold names and values"),
        ("- 1\n- 2", "must hold names and values"),
        ("1: 2", "must hold names and values"),
        ("width: 1.2", r"`stages` \(=None\) must be a list"),
        ("{name: x, stages: 5}", r"`stages` \(=5\) must be a list"),
        ("{name: x, stages: [5]}", "StageSpec"),
        ("{name: x, stages: [{channels: 8}]}", r"`StageSpec field` \(='expand_ratio'\) is missing"),
        (B0_TEXT.replace("name: b0", "name: 5"), r"`name` \(=5\) must be text"),
        (B0_TEXT.replace("name: b0\n", ""), r"\(='name'\) is missing"),
        (B0_TEXT.replace("width:", "widht:"), "Did you mean 'width'"),
        (B0_TEXT.replace("kernel_size", "kernal_size"), "line 4: .*Did you mean 'kernel_size'"),
        (
            B0_TEXT.replace("stride: 2, channels: 40", "stride: 3, channels: 40"),
            r"line 6: `stride` \(=3\) must be 1 or",
        ),
        (OWN.replace("mbconv", "mbcon"), r"line 6: `op` .*Did you mean 'mbconv'"),
        (OWN.replace("expansion: 1", "expansion: 2"), r"line 5: `expansion` \(=2\) must be 1 for separable"),
        (OWN.replace("expansion: 1", "expansion: 1, se: 0.25"), r"line 5: `se` \(=0.25\) must be 0: separable"),
        (OWN.replace("op: mbconv", "op: [mbconv]"), r"line 6: `op` \(=\['mbconv'\]\) must be one of mbconv, separable"),
        (OWN.replace("expansion: 1", "expansion: 1, expand_ratio: 1"), r"line 5: `expansion` \(=1\) is given a second"),
        (OWN.replace("expansion: 1", "expansion: 1, expansion: 1"), r"`expansion` \(='1'\) is given a second .*line 5"),
        (OWN + "head: 8", r"`head` \(='8'\) is given a second time in line"),
        (OWN.replace("head: 0", "fixed_ends: maybe"), r"line 2: `fixed_ends` \(='maybe'\) must be true or false"),
        ("{name: x, stages: [[1, 2]]}", r"line 1: `StageSpec` \(=\[1, 2\]\) must be a mapping"),
        ("{name: x, stages: &a [*a]}", "must be a mapping"),
        (OWN.replace("head: 0", "head: -1"), r"line 2: `head` \(=-1\) must be a positive"),
        (B0_TEXT.replace("resolution: 224", "resolution: 224.5"), r"`resolution` \(=224.5\)"),
        (B0_TEXT.replace("width: 1.0", "width: one"), r"`width` \(='one'\) must be a number"),
        (B0_TEXT.replace("depth_rounding: ceil", "depth_rounding: ciel"), "Did you mean 'ceil'"),
    ],
)
def test_what_cannot_be_read_is_named(file, text, reason):
    file.write_text(text)
    with pytest.raises(ArgumentError, match=f"(?s)spec.yaml.*{reason}") as raised:
        read_spec(file)
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ArgumentError, match=r"nowhere.yaml'\) does not exist"):
        read_spec(tmp_path / "nowhere.yaml")
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_spec(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_spec(tmp_path / "binary.yaml")


def test_a_file_is_a_network_wherever_one_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(spec_text(effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=3)))
    assert effnet.spec(str(path), num_classes=5).num_classes == 5
    assert effnet.create(str(path)).spec.resolution == 32
    assert effnet.fit_spec(effnet.Budget(params="1M"), str(path)).use <= 1
    with pytest.raises(CheckpointError, match="without weights"):
        effnet.load(str(path))


LETTERS = [*itertools.pairwise("abcdefghijk")]


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in LETTERS) + "name: *k",
        "name: " + "[" * 20_000,
    ],
    ids=["aliases", "deep"],
)
def test_what_would_never_be_written_out_is_refused(tmp_path: Path, text: str) -> None:
    """A value's text, in a message or a name, would have as many words as its aliases stand for: here 2 * 9^9."""
    file = tmp_path / "x.yaml"
    file.write_text(text + "\nalpha: 1\nbeta: 1\ngamma: 1\n")
    for read in (read_mapping, read_rule, read_recipe):
        with pytest.raises(ArgumentError, match=r"x\.yaml.* is not YAML"):
            read(file)
    for content in (file.read_text(), "data: a\nre\nb: c", "a: b: c"):
        (tmp_path / "args.yaml").write_text(content)
        with pytest.raises(TrainingError, match=r"args\.yaml is not what[^\n]*$"):
            RunPlan.read(tmp_path)
