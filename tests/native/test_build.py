"""native/build.py: which files are compiled with which flags, what is cached, and the message if compiling fails."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import sanitized
from native_build import load_build

from effnet.machine import this_machine

HEADER = """
#define EXPORT extern "C" __attribute__((visibility("default")))
#ifdef __AVX2__
#define WIDE 1
#else
#define WIDE 0
#endif
// inline, and yet a function of its own: the linker keeps one of its copies for all files
inline __attribute__((noinline)) int wide() { return WIDE; }
"""
HAS = "EXPORT int has() { return EFFNET_HAS_AVX2 + 10 * EFFNET_HAS_AVX512 + 100 * EFFNET_HAS_AVX512BF16; }\n"
SOURCES = {
    "names.h": HEADER,
    "version.cpp": '#include "names.h"\nEXPORT const char* effnet_build() { return EFFNET_BUILD; }\n',
    "zoo.cpp": f'#include "names.h"\nEXPORT int zoo() {{ return wide(); }}\n{HAS}',
    "kernels_portable.cpp": '#include "names.h"\nEXPORT int portable() { return WIDE; }\n',
    "kernels_avx2.cpp": '#include "names.h"\nEXPORT int avx2() { return WIDE + 10 * wide(); }\n',
}


@pytest.fixture
def build() -> ModuleType:
    return load_build()


@pytest.fixture
def compiled(build: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """Compile SOURCES as changed; the library."""

    def compile_sources(sanitize: str = "", isas: tuple[str, ...] = tuple(build.X86_ISAS), **changed: str) -> Path:
        (tmp_path / "native").mkdir(exist_ok=True)
        for name, text in (SOURCES | changed).items():
            (tmp_path / "native" / name).write_text(text)
        out = tmp_path / "out" / f"{len(list(tmp_path.glob('out/*')))}.so"
        built: Path = build.compile_library(
            out, sanitize, isas, native=tmp_path / "native", objects=tmp_path / "objects"
        )
        assert list(out.parent.glob(f"{out.name}*")) == [out]
        return built

    return compile_sources


def is_x86(build: ModuleType) -> bool:
    return "__x86_64__" in build.find_compiler().macros


def test_a_file_has_the_instructions_of_its_name(build: ModuleType, compiled: Callable[..., Path]) -> None:
    library = ctypes.CDLL(str(compiled()))
    assert library.portable() == 0
    if is_x86(build):
        assert library.avx2() % 10 == 1
        assert library.has() == 1  # the files of the other two are not there
    else:
        assert not hasattr(library, "avx2")
        assert library.has() == 0


def test_shared_functions_run_on_any_processor(compiled: Callable[..., Path]) -> None:
    assert ctypes.CDLL(str(compiled())).zoo() == 0  # its name comes last, its object is linked before avx2's


def test_instruction_sets_unknown_to_the_compiler_are_left_out(
    build: ModuleType, compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.X86_ISAS, "avx2", "-mavx2 -mno-such-instructions")
    library = ctypes.CDLL(str(compiled()))
    assert library.has() == 0
    assert not hasattr(library, "avx2")


def test_fewer_instruction_sets_may_be_asked_for(compiled: Callable[..., Path]) -> None:
    assert not hasattr(ctypes.CDLL(str(compiled(isas=("avx512",)))), "avx2")


def test_only_the_best_instruction_set_of_this_processor_may_be_asked_for(
    build: ModuleType, compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {f"kernels_{isa}.cpp": f"EXPORT int {isa}() {{ return 1; }}\n" for isa in ("avx512", "avx512bf16")}
    files = {name: f'#include "names.h"\n{text}' for name, text in new.items()}
    monkeypatch.setenv("EFFNET_ISAS", "host")
    library = ctypes.CDLL(str(compiled(**files)))
    features = {"avx2": ["avx2"], "avx512f": ["avx512"], "avx512_bf16": ["avx512", "avx512bf16"]}
    best = [isas for feature, isas in features.items() if feature in this_machine().features][-1:]
    assert [[isa for isa in build.X86_ISAS if hasattr(library, isa)]] == (best or [[]])
    monkeypatch.setenv("EFFNET_ISAS", "none")
    with pytest.raises(build.BuildError, match=r"EFFNET_ISAS \(=none\) must be all or host"):
        compiled()


def test_a_file_of_an_unknown_instruction_set_is_refused(build: ModuleType, compiled: Callable[..., Path]) -> None:
    with pytest.raises(build.BuildError, match=r"kernels_avx3\.cpp.*avx512bf16"):
        compiled(**{"kernels_avx3.cpp": ""})


def test_nothing_is_compiled_twice(compiled: Callable[..., Path], tmp_path: Path) -> None:
    def objects() -> set[Path]:
        return set((tmp_path / "objects").iterdir())

    first = compiled()
    before = objects()
    second = compiled()
    assert objects() == before
    assert first.read_bytes() == second.read_bytes()
    compiled(**{"zoo.cpp": SOURCES["zoo.cpp"] + "int more;\n"})
    assert len(objects() - before) == 2  # zoo itself, and version, which has the hash of all
    zoo = {
        "zoo.cpp": '#include "deeper.h"\n' + SOURCES["zoo.cpp"],
        "deeper.h": '#include "deepest.h"\n',
        "deepest.h": "",
    }
    compiled(**zoo)
    before = objects()
    compiled(**zoo | {"deepest.h": "int deep;\n"})
    assert len(objects() - before) == 2  # the other files do not include it
    before = objects()
    compiled(**{"names.h": HEADER + "// another\n"})
    assert len(objects() - before) == len([name for name in SOURCES if name.endswith(".cpp")])


def test_the_library_names_its_sources(build: ModuleType, compiled: Callable[..., Path], tmp_path: Path) -> None:
    told = []
    for text in ("int a;\n", "int b;\n"):
        library = ctypes.CDLL(str(compiled(**{"more.cpp": text})))
        library.effnet_build.restype = ctypes.c_char_p
        assert library.effnet_build().decode() == build.hash_sources(tmp_path / "native")
        told.append(library.effnet_build())
    assert told[0] != told[1]


def test_only_what_is_exported_is_seen(compiled: Callable[..., Path]) -> None:
    more = """#include <stdexcept>
