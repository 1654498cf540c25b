from __future__ import annotations

import csv
import importlib
import inspect
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from cyclopts import App
from PIL import Image
from ran import Run

import effnet
from effnet.arch.spec import Calibration, InputSpec
from effnet.arch.variants import VARIANTS
from effnet.cli import COMMANDS, main
from effnet.weights.bundle import Record, read_record

TINY = effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return effnet.save(effnet.EfficientNet(TINY), folder, classes=["a", "b", "c"], input=InputSpec(32, 40))


@pytest.fixture
def material(tmp_path: Path, photos: Path) -> Path:
    """A folder with a photo, a broken one, a text and a photo further down."""
    (tmp_path / "deep").mkdir()
    Image.open(photos / "coffee.png").save(tmp_path / "deep" / "cup.jpg")
    Image.open(photos / "chelsea.png").save(tmp_path / "cat.webp")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 cut")
    (tmp_path / "notes.txt").write_text("no photo")
    return tmp_path


# the table of commands


def test_root_help_imports_no_command() -> None:
    code = (
        "import sys\nfrom effnet.cli import COMMANDS, main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith('effnet.') and name.count('.') > 1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    *shown, imported = done.stdout.splitlines()
    assert imported == "[]"
    for name in COMMANDS:
        assert f" {name} " in "\n".join(shown)


def functions(names: Iterable[str]) -> Iterator[tuple[str, Callable[..., int]]]:
    """Every command and subcommand, and its function."""
    for name in names:
        command = getattr(importlib.import_module(f"effnet.{COMMANDS[name][0]}"), name)
        if isinstance(command, App):
            yield from ((f"{name} {sub}", command[sub].default_command) for sub in command if not sub.startswith("-"))
        else:
            yield name, command


STILL = {"info", "predict", "profile", "train", "val", "bench", "search run"}  # to be rebuilt


@pytest.mark.parametrize(
    ("name", "function"), list(functions(COMMANDS)), ids=lambda value: value if type(value) is str else ""
)
def test_more_than_six_options_are_a_dataclass(
    name: str, function: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    plain = [option.name for option in options if 'Parameter(name="*"' not in option.annotation]
    assert len(plain) <= 6 or name in STILL, plain
    out = Run(capsys, *name.split(), "--help").out
    assert function.__doc__ is not None
    assert function.__doc__.split()[:4] == out.split("\n\n")[1].split()[:4]  # its own words, not the table's


# info


def test_info_lists_the_family(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "info")
    assert run.code == 0
    lines = {line.split()[0]: line.split() for line in run.out.splitlines() if "G" in line.split()}
    assert lines["b0"][1:] == ["1.0", "1.0", "224", "0.2", "0.2", "5.289", "M", "0.3858", "G", "0.7716", "G", "77.1"]
    assert set(VARIANTS) <= set(lines)
    assert "what the paper calls FLOPS" in run.out
    assert "published" in run.out
    assert "Next: effnet info" in run.err


def test_info_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    family = {row["name"]: row for row in json.loads(Run(capsys, "info", "--json").out)}
    assert list(family) == list(VARIANTS)
    # B7: the paper's largest network
    expected = {"params": 66347960, "macs": 37745884192, "flops": 2 * 37745884192, "activations": 289938464}
    assert expected.items() <= family["b7"].items()
    one = json.loads(Run(capsys, "info", "b7", "--json").out)
    assert family["b7"].items() <= one.items()
    assert sum(stage["macs"] for stage in one["stages"]) == one["macs"]
    blocks = json.loads(Run(capsys, "info", "b7", "--blocks", "--json").out)["blocks"]
    assert len(blocks) == 55 + 3  # and stem, head, classifier
    assert sum(block["activations"] for block in blocks) == one["activations"]


def test_info_shows_table_1(capsys: pytest.CaptureFixture[str]) -> None:
    out = Run(capsys, "info", "b0").out
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
    assert "5,288,548" in out
    assert "385,814,752" in out
    assert "6,747,036" in out


def test_info_of_a_changed_network(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("b0", "--width", 1.1, "--depth", 1.2, "--resolution", 260, "--num-classes", 10, "--json")
    values = json.loads(Run(capsys, "info", *words).out)
    assert (values["width"], values["depth"], values["resolution"], values["num_classes"]) == (1.1, 1.2, 260, 10)
    # B2 without its 1000 classes
    assert values["params"] == 9109994 - 990 * (1408 + 1)


def test_info_of_a_stem_stride(capsys: pytest.CaptureFixture[str]) -> None:
    words = "b0", "--stem-stride", "1", "--resolution", "112"
    assert json.loads(Run(capsys, "info", *words, "--json").out)["macs"] == effnet.cost(effnet.spec("b0")).macs
    shown = Run(capsys, "info", *words).out
    assert shown.startswith("b0-r112-s1: ")
    assert ["1", "Conv3x3", "112", "32", "1", "1"] in [line.split()[:6] for line in shown.splitlines()]


def test_info_of_a_bundle(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    assert json.loads(Run(capsys, "info", tiny, "--json").out)["params"] == effnet.cost(TINY).params


def test_info_rivals(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "info", "--rivals")
    assert run.code == 0
    assert "GPipe" in run.out
    assert "8.4x" in run.out
    assert "published" in run.out
    groups = json.loads(Run(capsys, "info", "--rivals", "--json").out)
    assert groups[0]["rivals"][0]["name"] == "ResNet-50"


def test_convert_keeps_what_a_training_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(
        Calibration(1.5, 0.7, 0.05, 300, "val"), {"recipe": "finetune"}, {"split.csv": "path,label,split\n"}
    )
    trained = effnet.save(effnet.EfficientNet(TINY), tmp_path / "trained", record=record)
    assert Run(capsys, "convert", trained, "--out", tmp_path / "copy").code == 0
    assert read_record(tmp_path / "copy") == record


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "b9"], "`network` (='b9') is not known"),
        (["info", "b0", "--width", "0"], "`width` (=0.0) must be a positive finite number"),
        (["info", "b0", "--widht", "1"], "Did you mean --width?"),
        (["info", "--width", "1.1"], "effnet info b0 --width 1.1"),
        (["info", "b0", "--resolution", "1.5"], "'1.5' is no whole number"),
        (["info", "b0", "--stem-stride", "4"], "`stem_stride` (=4) must be 1 or 2"),
        (["info", "--stem-stride", "1"], "effnet info b0 --stem-stride 1"),
        (["info", "."], "is no bundle"),
        (["info", "--blocks"], "is about one network"),
        (["info", "b0", "--rivals"], "does not go with --rivals"),
        (["info", "--rivals", "--width", "3"], "is about one network"),
        (["info", "b0", "--width", "1e308"], "must be at most 100"),
        (["convert", "lite0", "--source", "timm"], "comes from lukemelas"),
        (["predict", "x.jpg", "--batch", "0"], "`batch` (=0)"),
        (["inof"], 'Did you mean "info"?'),
        (["predict"], "must name a file, a folder"),
        (["predict", "x.jpg", "--model", "lite9"], "Did you mean 'lite"),
        (["predict", "x.jpg", "--topk", "many"], "--topk"),
        (["predict", "x.jpg", "--json", "--csv"], "choose one form of output"),
        (["convert", "missing.pth"], "missing.pth does not exist"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    run = Run(capsys, *words)
    assert run.code == 2
    assert message in run.err
    assert "Traceback" not in run.err
    assert run.out == ""


def test_traceback_on_request() -> None:
    with pytest.raises(effnet.EffnetError):
        main(["info", "b9", "--traceback"])


# predict


def test_predict_prints_a_table(capsys: pytest.CaptureFixture[str], tiny: Path, material: Path) -> None:
    run = Run(capsys, "predict", material, "--model", tiny, "--topk", 2)
    assert run.code == 1  # one is broken
    assert "cat.webp" in run.out
    assert run.out.count("%") == 4
    assert "unreadable: " in run.out
    assert "3 photos, 1 unreadable" in run.err
    assert "Next: effnet" in run.err


def test_predict_prints_json_lines(capsys: pytest.CaptureFixture[str], tiny: Path, material: Path) -> None:
    sources = (material / "missing.jpg", material, material / "deep" / "*.jpg", material / "notes.txt")
    run = Run(capsys, "predict", *sources, "--model", tiny, "--json")
    lines = [json.loads(line) for line in run.out.splitlines()]
    names = ["missing.jpg", "broken.jpg", "cat.webp", "cup.jpg", "cup.jpg", "notes.txt"]
    assert [Path(line["file"]).name for line in lines] == names
    assert ["error" in line for line in lines] == [True, True, False, False, False, True]
    assert [set(score) for score in lines[2]["predictions"]] == [{"index", "label", "probability"}] * 3
    assert {score["label"] for score in lines[2]["predictions"]} == {"a", "b", "c"}
    assert run.code == 1


def test_predict_prints_csv(capsys: pytest.CaptureFixture[str], tiny: Path, material: Path) -> None:
    run = Run(capsys, "predict", material / "cat.webp", material / "broken.jpg", "--model", tiny, "--csv", "--topk", 1)
    rows = list(csv.DictReader(io.StringIO(run.out)))
    assert [row["rank"] for row in rows] == ["1", ""]
    assert rows[0]["label"] in "abc"
    assert rows[1]["error"]


def test_predict_is_well_when_all_is_well(capsys: pytest.CaptureFixture[str], tiny: Path, photos: Path) -> None:
    assert Run(capsys, "predict", photos, "--model", tiny).code == 0


def test_predict_reads_a_list(
    capsys: pytest.CaptureFixture[str], tiny: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos}/coffee.png\nmissing.png\n"))
    lines = Run(capsys, "predict", "-", "--model", tiny, "--json").out.splitlines()
    assert [json.loads(line)["file"] for line in lines] == [f"{photos}/coffee.png", "missing.png"]


def test_ctrl_c_leaves_whole_lines(tiny: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "effnet", "predict", "-", "--model", str(tiny), "--json", "--batch", "1"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{photos}/coffee.png\n" * 50)
    child.stdin.flush()
    first = child.stdout.readline()  # it works by now
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in errors
    assert all(json.loads(line)["predictions"] for line in (first + rest).splitlines())
    assert (first + rest).endswith("\n")


def test_a_reader_that_leaves_is_no_catastrophe(tiny: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "effnet", "predict", *[str(photos)] * 40, "--model", str(tiny), "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr is not None
    errors = child.stderr.read()
    child.stderr.close()
    child.wait(60)
    assert "Traceback" not in errors
