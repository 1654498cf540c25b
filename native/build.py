"""Compiles native/ into one shared library, src/effnet/_kernels.so (.dylib, .dll), which effnet opens with ctypes.

    python native/build.py                                            write src/effnet/_kernels.so
    python native/build.py --if-possible                              the same, as run by installation and `make`
    python native/build.py --sanitize address,undefined --out FOLDER  a library with sanitizers, for tests

It needs g++ or clang++ with C++17; CXX names another compiler, including any arguments, such as
CXX="python -m ziglang c++ -march=x86_64" (without -march, ziglang compiles for this machine's processor and newer).
On Windows it uses clang++, since cl lacks the vector extensions that the kernels need; this was never tried.
EFFNET_BUILD sets what --if-possible does: nothing (0), fail if compiling fails (required), or go on without (auto).
EFFNET_ISAS=host compiles only the portable kernels and those for this processor's best instruction set, which takes
less time; the default is all, so that the library also runs on other machines.

A file kernels_ISA.cpp is compiled for its instruction set, all others for any processor; -DEFFNET_HAS_ISA=0 or 1 tells
them which instruction sets the library has. Objects are cached in build/native under a hash of everything that they
depend on, so nothing is compiled twice. Only Python's standard library is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

NATIVE = Path(__file__).resolve().parent
ROOT = NATIVE.parent
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY = ROOT / "src" / "effnet" / f"_kernels{SUFFIX}"
OBJECTS = ROOT / "build" / "native"

# Each instruction set with its compiler flags; an instruction set follows those that it contains.
AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
X86_ISAS = {
    "avx2": "-mavx2 -mfma",
    "avx512": AVX512,
    "avx512bf16": f"{AVX512} -mavx512bf16",
}
NEEDS = {"avx512bf16": {"avx512"}}  # it uses their fp32 kernels
COMMON = "-std=c++17 -fno-math-errno -ffp-contract=fast -fvisibility=hidden"
RELEASE = "-O2 -fno-rtti"
# g++ 12 warns about its own AVX-512 headers
SANITIZED = "-Wall -Wextra -Wno-maybe-uninitialized -O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
# Dropped if the linker does not know them. They link the C++ library statically, hide its symbols and shrink the file.
HIDE = ["-Wl,--exclude-libs,ALL", f"-Wl,--version-script={NATIVE / 'exports.map'}"]
LINK_EXTRAS = {"linux": ["-static-libgcc", "-static-libstdc++", *HIDE, "-Wl,-s"]}


class BuildError(Exception):
    """The library could not be compiled; the message is one line, printed after the compiler's output."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler, as the words of its command."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)

    def run(self, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run the compiler with these arguments and capture its output."""
        words = [*self.words, *map(str, arguments)]
        try:
            return subprocess.run(words, input=stdin, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise BuildError(f"{self} could not be started: {error.strerror}") from error

    @cached_property
    def macros(self) -> str:
        """Its predefined macros, which give its version and target processor."""
        done = self.preprocess(*platform_flags())
        if done.returncode:
            raise BuildError(f"{self} is not a compiler like g++ or clang++: {first_error(done)}")
        return done.stdout

    def preprocess(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """Preprocess an empty file with these flags; the exit code says whether the compiler knows them."""
        return self.run(*flags, "-dM", "-E", "-x", "c++", "-")


def find_compiler() -> Compiler:
    """The compiler that CXX names, else the first of g++, clang++ and c++ that is installed.

    Raises:
        BuildError: there is none.
    """
    if named := os.environ.get("CXX", "").strip():
        words = tuple(shlex.split(named, posix=sys.platform != "win32"))
        if not shutil.which(words[0]):
            raise BuildError(f"the C++ compiler that CXX names was not found: {named}")
        return Compiler(words)
    # g++ on Windows makes libraries that need its runtime libraries
    known = ("clang++",) if sys.platform == "win32" else ("g++", "clang++", "c++")
    for name in known:
        if shutil.which(name):
            return Compiler((name,))
    raise BuildError(f"no C++ compiler was found ({', '.join(known)}; CXX names another)")


def compile_library(
    out: Path = LIBRARY,
    sanitize: str = "",
    isas: Collection[str] = tuple(X86_ISAS),
    native: Path = NATIVE,
    objects: Path = OBJECTS,
) -> Path:
    """Compile the folder `native` into the library `out`, which appears whole or not at all.

    Args:
        out: the file to write.
        sanitize: sanitizers by the compiler's names, such as "address,undefined".
        isas: instruction sets beyond the baseline; those that the compiler does not know are skipped.
        native: the folder of sources.
        objects: the folder where object files are cached.

    Raises:
        BuildError: no compiler was found, or it failed.
    """
    compiler = find_compiler()
    sources = sorted(native.glob("*.cpp"))
    flags = [*COMMON.split(), *(SANITIZED if sanitize else RELEASE).split(), *platform_flags()]
    flags += [f"-fsanitize={sanitize}"] * bool(sanitize)
    isas = usable_isas(compiler, native) & set(isas)
    if wish("EFFNET_ISAS", "all", ("all", "host")) == "host":
        isas = best_isas(compiler, isas)
    has = [f"-DEFFNET_X86={int(bool(isas))}"]
    has += [f"-DEFFNET_HAS_{isa.upper()}={int(isa in isas)}" for isa in X86_ISAS]

    jobs = []
    for source in sources:
        isa = source.stem.partition("_")[2]  # of kernels_ISA and training_ISA
        if isa in X86_ISAS and isa not in isas:
            continue
        if isa not in ("", "portable", *X86_ISAS):
            raise BuildError(f"{source.name}: build.py knows no flags for {isa}; it knows {', '.join(X86_ISAS)}")
        own = X86_ISAS[isa].split() if isa in X86_ISAS else has
        if b"EFFNET_BUILD" in source.read_bytes():  # only this file is recompiled whenever any source changes
            own = [*own, f'-DEFFNET_BUILD="{hash_sources(native)}"']
        key = hashlib.sha256(repr((with_headers(source), flags, own, compiler.macros)).encode()).hexdigest()
        # The linker keeps the first copy of an inline function, which must be one that any processor can run.
        jobs.append(([*X86_ISAS].index(isa) if isa in X86_ISAS else -1, source, flags + own, objects / f"{key}.o"))
    jobs.sort(key=lambda job: job[:2])

    objects.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        # the widest instruction sets take longest, so they start first
        for done in [pool.submit(compile_file, compiler, *job[1:]) for job in reversed(jobs)]:
            done.result()
    link(compiler, [job[3] for job in jobs], out, sanitize)
    return out


def usable_isas(compiler: Compiler, native: Path) -> set[str]:
    """The instruction sets beyond the baseline that have a source file and that the compiler knows."""
    if "__x86_64__" not in compiler.macros:
        return set()
    return {
        isa
        for isa, flags in X86_ISAS.items()
        if (native / f"kernels_{isa}.cpp").exists() and compiler.preprocess(*flags.split()).returncode == 0
    }


def best_isas(compiler: Compiler, isas: Collection[str]) -> set[str]:
    """The best of the instruction sets on this processor, as the compiler detects it, with those that it needs."""
    host = compiler.preprocess("-march=native").stdout
    wanted = {isa: [flag[2:] for flag in flags.split() if "=" not in flag] for isa, flags in X86_ISAS.items()}
    found = [isa for isa in wanted if isa in isas and all(f"__{word.upper()}__ " in host for word in wanted[isa])]
    return set(found[-1:]).union(*(NEEDS.get(isa, ()) for isa in found[-1:]))


def with_headers(source: Path) -> bytes:
    """The contents of a source file and of our headers that it includes, directly or not."""
    contents: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in contents and path.exists():
            contents[path] = path.read_bytes()
            names = re.findall(r'^\s*#\s*include\s*"([^"]+)"', contents[path].decode(), re.MULTILINE)
            waiting += [path.parent / name for name in names]
    return b"".join(contents.values())


def platform_flags() -> list[str]:
    """Compiler flags for this operating system."""
    if sys.platform == "win32":
        return []
    archs = os.environ.get("ARCHFLAGS", "").split() if sys.platform == "darwin" else []
    if archs.count("-arch") > 1:
        raise BuildError(f"ARCHFLAGS (={os.environ['ARCHFLAGS']}) names several processors; a library is for one")
    return ["-fPIC", "-pthread", *archs]


def compile_file(compiler: Compiler, source: Path, flags: list[str], out: Path) -> None:
    """Compile one source file to an object, unless the object exists."""
    if out.exists():
        return
    new = out.with_suffix(f".{os.getpid()}.o")
    done = compiler.run(*flags, "-c", source, "-o", new)
    sys.stderr.write(done.stderr)  # including warnings
    if done.returncode:
        raise BuildError(f"{compiler} could not compile {source.name}: {first_error(done)}")
    new.replace(out)


def link(compiler: Compiler, objects: list[Path], out: Path, sanitize: str) -> None:
    """Link objects to the library, with LINK_EXTRAS if the linker knows them."""
    extras = [] if sanitize else LINK_EXTRAS.get(sys.platform, [])
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f"{out.name}.{os.getpid()}")
    needed = [*platform_flags(), *[f"-fsanitize={sanitize}"] * bool(sanitize), "-shared", "-o", str(new)]
    needed += ["-Wl,-z,defs"] * (sys.platform == "linux" and not sanitize)  # fail on undefined functions
    needed += map(str, objects)
    done = compiler.run(*needed, *extras)
    if done.returncode and extras:
        done = compiler.run(*needed)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise BuildError(f"{compiler} could not link {out.name}: {first_error(done)}")
    new.replace(out)


def first_error(done: subprocess.CompletedProcess[str]) -> str:
    """The first error in the output of a compiler or linker."""
    lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    return next((line for line in lines if re.search("error: |undefined ", line)), lines[0]).strip()


def hash_sources(native: Path = NATIVE) -> str:
    """The hash that effnet_build() returns in a library compiled from these sources."""
    digest = hashlib.sha256()
    for path in sorted([*native.glob("*.cpp"), *native.glob("*.h")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def wish(variable: str, default: str, allowed: Sequence[str]) -> str:
    """The value of an environment variable, or the default if it is not set.

    Raises:
        BuildError: the value is not allowed.
    """
    value = os.environ.get(variable) or default
    if value not in allowed:
        raise BuildError(f"{variable} (={value}) must be {', '.join(allowed[:-1])} or {allowed[-1]}")
    return value


def compile_if_possible() -> Path | None:
    """Compile the library as EFFNET_BUILD says; without a library, print one line that says why and return None.

    If compiling fails, an existing library is kept if it was compiled from the same sources, and removed otherwise.

    Raises:
        BuildError: compiling failed and EFFNET_BUILD=required, or the value of EFFNET_BUILD is not allowed.
    """
    build = wish("EFFNET_BUILD", "auto", ("0", "auto", "required"))
    if build == "0":
        print("effnet is without its own engine here, because EFFNET_BUILD=0.", file=sys.stderr)
        return None
    try:
        return compile_library()
    except (BuildError, OSError) as error:
        if build == "required":
            raise
        if LIBRARY.exists() and hash_sources().encode() in LIBRARY.read_bytes():
            return LIBRARY
        LIBRARY.unlink(missing_ok=True)
        print(f"effnet is without its own engine here, because {error}.", file=sys.stderr)
        return None


def main() -> int:
    """Run the command line and return its exit code."""
    summary, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--if-possible", action="store_true", help="follow EFFNET_BUILD if compiling fails")
    parser.add_argument("--sanitize", default="", metavar="NAMES", help="such as address,undefined")
    parser.add_argument("--out", type=Path, default=LIBRARY.parent, metavar="FOLDER", help="folder for the library")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        if options.if_possible:
            library = compile_if_possible()
        else:
            library = compile_library(options.out / LIBRARY.name, options.sanitize)
    except (BuildError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if library:
        seconds = time.perf_counter() - started
        print(f"{library}: {library.stat().st_size / 1000:,.0f} kB in {seconds:.1f} s, sources {hash_sources()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
