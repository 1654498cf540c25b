"""Build hook: compiles the kernels into the wheel; if that fails, the wheel is pure Python."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface[Any]):
    """Called by hatchling before it builds a wheel, including an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile native/, add the library to the wheel and the platform to the wheel's tag."""
        library = load_build(Path(self.root)).compile_if_possible()
        if library is None:
            return
        # The library does not use Python's C API, so the wheel works with every Python 3 on this platform.
        platform = self.build_config.builder.get_best_matching_tag().rpartition("-")[2]
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
        build_data["artifacts"].append(f"/{library.relative_to(self.root).as_posix()}")


def load_build(root: Path) -> ModuleType:
    """Import native/build.py as a module."""
    spec = importlib.util.spec_from_file_location("effnet_native_build", root / "native" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses looks the module up there
    spec.loader.exec_module(module)
    return module
