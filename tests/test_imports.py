"""The architecture's import rules, read from the source, and what must work without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import effnet

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "effnet"

# Lower rooms first. A room imports those on the lines before its own, and of its own line only itself.
GROUND = ("version", "errors", "fields", "files", "machine", "process", "progress", "cluster", "console", "native")
KERNEL = (("arch",), ("models", "data"), ("weights",), ("runtime",), ("metrics", "plots"))
FEATURES = {  # each with the features that it may import
    "describing": (),
    "predicting": (),
    "converting": (),
    "scaling": (),
    "checking": (),
    "packing": (),
    "profiling": (),
    "reporting": (),
    "training": ("reporting",),
    "evaluating": ("reporting",),
    "exporting": (),
    "explaining": (),
    "benchmarking": ("exporting",),  # it measures the files that would be shipped
    "searching": ("training", "scaling"),
    "serving": (),
    "fitting": ("checking", "scaling", "searching", "training", "exporting", "reporting"),
}
LINES = (*((module,) for module in GROUND), *KERNEL, tuple(FEATURES), ("cli",), ("__main__",))
LINE_OF = {room: line for line, rooms in enumerate(LINES) for room in rooms}
WITHOUT_TORCH = (
    *GROUND,
    "arch",
    "scaling",
    "describing",
    "checking",
    "packing",
    "serving",
    "reporting",
    *(f"data/{name}" for name in ("image", "jpeg", "paths", "dataset", "duplicates", "shards")),
    *(f"data/{name}" for name in ("fingerprint", "fingerprint_cache")),
    *(f"weights/{name}" for name in ("arrays", "files", "hub", "keras", "layouts", "pickles", "registry")),
    "cli",
)
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "base"}

MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]
NAMES = {".".join(("effnet", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in MODULES}
LONGEST = 400  # lines of a module


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def types_defined(path: Path) -> Iterator[str]:
    """The classes of a module, and its aliases of types: names such as Precision that a module binds."""
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            yield from (name for name in names if re.match(r"[A-Z]\w*[a-z]", name))


def test_every_room_has_a_line() -> None:
    assert {room(path) for path in MODULES} <= set(LINE_OF)


def test_imports_point_down() -> None:
    wrong = []
    for path in MODULES:
        here = room(path)
        for name in imported(path):
            there = f"{name}.".split(".")[1] if name.startswith("effnet.") else ""
            if there and there != here:
                down = there in LINE_OF and LINE_OF[there] < LINE_OF[here]
                if not down and there not in FEATURES.get(here, ()):
                    wrong.append(f"{path.relative_to(SOURCE)} must not import {name}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        name: {m for i in imported(path) for m in (i, i.rpartition(".")[0]) if m in NAMES and m != name}
        for name, path in NAMES.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_no_torch_where_none_is_promised() -> None:
    for path in MODULES:
        if str(path.relative_to(SOURCE)).startswith(WITHOUT_TORCH):
            assert not {name for name in imported(path) if name.split(".")[0] in ("torch", "torchvision")}, path


def test_a_type_is_defined_once() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for name in set(types_defined(path)):
            places.setdefault(name, []).append(str(path.relative_to(SOURCE)))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_no_module_is_long_or_collects_everything() -> None:
    assert not [path for path in MODULES if path.stem in VAGUE]
    assert not [path for path in MODULES if len(path.read_text().splitlines()) > LONGEST]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_effnet_loads_nothing_slow() -> None:
    slow = "torch", "numpy", "PIL", "rich", "cyclopts"
    assert run(f"import sys, effnet; print([name for name in {slow} if name in sys.modules])") == "[]\n"


def test_predict_starts_without_what_it_does_not_need() -> None:
    # numpy is imported while the weights are read, Pillow while they are packed
    late = "numpy", "PIL", "ctypes"
    unneeded = (
        *("torch", "rich", "yaml", "xml", "zipfile", "shutil", "tempfile", "csv", "difflib"),
        *("importlib.metadata", "markdown_it", "effnet.data.dataset", "effnet.models", "openvino", "onnxruntime"),
        *("PIL.TiffImagePlugin", "PIL.JpegImagePlugin", "subprocess"),  # the photo is a PNG
    )
    program = f"""
import sys
import effnet.cli as cli
command, bound, _ = cli.build_app(["predict"]).parse_args(["predict", "photo.jpg"])
print([name for name in {late + unneeded} if name in sys.modules])
from effnet.arch.spec import InputSpec
from effnet.data.image import PHOTOS, load_pixels
from effnet.runtime import classifier, select
load_pixels(PHOTOS / "coffee.png", InputSpec(32, 32))
print([name for name in {unneeded} if name in sys.modules])
"""
    assert run(program) == "[]\n[]\n"


def test_public_names() -> None:
    assert all(getattr(effnet, name) is not None for name in effnet.__all__)
    assert "efficientnet_b7" in effnet.__all__
    with pytest.raises(AttributeError, match="Did you mean 'create'"):
        effnet.creat  # noqa: B018


def test_counts_and_prepares_without_torch() -> None:
    # None in sys.modules makes every import of torch fail, wherever it is tried
    blocked = "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
    script = (ROOT / "tests" / "support" / "plain_install.py").read_text()
    assert "b0 5288548" in run(blocked + script)
