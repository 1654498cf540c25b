from __future__ import annotations

import csv
import errno
import gc
import importlib
import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from cyclopts import App
from limits import SETS, familiarity
from PIL import Image
from ran import Run

import effnet
from effnet.__main__ import main as program
from effnet.arch.spec import Calibration, InputSpec
from effnet.cli import COMMANDS, main
from effnet.errors import DownloadError, ImageError
from effnet.predicting.lines import json_object, table_lines
from effnet.runtime.classifier import Prediction, Score
from effnet.weights.bundle import Record

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


@pytest.mark.parametrize("name", ["fit", "search"])
def test_torchrun_is_for_one_training(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        main([name, str(tmp_path)])
    assert ended.value.code == 2
    assert f"effnet {name} is a single process: start it without torchrun" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("name", "function"), list(functions(COMMANDS)), ids=lambda value: value if type(value) is str else ""
)
def test_more_than_six_options_are_a_dataclass(
    name: str, function: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    plain = [option.name for option in options if 'Parameter(name="*"' not in option.annotation]
    assert len(plain) <= 6, plain
    out = Run(capsys, *name.split(), "--help").out
    assert function.__doc__ is not None
    assert function.__doc__.split()[:4] == out.split("\n\n")[1].split()[:4]  # its own words, not the table's
    assert "--empty-" not in out  # what cyclopts would add for a list


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inof"], 'Did you mean "info"?'),
        (["info", "b9"], "Did you mean 'b8'?"),
        (["convert", "lite0", "--source", "timm"], "comes from lukemelas"),
        (["convert", "missing.pth"], "missing.pth does not exist"),
        (["predict"], "must name a file, a folder"),
        (["predict", "x.jpg", "--batch", "0"], "`batch` (=0)"),
        (["predict", "x.jpg", "--model", "lite9"], "`model` (='lite9') is not known"),
        (["export", "lite9"], "`model` (='lite9') is not known"),
        (["convert", "lite9"], "`file` (='lite9') is not known"),
        (["scale", "--from", "b9"], "`from` (='b9') is not known"),
        (["scale", "--macs", "300", "M"], "'M' is more than effnet scale takes. Write 300M in one word."),
        (["scale", "--memory", "8", "GB"], "100MiB, 8GB or 8GiB. Write 8GB in one word."),
        (["scale", "b0", "--macs", "400M"], "'b0' is more than effnet scale takes.\neffnet scale --help"),
        (["search", "run", "x", "--seeds", "1.5"], "--seeds: '1.5' is not a whole number"),
        (["predict", "x.jpg", "--topk", "many"], "--topk"),
        (["predict", ""], "an empty word"),
        (["train", ""], "an empty word"),
        (["predict", "x.jpg", "--model", ""], "--model: an empty word"),
        (["export", "lite0", "--out="], "--out: an empty word"),
        (["predict", "x.jpg", "--json", "--csv"], "choose one format"),
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


@pytest.mark.parametrize("words", [["--model=~/my models/none.pth"], ["--model", "~/my models/none.pth"]])
def test_the_home_that_no_shell_wrote_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    """Bash leaves ~ alone behind = and in quotes, which a pattern and a name with a space need."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/my models/none.pth does not exist" in Run(capsys, "predict", "x.jpg", *words).err
    assert "`model` (='~x') is not known" in Run(capsys, "info", "~x").err


def test_traceback_on_request() -> None:
    with pytest.raises(effnet.EffnetError):
        main(["info", "b9", "--traceback"])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_runs_out_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def info() -> int:
        raise error

    monkeypatch.setattr("effnet.describing.info", info)
    run = Run(capsys, "info")
    assert (run.code, run.err) == (2, f"effnet: memory ran out: {error}\n")


def test_too_few_descriptors_are_told_with_a_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def info() -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("effnet.describing.info", info)
    assert Run(capsys, "info").err == "effnet: [Errno 24] Too many open files; allow more: ulimit -n 1024\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("words", [["info"], ["info", "b0", "--json"]], ids=len)
def test_a_full_disk_behind_standard_output(words: list[str]) -> None:
    command = [sys.executable, "-m", "effnet", *words]
    with Path("/dev/full").open("w") as full:
        child = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert child.returncode == 2
    assert child.stderr == "effnet: [Errno 28] No space left on device: 'standard output'\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_behind_standard_error(tiny: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "effnet", "predict", str(photos), "--model", str(tiny), "--json"]
    with Path("/dev/full").open("w") as full:
        child = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, check=False)
    assert (child.returncode, child.stdout.count("\n")) == (0, 2)


@pytest.mark.parametrize("words", [("predict", "x.jpg", "--model", "b0"), ("bench", "b0"), ("export", "b0")])
def test_a_download_is_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    def fetch(weights: object, *, progress: object) -> Path:
        raise DownloadError(type(progress).__name__)

    monkeypatch.setattr("effnet.weights.registry.fetch", fetch)
    assert Run(capsys, *words).err == "effnet: Display\n"


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


@pytest.fixture
def limited(tmp_path: Path) -> Path:
    """A bundle that finds every answer unsure and every photo unfamiliar."""
    torch.manual_seed(0)
    network = effnet.EfficientNet(TINY)
    known = familiarity(network.spec.head_channels, 3, threshold=1.0)
    record = Record(Calibration(1.0, 0.99, 0.05, 60, "val"), sets=SETS, familiarity=known)
    return effnet.save(network, tmp_path / "limited", classes=["a", "b", "c"], record=record)


def test_predict_says_what_is_unsure_and_unfamiliar(
    capsys: pytest.CaptureFixture[str], limited: Path, photos: Path
) -> None:
    words = ("predict", photos / "coffee.png", "--model", limited, "--topk", 1, "--sets", 0.9)
    run = Run(capsys, *words)
    first, second = run.out.splitlines()[2:]  # the long name has a line of its own
    assert first.endswith("(unsure, unfamiliar)")
    labels = second.split("set  ")[1].split(", ")
    assert "1 unsure: only a confidence from 99.0% ensures that at most 0.05 of the answers are wrong" in run.err
    assert "1 unfamiliar: less like the training images than 95 % of the val images" in run.err

    found = json.loads(Run(capsys, *words, "--json").out)
    assert (found["unsure"], found["unfamiliar"]) == (True, True)
    assert found["familiarity"] < 1.0
    assert found["labels"] == [label.strip() for label in labels]

    (row,) = csv.DictReader(io.StringIO(Run(capsys, *words, "--csv").out))
    assert (row["unsure"], row["unfamiliar"]) == ("true", "true")
    assert json.loads(row["labels"]) == found["labels"]


def test_predict_says_nothing_of_what_a_model_cannot_tell(
    capsys: pytest.CaptureFixture[str], tiny: Path, photos: Path
) -> None:
    words = ("predict", photos / "coffee.png", "--model", tiny)
    assert set(json.loads(Run(capsys, *words, "--json").out)) == {"file", "predictions"}
    rows = csv.DictReader(io.StringIO(Run(capsys, *words, "--csv").out))
    assert {(row["unsure"], row["unfamiliar"], row["labels"]) for row in rows} == {("", "", "")}
    assert "unsure" not in Run(capsys, *words).err
    run = Run(capsys, *words, "--sets", 0.9)
    assert (run.code, run.out) == (2, "")
    assert "`sets` (=0.9) needs label sets" in run.err


def test_a_long_set_is_cut_in_the_table_only() -> None:
    answer = Prediction((Score(0, "0", 1.0),), labels=tuple(map(str, range(30))))
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more" in table_lines("x.png", answer)
    assert len(json.loads(json_object("x.png", answer))["labels"]) == 30


@pytest.mark.parametrize(("name", "shown"), [("a\nb.png", r"a\nb.png"), ("\x1b[2J\x85é.png", r"\x1b[2J\x85é.png")])
def test_a_name_is_one_line(name: str, shown: str) -> None:
    """A line feed in a name would be a second answer, and a terminal obeys what follows an escape."""
    assert table_lines(name, ImageError("is empty")) == f"{shown:<40} {'-':>11}  unreadable: is empty\n"


def test_predict_prints_nothing_of_a_damaged_bundle(
    capsys: pytest.CaptureFixture[str], tiny: Path, photos: Path, tmp_path: Path
) -> None:
    """Its weights are checked while other things go on; no answer comes before."""
    damaged = shutil.copytree(tiny, tmp_path / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    run = Run(capsys, "predict", photos / "coffee.png", "--model", damaged, "--csv")
    assert (run.code, run.out) == (2, "")
    assert "was changed or cut short" in run.err


@pytest.mark.skipif(sys.platform == "win32", reason="names are bytes on POSIX only")
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_every_name_is_printed_in_every_encoding(
    form: str, encoding: str, tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are not text come out as they are, letters that the encoding lacks escaped; JSON stays JSON."""
    monkeypatch.chdir(tmp_path)
    names = [os.fsdecode(b"caf\xe9.png"), "\u00e9.png", "\u4e2d.png"]
    for name in names:
        Path(name).symlink_to(photos / "coffee.png")
    out = io.TextIOWrapper(io.BytesIO(), encoding, "strict")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(map(os.fsencode, names))), "utf-8"))
    with pytest.raises(SystemExit) as ended:
        main(["predict", "-", "--model", str(tiny), *([] if form == "table" else [f"--{form}"])])
    assert ended.value.code == 0
    out.flush()
    written = out.buffer.getvalue()
    if form == "json":
        assert [json.loads(line)["file"] for line in written.decode(encoding).splitlines()] == names
        return
    assert b"caf\xe9.png" in written
    assert {"utf-8": "\u00e9.png".encode(), "ascii": rb"\xe9.png", "cp1252": b"\xe9.png"}[encoding] in written
    assert {"utf-8": "\u4e2d.png".encode()}.get(encoding, rb"\u4e2d.png") in written


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


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="the system tells no load")
@pytest.mark.parametrize(("load", "given", "expected"), [(0.5, None, None), (1.0, None, "1000"), (9.0, "7", "7")])
def test_threads_sleep_soon_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, load: float, given: str | None, expected: str | None
) -> None:
    monkeypatch.setattr("effnet.cli.main", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "environ", {} if given is None else {"GOMP_SPINCOUNT": given})
    program()
    gc.enable()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
