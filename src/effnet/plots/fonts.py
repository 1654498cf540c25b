r"""Fonts: which characters this machine can draw, so that no picture shows boxes instead of letters.

matplotlib comes with DejaVu, which has Latin, Greek, Cyrillic, Arabic and symbols. What it lacks, such as Chinese, is
drawn in a system font. A character that no font has is drawn as its code (\u732b), and a class whose name has such a
character as its number.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

FAMILY = "DejaVu Sans"
NAMED = 8  # classes in a message


class Font(NamedTuple):
    """A font file."""

    family: str
    file: str


def choose_fonts(text: str) -> list[Font]:
    """DejaVu and system fonts for the characters of a text that it lacks; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    from matplotlib import get_data_path

    fonts = [Font(FAMILY, str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")))]
    lacking = set(map(ord, text)) - characters(fonts[0].file)
    while lacking and (others := system_fonts()):
        best = max(others, key=lambda font: len(lacking & characters(font.file)))
        if lacking.isdisjoint(characters(best.file)):
            break
        fonts.append(best)
        lacking -= characters(best.file)
    return fonts


@cache
def system_fonts() -> tuple[Font, ...]:
    """The upright fonts of normal weight that matplotlib finds, sans-serif ones first."""
    from matplotlib.font_manager import fontManager

    fonts = [Font(it.name, it.fname) for it in fontManager.ttflist if (it.style, it.weight) == ("normal", 400)]
    fonts = [font for font in fonts if "Last Resort" not in font.family]  # it has a box for every character
    return tuple(sorted(fonts, key=lambda font: ("Sans" not in font.family, font)))


@cache
def characters(file: str) -> frozenset[int]:
    """The code points for which a font has outlines."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):  # unusable
        return frozenset()


def on_one_line(text: str) -> str:
    """A text without undrawable characters: control characters become codes, invisible ones are left out."""
    kept = (char for char in text if unicodedata.category(char) != "Cf")
    return "".join(char if char.isprintable() else _code(char) for char in kept)


def drawable_text(text: str, fonts: Sequence[Font]) -> str:
    """A text on one line, with codes for non-ASCII characters that none of the fonts has."""
    known = _known(tuple(fonts))
    return "".join(char if ord(char) in known else _code(char) for char in on_one_line(text))


def label_classes(classes: Sequence[str]) -> list[str]:
    """The names of classes as shown in plots: "class 3" for the third if no font has its characters."""
    lines = [on_one_line(name) for name in classes]
    fonts = choose_fonts("".join(lines))
    return [line if drawable_text(line, fonts) == line else f"class {n}" for n, line in enumerate(lines, start=1)]


def explain_labels(classes: Sequence[str]) -> str:
    """A sentence about the classes that `label_classes` numbers; empty if it numbers none."""
    pairs = zip(classes, label_classes(classes), strict=True)
    numbered = [f"{label} is {line}" for name, label in pairs if label != (line := on_one_line(name))]
    if not numbered:
        return ""
    more = f", and {len(numbered) - NAMED} more" if len(numbered) > NAMED else ""
    listed = ", ".join(numbered[:NAMED]) + more
    return f"no font here has the characters of some class names, so pictures number these: {listed}"


@cache
def _known(fonts: tuple[Font, ...]) -> frozenset[int]:
    return frozenset(range(128)).union(*(characters(font.file) for font in fonts))


def _code(char: str) -> str:
    return char.encode("unicode_escape").decode()
