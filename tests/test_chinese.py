"""The Chinese pages say what the English ones say: section by section the same code, tables, formulas, links, numbers.

What is compared is what can be without reading Chinese; a sentence that was only reworded is not noticed.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
TRANSLATED = {"README.md": "README.zh-CN.md", "docs/method.md": "docs/zh/method.md"}
ENGLISH_OF = {chinese: english for english, chinese in TRANSLATED.items()}

COMMENT = re.compile(r"^<!--.*?-->\n|<!--.*?-->", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
DISPLAY, INLINE = re.compile(r"\$\$(.+?)\$\$", re.DOTALL), re.compile(r"\$(`?)([^$\n`]+)\1\$")
CODE_COMMENT = re.compile(r"(^|[ \t]+)#.*$", re.MULTILINE)
NUMBER = re.compile(r"(?<![A-Za-z\d.,])(?<![A-Za-z]-)\.?\d+(?:[.,]\d+)*(?: ?%)?")
NAME = re.compile(r"(?<![A-Za-z\d.])[A-Za-z][A-Za-z-]*\d[\w.-]*", re.ASCII)  # B0, fp32, ResNet-50
WIDE, NARROW = r"[\u4e00-\u9fff]", r"[A-Za-z0-9`$%]"


@dataclass
class Section:
    """The content of a section that a translation must have too."""

    place: str
    shape: list[str] = field(default_factory=list)  # its headings, paragraphs, items, tables and code, in order
    code: list[str] = field(default_factory=list)  # without comments, which are translated
    cells: list[str] = field(default_factory=list)  # of its tables
    spans: list[str] = field(default_factory=list)  # code and formulas within sentences
    links: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)  # how often one is repeated is a matter of style


def sections(page: str, text: str) -> Iterator[Section]:
    """The sections of a page; formulas are read as code, as GitHub does."""
    text, fences = COMMENT.sub("", text), []
    text = FENCE.sub(lambda code: fences.append(code[0]) or f"\0{len(fences) - 1}\0", text)
    text = INLINE.sub(r"`$\2$`", DISPLAY.sub(r"```math\n\1\n```", text))
    text = re.sub(r"\0(\d+)\0", lambda place: fences[int(place[1])], text)
    tokens, found = MarkdownIt("commonmark").enable("table").parse(text), None
    for token, following in zip_longest(tokens, tokens[1:]):
        if token.type == "heading_open":
            if found:
                yield found
            found = Section(f'{page} "{following.content}"')
        if not found:
            continue
        if token.type in ("heading_open", "table_open", "tr_open", "list_item_open", "fence") or (
            token.type == "paragraph_open" and token.level == 0
        ):
            found.shape.append(f"{token.tag} {token.info}".strip())
        if token.type == "fence":
            found.code.append(token.content if token.info == "console" else bare(token.content))
        elif token.type in ("th_open", "td_open"):
            cell = Section("")
            collect(cell, page, following)
            style = token.attrGet("style")
            found.cells.append(" ".join([str(style), *sorted(cell.numbers + cell.spans + cell.links + [*cell.names])]))
        elif following and following.type == "inline":
            collect(found, page, following)
    if found:
        yield found


def bare(code: str) -> str:
    """Code without comments and what aligns them."""
    return "\n".join(line.rstrip() for line in CODE_COMMENT.sub("", code).splitlines())


def collect(section: Section, page: str, token: Token) -> None:
    """Add what a paragraph, an item or a cell holds."""
    words = []
    for child in token.children or []:
        if child.type == "code_inline":
            section.spans.append(child.content)
        elif child.type in ("link_open", "image"):
            target = str(child.attrGet("href") or child.attrGet("src"))
            if "://" not in target and not target.startswith("#"):
                path, *anchor = posixpath.normpath(posixpath.join(posixpath.dirname(page), target)).split("#")
                target = "#".join([ENGLISH_OF.get(path, path), *anchor])
            section.links.append(target)
        if child.type in ("text", "image", "softbreak"):
            words.append(child.content or " ")
    text = "".join(words)
    section.numbers += [number.replace(" ", "") for number in NUMBER.findall(text)]
    section.names |= {name.rstrip(".-") for name in NAME.findall(text)}


def pairs(ours: list[Section], theirs: list[Section]) -> Iterator[tuple[Section | None, Section | None]]:
    """Each section with its translation, so that a new one is told once and not by all that follow it."""
    keys = [[str((section.shape, section.code, sorted(section.links))) for section in page] for page in (ours, theirs)]
    for _, start, end, other_start, other_end in SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        yield from zip_longest(ours[start:end], theirs[other_start:other_end])


def differences(english: str, text: str, chinese: str, other: str) -> list[str]:
    """What one language has and the other lacks, a line for each section and kind."""
    lines = []
    for left, right in pairs([*sections(english, text)], [*sections(chinese, other)]):
        if not left or not right:
            lines.append(f"{(left or right).place}: the other language has no such section")
            continue
        where = f"{left.place} / {right.place}"
        if left.shape != right.shape:
            lines.append(f"{where}: not the same paragraphs, items, rows and code blocks: {left.shape} / {right.shape}")
        for kind in ("code", "cells"):
            for place, (ours, theirs) in enumerate(zip(getattr(left, kind), getattr(right, kind), strict=False), 1):
                if ours != theirs:
                    lines.append(f"{where}: {kind} {place}: {ours!r} / {theirs!r}")
        for kind in ("spans", "links", "numbers", "names"):
            ours, theirs = Counter(getattr(left, kind)), Counter(getattr(right, kind))
            if ours != theirs:
                missing, surplus = sorted((ours - theirs).elements()), sorted((theirs - ours).elements())
                lines.append(f"{where}: {kind}: only {english} has {missing}, only {chinese} has {surplus}")
    return lines


def read(page: str) -> str:
    """A page without the line under its title that leads to the other language."""
    title, line, rest = (ROOT / page).read_text("utf-8").split("\n\n", 2)
    other = TRANSLATED.get(page) or ENGLISH_OF[page]
    assert f"]({posixpath.relpath(other, posixpath.dirname(page))})" in line, f"{page}: no link to {other}"
    return f"{title}\n\n{rest}"


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED.items())
def test_both_languages_say_the_same(english: str, chinese: str) -> None:
    found = differences(english, read(english), chinese, read(chinese))
    assert not found, "\n".join(["", *found])


def test_no_page_is_forgotten() -> None:
    pages = [*ROOT.glob("*.zh-CN.md"), *(ROOT / "docs" / "zh").glob("*.md")]
    assert {page.relative_to(ROOT).as_posix() for page in pages} == ENGLISH_OF.keys()


@pytest.mark.parametrize("chinese", ENGLISH_OF)
def test_chinese_is_set_as_chinese(chinese: str) -> None:
    page = INLINE.sub("$x$", FENCE.sub("", (ROOT / chinese).read_text("utf-8")))
    text = re.sub(r"\]\([^)\s]+\)", "]", re.sub(r"`[^`\n]+`", "`x`", page))
    for rule, fault in {
        rf"{WIDE}{NARROW}|{NARROW}{WIDE}": "no space between Chinese and other characters",
        rf"{WIDE} *[,.:;?!()]|[,:;?!()] *{WIDE}": "a narrow punctuation mark",
        r"[，。：；、（）“”] (?!\|)|(?<!\|) [，。：；、（）”]": "a space beside a wide punctuation mark",
        rf"(?:{WIDE}|[，。：；、（）”])\n(?:{WIDE}|[（“`])": "a line break, which is shown as a space",
    }.items():
        assert not (found := re.search(rf".{{0,20}}(?:{rule}).{{0,20}}", text)), f"{chinese}: {fault}: {found[0]!r}"
    "".join(re.findall(WIDE, page)).encode("gb2312")  # has no traditional characters
    html = MarkdownIt("commonmark").enable("table").render(page)
    assert "*" not in re.sub(r"<code.*?</code>", "", html, flags=re.DOTALL), "bold that markdown does not see"


ENGLISH = """# A
## B
Run `x --y` on 1,000 of B0's images in 0.5 s, [as here](docs/a.md).
![picture](b.svg)

