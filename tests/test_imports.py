"""The architecture's import rules, read from the source, and what must work where torch is not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "effnet"

# Lower rooms first. A room imports those on the lines before its own, and of its own line only itself.
GROUND = ("version", "errors", "fields", "files", "machine", "progress", "console", "native")
KERNEL = (("arch",), ("models", "data"), ("weights",), ("runtime", "metrics", "plots"))
FEATURES = {  # each with the features that it may import
    "describing": (),
    "predicting": (),
    "converting": (),
    "scaling": (),
    "checking": (),
    "profiling": (),
    "training": ("reporting",),
    "evaluating": ("reporting",),
    "exporting": (),
    "benchmarking": ("profiling",),
    "searching": ("training", "scaling"),
}
LINES = (*((module,) for module in GROUND), *KERNEL, tuple(FEATURES), ("cli",), ("__main__",))
LINE_OF = {room: line for line, rooms in enumerate(LINES) for room in rooms}
STILL = {  # arrows that the rebuilding has yet to remove
    ("runtime", "metrics"),
    ("searching", "profiling"),
    ("benchmarking", "exporting"),
    ("training", "bars"),
    ("searching", "bars"),
    ("bars", "console"),
}
WITHOUT_TORCH = (
    *GROUND,
    "arch",
    "scaling",
    "describing",
    "checking",
    *(f"data/{name}" for name in ("image", "paths", "dataset", "duplicates")),
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
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    if here == "bars":
        return
    assert here in LINE_OF, f"{here}: give the room a line"
    for name in imported(path):
        pieces = name.split(".")
        if pieces[0] != "effnet" or len(pieces) == 1 or pieces[1] == here or (here, pieces[1]) in STILL:
            continue
        assert pieces[1] in LINE_OF, f"{name}: give the room a line"
        allowed = LINE_OF[pieces[1]] < LINE_OF[here] or pieces[1] in FEATURES.get(here, ())
        assert allowed, f"{here} must not import {name}"


@pytest.mark.xfail(strict=True, reason="circles that the rebuilding has yet to remove")
def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(("effnet", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in MODULES}
    graph = {
        name: {m for i in imported(path) for m in (i, i.rpartition(".")[0]) if m in names and m != name}
        for name, path in names.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


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
    script = (ROOT / "tests" / "support" / "plain_install.py").read_text()
    assert "b0 5288548" in run(blocked + script)
