"""Checks the contents of a torch.export file before torch reads it, since torch runs code that such a file names.

torch evaluates the sizes of a program as Python (by sympify) and the guards of its inputs, calls what its nodes name,
and loads the libraries of data/aotinductor. A program of effnet needs none of this: its members, operators and sizes
are known, and torch gets a copy in memory that holds nothing else. Each member's crc32 is compared as it is read.
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

from effnet.errors import ArtifactError
from effnet.files import parse_json
from effnet.weights.arrays import open_zip

PROGRAM = "models/model.json"
MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|version|\.\w+(/\w+)?|models/model\.json|extra/effnet|"
    r"data/(weights|constants|sample_inputs)/(?!custom_obj|opaque_obj)[\w.-]+"
)
_TYPE, _CONTEXT = r'"type": (null|"builtins\.(tuple|list|dict)")', r'"context": (null|"null"|"\[\]")'
_SIZE = r"L\['\w+'\]\.size\(\)\[\d+\]"
RULES = {  # what a text of the program may be, by its name
    "target": re.compile(r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|_operator\.(add|sub|mul|floordiv|eq|ge|le|gt|lt)"),
    "expr_str": re.compile(r"Symbol\('\w+'(, \w+=True)*\)|[a-z]+\d+|\d+"),
    "guards_code": re.compile(rf"({_SIZE}|\d+)( [=!<>]=? ({_SIZE}|\d+))+"),
    **dict.fromkeys(("in_spec", "out_spec"), re.compile(rf"({_TYPE}|{_CONTEXT}|\"children_spec\"|[][{{}}:, 1])*")),
}


def read_checked(file: Path) -> io.BytesIO:
    """A copy of a torch.export file, of nothing but what a program of effnet has.

    Raises:
        ArtifactError: it holds something else, which could run code.
        ValueError, KeyError, OSError: it is damaged.
    """
    copy = io.BytesIO()
    size, taken, seen = file.stat().st_size, 0, set[str]()
    with open_zip(file) as archive, zipfile.ZipFile(copy, "w") as out:
        for member in archive.infolist():
            name, taken = member.filename.partition("/")[2], taken + member.file_size
            if not MEMBER.fullmatch(name):
                raise _refusal(file, f"a member {member.filename!r}")
            # torch takes the first of two members of one name, whatever its capitals, and zipfile the last
            if name.lower() in seen or member.compress_size != member.file_size or taken > size:
                raise ValueError(f"{name} is there twice, compressed, or larger than the file")
            seen.add(name.lower())
            content = archive.read(member)
            if name == PROGRAM:
                _check(parse_json(content), "", file)
            out.writestr(member.filename, content)
    copy.seek(0)
    return copy


def _check(value: Any, name: str, file: Path) -> None:
    if isinstance(value, dict):
        for key, each in value.items():
            _check(each, key, file)
    elif isinstance(value, list):
        for each in value:
            _check(each, name, file)
    elif isinstance(value, str) and name in RULES and not RULES[name].fullmatch(value):
        raise _refusal(file, f"the {name} {value!r:.80}")


def _refusal(file: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{file} holds {what}, as no artifact of effnet does: opening it could run its code")
