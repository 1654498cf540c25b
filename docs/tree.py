"""The file tree of architecture.md, made of the modules' docstrings; draw.py fills it in."""

from __future__ import annotations

import ast
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, NATIVE = ROOT / "src" / "effnet", ROOT / "native"


def tree() -> str:
    """Every module of the top level and every package with its modules, each with its summary."""
    rows = [("src/effnet/", SOURCE / "__init__.py")]
    rows += [(f"  {path.name}", path) for path in modules(SOURCE)]
    for room in sorted(SOURCE.glob("*/__init__.py")):
        rows += [(f"  {room.parent.name}/", room), *((f"    {path.name}", path) for path in modules(room.parent))]
    lines = [f"{name:<27}{summary(path)}" for name, path in rows]
    lines.append(f"{'native/':<27}The kernels in C++17, without dependencies.")
    lines += [f"  {path.name:<25}{summary(path)}" for path in sorted(NATIVE.glob("[!.]*.[chp]*"))]
    return "\n```\n" + "".join(f"{line}\n" for line in lines) + "```\n"


def modules(folder: Path) -> list[Path]:
    """The modules of a package, without the package itself."""
    return [path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("__")]


def summary(path: Path) -> str:
    """The first line of a module's docstring, or the first sentence of the comment that a C++ file begins with."""
    if path.suffix != ".py":
        comment = [*takewhile(lambda line: line.startswith("//"), path.read_text("utf-8").splitlines())]
        if not comment:  # its header says it
            return summary(path.with_suffix(".h"))
        return " ".join(line.lstrip("/ ") for line in comment).partition(". ")[0].rstrip(".") + "."
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0]


BLOCKS = {"tree": tree}
