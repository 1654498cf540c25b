"""Answers in a folder: each photo once, in whole files, even after stops and kills, and the same on a cluster."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import Machines
from short_run import Recorder
from tiny import draw_images

import effnet
from effnet.arch.spec import InputSpec
from effnet.data.paths import expand
from effnet.errors import ClusterError
from effnet.files import hold_lock
from effnet.predicting import parts
from effnet.predicting.parts import PART, REQUEST, RESULT, divide, fingerprint, open_request, write_answers
from effnet.predicting.settings import AnswerOptions, OutputOptions
from effnet.progress import SILENT, Progress, Silent
from effnet.runtime.load import read_model
from effnet.runtime.options import LoadOptions
from effnet.version import __version__

COMMAND = "predict"
ODD = '", "error": "x", "unsure": true, ".png'  # a name that looks like an answer

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    spec = effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return effnet.save(effnet.EfficientNet(spec), folder, classes=["a", "b", "c"], input=InputSpec(32, 32))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 files, of which one is broken."""
    folder = draw_images(tmp_path_factory.mktemp("photos"), 8)
    (folder / "broken.png").write_bytes(b"\x89PNG cut")
    shutil.copy(folder / "disc" / "000.png", folder / ODD)
    return folder


@pytest.fixture
def predict(run: Typed, model: Path, photos: Path) -> Typed:
    """effnet predict with the model and the photos, by the engine that is the same to the bit with any batch."""
    return lambda *more: run(photos, "--model", model, "--engine", "native", "--threads", 1, *more)


def answer(out: Path, model: Path, photos: Path, progress: Progress = SILENT, ray: str | None = None) -> Any:
    request, classifier = open_request(str(model), AnswerOptions(), LoadOptions(engine="native", threads=1))
    output = OutputOptions(out=out, part=4, ray=ray)
    return write_answers(out, expand([str(photos)]), request, classifier, output, progress)


def joined(out: Path) -> str:
    return "".join(file.read_text() for file in sorted(out.glob("*.jsonl")))


class Stopping(Silent):
    """Ctrl-C when so many files are written."""

    def __init__(self, after: int) -> None:
        self.after = after

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        assert (task, total) == ("files of answers", 7)
        if done == self.after:
            raise KeyboardInterrupt


def test_the_files_hold_what_is_printed(predict: Typed, model: Path, tmp_path: Path) -> None:
    code, printed, said = predict("--json")
    assert (code, said.splitlines()[-1]) == (1, f"Next: effnet info {model}")
    out = tmp_path / "answers"
    code, nothing, remarks = predict("--out", out, "--part", 4)
    assert (code, nothing) == (1, "")
    assert joined(out) == printed
    assert [len(file.read_text().splitlines()) for file in sorted(out.glob("*.jsonl"))] == [4] * 6 + [2]
    found = json.loads((out / RESULT).read_text())
    assert (found["photos"], found["unreadable"], found["unsure"], found["files"]) == (26, 1, 0, 7)
    assert found["versions"]["effnet"] == __version__
    assert "26 photos, 1 unreadable" in remarks
    assert f"head -n 3 {out}/*.jsonl" in remarks


def test_a_folder_needs_neither_ray_nor_torch(model: Path, photos: Path, tmp_path: Path) -> None:
    words = ["predict", str(photos), "--model", str(model), "--engine", "native", "--out", str(tmp_path / "answers")]
    blocked = "import sys; sys.modules.update(ray=None, torch=None, pandas=None, pyarrow=None)\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}from effnet.cli import main; main({words})"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, (tmp_path / "answers" / RESULT).exists()) == (1, True), done.stderr
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{blocked}from effnet.cli import main; main({[*words[:-1], str(tmp_path / 'new'), '--ray', 'auto']})",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "pip install 'effnet[ray]'" in done.stderr


def test_what_was_answered_is_not_answered_again(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "answers"
    answer(whole, model, photos)
    (out / f".{REQUEST}.killed").mkdir(parents=True)  # what a process leaves that is killed while it writes
    with pytest.raises(KeyboardInterrupt):
        answer(out, model, photos, Stopping(3))
    kept = {file.name for file in out.glob("*.jsonl")}
    assert kept == {PART.format(place) for place in range(3)}
    (out / f".{PART.format(5)}.killed").mkdir()
    (out / PART.format(1)).unlink()

    answered = list[bytes]()
    real = parts.answer_part
    monkeypatch.setattr(parts, "answer_part", lambda *given: (answered.append(given[2]), real(*given))[1])
    progress = Recorder()
    counts = answer(out, model, photos, progress)
    assert len(answered) == 5
    assert progress.has("26 photos in 7 files of answers, 2 of them there already")
    assert (counts["photos"], counts["unreadable"]) == (26, 1)
    assert joined(out) == joined(whole)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}
    answer(out, model, photos)
    assert len(answered) == 5


