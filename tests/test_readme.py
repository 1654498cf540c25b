"""Runs what README.md and the pages of docs/ show: transcripts must be what the commands print, Python must run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
CHINESE = (ROOT / "README.zh-CN.md", *sorted((ROOT / "docs" / "zh").glob("*.md")))  # their code is that of PAGES
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text("utf-8")) if name == language]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like the repository's root, where commands may write."""
    for name in ("src", "docs", "tests", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_door_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200


def test_transcripts_are_what_the_commands_print() -> None:
    assert sum(len(blocks(page, "console")) for page in PAGES) >= 6
    done = subprocess.run([sys.executable, "docs/transcripts.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_runs(page: Path, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    for code in blocks(page, "python"):  # one after the other: a later one may use what an earlier one wrote
        exec(compile(code, page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES + CHINESE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_targets_and_files_exist(page: Path) -> None:
    text, makefile = page.read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"\bmake (demo|install|test|check|docs|bench|clean)\b", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for script in re.findall(r"python ((?:benchmarks|docs)/\w+\.py)", text):
        assert (ROOT / script).exists(), script
