from __future__ import annotations

import gc
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ran import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
PHOTOS = FOLDER.parent / "src" / "effnet" / "data" / "photos"

if "PYTEST_XDIST_WORKER" in os.environ:  # the controller does not need torch
    import torch

    torch.set_num_threads(1)  # so that workers do not compete for the cores

# A run in the background inherits a deaf ear for Ctrl-C and would hand it on to the programs that tests interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["KERAS_BACKEND"] = "torch"  # read once, by the import of Keras
os.environ["RAY_raylet_start_wait_time_s"] = "150"  # noqa: SIM112  # Ray's spelling; seconds for its start on a busy machine
os.environ["RAY_health_check_period_ms"] = "400"  # noqa: SIM112  # a killed machine is missed five times before it is given up

# What tests keep is not kept for the user's own networks.
os.environ["EFFNET_CACHE"] = tempfile.mkdtemp(prefix="effnet-tests-")


# The files whose tests take longest: the first a minute of one core, the others a quarter to three quarters of one
LONGEST = (
    *("fitting/test_fit.py", "test_readme.py", "runtime/test_native.py", "training/test_kill.py"),
    *("models/test_oracles.py", "fitting/test_choice.py", "runtime/test_maps.py", "searching/test_jobs.py"),
    *("weights/test_convert_keras.py", "models/test_native_losses.py", "training/test_device.py"),
    *("weights/test_convert.py", "arch/test_memory.py", "training/test_train.py", "weights/test_writers.py"),
    *("models/test_efficientnet.py", "training/test_processes.py", "runtime/test_fork.py", "training/test_command.py"),
)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests of a file in one process, so that fixtures are made once; the longest files start first."""
    from xdist.scheduler import LoadFileScheduling

    if config.option.dist != "load":  # the user chose another distribution
        return None
    config.option.loadscopereorder = False  # it would order by the number of tests
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first if several processes share the work, so that none is left with one at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {FOLDER / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Freeze imported objects: collecting them after every 700 allocations takes a fifteenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Count passing tests without listing them in CI, so that its log shows what fails."""
    if "CI" in os.environ and report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
        return "passed", "", ""
    return None


@pytest.fixture(autouse=True, scope="session")
def run_networks_in_torch() -> Iterator[None]:
    """Use fp32, with the same bits on every processor; the engines that rules choose are tested in tests/runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effnet.runtime.select.installed", lambda name: name == "torch")
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: (figures.append(figure), save(figure, *a, **kw)))
    return figures


@pytest.fixture
def photos() -> Path:
    """The folder of effnet's two packaged photos: chelsea.png (a cat) and coffee.png (an espresso)."""
    return PHOTOS


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Callable[..., tuple[int, str, str]]:
    """Run the module's COMMAND; returns its exit code, standard output and standard error."""

    def typed(*words: object) -> tuple[int, str, str]:
        ran = Run(capsys, request.module.COMMAND, *words)
        return ran.code, ran.out, ran.err

    return typed
