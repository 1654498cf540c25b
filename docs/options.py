"""The tables of commands.md, of the command line's own options; draw.py fills them in."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cyclopts.argument import Argument

from effnet.cli import COMMANDS, build_app
from effnet.fields import BYTES, COUNTS, SECONDS
from effnet.scaling.budget import UNITS

DEFAULT = re.compile(r"[.;]? ?\b[Dd]efault: (.+?)(?:\.(?= |$)|$)", re.DOTALL)
TYPED = {int: "whole number", float: "number", Path: "path", str: "text", bool: ""}


def commands() -> str:
    """Each command: what it does, its arguments and its options."""
    return "\n" + "\n".join("\n".join(command(name)) for name in COMMANDS)


def command(name: str) -> Iterator[str]:
    app = build_app([name])[name]
    assert app.default_command is not None
    told = inspect.getdoc(app.default_command) or ""
    arguments = [each for each in app.assemble_argument_collection(parse_docstring=True) if each.show]
    typed = " ".join(placed(each) for each in arguments if is_placed(each))
    yield f"## effnet {name}\n"
    yield f"{escaped(told.partition('Args:')[0].strip())}\n"
    yield f"```text\n{' '.join(filter(None, ['effnet', name, typed, '[OPTIONS]']))}\n```\n"
    if (extra := COMMANDS[name][1]) and extra != "torch":
        yield f"Needs `pip install 'effnet[{extra}]'`.\n"
    yield "| option | takes | default | meaning |\n| :--- | :--- | :--- | :--- |"
    yield from map(row, sorted(arguments, key=is_placed, reverse=True))
    yield ""


def is_placed(argument: Argument) -> bool:
    """Whether it is given by its place."""
    return argument.field_info.kind is not inspect.Parameter.KEYWORD_ONLY and "." not in argument.name


def placed(argument: Argument) -> str:
    name = argument.name.lstrip("-").upper()
    several = argument.field_info.kind is inspect.Parameter.VAR_POSITIONAL
    shown = f"{name}..." if several else name
    return shown if argument.required else f"[{shown}]"


def row(argument: Argument) -> str:
    meaning, default = read_help(argument)
    names = [placed(argument).strip("[]")] if is_placed(argument) else argument.names
    return f"| {', '.join(f'`{name}`' for name in names)} | {takes(argument)} | {default} | {meaning} |"


def takes(argument: Argument) -> str:
    """What an option takes: a kind of value, or a choice."""
    if argument.parameter.metavar == "AMOUNT":
        units = UNITS.get(argument.name[2:].replace("-", "_")) or (SECONDS if argument.name == "--grace" else BYTES)
        return {id(COUNTS): "count", id(BYTES): "size", id(SECONDS): "time"}[id(units)]
    choices, kinds = [], []
    for kind in flat(argument.hint):
        if get_origin(kind) is Literal:
            choices += [f"`{value}`" for value in get_args(kind)]
        elif kind in TYPED:
            kinds.append(TYPED[kind])
    several = ", several times" if get_origin(next(iter(flat(argument.hint, deep=False)))) in (list, tuple) else ""
    return ", ".join(choices or kinds[:1]) + several


def flat(hint: Any, deep: bool = True) -> Iterator[Any]:
    """The types of a union, a list or a tuple."""
    inner = get_args(hint)
    if not inner or get_origin(hint) is Literal or (not deep and get_origin(hint) in (list, tuple)):
        yield hint
        return
    for each in inner:
        if each not in (None, type(None), ...):
            yield from flat(each, deep)


def read_help(argument: Argument) -> tuple[str, str]:
    """What an option means, and its default: what its help says, else its value."""
    text = escaped(" ".join((argument.parameter.help or "").split()))
    value = argument.field_info.default
    said = DEFAULT.search(text)
    if said and value in (None, "auto", ()):
        rest = text[said.end() :]
        text = text[: said.start()].rstrip(" .;") + "." + rest
        return text, said[1]
    if value is inspect.Parameter.empty:
        return text, "required" if argument.required else ""
    if value is None or value is False or value == ():
        return text, ""
    return text, f"`{value:g}`" if isinstance(value, float) else "on" if value is True else f"`{value}`"


def escaped(text: str) -> str:
    """What markdown would take for a mark of its own; options stand in code."""
    text = inspect.cleandoc(text).replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")
    return re.sub(r"(?<![\w`-])(--[a-z][a-z0-9-]*(?: \w+=\w+(?:\.\d+)?)?)", r"`\1`", text)


BLOCKS = {"commands": commands}
