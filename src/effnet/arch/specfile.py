"""A network in a file: spec.yaml, which a person can read and edit, and which names an untrained network as MODEL.

The file holds the fields of NetworkSpec and nothing else; each row of the paper's Table 1 is one line. Fields that have
a default may be left out, and a row may use the shorter names of SHORT:

    name: mine
    head: 0
    squeeze_ratio: 0
    stages:
    - {op: separable, channels: 32, repeats: 1, kernel: 3, stride: 1, expansion: 1}
    - {op: mbconv, channels: 64, repeats: 3, kernel: 5, stride: 2, expansion: 4, se: 0.25}

Reading back what was written gives the same network, to the last digit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.errors import ArgumentError
from effnet.fields import read_fields
from effnet.version import newer_format

SUFFIXES = (".yaml", ".yml")
SHORT = {"repeats": "layers", "kernel": "kernel_size", "expansion": "expand_ratio", "se": "squeeze_ratio"}
WIDE = 120  # columns
MOST_VALUES = 1_000_000  # in a file, with those that aliases stand for
FORMAT = 1
MARK = f"# An effnet network, format {FORMAT}: effnet info FILE shows it, effnet scale --phi 1 --from FILE scales it.\n"
NUMBER = re.compile(r"# An effnet network, format (\d+)")


def spec_text(spec: NetworkSpec) -> str:
    """The text of the file that holds `spec`."""
    import yaml

    # default_flow_style=None: only the innermost mappings, which are the stages, stand in one line
    form: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None, "width": WIDE}
    return MARK + str(yaml.safe_dump(spec.to_dict(), **form))


def read_spec(path: str | Path) -> NetworkSpec:
    """The network in a file.

    Raises:
        ArgumentError: the file does not exist, is not YAML, does not describe a network (line and reason), or has a
            format that only a newer effnet reads.
    """
    values, place = read_mapping(path), list[Any]()
    if (found := NUMBER.match(Path(path).read_text(encoding="utf-8"))) and int(found[1]) > FORMAT:
        raise ArgumentError("file", str(path), newer_format(None, int(found[1]), FORMAT))
    try:
        return _network(values, place)
    except ArgumentError as error:
        lines, reason = _lines(Path(path).read_text(encoding="utf-8")), str(error)
        names = [name for name in (error.argument, error.value) if isinstance(name, str) and (*place, name) in lines]
        line = lines.get((*place, *names[:1]))
        where = f"line {line}: " if line else ""
        for short, long in SHORT.items() if place else ():
            if isinstance(row := values["stages"][place[1]], Mapping) and short in row:  # as the user wrote it
                reason = reason.replace(f"`{long}`", f"`{short}`")
        raise ArgumentError("file", str(path), f"does not describe a network: {where}{reason}") from error


def _network(values: Mapping[str, Any], place: list[Any]) -> NetworkSpec:
    """The network; `place` tells which row is being read."""
    if not isinstance(values.get("stages"), list):
        raise ArgumentError("stages", values.get("stages"), "must be a list with a row for each stage.")
    if not isinstance(values.get("name", ""), str):
        raise ArgumentError("name", values["name"], "must be text; put it in quotes.")
    rows = []
    for number, row in enumerate(values["stages"]):
        place[:] = "stages", number
        if isinstance(row, Mapping):
            for short, long in SHORT.items():
                if short in row and long in row:
                    raise ArgumentError(short, row[short], f"is given a second time, as {long}: {row[long]!r}.")
            row = {SHORT.get(name, name): value for name, value in row.items()}
        rows.append(read_fields(StageSpec, row))
    place.clear()
    return read_fields(NetworkSpec, {**values, "stages": tuple(rows)})


def _lines(text: str) -> dict[tuple[Any, ...], int]:
    """The line of each name and row in the file, of a YAML alias the first; refuses a mapping with a name twice."""
    import yaml

    lines: dict[tuple[Any, ...], int] = {}
    seen = set[int]()

    def walk(node: Any, place: tuple[Any, ...]) -> None:
        lines[place] = node.start_mark.line + 1
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names = set[str]()
            for key, value in node.value:
                if key.value in names:
                    again = value.value if isinstance(value, yaml.ScalarNode) else "..."
                    raise ArgumentError(key.value, again, f"is given a second time in line {key.start_mark.line + 1}.")
                names.add(str(key.value))
                name = SHORT.get(str(key.value), str(key.value))
                walk(value, (*place, name))
                lines[*place, name] = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                walk(value, (*place, number))

    walk(yaml.compose(text, yaml.SafeLoader), ())
    return lines


def load_yaml(text: str) -> Any:
    """The values in YAML, of which nothing is ever executed.

    Raises:
        yaml.YAMLError: it is not YAML, is nested too deeply, or its aliases stand for more than MOST_VALUES values. The
            reason is one line.
        ValueError: a value cannot be, such as the date 2021-99-99.
    """
    import yaml

    try:
        if (root := yaml.compose(text, yaml.SafeLoader)) is not None:
            _count(root, {})
        return yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise yaml.YAMLError(" ".join(str(error).split())) from error


def _count(node: Any, known: dict[int, int]) -> int:
    """The values of a node, counted wherever an alias stands for them: whoever writes them out would never end."""
    import yaml

    if id(node) not in known:
        known[id(node)] = 0  # where it holds itself, which Python writes as dots
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        each = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
        known[id(node)] = 1 + sum(_count(part, known) for part in each)
    if known[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
    return known[id(node)]


def read_mapping(path: str | Path) -> Mapping[str, Any]:
    """The names and values in a YAML file; nothing in it is ever executed.

    Raises:
        ArgumentError: the file does not exist, is not YAML or holds something else than names and values.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        values = load_yaml(text)
    except FileNotFoundError:
        raise ArgumentError("file", str(path), "does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("file", str(path), f"cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ArgumentError("file", str(path), f"is not YAML: {error}") from error
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ArgumentError("file", str(path), "must hold names and values, such as `width: 1.2`.")
    try:
        _lines(text)
    except ArgumentError as error:
        raise ArgumentError("file", str(path), f"cannot be used: {error}") from error
    return values
