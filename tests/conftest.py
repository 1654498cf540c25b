from __future__ import annotations

from pathlib import Path

import pytest

PHOTOS = Path(__file__).parents[1] / "src" / "effnet" / "data" / "photos"


@pytest.fixture
def photos() -> Path:
    """The folder of the two photos that come with effnet: chelsea.png (a cat) and coffee.png (an espresso)."""
    return PHOTOS
