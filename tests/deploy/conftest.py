from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def engines_end_here() -> Iterator[None]:
    """Sessions of engines own threads: what a failed opening left in a cycle ends now, not in another test's thread."""
    yield
    gc.collect()
