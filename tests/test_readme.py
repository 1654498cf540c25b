"""Runs what the README shows: its transcripts must be what the commands print, its Python must run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def blocks(kind: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README) if name == kind]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like the repository's root, where commands may write."""
    for name in ("src", "docs", "tests", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_transcripts_are_what_the_commands_print() -> None:
    assert len(blocks("console")) >= 3
    done = subprocess.run([sys.executable, "docs/transcripts.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_the_file_tree_is_the_file_tree() -> None:
    tree = next(text for text in blocks("") if "src/effnet/" in text)
    listed = set(re.findall(r"(\w+\.py)\b", tree)) - {"__init__.py"}
    built = {path.name for path in (ROOT / "src" / "effnet").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert listed == built


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", "".join(blocks("sh")))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