#include <thread>
#include <vector>
EXPORT int cores() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; i++) threads.emplace_back([i] { if (i > 2) throw std::invalid_argument(std::to_string(i)); });
  for (auto& thread : threads) thread.join();
  return 1;
}
"""
    names = subprocess.run(
        ["nm", "-D", "--defined-only", compiled(**{"zoo.cpp": SOURCES["zoo.cpp"] + more})],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[2::3]
    assert set(names) - {"avx2"} == {"effnet_build", "zoo", "has", "portable", "cores"}


def test_errors_name_the_file(build: ModuleType, compiled: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match=r"could not compile zoo\.cpp: .*zoo\.cpp:1.*'nonsense'|‘nonsense’"):
        compiled(**{"zoo.cpp": "int a = nonsense;\n"})
    assert not (tmp_path / "out").exists()
    with pytest.raises(build.BuildError, match=r"could not link 0\.so: .*nowhere"):
        compiled(**{"zoo.cpp": '#include "names.h"\nint nowhere();\nEXPORT int zoo() { return nowhere(); }\n'})
    assert not list((tmp_path / "out").iterdir())


def test_the_compiler(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    named = build.find_compiler()
    monkeypatch.setenv("CXX", f"{named} -DWORD='two words'")
    assert build.find_compiler().words == (*named.words, "-DWORD=two words")
    assert "#define WORD two words" in build.find_compiler().macros
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX names was not found: no-such-compiler"):
        build.find_compiler()
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(build.BuildError, match="is not a compiler like g"):
        assert build.find_compiler().macros
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler was found"):
        build.find_compiler()


@pytest.mark.parametrize("current", [True, False])
def test_where_compiling_fails(
    build: ModuleType,
    current: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = tmp_path / "_kernels.so"
    library.write_bytes(b"a library of " + (build.hash_sources().encode() if current else b"older sources"))
    monkeypatch.setattr(build, "LIBRARY", library)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("EFFNET_BUILD", "required")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.compile_if_possible()
    monkeypatch.setenv("EFFNET_BUILD", "maybe")
    with pytest.raises(build.BuildError, match=r"EFFNET_BUILD \(=maybe\) must be 0, auto or required"):
        build.compile_if_possible()
    monkeypatch.delenv("EFFNET_BUILD")
    assert build.compile_if_possible() == (library if current else None)
    assert library.exists() == current
    said = capsys.readouterr().err
    assert said == "" if current else said.count("\n") == 1
    assert ("without its own engine" in said) != current


def test_nothing_is_compiled_where_that_is_asked(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "compile_library", lambda: pytest.fail("compiled"))
    monkeypatch.setenv("EFFNET_BUILD", "0")
    assert build.compile_if_possible() is None
    assert "EFFNET_BUILD=0" in capsys.readouterr().err


OUTSIDE = """#include "names.h"
EXPORT int zoo(int n) { int* volatile a = new int[4](); int last = a[n]; delete[] a; return last; }
EXPORT int undefined(int n) { return 2147483647 + n; }
"""


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
@pytest.mark.parametrize(
    ("call", "found"),
    [("zoo(3) == 0", ""), ("zoo(4)", "heap-buffer-overflow"), ("undefined(1)", "signed integer overflow")],
)
def test_sanitizers_find(build: ModuleType, compiled: Callable[..., Path], call: str, found: str) -> None:
    library = compiled("address,undefined", **{"zoo.cpp": OUTSIDE})
    code = f"import ctypes\nassert ctypes.CDLL({str(library)!r}).{call}"
    words, seen = [sys.executable, "-S", "-c", code], sanitized.environment(build) | {"PATH": os.environ["PATH"]}
    done = subprocess.run(words, env=seen, capture_output=True, text=True, check=False)
    assert (done.returncode != 0, found in done.stderr) == (bool(found), True), done.stderr
