"""The version of effnet, which files and reports carry, and how files of a newer one are refused."""

from __future__ import annotations

import re

__version__ = "0.9.0"


def is_newer(version: object) -> bool:
    """Whether a file that carries `version` was made by a newer effnet than this one."""
    theirs, ours = ([int(number) for number in re.findall(r"\d+", str(text))[:3]] for text in (version, __version__))
    return theirs > ours


def newer_file(version: object, reason: object) -> str:
    """What is said after the name of a file of a newer effnet: the version that it carries, and what is new in it."""
    by = f"a newer effnet ({version})" if is_newer(version) else "a newer effnet"
    return f"was made by {by} than this one ({__version__}): {reason}. Use: pip install --upgrade effnet"


def newer_format(version: object, found: int, known: int) -> str:
    """The same of a file whose format has a higher number."""
    return newer_file(version, f"it has format {found}, and {known} is read")
