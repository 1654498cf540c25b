"""effnet convert: what it reads, builds, writes and refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import saved, small, tiny
from ran import Run

import effnet
from effnet.arch.spec import Calibration
from effnet.models.efficientnet import EfficientNet
from effnet.weights import convert, files, verify
from effnet.weights.bundle import Record, open_bundle, read_record
from effnet.weights.verify import LogitDifference


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return saved(tmp_path / "net.pth", tiny("tutorial"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened, and networks were built."""
    found: Counter[str] = Counter()

    def count(owner: Any, name: str, what: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def counted(*values: Any, **options: Any) -> Any:
            found[what(*values)] += 1
            return original(*values, **options)

        monkeypatch.setattr(owner, name, counted)

    count(files, "read_torch", lambda file: str(file))
    count(convert, "open_weights", lambda path: f"open {path.name}")
    count(EfficientNet, "__init__", lambda *_: "build")
    return found


@pytest.mark.parametrize(("to", "target"), [("bundle", "net-bundle"), ("torchvision", "net-torchvision.pth")])
def test_a_file_is_opened_once_and_a_network_built_once(
    checkpoint: Path, calls: Counter[str], capsys: pytest.CaptureFixture[str], to: str, target: str
) -> None:
    ran = Run(capsys, "convert", checkpoint, "--to", to)
    assert ran.code == 0
    assert Path(target).exists()
    assert (calls[str(checkpoint)], calls["open net.pth"], calls["build"]) == (1, 1, 1)
    assert set(calls.values()) == {1}  # what was written is opened once, too
    assert "tutorial" in ran.out
    assert f"--model {target}" in ran.err


def test_a_bundle_is_opened_once(
    tmp_path: Path, calls: Counter[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(Calibration(1.5, 0.7, 0.05, 300, "val"), {"recipe": "finetune"}, "path,label,split\n")
    trained = effnet.save(small(), tmp_path / "trained", classes=list("abcde"), record=record)
    calls.clear()
    assert Run(capsys, "convert", trained, "--out", tmp_path / "copy").code == 0
    assert calls == {"open trained": 1, "build": 1, next(name for name in calls if name.startswith("open new")): 1}
    assert read_record(tmp_path / "copy") == record
    assert open_bundle(tmp_path / "copy").config.classes == tuple("abcde")


def test_another_number_of_classes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Run(capsys, "convert", checkpoint, "--num-classes", 3, "--out", "of three")
    assert (ran.code, ran.err) == (0, "Next: effnet predict photo.jpg --model 'of three'\n")
    ours, old = open_bundle("of three").network, small()
    assert ours.classifier.out_features == 3
    assert torch.equal(ours.stem.conv.weight, old.stem.conv.weight)


@pytest.mark.parametrize("check", [1, 2])  # of what was read, of what was written
def test_a_failed_check_writes_nothing(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, check: int
) -> None:
    results = iter([0.0] * (check - 1) + [float("nan")])
    monkeypatch.setattr(verify, "logit_difference", lambda *_: LogitDifference("timm", 64, 1, next(results)))
    ran = Run(capsys, "convert", checkpoint, "--to", "torchvision")
    assert ran.code == 1
    assert "written" in ran.err
    assert [path.name for path in checkpoint.parent.iterdir()] == ["net.pth"]
