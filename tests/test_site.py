"""The site of docs: it builds without a warning, needs nothing from the internet, and its search works offline."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import open_browser
from playwright.sync_api import Page

import effnet

ROOT = Path(__file__).parents[1]
LOADED = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"]*)\"")
IMPORTED = re.compile(r"@import\b|url\(\s*['\"]?(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: warnings are errors."""
    out = tmp_path_factory.mktemp("site")
    words = (
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-d",
        str(out / "trees"),
        "docs",
        str(out / "html"),
    )
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def tab(site: Path) -> Iterator[Page]:
    with open_browser() as browser:
        yield browser.new_page(viewport={"width": 390, "height": 844})


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).exists(), page
    # the method changes its language by a link under its title
    assert 'href="zh/method.html"' in (site / "method.html").read_text("utf-8")
    assert 'href="../method.html"' in (site / "zh/method.html").read_text("utf-8")


def test_nothing_comes_from_the_internet(site: Path) -> None:
    for page in site.rglob("*.html"):
        for target in LOADED.findall(page.read_text("utf-8")):
            assert not re.match(r"(\w+:)?//", target), f"{page.name} loads {target}"
    for sheet in site.rglob("*.css"):
        assert not IMPORTED.search(sheet.read_text("utf-8")), sheet


def test_formulas_are_drawn_by_the_browser(site: Path) -> None:
    for page in (site / "method.html", site / "zh/method.html"):
        text = page.read_text("utf-8")
        assert text.count("<math") > 50
        assert not re.search(r"\$`|\\(?:mathcal|frac|cdot|phi)\b", text), page


def test_python_has_signatures_and_meanings(site: Path) -> None:
    text = html.unescape((site / "python.html").read_text("utf-8"))
    for name in {*effnet.__all__} - {"__version__"}:
        assert f'id="effnet.{name}"' in text, name
    # a field's own docstring, and a comment beside a field
    assert "Most multiply-adds per image" in text
    assert "stochastic depth's rate behind the last block" in text


def test_search_works_offline(site: Path, tab: Page) -> None:
    tab.goto((site / "search.html").as_uri() + "?q=mahalanobis")
    tab.wait_for_selector("ul.search li")
    assert "sure.html" in tab.inner_html("ul.search")


@pytest.mark.parametrize("name", ["commands", "performance", "zh/method", "python", "troubleshooting"])
def test_a_phone_scrolls_tables_and_not_pages(site: Path, tab: Page, name: str) -> None:
    tab.goto((site / f"{name}.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