- one
- two: $a^2$

```sh
effnet info b0  # words
```

| a | b |
| :--- | ---: |
| c | 94.1% |
"""
CHINESE = """# 甲
## 乙
对 B0 的 1,000 张图像运行 `x --y`，用时 0.5 s，[见此](docs/a.md)。
![图](b.svg)

- 一
- 二：$`a^2`$

```sh
effnet info b0 # 注释
```

| 甲 | 乙 |
| :--- | ---: |
| 丙 | 94.1% |
"""


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("words", "other words", None),
        ("Run", "Use", None),
        ("info b0", "info b1", "code 1"),
        ("```sh", "```console", "code blocks"),
        ("94.1%", "94.2%", "cells 4"),
        ("| c | 94.1% |\n", "", "rows"),
        ("---: |", "--- |", "cells 2"),
        ("`x --y`", "`x --z`", "spans"),
        ("$a^2$", "$a^3$", "spans"),
        ("docs/a.md", "docs/b.md", "links"),
        ("b.svg", "c.svg", "links"),
        ("1,000", "2,000", "numbers"),
        ("0.5 s", "0.05 s", "numbers"),
        ("B0's", "B4's", "names"),
        ("- one\n", "", "items"),
        ("- one\n", "A paragraph.\n\n- one\n", "paragraphs"),
        ("## B", "### B", "paragraphs"),
        ("## B", "## C\n\nText.\n\n## B", "no such section"),
    ],
)
def test_a_change_in_english_alone_is_found(old: str, new: str, kind: str | None) -> None:
    assert old in ENGLISH
    found = differences("README.md", ENGLISH.replace(old, new), "README.zh-CN.md", CHINESE)
    if kind is None:
        assert not found
    else:
        assert any(kind in line and "README.md" in line for line in found), found
        assert all('"B"' in line or '"C"' in line for line in found), found
