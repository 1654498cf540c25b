"""The page in a real browser, from a file: Debian's chromium, driven by playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
from browser import open_browser
from playwright.sync_api import Browser, Page, expect
from reported import CLASSES

from effnet.metrics.intervals import wilson
from effnet.reporting import sections
from effnet.reporting.page import write_report
from effnet.reporting.subject import Subject


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(fitted: Subject, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(fitted, tmp_path_factory.mktemp("page") / "report.html").as_uri()


@contextmanager
def opened(browser: Browser, address: str, **options: object) -> Iterator[Page]:
    """The page; at the end it has said nothing, refused nothing and fetched nothing but itself."""
    page = browser.new_page(**options)  # type: ignore[arg-type]
    page.set_default_timeout(30_000)
    heard: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert heard == []
    assert [url for url in fetched if not url.startswith("data:") and url.partition("#")[0] != address] == []


def test_a_class_that_is_a_script_is_text(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:  # a dialog or an error would be heard
        name = "<script>alert(1)</script>"
        expect(page.locator("#scores").get_by_role("rowheader", name=name)).to_be_visible()


def test_nothing_else_runs(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    refused = page.evaluate(
        """() => new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (event) => done(event.violatedDirective));
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
        })"""
    )
    assert refused == "script-src-elem"
    assert page.evaluate("window.ran") is None
    page.close()


def test_the_slider_tells_what_a_threshold_does(browser: Browser, address: str, fitted: Subject) -> None:
    with opened(browser, address) as page:
        slider, status = page.get_by_label("How many images to answer"), page.get_by_role("status")
        points = sections.tabulate_coverage(fitted)["points"]
        for place in (len(points) - 1, 30):
            slider.fill(str(place))
            _, answered, right = points[place]
            share, low, high = (100 * value for value in vars(wilson(right, answered)).values())
            expect(status).to_contain_text(f"{answered / 1.2:.1f}% of the images are answered")
            expect(status).to_contain_text(f"{share:.1f}% of the answers are right ({low:.1f}% to {high:.1f}%)")
        place = page.evaluate("document.querySelector('#handle').cx.baseVal.value")
        slider.press("ArrowRight")
        assert page.evaluate("document.querySelector('#handle').cx.baseVal.value") > place


def test_a_cell_opens_its_pictures(browser: Browser, address: str, fitted: Subject) -> None:
    worst = fitted.evaluation.mistakes[0]
    with opened(browser, address) as page:
        page.get_by_role("link", name=f"{worst.true} taken for {worst.predicted}: {worst.count}", exact=True).click()
        true, predicted = CLASSES.index(worst.true), CLASSES.index(worst.predicted)
        cell = page.locator(f"#cell-{true}-{predicted}")
        expect(cell.get_by_role("listitem")).to_have_count(min(worst.count, sections.OF_PAIR))
        image = cell.get_by_role("img").first
        expect(image).to_be_visible()
        assert image.evaluate("image => image.naturalWidth") > 0
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_the_classes_are_sorted(browser: Browser, address: str, fitted: Subject) -> None:
    with opened(browser, address) as page:
        recalls = {score.name: score.right / score.n for score in fitted.evaluation.scores}
        heading = page.locator("#scores").get_by_role("columnheader", name="recall")
        names = page.locator("#scores tbody th")
        for order in ("ascending", "descending"):
            heading.get_by_role("button").click()
            expect(heading).to_have_attribute("aria-sort", order)
            found = [recalls[name] for name in names.all_text_contents()]
            assert found == sorted(found, reverse=order == "descending")


def test_without_javascript(browser: Browser, address: str, fitted: Subject) -> None:
    worst = fitted.evaluation.mistakes[0]
    with opened(browser, address, java_script_enabled=False) as page:
        expect(page.get_by_text("Does not keep the budget")).to_be_visible()
        expect(page.get_by_label("How many images to answer")).to_be_hidden()
        page.get_by_text("Pictures of").click()
        page.get_by_text(f"{worst.true} taken for {worst.predicted}: {worst.count}", exact=True).click()
        shown = page.locator(f"#cell-{CLASSES.index(worst.true)}-{CLASSES.index(worst.predicted)}")
        expect(shown.get_by_role("img").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(browser: Browser, address: str, scheme: str) -> None:
    options = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme, "has_touch": True, "is_mobile": True}
    with opened(browser, address, **options) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        paper, ink = page.evaluate(
            "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name].match(/\\d+/g)[0])"
        )
        assert (int(paper) < int(ink)) == (scheme == "dark")


def test_on_paper_the_tables_are_open(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        page.emulate_media(media="print")
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        expect(page.get_by_role("navigation")).to_be_hidden()
        expect(page.get_by_role("slider")).to_be_hidden()
        expect(page.get_by_role("table", name="Accuracy of the most confident answers")).to_be_visible()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_by_ear_and_by_keyboard(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        assert page.locator("img:not([alt]), svg:not([aria-label]):not([aria-hidden])").count() == 0
        assert page.locator("table:not(:has(caption)), section:not([aria-labelledby])").count() == 0
        assert page.locator("thead th:not([scope]), tbody th:not([scope])").count() == 0
        levels = page.locator("h1, h2, h3").evaluate_all("all => all.map((each) => Number(each.tagName[1]))")
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('href')") == "#budget"
