"""Tests of the compiled kernels with a library that checks itself: run by `make check`.

    python tests/support/sanitized.py [TEST ...]    pytest's words; the default is every test of the library

AddressSanitizer stops at the first access outside an array, UndefinedBehaviorSanitizer at the first overflow, shift or
pointer that C++ does not define.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from native_build import load_build

ROOT = Path(__file__).parents[2]
SANITIZERS = "address,undefined"
TESTS = ("tests/test_native.py", "tests/runtime/test_native.py")


def environment(build: ModuleType) -> dict[str, str]:
    """The environment of a Python process that may open a library with sanitizers."""
    compiler = build.find_compiler()
    # The first watches memory, so it must be there before any is taken; it looks for exceptions in the second.
    names = [compiler.run(f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libstdc++.so")]
    if not all(Path(name).is_absolute() for name in names):
        raise build.BuildError(f"{compiler} has no {' or '.join(names)}; these tests are for g++ on Linux")
    wishes = {
        "LD_PRELOAD": " ".join(names),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return {**os.environ, **wishes}


def main(words: list[str]) -> int:
    """Compile the library, test it; the exit code."""
    if sys.platform != "linux":
        print("Tests with sanitizers need Linux; they are left out.")
        return 0
    build = load_build()
    try:
        library = build.compile_library(ROOT / "build" / "sanitized" / build.LIBRARY.name, SANITIZERS)
        seen = environment(build) | {"EFFNET_KERNELS": str(library)}
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    # --capture=sys: what a sanitizer writes while it ends the process is seen
    tests = [sys.executable, "-m", "pytest", "-q", "-n0", "--capture=sys", "-p", "no:cacheprovider", *(words or TESTS)]
    return subprocess.run(tests, cwd=ROOT, env=seen, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
