"""effnet leaves the settings of a program that calls it unchanged: signals, environment, random numbers, files."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from effnet.process import any_start_method, unchanged

PROGRAM = Path(__file__).parent / "support" / "guest.py"
OPERATIONS = (
    *("save", "scale", "explain", "evaluate", "check", "pack", "profile", "bench", "convert"),
    *(f"predict with {engine}" for engine in ("native", "torch", "OpenVINO", "ONNX Runtime")),
    *(f"export for {engine}" for engine in ("OpenVINO", "ONNX Runtime", "torch")),
    *("export in int8", "train", "search", "fit", "serve"),
)
ALLOWED = {  # changes as the program prints them, and their reasons
    r"sys\.meta_path: new <absl\..*": "OpenVINO imports absl where it is installed, which watches for its own reload",
    r"sys\.path: new '.*/setuptools/_vendor'": "NNCF imports setuptools, which needs the folder of its own packages",
    r"torch's functions: compile: .*": "Lightning notes what a module was compiled with, and refuses it without a note",
    r"open files: new '.*\.ttf'": "matplotlib keeps the fonts that it drew with open",
    r"open files: new 'pipe:.*'": "libuv keeps the pipe through which its loops learn of signals",
}


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each operation changed in a process of its own."""
    root = tmp_path_factory.mktemp("guest")
    (root / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(root / "tmp"), "EFFNET_CACHE": str(root / "cache"), "MPLBACKEND": "agg"}
    environment.pop("KERAS_BACKEND", None)
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(root)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads((root / "changes.json").read_text())
    return found


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="open files are listed as Linux lists them")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_leaves_the_process_as_it_was(operation: str, changes: dict[str, list[str]]) -> None:
    assert changes.keys() == set(OPERATIONS)
    assert not [text for text in changes[operation] if not any(re.fullmatch(each, text) for each in ALLOWED)]


def test_what_is_set_inside_ends_with_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUEST_KEPT", "a")
    monkeypatch.setenv("GUEST_TAKEN", "b")
    before, hook = dict(os.environ), sys.excepthook
    with suppress(ArithmeticError), unchanged():
        os.environ |= {"GUEST_KEPT": "c", "GUEST_NEW": "d"}
        del os.environ["GUEST_TAKEN"]
        sys.excepthook = lambda *_: None
        raise ArithmeticError
    assert (dict(os.environ), sys.excepthook) == (before, hook)


def test_a_start_method_that_the_program_has_chosen_stays() -> None:
    context = multiprocessing.context._default_context  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "_actual_context", None)
        multiprocessing.set_start_method("spawn")
        with any_start_method():
            pass
        assert multiprocessing.get_start_method(allow_none=True) == "spawn"
