"""Command lines as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from effnet.console import command_line, remark_once


def test_a_command_line_says_every_value_in_full() -> None:
    options = {"from_": "net-1.0", "phi": 1.23456789, "width": 2.0, "ema": False, "set": ["flip=0", "lr=1e-3"]}
    expected = "effnet scale --from net-1.0 --phi 1.23456789 --width 2 --no-ema --set flip=0 --set lr=1e-3"
    assert command_line("scale", options) == expected


def test_of_several_processes_one_writes_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt in "01":  # each time that torchrun starts them
        for rank in "01":
            (tmp_path / attempt / rank).mkdir(parents=True)
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / attempt / rank / "error.json"))
            remark_once(f"{attempt} {rank}")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    remark_once("nowhere to agree")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    remark_once("alone")
    assert capsys.readouterr().err.splitlines() == ["0 0", "1 0", "nowhere to agree", "alone"]
