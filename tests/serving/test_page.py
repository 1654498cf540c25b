"""The page in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import open_browser
from limits import SETS, familiarity
from playwright.sync_api import Browser, FilePayload, Page, expect
from served import Colours, Served, photo, serving, wait_until

import effnet
from effnet.arch.spec import Calibration, InputSpec

LIMITS = {
    "calibration": Calibration(1.0, 0.9, 0.05, 100, "val"),
    "sets": SETS,
    "familiarity": familiarity(8, 3, "energy", threshold=5.5),  # red is unfamiliar, grey is unsure: see test_engine
}
# What a hand does with a file that it drags or pastes.
GIVE = """([type, name, data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], name));
    const options = { bubbles: true, cancelable: true };
    document.body.dispatchEvent(type === "paste"
        ? new ClipboardEvent(type, { ...options, clipboardData: files })
        : new DragEvent(type, { ...options, dataTransfer: files }));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(Colours(**LIMITS)) as server:
        yield server


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    yield from opened(browser, served)


def opened(browser: Browser, served: Served, **options: object) -> Iterator[Page]:
    """The page; at the end nothing has been refused by its policy, and nothing fetched from elsewhere."""
    page = browser.new_page(**options)  # type: ignore[arg-type]
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    complaints: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(served.url)
    yield page
    page.close()
    # a failed request is a complaint, too: those that a test provokes have a status
    assert [text for text in complaints if "Failed to load resource" not in text] == []
    assert all(url.startswith((served.url, "blob:", "data:")) for url in fetched)


def file(name: str, data: bytes) -> FilePayload:
    return {"name": name, "mimeType": "", "buffer": data}


def give(page: Page, type_: str, name: str, data: bytes) -> None:
    page.evaluate(GIVE, [type_, name, base64.b64encode(data).decode()])


def card(page: Page, name: str) -> Page:
    return page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=name))  # type: ignore[return-value]


def test_several_photos_are_chosen(page: Page) -> None:
    files = [file(f"{colour}.png", photo(colour)) for colour in ("red", "lime", "blue")]
    page.get_by_label("Choose photos").set_input_files(files)
    for name, label in (("red.png", "red"), ("lime.png", "green"), ("blue.png", "blue")):
        best = card(page, name).get_by_role("listitem").first
        expect(best).to_contain_text(label)
        expect(best).to_contain_text("98.7%")  # e^5 / (e^5 + 2)
    expect(page.get_by_role("status").first).to_contain_text("98.7%")  # screen readers hear it
    expect(page.get_by_label("Model")).to_have_value("colours")


def test_a_photo_is_dropped_or_pasted(page: Page) -> None:
    give(page, "dragenter", "blue.png", photo("blue"))
    expect(page.locator("#drop")).to_have_class("over")
    give(page, "drop", "blue.png", photo("blue"))
    expect(card(page, "blue.png").get_by_role("listitem").first).to_contain_text("blue")
    expect(page.locator("#drop")).not_to_have_class("over")
    give(page, "paste", "image.png", photo("red"))
    expect(card(page, "image.png").get_by_role("listitem").first).to_contain_text("red")


def test_an_example(page: Page) -> None:
    page.get_by_role("button", name="a cup of coffee").click()
    expect(card(page, "coffee.png").get_by_role("listitem").first).to_contain_text("%")
    assert page.get_by_alt_text("coffee.png").evaluate("image => image.naturalWidth") > 0


def test_doubts_in_words(page: Page) -> None:
    page.get_by_label("Choose photos").set_input_files([file("red.png", photo("red")), file("grey.png", photo("grey"))])
    expect(card(page, "red.png")).to_contain_text("Unfamiliar: this is unlike the images")
    expect(card(page, "grey.png")).to_contain_text("Unsure: ")
    expect(card(page, "grey.png")).not_to_contain_text("Unfamiliar")


