"""A network in a file: spec.yaml, which a person can read and edit, and which names an untrained network as MODEL.

The file holds the fields of NetworkSpec and nothing else; each row of the paper's Table 1 is one line. Fields that have
a default may be left out. Reading back what was written gives the same network, to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError

SUFFIXES = (".yaml", ".yml")
WIDE = 120  # columns
MARK = "# An effnet network, format 1: effnet info FILE shows it, effnet scale --phi 1 --from FILE scales it.\n"


def spec_text(spec: NetworkSpec) -> str:
    """The text of the file that holds `spec`."""
    import yaml

    # None: only the innermost mappings, which are the stages, stand in one line
    return MARK + str(
        yaml.safe_dump(spec.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=WIDE)
    )


def read_spec(path: str | Path) -> NetworkSpec:
    """The network in a file.

    Raises:
        ArgumentError: the file does not exist, is no YAML or holds no network; it and the reason are named.
    """
    try:
        return _network(read_mapping(path))
    except ArgumentError as error:
        if error.argument == "file":
            raise
        raise ArgumentError("file", str(path), f"holds no network: {error}") from error


def _network(values: Mapping[str, Any]) -> NetworkSpec:
    if not isinstance(values.get("stages"), list):
        raise ArgumentError("stages", values.get("stages"), "must be a list with a row for each stage.")
    if not isinstance(values.get("name", ""), str):
        raise ArgumentError("name", values["name"], "must be text; put it in quotes.")
    return NetworkSpec.from_dict(values)


def read_mapping(path: str | Path) -> Mapping[str, Any]:
    """The names and values in a YAML file; nothing in it is ever executed.

    Raises:
        ArgumentError: the file does not exist, is no YAML or holds something else than names and values.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError("file", str(path), "does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("file", str(path), f"cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2021-99-99
        raise ArgumentError("file", str(path), f"is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ArgumentError("file", str(path), "must hold names and values, such as `width: 1.2`.")
    return values
