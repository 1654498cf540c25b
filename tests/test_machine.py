"""Detection of a computer's features from several kinds of descriptions, and the precision that follows."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from effnet.errors import ArgumentError, MissingExtraError, UnknownNameError
from effnet.machine import (
    Machine,
    cache_folder,
    check_device,
    choose_precision,
    forget_peak,
    peak_memory,
    read_processor,
    resident_memory,
    this_machine,
)

ZEN3 = """processor\t: 0
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx fma avx2 vaes

processor\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx fma avx2 vaes
"""
SAPPHIRE_RAPIDS = """processor\t: 0
model name\t: Intel(R) Xeon(R)   Processor @ 2.10GHz
flags\t\t: fpu avx avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
"""
ZEN4 = "model name : AMD EPYC 9R14\nflags : avx avx2 avx512f avx512_vnni avx512_bf16\n"
GRAVITON3 = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm asimdhp asimddp sve bf16 i8mm
CPU implementer\t: 0x41
"""
M2 = """machdep.cpu.brand_string: Apple M2
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
hw.optional.AdvSIMD: 1
"""


def machine(text: str) -> Machine:
    name, features = read_processor(text)
    return Machine(name, 2, 24 * 2**30, features)


@pytest.mark.parametrize(
    ("text", "words", "bf16", "int8"),
    [
        (ZEN3, "AMD EPYC, 2 cores, AVX2, no bf16", False, False),
        (SAPPHIRE_RAPIDS, "Intel(R) Xeon(R) Processor @ 2.10GHz, 2 cores, AVX-512, bf16 (AMX)", True, True),
        (ZEN4, "AMD EPYC 9R14, 2 cores, AVX-512, bf16 (AVX-512)", True, True),
        (GRAVITON3, ", 2 cores, SVE, bf16 (ARM)", True, True),
        (M2, "Apple M2, 2 cores, NEON, bf16 (ARM)", True, True),
        ("", ", 2 cores, no bf16", False, False),
        ("no colon here", ", 2 cores, no bf16", False, False),
    ],
    ids=["zen3", "sapphire-rapids", "zen4", "graviton3", "m2", "nothing", "nonsense"],
)
def test_processors(text: str, words: str, bf16: bool, int8: bool) -> None:
    described = machine(text)
    assert str(described) == words
    assert (described.bf16, described.int8) == (bf16, int8)


def test_features_are_those_that_matter() -> None:
    assert read_processor(ZEN3)[1] == ("avx2", "avx")
    assert set(read_processor(SAPPHIRE_RAPIDS)[1]) >= {"amx_bf16", "avx512_bf16", "amx_int8", "avx512_vnni"}
    assert "amx_tile" not in read_processor(SAPPHIRE_RAPIDS)[1]


def test_one_core_is_no_plural() -> None:
    assert str(Machine("x", 1, None, ())) == "x, 1 core, no bf16"


@pytest.mark.parametrize(
    ("text", "value", "reason"),
    [
        (ZEN3, "fp32", "no bf16 instructions"),
        (SAPPHIRE_RAPIDS, "bf16", "Xeon, AMX"),
        (ZEN4, "bf16", "EPYC Zen 5"),
        (GRAVITON3, "fp32", "not measured on ARM"),
        ("", "fp32", "no bf16 instructions"),
    ],
)
def test_the_processor_decides_the_precision(text: str, value: str, reason: str) -> None:
    chosen, why = choose_precision("cpu", machine(text))
    assert chosen == value
    assert reason in why


def test_bf16_is_fast_with_amx_or_on_amd() -> None:
    assert machine(ZEN4).fast_bf16
    assert machine(SAPPHIRE_RAPIDS).fast_bf16
    without_amx = Machine("Intel(R) Xeon(R)", 2, None, ("avx512f", "avx512_bf16"))
    assert without_amx.bf16
    assert not without_amx.fast_bf16
    assert choose_precision("cpu", without_amx)[0] == "fp32"
    assert choose_precision("cpu", without_amx, kernels=True)[0] == "bf16"


