"""Installing effnet: its kernels are compiled into the wheel, or it is a wheel of pure Python where that fails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface[Any]):
    """Called by hatchling before it makes a wheel, an editable one included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile native/, put the library into the wheel and its platform into the wheel's name."""
        library = load_build(Path(self.root)).compile_if_possible()
        if library is None:
            return
        # No part of Python's C interface is used, so the wheel is for this platform and every Python 3.
        platform = self.build_config.builder.get_best_matching_tag().rpartition("-")[2]
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
        build_data["artifacts"].append(f"/{library.relative_to(self.root).as_posix()}")


def load_build(root: Path) -> ModuleType:
    """native/build.py as a module."""
    spec = importlib.util.spec_from_file_location("effnet_native_build", root / "native" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module
