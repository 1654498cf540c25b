"""The wheel: built here, installed and used in a fresh environment that has no compiler and no torch."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from native_build import load_build
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "src" / "effnet" / "data" / "photos"
NOWHERE = {"PATH": "/nowhere", "PYTHONPATH": "", "CXX": ""}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# Opens the library as effnet does; what effnet_build() says.
OPEN = """
import ctypes, importlib.resources
(path,) = [path for path in importlib.resources.files("effnet").iterdir() if path.name.startswith("_kernels.")]
library = ctypes.CDLL(str(path))
library.effnet_build.restype = ctypes.c_char_p
print(library.effnet_build().decode())
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


AUTO = {"EFFNET_BUILD": "auto"}  # CI says that a missing compiler is an error


def run(*words: str | Path, **environment: str) -> str:
    """What a program prints, which must end well."""
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def make_wheel(source: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of a source tree or an sdist, by this environment's hatchling; and what building it said."""
    words = ("wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source)
    said = run(*PIP, *words, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


def needed(names: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """The installed packages behind requirements, and those that they need."""
    for text in names:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = importlib.metadata.distribution(requirement.name)
            yield found
            yield from needed(found.requires or [])


def make_environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment with a wheel, and with the dependencies that it names as links to ours; its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for package in needed(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]):
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(package.locate_file(top))
    run(*PIP, "--python", folder, "install", "--no-index", wheel)  # refuses where a dependency is missing
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    (path,) = folder.glob("*.tar.gz")
    return path


def test_a_wheel_with_kernels(tmp_path: Path) -> None:
    wheel, _ = make_wheel(ROOT, tmp_path / "wheel", EFFNET_BUILD="required")
    _, _, tag, abi, platform = wheel.stem.split("-")
    assert (tag, abi) == ("py3", "none")
    assert platform != "any"
    with zipfile.ZipFile(wheel) as members:
        (library,) = [member for member in members.infolist() if member.filename.startswith("effnet/_kernels.")]
        assert not [name for name in members.namelist() if name.endswith((".cpp", ".h", ".o"))]
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, of which the kernels {library.compress_size:,}")
    python = make_environment(tmp_path / "venv", wheel)
    assert run(python, "-c", OPEN, **NOWHERE).strip() == load_build().hash_sources()
    assert run(python, "-c", "import effnet; print(effnet.__file__)", **NOWHERE).startswith(str(tmp_path))
    shown = run(python.with_name("effnet"), "predict", PHOTOS, "--topk", "1", **NOWHERE)
    assert "tiger cat" in shown
    assert "espresso" in shown
    assert "native" in shown


@pytest.mark.parametrize(
    ("environment", "said"), [({"EFFNET_BUILD": "0"}, "EFFNET_BUILD=0"), (NOWHERE | AUTO, "no C++ compiler was found")]
)
def test_a_wheel_without_compiler(tmp_path: Path, sdist: Path, environment: dict[str, str], said: str) -> None:
    wheel, output = make_wheel(sdist, tmp_path / "wheel", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said in output
    with zipfile.ZipFile(wheel) as members:
        assert not [name for name in members.namelist() if "_kernels" in name]
    python = make_environment(tmp_path / "venv", wheel)
    assert "5,288,548" in run(python.with_name("effnet"), "info", "b0", **NOWHERE)


def test_the_sdist_has_what_a_wheel_is_built_from(sdist: Path) -> None:
    with tarfile.open(sdist) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    assert names >= {path.relative_to(ROOT).as_posix() for path in (ROOT / "native").glob("*.*")} | {"hatch_build.py"}
    assert not [name for name in names if "_kernels." in name or name.startswith("build/")]