def test_another_request_is_refused_in_one_line(
    predict: Typed, run: Typed, model: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers"
    predict("--out", out, "--part", 4)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    other = tmp_path / "other"
    network = effnet.load(model, engine="torch").network
    assert network is not None
    with torch.no_grad():
        network.classifier.bias += 1
    effnet.save(network, other, classes=["a", "b", "c"], input=InputSpec(32, 32))
    where = ("--out", out, "--part", 4, "--engine", "native")
    for name, words in {
        "topk": (photos, "--model", model, *where, "--topk", 2),
        "part": (photos, "--model", model, *where[:2], "--part", 5, *where[4:]),
        "photos": (photos / "disc", "--model", model, *where),
        "model": (photos, "--model", other, *where),
        "fit": (photos, "--model", model, *where, "--fit", "pad"),
        "engine": (photos, "--model", model, *where[:4], "--engine", "torch"),
    }.items():
        code, printed, refusal = run(*words)
        assert (code, printed) == (2, "")
        assert f"holds answers for another `{name}`" in refusal
        assert len(refusal.splitlines()) == 1
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}

    shutil.copytree(model, tmp_path / "copy")
    assert fingerprint(read_model(tmp_path / "copy")) == fingerprint(read_model(model))
    assert run(photos, "--model", tmp_path / "copy", *where)[0] == 1  # the broken photo


def test_a_folder_of_something_else_and_one_in_use(predict: Typed, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, refusal = predict("--out", tmp_path)
    assert (code, "holds something else" in refusal) == (2, True)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    out = tmp_path / "answers"
    predict("--out", out)
    with hold_lock(out / REQUEST):
        code, _, refusal = predict("--out", out)
    assert (code, f"`out` (='{out}') is in use by another process" in refusal) == (2, True)
    (out / PART.format(0)).write_text("{}\n")
    code, _, refusal = predict("--out", out)
    assert (code, f"{PART.format(0)} was changed: delete it" in refusal) == (2, True)
    (out / REQUEST).write_text("[1]")
    code, _, refusal = predict("--out", out)
    assert (code, "cannot be read" in refusal) == (2, True)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("--ray", "auto"), "`ray` (='auto') needs --out"),
        (("--out", "answers", "--csv"), "`csv` (=True) is for standard output"),
        (("--json", "--csv"), "`csv` (=True) excludes --json"),
        (("--out", "answers", "--part", 0), "`part` (=0) must be a positive whole number"),
    ],
)
def test_options_that_do_not_fit(predict: Typed, words: tuple[object, ...], rule: str) -> None:
    code, printed, refusal = predict(*words)
    assert (code, printed) == (2, "")
    assert rule in refusal


def test_names_of_any_kind_are_kept() -> None:
    names = ["a\nb", "\udcff.png", "", "\0", "ü" * 300]
    listed = divide(iter(names), 2)
    assert (listed.count, len(listed.parts)) == (5, 3)
    assert divide(names[::-1], 2).digest != listed.digest
    assert divide([], 2).parts == ()


def test_a_machine_without_the_photos_or_with_another_model(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has none of them under their path: what it answers is not kept."""
    request, _ = open_request(str(model), AnswerOptions(), LoadOptions(engine="native"))
    with pytest.raises(ClusterError, match="is another model on"):
        parts._open(dataclasses.replace(request, fingerprint="0"))

    def elsewhere(*_: object) -> Iterator[tuple[str, tuple[str, list[str]]]]:
        yield PART.format(0), ("", ["gone.png", str(photos / "broken.png")])

    monkeypatch.setattr(parts, "_answer", elsewhere)
    with pytest.raises(ClusterError, match=r"broken\.png is here but not on every machine"):
        answer(tmp_path / "answers", model, photos)
    assert not list((tmp_path / "answers").glob("*.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_machine_that_is_killed_in_the_middle_changes_nothing(model: Path, photos: Path, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "answers"
    counts, progress = answer(alone, model, photos), Recorder()
    with Machines() as machines, machines.second_dies("_answer_there"):
        assert answer(out, model, photos, progress, machines.address) == counts
    assert progress.has("its worker or machine died; it runs again")
    for file in alone.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    files = [json.loads(line)["file"] for line in joined(out).splitlines()]
    assert files == list(expand([str(photos)]))
