"""native/build.py as a module, since it is not part of the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_build() -> ModuleType:
    """A new module for each caller, who may change it."""
    path = Path(__file__).parents[2] / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("effnet_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
