"""The command effnet info; and the compared networks against Table 2 (v5) of the paper and its printed ratios."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import effnet
from effnet.arch.memory import largest_batch, training_memory
from effnet.arch.segments import Keep
from effnet.arch.specfile import spec_text
from effnet.arch.variants import VARIANTS
from effnet.describing import RIVALS
from effnet.native import instruction_sets

COMMAND = "info"  # what `run` runs
needs_kernels = pytest.mark.skipif(not instruction_sets(), reason="nothing was compiled")


def test_the_family(run):
    code, out, err = run()
    assert code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines() if "G" in line.split()}
    assert lines["b0"][1:] == ["1.0", "1.0", "224", "0.2", "0.2", "5.289", "M", "0.3858", "G", "0.7716", "G", "77.1"]
    assert set(VARIANTS) <= set(lines)
    assert "what the paper calls FLOPS" in out
    assert "published" in out
    assert "Next: effnet info" in err


def test_json_is_exact(run):
    family = {row["name"]: row for row in json.loads(run("--json")[1])}
    assert list(family) == list(VARIANTS)
    # B7: the paper's largest network
    expected = {"params": 66347960, "macs": 37745884192, "flops": 2 * 37745884192, "activations": 289938464}
    assert expected.items() <= family["b7"].items()
    one = json.loads(run("b7", "--json")[1])
    assert family["b7"].items() <= one.items()
    assert sum(stage["macs"] for stage in one["stages"]) == one["macs"]
    blocks = json.loads(run("b7", "--blocks", "--json")[1])["blocks"]
    assert len(blocks) == 55 + 3  # and stem, head, classifier
    assert sum(block["activations"] for block in blocks) == one["activations"]


def test_table_1(run):
    _, out, _ = run("b0")
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    # Table 1 of the paper: operator, input resolution, channels, layers; then the stride
    table = [
        ("Conv3x3", 224, 32, 1, 2),
        ("MBConv1, k3x3", 112, 16, 1, 1),
        ("MBConv6, k3x3", 112, 24, 2, 2),
        ("MBConv6, k5x5", 56, 40, 2, 2),
        ("MBConv6, k3x3", 28, 80, 3, 2),
        ("MBConv6, k5x5", 14, 112, 3, 1),
        ("MBConv6, k5x5", 14, 192, 4, 2),
        ("MBConv6, k3x3", 7, 320, 1, 1),
        ("Conv1x1 & Pooling & FC", 7, 1280, 1, 1),
    ]
    for number, (row, expected) in enumerate(zip(rows, table, strict=False), start=1):
        assert " ".join(row).startswith(" ".join(map(str, (number, *expected)))), row
    for total in ("5,288,548", "385,814,752", "6,747,036"):
        assert total in out


def test_a_changed_network(run):
    words = ("b0", "--width", 1.1, "--depth", 1.2, "--resolution", 260, "--num-classes", 10, "--json")
    values = json.loads(run(*words)[1])
    assert (values["width"], values["depth"], values["resolution"], values["num_classes"]) == (1.1, 1.2, 260, 10)
    # B2 without its 1000 classes
    assert values["params"] == 9109994 - 990 * (1408 + 1)


def test_a_stem_stride(run):
    words = "b0", "--stem-stride", "1", "--resolution", "112"
    assert json.loads(run(*words, "--json")[1])["macs"] == effnet.cost(effnet.spec("b0")).macs
    _, out, _ = run(*words)
    assert out.startswith("b0-r112-s1: ")
    assert ["1", "Conv3x3", "112", "32", "1", "1"] in [line.split()[:6] for line in out.splitlines()]


def test_a_spec_file(run, tmp_path: Path):
    spec = effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=3)
    (tmp_path / "tiny.yaml").write_text(spec_text(spec))
    assert json.loads(run(tmp_path / "tiny.yaml", "--json")[1])["params"] == effnet.cost(spec).params


def test_the_networks_of_table_2(run):
    code, out, _ = run("--rivals")
    assert code == 0
    for text in ("GPipe", "8.4x", "published"):
        assert text in out
    assert json.loads(run("--rivals", "--json")[1])[0]["rivals"][0]["name"] == "ResNet-50"


LEVELS = {"0": ["activations", "convolutions", "depthwise", "bottlenecks"], "1": ["bottlenecks"]}


@pytest.mark.parametrize("native", [pytest.param("1", marks=needs_kernels), "0"])
def test_training_memory(run, native, monkeypatch):
    monkeypatch.setenv("EFFNET_NATIVE", native)
    _, out, _ = run("b4", "--batch", "32", "--train-memory", "6GB", "--precision", "fp32", "--json")
    values = json.loads(out)
    rows = {row["keep"]: row for row in values["training"]}
    assert values["kernels"] is (native == "1")
    assert list(rows) == ["everything", *LEVELS[native], "least work"]
    spec = effnet.spec("b4")
    assert rows["everything"]["peak"] == training_memory(spec, 32, kernels=native == "1").peak
    assert rows["bottlenecks"]["largest_batch"] == largest_batch(spec, 6 * 10**9, plan=Keep.BOTTLENECKS)
    assert rows["everything"]["extra_macs_share"] == 0
    assert 0 < rows["least work"]["extra_macs_share"] < rows["bottlenecks"]["extra_macs_share"] <= 1
    _, out, err = run("b4", "--batch", "32")
    assert "bottlenecks" in out
    assert ("effnet's kernels" in out) == (native == "1")
    assert "bf16" in out  # the precision and its reason are printed
    assert err == "Next: effnet scale --from b4 --train-memory 8GB --batch 32\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["b9"], "`model` (='b9') is not known"),
        (["b0", "--width", "0"], "`width` (=0.0) must be a positive finite number"),
        (["b0", "--width", "1e308"], "must be at most 100"),
        (["b0", "--widht", "1"], "Did you mean --width?"),
        (["b0", "--resolution", "1.5"], "--resolution: '1.5'"),
        (["b0", "--stem-stride", "4"], "`stem_stride` (=4) must be 1 or 2"),
        (["--width", "1.1"], "effnet info b0 --width 1.1"),
        (["--stem-stride", "1"], "effnet info b0 --stem-stride 1"),
        (["--batch", "8"], "effnet info b0 --batch 8"),
        (["--blocks"], "effnet info b0 --blocks"),
        (["--rivals", "--width", "3"], "effnet info b0 --width 3"),
        (["b0", "--rivals"], "`model` (='b0') does not go with --rivals"),
        (["."], "`model` (='.')"),
        (["b0", "--optimizer", "adam"], "--train-memory"),
        (["b0", "--batch", "8", "--optimizer", "adamm"], "Did you mean 'adam'"),
        (["b0", "--batch", "8", "--blocks"], "`blocks` (=True) does not go with"),
        (["b0", "--train-memory", "8"], "100MB"),
        (["b0", "--batch", "0"], "`batch`"),
    ],
)
def test_wrong_usage_is_one_line(run, words, message):
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert out == ""


# Table 2

# EfficientNet's own columns: parameters (M), multiply-adds (B)
EFFICIENTNETS = {"b0": (5.3, 0.39), "b1": (7.8, 0.70), "b2": (9.2, 1.0), "b3": (12, 1.8)} | {
    "b4": (19, 4.2),
    "b5": (30, 9.9),
    "b7": (66, 37),
}
# rival, its group, top-1, top-5, then parameters and multiply-adds as multiples of the group's EfficientNet
TABLE_2 = (
    ("ResNet-50", "b0", 76.0, 93.0, 4.9, 11),
    ("DenseNet-169", "b0", 76.2, 93.2, 2.6, 8.9),
    ("ResNet-152", "b1", 77.8, 93.8, 7.6, 16),
    ("DenseNet-264", "b1", 77.9, 93.9, 4.3, 8.6),
    ("Inception-v3", "b1", 78.8, 94.4, 3.0, 8.1),
    ("Xception", "b1", 79.0, 94.5, 3.0, 12),
    ("Inception-v4", "b2", 80.0, 95.0, 5.2, 13),
    ("Inception-resnet-v2", "b2", 80.1, 95.1, 6.1, 13),
    ("ResNeXt-101", "b3", 80.9, 95.6, 7.0, 18),
    ("PolyNet", "b3", 81.3, 95.8, 7.7, 19),
    ("SENet", "b4", 82.7, 96.2, 7.7, 10),
    ("NASNet-A", "b4", 82.7, 96.2, 4.7, 5.7),
    ("AmoebaNet-A", "b4", 82.8, 96.1, 4.6, 5.5),
    ("PNASNet", "b4", 82.9, 96.2, 4.5, 5.5),  # printed as 6.0x beside 23B, and 23 / 4.2 is 5.5
    ("AmoebaNet-C", "b5", 83.5, 96.5, 5.2, 4.1),
    ("GPipe", "b7", 84.3, 97.0, 8.4, None),
)


def test_names_groups_and_accuracies():
    printed = [row[:4] for row in TABLE_2]
    assert [(rival.name, rival.compared_with, rival.top1, rival.top5) for rival in RIVALS] == printed


def test_sizes_reproduce_the_printed_ratios():
    """The ratios are printed with two digits, hence 5 per cent."""
    for rival, (*_, params_ratio, macs_ratio) in zip(RIVALS, TABLE_2, strict=True):
        params, macs = EFFICIENTNETS[rival.compared_with]
        assert rival.params_millions / params == pytest.approx(params_ratio, rel=0.05), rival.name
        if macs_ratio is None:
            assert rival.macs_billions is None
        else:
            assert rival.macs_billions / macs == pytest.approx(macs_ratio, rel=0.05), rival.name


def test_the_next_command_shows_the_same_network(run, tmp_path):
    path = tmp_path / "my networks" / "b0.yaml"
    path.parent.mkdir()
    path.write_text(spec_text(effnet.spec("b0")))
    said = run(str(path), "--resolution", "64", "--num-classes", "7")[2]
    following = shlex.split(said.removeprefix("Next: effnet info "))
    assert following == [str(path), "--resolution", "64", "--num-classes", "7", "--blocks"]
    code, out, said = run(*following)
    assert (code, said) == (0, "Next: effnet info --rivals\n")
    assert "64 px, dropout 0.2, drop-connect 0.2, 7 classes" in out
