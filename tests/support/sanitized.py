"""Tests of the compiled kernels with sanitizers, run by `make check`.

    python tests/support/sanitized.py [WORD ...]    more words for pytest, such as -x

AddressSanitizer stops at the first access outside an array or a piece of a network's memory,
UndefinedBehaviorSanitizer at the first overflow, shift or pointer that C++ does not define, both on every instruction
set. ThreadSanitizer tells of data that two threads touch at once; one instruction set shows that of all.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from native_build import load_build

ROOT = Path(__file__).parents[2]
INFERENCE = ("tests/test_native.py", "tests/runtime/test_native.py")
TRAINING = ("tests/models/test_native.py",)


@dataclass(frozen=True)
class Check:
    """A library with sanitizers, and the tests that run with it."""

    sanitizers: str
    runtime: str  # the library that must be there before memory is taken
    files: tuple[str, ...]
    tests: str  # pytest's -k
    one_isa: bool = False


CHECKS = (
    Check("address,undefined", "libasan.so", (*INFERENCE, *TRAINING), "not variant"),
    # It cannot follow a process of several threads that forks, nor threads of an OpenMP that was compiled without it.
    Check("thread", "libtsan.so", INFERENCE, "answers or threads or at_once", one_isa=True),
)


def environment(build: ModuleType, runtime: str = "libasan.so") -> dict[str, str]:
    """The environment of a Python process that may open a library with sanitizers."""
    compiler = build.find_compiler()
    # AddressSanitizer looks for exceptions in the second.
    names = [compiler.run(f"-print-file-name={name}").stdout.strip() for name in (runtime, "libstdc++.so")]
    if not all(Path(name).is_absolute() for name in names):
        raise build.BuildError(f"{compiler} has no {' or '.join(names)}; these tests are for g++ on Linux")
    wishes = {
        "LD_PRELOAD": " ".join(names),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return {**os.environ, **wishes}


def run(check: Check, words: list[str]) -> int:
    """Compile the library and test it; returns the exit code."""
    build = load_build()
    library = ROOT / "build" / "sanitized" / check.sanitizers / build.LIBRARY.name
    try:
        build.compile_library(library, check.sanitizers, () if check.one_isa else tuple(build.X86_ISAS))
        seen = environment(build, check.runtime) | {"EFFNET_KERNELS": str(library)}
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    # --capture=sys: what a sanitizer writes while it ends the process is seen
    tests = ("-q", "-n0", "--capture=sys", "-p", "no:cacheprovider", "-m", "not slow", "-k", check.tests, *check.files)
    print(f"With sanitizers: {check.sanitizers}", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", *tests, *words], cwd=ROOT, env=seen, check=False).returncode


def main(words: list[str]) -> int:
    """Run the checks until one fails; returns the exit code."""
    if sys.platform != "linux":
        print("Tests with sanitizers need Linux; they are left out.")
        return 0
    return next((code for check in CHECKS if (code := run(check, words))), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