def test_the_kernels_keep_bf16_without_instructions_that_multiply_it() -> None:
    assert choose_precision("cpu", Machine("Intel(R) Xeon(R)", 2, None, ("avx512f",)), kernels=True)[0] == "bf16"
    assert choose_precision("cpu", machine(ZEN3), kernels=True)[0] == "fp32"


@pytest.mark.parametrize(
    ("capability", "value"), [((6, 1), "fp32"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_a_gpu_is_asked(capability: tuple[int, int], value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    chosen, reason = choose_precision("cuda:1")
    assert chosen == value
    assert "not measured here" in reason
    assert asked == [1]


def test_devices_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("mps")[0] == "fp32"
    with pytest.raises(UnknownNameError, match="cpu, cuda, mps"):
        choose_precision("tpu")
    with pytest.raises(UnknownNameError):
        choose_precision("cuda:first")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"effnet\[torch\]"):
        choose_precision("cuda")


@pytest.mark.parametrize("device", ["mps", "gpu", "0", "xpu", "tpu", "cpu:0", "cuda:9", "cuda:first", "", "CPU"])
def test_a_device_that_is_not_there_is_refused_with_what_is(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for there in ("cpu", "cuda", "cuda:1"):
        check_device(there)
    with pytest.raises(ArgumentError, match=rf"`device` \(='{device}'\) .*: cpu, cuda:0, cuda:1\."):
        check_device(device)
    with pytest.raises(ArgumentError, match=r": cpu\."):
        check_device("cuda", ("cpu",))


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("EFFNET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "effnet"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # and the system does not know the user
    assert cache_folder().parent == Path(tempfile.gettempdir())


def test_this_machine_is_asked_once_and_plain() -> None:
    here = this_machine()
    assert here is this_machine()
    assert here.processor
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.memory_bytes is None or here.memory_bytes > 2**28
    values = json.loads(json.dumps(here.to_dict()))
    assert set(values) == {"processor", "cores", "memory_bytes", "features", "bf16", "int8"}


def test_a_system_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effnet.machine._description", lambda: "")
    monkeypatch.delattr("os.sysconf")  # as on Windows
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    unknown = this_machine.__wrapped__()
    assert unknown.processor
    assert unknown.memory_bytes is None
    assert unknown.cores >= 1


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/box/job\n", {"box/memory.max": "3000000\n", "box/job/memory.max": "max\n", "memory.max": "9000000\n"}),
        ("0::/not/seen/inside\n", {"memory.max": "3000000\n"}),
        ("4:cpu:/x\n7:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "3000000\n"}),
    ],
)
def test_a_container_limits_the_memory(
    group: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "group").write_text(group)
    monkeypatch.setattr("effnet.machine.GROUP", tmp_path / "group")
    monkeypatch.setattr("effnet.machine.GROUPS", tmp_path)
    assert this_machine.__wrapped__().memory_bytes == 3_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may refuse such a limit")
@pytest.mark.parametrize("kind", ["AS", "DATA"])
def test_ulimit_limits_the_memory(kind: str) -> None:
    lines = f"import resource; resource.setrlimit(resource.RLIMIT_{kind}, (2**31, 2**31)); "
    lines += "from effnet.machine import this_machine; print(this_machine().memory_bytes)"
    assert int(subprocess.run([sys.executable, "-c", lines], capture_output=True, check=True).stdout) <= 2**31


def test_memory_of_this_process() -> None:
    """In a new process: one that has worked before may hold enough free memory for the block."""
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=measure_memory)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def measure_memory() -> None:
    before, block = resident_memory(), bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert 190e6 < resident_memory() - before < 300e6
    assert peak_memory() >= resident_memory() - 50e6
    del block
    if sys.platform == "linux":
        forget_peak()
        assert peak_memory() < before + 100e6


def test_a_childs_memory_is_its_own() -> None:
    """Linux tells of a child that it held what its parent held when it forked."""
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    code = "from effnet.machine import peak_memory; print(peak_memory())"
    held = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1e6 < held < 200e6
