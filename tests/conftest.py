from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from ran import Run

PHOTOS = Path(__file__).parents[1] / "src" / "effnet" / "data" / "photos"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # parallel workers do not fight for the cores

# A run in the background inherits a deaf ear for Ctrl-C and would hand it on to the programs that tests interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["KERAS_BACKEND"] = "torch"  # read once, by the import of Keras
os.environ["RAY_raylet_start_wait_time_s"] = "150"  # noqa: SIM112  # so spelt; seconds for Ray's start where it is busy

# What tests keep is not kept for the user's own networks.
os.environ["EFFNET_CACHE"] = tempfile.mkdtemp(prefix="effnet-tests-")


@pytest.fixture(autouse=True, scope="session")
def run_networks_in_torch() -> Iterator[None]:
    """In fp32 and to the bit on every processor; the engines that the rules would take are tested in tests/runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effnet.runtime.select.installed", lambda name: name == "torch")
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: (figures.append(figure), save(figure, *a, **kw)))
    return figures


@pytest.fixture
def photos() -> Path:
    """The folder of the two photos that come with effnet: chelsea.png (a cat) and coffee.png (an espresso)."""
    return PHOTOS


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Callable[..., tuple[int, str, str]]:
    """Run the module's COMMAND: its exit code, what it printed, what it remarked."""

    def typed(*words: object) -> tuple[int, str, str]:
        ran = Run(capsys, request.module.COMMAND, *words)
        return ran.code, ran.out, ran.err

    return typed
