from __future__ import annotations

from pathlib import Path

import pytest
from tiny import draw_images


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 small images of three classes, one of which has a name that no page or shell may take for code."""
    folder = draw_images(tmp_path_factory.mktemp("data") / "shapes")
    (folder / "ring").rename(folder / "<b>'ring' & $(co)")
    return folder
