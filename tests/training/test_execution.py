"""The rules for how a run is computed: they time nothing, and the user's options win."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from effnet import machine
from effnet.arch.memory import gpu_memory, training_memory
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import spec
from effnet.errors import ArgumentError
from effnet.training import execution
from effnet.training.execution import (
    LIBRARIES,
    MMAP_MAX,
    TRIM_THRESHOLD,
    Execution,
    Images,
    check_main_guard,
    choose_execution,
    choose_workers,
    keep_freed_memory,
)
from effnet.training.recipe import Recipe
from effnet.training.settings import Settings

RECIPE, ANY = Recipe(batch=32), Settings()
SHALLOW = spec("b0", depth=0.1)
SMALL, PHOTOS, HUGE = Images(60_000, 28), Images(60_000, 500), Images(60_000, 3000)


@pytest.fixture(autouse=True)
def from_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks are so small that the memory of the libraries would hide theirs."""
    monkeypatch.setattr("effnet.training.execution.workers_are_safe", lambda: True)
    monkeypatch.setattr("effnet.training.execution.LIBRARIES", 0)


def computer(monkeypatch: pytest.MonkeyPatch, cores: int = 2, memory: int = 8 * 10**9, *features: str) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: machine.Machine("a processor", cores, memory, features))


@pytest.mark.parametrize(
    ("cores", "images", "resolution", "settings", "workers"),
    [
        (2, SMALL, 32, {}, 0),
        (2, PHOTOS, 224, {}, 0),
        (2, HUGE, 224, {}, 0),  # all threads load
        (1, HUGE, 224, {}, 0),
        (16, HUGE, 224, {}, 0),
        (16, HUGE, 224, {"threads": 2}, 2),  # here cores are left
        (16, PHOTOS, 224, {"device": "cuda"}, 15),  # a GPU waits for nothing but images
        (64, PHOTOS, 224, {"device": "cuda"}, 24),
        (2, Images(3, 3000), 224, {}, 0),  # over before a worker has started
    ],
)
def test_workers(cores: int, images: Images, resolution: int, settings: dict[str, Any], workers: int) -> None:
    network = spec("b0", resolution=resolution)
    assert choose_workers(network, RECIPE, Settings(**settings), images, cores=cores, kernels=False) == workers


@pytest.mark.parametrize(("memory", "workers"), [(10**9, 1), (4 * 10**9, 2), (64 * 10**9, 15)])
def test_workers_fit_in_memory(monkeypatch: pytest.MonkeyPatch, memory: int, workers: int) -> None:
    computer(monkeypatch, cores=16, memory=memory)
    monkeypatch.setattr("effnet.training.execution.choose_workers", lambda *_, **__: 15)
    assert choose(Settings(workers=2)).workers == 2
    assert choose().workers == workers
    most = memory // (4 * 10**8)
    rule = rf"^`workers` \(={most + 1}\) must be at most {most} on this machine: each process takes about 0.4 GB"
    with pytest.raises(ArgumentError, match=rule):
        choose(Settings(workers=most + 1))
    choose(Settings(workers=most))


def test_a_script_gets_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effnet.training.execution.workers_are_safe", lambda: False)
    assert choose_workers(spec("b0"), RECIPE, Settings(), HUGE, cores=2, kernels=True) == 0


def choose(settings: Settings = ANY, network: NetworkSpec = SHALLOW, **options: Any) -> Execution:
    return choose_execution(network, RECIPE, settings, options.pop("images", PHOTOS), **{"world": 1, **options})


@pytest.mark.parametrize(
    ("settings", "world", "workers", "threads"),
    [
        (Settings(), 1, 0, 4),
        (Settings(workers=1), 1, 1, 3),
        (Settings(workers=9), 1, 9, 1),
        (Settings(threads=2), 1, 1, 2),  # a core would have nothing to do
        (Settings(), 2, 0, 2),
    ],
)
def test_threads_are_the_cores_without_a_worker(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, world: int, workers: int, threads: int
) -> None:
    computer(monkeypatch, 4)
    execution = choose(settings, spec("b0", resolution=64), images=SMALL, world=world)
    assert (execution.workers, execution.threads, execution.part) == (workers, threads, 32 // world)


@pytest.mark.parametrize(
    ("features", "resolution", "kernels", "precision"),
    [
        ((), 224, "1", "fp32"),
        (("amx_bf16",), 64, "0", "bf16"),
        (("avx512_bf16",), 224, "0", "bf16"),
        (("avx512_bf16",), 64, "0", "fp32"),
        (("avx512f",), 64, "1", "bf16"),  # maps of half the size are faster without instructions for bf16
    ],
)
def test_precision_is_the_machines_and_that_of_what_computes(
    monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], resolution: int, kernels: str, precision: str
) -> None:
    computer(monkeypatch, 2, 8 * 10**9, *features)
    monkeypatch.setenv("EFFNET_NATIVE", kernels)
    assert choose(network=spec("b0", resolution=resolution)).precision == precision
    assert choose(Settings(precision="fp32")).precision == "fp32"


