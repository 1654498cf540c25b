"""The architecture's import rules, read from the source, and what must work where torch is not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "effnet"

# Downwards only; rooms on one line do not import each other.
LEVELS = (
    {"errors"},
    {"machine"},
    {"arch"},
    {"scaling", "models", "data"},
    {"weights"},
    {"analysis"},
    {"training", "deploy"},
    {"serve"},
    {"fit", "report"},
    {"console"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
WITHOUT_TORCH = (
    "arch",
    "scaling",
    *(f"data/{name}.py" for name in ("preprocess", "photo", "sources", "folder", "fingerprint", "likeness")),
    *(f"data/{name}.py" for name in ("duplicates", "findings", "check")),
    "errors",
    "machine",
    "console",
    "commands",
    "cli",
)
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "base"}

MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_import_downwards_only(path: Path) -> None:
    here = room(path)
    for name in imported(path):
        pieces = name.split(".")
        if pieces[0] != "effnet" or len(pieces) == 1 or pieces[1] == here:
            continue
        assert pieces[1] in LEVEL_OF, f"{name}: give the room a level"
        assert LEVEL_OF[pieces[1]] < LEVEL_OF[here], f"{here} must not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_torch_where_none_is_promised(path: Path) -> None:
    if str(path.relative_to(SOURCE)).startswith(WITHOUT_TORCH):
        assert not {name for name in imported(path) if name.split(".")[0] in ("torch", "torchvision")}


def test_no_module_collects_everything() -> None:
    assert not [path for path in MODULES if path.stem in VAGUE]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_effnet_loads_neither_torch_nor_numpy() -> None:
    assert (
        run("import sys, effnet; print([m for m in ('torch', 'numpy', 'PIL', 'rich') if m in sys.modules])") == "[]\n"
    )


def test_every_public_name_resolves() -> None:
    assert "efficientnet_b7" in run(
        "import effnet; print([getattr(effnet, n) for n in effnet.__all__] and effnet.__all__)"
    )


def test_unknown_public_name_suggests() -> None:
    import effnet

    with pytest.raises(AttributeError, match="Did you mean 'create'"):
        effnet.creat  # noqa: B018


def test_counts_and_prepares_without_torch() -> None:
    # None in sys.modules makes every import of torch fail, wherever it is tried
    blocked = "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
    script = (ROOT / "tests" / "plain_install.py").read_text()
    assert "b0 5288548" in run(blocked + script)