def test_a_file_that_cannot_be_read(page: Page) -> None:
    page.get_by_label("Choose photos").set_input_files([file("text.jpg", b"no photo"), file("red.png", photo("red"))])
    expect(card(page, "text.jpg").get_by_role("alert")).to_contain_text("This file is not an image")
    expect(card(page, "text.jpg").get_by_role("button", name="Try again")).to_be_hidden()
    expect(card(page, "red.png").get_by_role("listitem").first).to_contain_text("red")  # the other is answered


def test_a_server_that_stops_in_the_middle(browser: Browser) -> None:
    engine = Colours()
    with serving(engine) as served:
        for page in opened(browser, served):
            expect(page.get_by_label("Model")).to_have_value("colours")
            engine.go.clear()
            page.get_by_label("Choose photos").set_input_files(file("red.png", photo("red")))
            expect(card(page, "red.png")).to_contain_text("is being looked at")
            wait_until(lambda: served.taken == 1)
            served.stop()  # it answers what is in flight
            expect(card(page, "red.png").get_by_role("listitem").first).to_contain_text("red")
            page.get_by_label("Choose photos").set_input_files(file("blue.png", photo("blue")))
            expect(card(page, "blue.png").get_by_role("alert")).to_contain_text("The server does not answer")
            expect(card(page, "blue.png").get_by_role("button", name="Try again")).to_be_visible()


def test_a_busy_server_is_asked_again(browser: Browser) -> None:
    with serving(Colours(), places=2) as served:
        for page in opened(browser, served):
            expect(page.get_by_label("Model")).to_have_value("colours")
            batcher = served.catalogue.engine().batcher
            batcher.taken += 2  # by others
            page.get_by_label("Choose photos").set_input_files(file("red.png", photo("red")))
            wait_until(lambda: served.number("effnet_requests_total", endpoint="predict", status="429"))
            batcher.taken -= 2
            expect(card(page, "red.png").get_by_role("listitem").first).to_contain_text("red")


def test_a_token_is_asked_for(browser: Browser) -> None:
    with serving(Colours(), token="secret") as served:
        for page in opened(browser, served):
            page.get_by_label("This server asks for a token").fill("secret")
            page.get_by_role("button", name="Use it").click()
            expect(page.get_by_label("Model")).to_have_value("colours")
            page.get_by_label("Choose photos").set_input_files(file("red.png", photo("red")))
            expect(card(page, "red.png").get_by_role("listitem").first).to_contain_text("red")


