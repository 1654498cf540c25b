from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

PHOTOS = Path(__file__).parents[1] / "src" / "effnet" / "data" / "photos"

# A run in the background inherits a deaf ear for Ctrl-C and would hand it on to the programs that tests interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def photos() -> Path:
    """The folder of the two photos that come with effnet: chelsea.png (a cat) and coffee.png (an espresso)."""
    return PHOTOS