def test_what_does_not_fit_goes_in_parts_and_only_a_limit_brings_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = training_memory(SHALLOW, 32, optimizer="adamw", ema=True).peak
    computer(monkeypatch, memory=2 * whole)
    fits = choose()
    assert (fits.part, fits.parts, fits.plan, fits.forecast_bytes) == (32, 1, None, whole)
    computer(monkeypatch, memory=whole)  # of which a part is usable
    parts = choose()
    assert (parts.part, parts.parts, parts.plan) == (16, 2, None)
    limited = choose(Settings(train_memory=9 * whole // 10))
    assert limited.part == 32
    assert limited.plan is not None
    assert limited.forecast_bytes <= 9 * whole // 10
    assert choose(like=limited).recompute == limited.recompute
    with pytest.raises(ArgumentError, match="train_memory"):
        choose(Settings(train_memory="1MB"))
    with pytest.raises(ArgumentError, match="multiple of 3"):
        choose(world=3)


def test_a_small_container_has_room_for_the_libraries_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a control group of 700 MiB a training of nearly nothing took 551 MiB, and one of B0 was killed."""
    monkeypatch.setattr("effnet.training.execution.LIBRARIES", LIBRARIES)
    monkeypatch.setattr("effnet.training.execution._glibc", Glibc)
    sizes = []
    for mebibytes in (1300, 900, 500):  # in the last there is no room at all: the system may still swap
        computer(monkeypatch, memory=mebibytes * 2**20)
        execution = choose_execution(spec("b0", resolution=160), Recipe(batch=16), ANY, SMALL, world=1)
        with keep_freed_memory(execution, ANY, world=1) as kept:
            sizes.append((execution.part, kept))
    assert sizes == [(16, True), (8, True), (1, False)]


def test_batch_statistics_are_of_more_than_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    pixel = spec("b0", depth=0.1, resolution=32)  # its last map
    one, two = (training_memory(pixel, part, optimizer="adamw", ema=True).peak for part in (1, 2))
    computer(monkeypatch, memory=one)
    assert choose(network=pixel).part == 2
    assert choose(network=SHALLOW).part == 1
    with pytest.raises(ArgumentError, match=r"train_memory.* 2 images at once take"):
        choose(Settings(train_memory=min(two, one) // 8), pixel)
    small = Recipe(batch=1)
    for recipe, settings in ((Recipe(batch=1, bn_momentum=0.0), ANY), (small, Settings(freeze=9))):
        assert choose_execution(pixel, recipe, settings, SMALL, world=1).part == 1
    with pytest.raises(ArgumentError, match=r"`batch` \(=1\) is too few: at 32 px .* need 2\."):
        choose_execution(pixel, small, ANY, SMALL, world=1)
    with pytest.raises(ArgumentError, match="too few"):
        choose_execution(pixel, Recipe(batch=2), ANY, SMALL, world=2)


@pytest.mark.parametrize(
    ("text", "spec_name", "workers", "refused"),
    [
        ("effnet.train(...)\n", None, 1, True),
        ("effnet.train(...)\n", None, 0, False),
        ('if __name__ == "__main__":\n    effnet.train(...)\n', None, 1, False),
        ("main()\n", "pytest.__main__", 1, False),  # python -m pytest
        (None, None, 1, True),  # standard input
    ],
)
def test_a_main_file_that_every_process_would_run_again(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str | None,
    spec_name: str | None,
    workers: int,
    refused: bool,
) -> None:
    main = ModuleType("__main__")
    main.__file__ = str(tmp_path / "mine.py") if text else "<stdin>"
    main.__spec__ = None if spec_name is None else ModuleSpec(spec_name, None)
    (tmp_path / "mine.py").write_text(text or "")
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ArgumentError, match=r"`workers` .*__main__") if refused else nullcontext():
        check_main_guard(workers)
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ArgumentError, match=r"`workers` .*__main__"):  # a process that runs it again
        check_main_guard(0)


def test_a_batch_fits_into_the_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    computer(monkeypatch, cores=1, memory=1)  # which does not count
    settings = Settings(device="cuda:1", precision="fp16")
    memory = training_memory(SHALLOW, 32, optimizer="adamw", ema=True, precision="fp16", kernels=False)
    taken = gpu_memory(SHALLOW, 32, memory)
    asked = []

    def of_gpu(device: str, size: int) -> int | None:
        asked.append(device)
        return None if device == "cpu" else size

    monkeypatch.setattr(machine, "device_memory", lambda device: of_gpu(device, int(1.2 * taken)))
    whole = choose(settings)
    assert (whole.part, whole.plan, whole.forecast_bytes, whole.float32) == (32, None, taken, "high")
    assert asked == ["cuda:1"]
    monkeypatch.setattr(machine, "device_memory", lambda device: of_gpu(device, taken))  # of which a part is usable
    assert (choose(settings).part, choose(settings).parts) == (16, 2)
    limited = choose(Settings(device="cuda", precision="fp16", train_memory=9 * taken // 10))
    assert limited.plan is not None
    assert limited.forecast_bytes <= 9 * taken // 10


def test_fp32_on_a_gpu_is_not_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_memory", lambda device: None)
    for precision, products in (("fp32", "highest"), ("tf32", "high"), ("bf16", "high")):
        assert choose(Settings(device="cuda", precision=precision)).float32 == products
    assert choose(Settings(precision="bf16")).float32 == "highest"  # of the CPU nothing is changed


def test_precisions_and_compiling_that_a_device_does_not_have() -> None:
    for precision in ("fp16", "tf32"):
        with pytest.raises(ArgumentError, match=rf"`precision` \(='{precision}'\) needs --device cuda; cpu has bf16"):
            Settings(precision=precision)
        assert Settings(precision=precision, device="cuda:1").precision == precision
    with pytest.raises(ArgumentError, match=r"compile.*excludes --train-memory"):
        Settings(compile=True, train_memory="1GB")
    assert not execution.trains_by_kernels(SHALLOW, RECIPE, Settings(compile=True))


def test_synchronised_statistics_need_cuda() -> None:
    with pytest.raises(ArgumentError, match=r"sync_bn.*cuda"):
        Settings(sync_bn=True)
    assert Settings(sync_bn=True, device="cuda:1").sync_bn


def test_the_named_fields_are_known() -> None:
    assert Settings(seed=0, model="lite0").given == {"seed", "model"}
    assert Settings() == Settings(seed=0)


class Glibc:
    """Remembers what its allocator was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def mallopt(self, option: int, value: int) -> int:
        self.calls.append((option, value))
        return 1

    def malloc_trim(self, left: int) -> int:
        self.calls.append((left,))
        return 1


def test_freed_memory_is_kept_while_steps_run(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Glibc()
    monkeypatch.setattr("effnet.training.execution._glibc", lambda: libc)
    computer(monkeypatch)
    chosen = choose()
    with keep_freed_memory(chosen, ANY, world=1) as kept:
        assert kept
        assert libc.calls == [(MMAP_MAX, 0), (TRIM_THRESHOLD, -1)]
    assert libc.calls[2:] == [(MMAP_MAX, 65536), (TRIM_THRESHOLD, 128 * 1024), (0,)]

    libc.calls.clear()
    for settings in (Settings(train_memory="4GB"), Settings(device="cuda")):
        with keep_freed_memory(chosen, settings, world=1) as kept:
            assert not kept
    computer(monkeypatch, memory=int(1.5 * chosen.forecast_bytes))  # of which a part is usable
    with keep_freed_memory(chosen, ANY, world=1) as kept:
        assert not kept
    computer(monkeypatch)
    monkeypatch.setattr("effnet.training.execution._glibc", lambda: None)  # another C library
    with keep_freed_memory(chosen, ANY, world=1) as kept:
        assert not kept
    assert libc.calls == []


def test_processes_share_the_machine_that_they_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    computer(monkeypatch, 8, 4 * training_memory(SHALLOW, 4, optimizer="adamw", ema=True).peak)
    alone = choose(world=8)
    assert alone.threads == 1
    assert alone.part < 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of torchrun on four machines
    shared = choose(world=8)
    assert (shared.threads, shared.part) == (4, 4)
    monkeypatch.setattr("effnet.training.execution._glibc", Glibc)
    for local, enough in ((1, True), (8, False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        with keep_freed_memory(shared, ANY, world=8) as kept:
            assert kept == enough


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_the_users_own_setting_of_the_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    with keep_freed_memory(choose(), ANY, world=1) as kept:
        assert kept
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert execution._glibc() is None
