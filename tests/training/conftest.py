from __future__ import annotations

from pathlib import Path

import pytest
from tiny import draw_images, write_spec


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of three kinds of shapes, unsplit."""
    return draw_images(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def spec_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of two stages."""
    return write_spec(tmp_path_factory.mktemp("spec") / "tiny.yaml")
