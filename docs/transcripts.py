"""Runs the commands that README.md and the pages of docs/ show and writes what they print; `--check` only compares."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CHINESE = ROOT / "README.zh-CN.md"  # shows what README.md shows; tests/test_chinese.py compares them
BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
# What differs from run to run, by the last digits from processor to processor, and with the engine that runs
VARYING = re.compile(
    r"\d+\.\d s with|at most \S+ \(\S+ of the largest\)|\d+\.\d%(?=  )"
    r"|^(native|torch|O\w+ ?\w*), .*$|^Memory in native .*\n",
    re.M,
)


def refresh(text: str) -> str:
    """The text with every console block as its commands print it now, errors included."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("src", "docs"):
            (Path(folder) / name).symlink_to(ROOT / name)  # the repository, and a place to write beside it
        return BLOCK.sub(lambda block: _transcript(block[0], folder), text)


def _transcript(block: str, folder: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shown = []
    for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
        done = subprocess.run(
            shlex.split(command),
            cwd=folder,
            env={**os.environ, "PATH": path},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        lines = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
        shown.append(f"$ {command}\n{lines}")
    return "\n".join(shown)


def translate(english: str, chinese: str) -> str:
    """A Chinese page with the console blocks of the English one."""
    blocks = iter(BLOCK.findall(english))
    return BLOCK.sub(lambda block: next(blocks, block[0]), chinese)


def differences(page: Path) -> str:
    """How a page differs from what its commands print, VARYING apart; "" if it does not."""
    text = page.read_text("utf-8")
    old, new = (VARYING.sub("", version).splitlines() for version in (text, refresh(text)))
    return "\n".join(difflib.unified_diff(old, new, page.name, "now", lineterm=""))


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit("\n".join(filter(None, map(differences, PAGES))) or 0)
    for page in PAGES:
        page.write_text(refresh(page.read_text("utf-8")), "utf-8")
    CHINESE.write_text(translate(PAGES[0].read_text("utf-8"), CHINESE.read_text("utf-8")), "utf-8")