def test_where_it_looked_and_why_not_another(browser: Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = effnet.spec("b0", width=0.25, depth=0.4, resolution=64, num_classes=3)
    folder = effnet.save(effnet.EfficientNet(spec), tmp_path / "m", classes=["a", "b", "c"], input=InputSpec(64, 80))
    engine = Colours()
    engine.classifier = effnet.load(folder)
    with serving(engine) as served:
        for page in opened(browser, served):
            page.get_by_role("button", name="a cat").click()
            shown = card(page, "chelsea.png")
            shown.get_by_role("button", name="Where did it look?").click()
            expect(shown.get_by_text("Orange speaks for")).to_be_visible()
            canvas = shown.locator("canvas")
            assert canvas.evaluate("canvas => [canvas.width, canvas.height]") == [2, 2]  # the map of 64 px
            picture, map_ = shown.locator("img").bounding_box(), canvas.bounding_box()
            assert picture
            assert map_
            assert map_["width"] / picture["height"] == pytest.approx(64 / 80, rel=0.02)  # the part that is seen
            shown.get_by_label("Overlay").fill("25")
            assert canvas.evaluate("canvas => canvas.style.opacity") == "0.25"
            shown.get_by_role("button", name=re.compile("Why not [abc]")).click()
            expect(shown.get_by_text("rather than")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(browser: Browser, served: Served, scheme: str) -> None:
    options = {"viewport": {"width": 400, "height": 800}, "color_scheme": scheme, "has_touch": True, "is_mobile": True}
    for page in opened(browser, served, **options):
        name = "a photo with a long name that goes on and on and has no end in sight.png"
        page.get_by_label("Choose photos").set_input_files(file(name, photo("red")))
        expect(card(page, name).get_by_role("listitem").first).to_contain_text("red")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        camera = page.get_by_label("Take a photo")
        expect(page.get_by_text("Take a photo")).to_be_visible()
        assert camera.get_attribute("capture") == "environment"
        paper, ink = page.evaluate(
            "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name].match(/\\d+/g)[0])"
        )
        assert (int(paper) < int(ink)) == (scheme == "dark")


def nodes(page: Page) -> list[dict[str, str]]:
    """What chromium gives a screen reader, in the order of reading: role, name, description, live and the element."""
    session = page.context.new_cdp_session(page)
    found = []
    for node in session.send("Accessibility.getFullAXTree")["nodes"]:
        if not node["ignored"]:
            more = {each["name"]: str(each["value"].get("value", "")) for each in node["properties"]}
            texts = {key: str(node.get(key, {}).get("value", "")) for key in ("role", "name", "description", "value")}
            found.append(more | texts)
    return found


def test_for_a_screen_reader(page: Page) -> None:
    def spoken(role: str) -> list[dict[str, str]]:
        return [node for node in nodes(page) if node["role"] == role]

    assert [(node["name"], node["level"]) for node in spoken("heading")] == [("What is in your photos?", "1")]
    assert len(spoken("main")) == 1
    assert [node["live"] for node in spoken("status")] == ["polite"]
    files = [file("red.png", photo("red")), file("grey.png", photo("grey")), file("text.jpg", b"no photo")]
    for each in files:
        page.get_by_label("Choose photos").set_input_files(each)
        heard = page.get_by_role("alert") if each["name"] == "text.jpg" else page.locator("#status")
        expect(heard).to_contain_text(f"{each['name']}: ")
        if each["name"] != "text.jpg":
            expect(heard).to_contain_text("Unfamiliar" if each["name"] == "red.png" else "Unsure")
    assert {node["name"] for node in spoken("list")} == {"Photos", "Most likely first"}
    assert {node["name"] for node in spoken("heading")} >= {each["name"] for each in files}
    assert [node["live"] for node in spoken("alert")] == ["assertive"]
    for role in ("button", "slider", "combobox", "textbox", "link", "image"):
        assert all(node["name"] for node in spoken(role)), role
    buttons = [(node["name"], node["description"]) for node in spoken("button")]
    assert len(buttons) == len(set(buttons))  # where two have a name, the photo tells them apart
    assert ("Where did it look?", "red.png") in buttons
    again = card(page, "red.png").get_by_role("button", name="Where did it look?")
    again.focus()
    page.keyboard.press("Enter")
    expect(card(page, "red.png").get_by_role("status")).not_to_be_empty()
    assert spoken("Canvas") == []


def test_focus_is_not_lost(browser: Browser) -> None:
    with serving(Colours(), token="secret") as served:
        for page in opened(browser, served):
            page.get_by_label("This server asks for a token").fill("secret")
            page.keyboard.press("Enter")
            expect(page.get_by_label("Model")).to_have_value("colours")
            assert page.evaluate("document.activeElement.id") == "choose"
            served.stop()
            page.get_by_label("Choose photos").set_input_files(file("red.png", photo("red")))
            again = card(page, "red.png").get_by_role("button", name="Try again")
            again.focus()
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.textContent") == "red.png"


def test_by_keyboard(page: Page) -> None:
    expect(page.get_by_text("Take a photo")).to_be_hidden()  # this computer has no touch screen
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached[:4] == ["model", "choose", "a cup of coffee", "a cat"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.textContent") == "a cup of coffee"
    page.keyboard.press("Enter")
    expect(card(page, "coffee.png").get_by_role("listitem").first).to_contain_text("%")
