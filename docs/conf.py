"""The site that `make docs` builds of these pages, in build/site: no resource of it comes from the internet.

The pages stay plain Markdown, as GitHub shows it. What only the site has is made of them while they are read: the
table of contents of the lists in index.md, and signatures and docstrings of the names that python.md lists.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock
from sphinx.pycode import ModuleAnalyzer

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "src"))

from effnet.version import __version__  # noqa: E402  # src is on the path from here on

REPOSITORY = "https://github.com/effnet/effnet/blob/main/"

project, author, version = "effnet", "The effnet developers", __version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["__pycache__"]
root_doc = "index"
default_role = "code"
smartquotes = False  # they would make one dash of the two before an option

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as GitHub makes them

autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning_fabric"]  # it imports what it can find, for ten seconds; nothing of it is shown
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"effnet {version}"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # it is fetched, which browsers refuse in pages of the disk
html_math_renderer = "mathml"
html_theme_options = {
    "source_repository": "https://github.com/effnet/effnet",
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = "$ "  # and the lines that a command printed are not copied

LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()(\.\./[^)\s]*)")
LISTED = re.compile(r"^- \[[^\]]*\]\(([\w/]+)\.md\)", re.MULTILINE)
HAT = re.compile(r"(\\hat\s*(?:\{[^}]*\}|[A-Za-z]))(?=[_^])")
FIELDS: dict[str, list[str]] = {}  # the text of each documented field
NAMED = re.compile(r"^- `effnet\.([\w.]+)`", re.MULTILINE)


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """A page as the site needs it."""
    text = source[0]
    folder = posixpath.dirname(f"docs/{name}")

    def outside(link: re.Match[str]) -> str:
        """Links to files beside docs/ lead to the repository."""
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        return link[0] if path.startswith("docs/") else f"{link[1]}{REPOSITORY}{path}"

    text = LINK.sub(outside, text)
    if name == root_doc:
        text = add_contents(text)
    if name == "python":
        text = add_docstrings(text)
    source[0] = text


def sections(text: str) -> list[str]:
    return re.split(r"^(?=## )", text, flags=re.MULTILINE)


def add_contents(text: str) -> str:
    """index.md with a table of contents made of the lists under its headings."""
    for section in sections(text)[1:]:
        caption = section.partition("\n")[0].removeprefix("## ")
        pages = "\n".join(LISTED.findall(section))
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"
    return text


def add_docstrings(text: str) -> str:
    """python.md with what the docstrings say of the names that each section lists."""
    out = []
    for section in sections(text):
        out.append(section)
        for name in NAMED.findall(section):
            value = public(f"effnet.{name}")
            kind = "autoclass" if isinstance(value, type) else "autofunction"
            if is_dataclass(value):
                explain_fields(value)
            members = "   :members:\n   :undoc-members:\n" if kind == "autoclass" else ""
            out.append(f"\n```{{eval-rst}}\n.. {kind}:: effnet.{name}\n{members}```\n")
    return "\n".join(out)


def public(name: str) -> Any:
    """What a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    with mock(autodoc_mock_imports):
        return getattr(import_module(module), attribute)


def hide_fields(app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returned: str) -> Any:
    """No signature for a dataclass: its fields follow, each with its type, default and meaning."""
    return ("", None) if is_dataclass(value) and isinstance(value, type) else None


def explain_fields(owner: type) -> None:
    """Let autodoc take the comment beside a field that has no docstring for one."""
    analyzer = ModuleAnalyzer.for_module(owner.__module__)
    analyzer.analyze()
    for field, comment in field_comments(owner).items():
        if comment:
            analyzer.attr_docs.setdefault((owner.__qualname__, field), [comment, ""])


def note_field(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """The text of a field, before napoleon."""
    if what in ("attribute", "property"):
        FIELDS[name] = list(lines)


def keep_field(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """As it was: napoleon takes what stands before a colon for a type."""
    if name in FIELDS:
        lines[:] = FIELDS[name]


def field_comments(owner: type) -> dict[str, str]:
    """The comments behind a class's fields, with the lines before one that continue in it."""
    found, before = {}, list[str]()
    for line in inspect.getsource(owner).splitlines():
        if sentence := re.fullmatch(r"    # (.*)", line):
            before.append(sentence[1])
        elif field := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
            before = before if before and before[0][0].isupper() else []  # else it is a heading
            found[field[1]] = " ".join([*before, field[2] or ""]).strip()
            before = []
    return found


def write_colons(app: Sphinx, tree: nodes.document) -> None:
    """An argument's name and its meaning are parted by a colon."""
    for node in [*tree.findall(nodes.Text)]:
        if node == " -- ":
            node.parent.replace(node, nodes.Text(": "))


def set_language(app: Sphinx, name: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Chinese pages say so, since letters look different in Japanese."""
    if name.startswith("zh/"):
        context["language"] = "zh-CN"


def visit_math(translator: Any, node: nodes.Element, *, block: bool = False) -> None:
    """MathML, which browsers draw themselves; GitHub's $`...`$ has backticks around the formula."""
    latex = node.astext().strip("`").replace(r"\dots", r"\ldots")  # which the converter calls so
    latex = HAT.sub(r"\1{}", latex)  # else what follows goes below the letter, and above the hat
    formula = latex2mathml.tex2mathml(latex, as_block=block)
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", read_page)
    app.connect("autodoc-process-signature", hide_fields)
    app.connect("autodoc-process-docstring", note_field, priority=499)
    app.connect("autodoc-process-docstring", keep_field, priority=501)  # napoleon is between them
    app.connect("doctree-read", write_colons)
    app.connect("html-page-context", set_language)
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(visit_math, None),
        block_renderers=(lambda translator, node: visit_math(translator, node, block=True), None),
    )
    return {"parallel_read_safe": True}
