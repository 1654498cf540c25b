"""The file tree of architecture.md, made of the modules' docstrings; draw.py fills it in."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "effnet"


def tree() -> str:
    """Every module of the top level and every room with its modules, each with its summary."""
    rows = [("src/effnet/", SOURCE / "__init__.py")]
    rows += [(f"  {path.name}", path) for path in modules(SOURCE)]
    for room in sorted(SOURCE.glob("*/__init__.py")):
        rows += [(f"  {room.parent.name}/", room), *((f"    {path.name}", path) for path in modules(room.parent))]
    return "\n```\n" + "".join(f"{name:<27}{summary(path)}\n" for name, path in rows) + "```\n"


def modules(folder: Path) -> list[Path]:
    """The modules of a room, without the room itself."""
    return [path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("__")]


def summary(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0]


BLOCKS = {"tree": tree}
