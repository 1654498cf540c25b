"""Runs what the README shows: its transcripts must be what the commands print, its Python must run."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SECONDS = re.compile(r"\d+\.\d s with")


def blocks(kind: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README) if name == kind]


def transcripts() -> list[tuple[str, str]]:
    """Every command behind a $, with what stands below it."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like the repository's root, where commands may write."""
    for name in ("src", "docs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_there_is_something_to_run() -> None:
    assert len(transcripts()) >= 3
    assert blocks("python")


def test_transcripts_are_what_the_commands_print(clone: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command, expected in transcripts():
        done = subprocess.run(
            command, shell=True, cwd=clone, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        printed, shown = (
            [SECONDS.sub("", line).rstrip() for line in text.splitlines()] for text in (done.stdout, expected)
        )
        difference = "\n".join(difflib.unified_diff(shown, printed, "README", command, lineterm=""))
        assert not difference, difference


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_the_file_tree_is_the_file_tree() -> None:
    tree = next(text for text in blocks("") if "src/effnet/" in text)
    listed = set(re.findall(r"(\w+\.py)\b", tree))
    built = {path.name for path in (ROOT / "src" / "effnet").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert listed == built


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", "".join(blocks("sh")))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
