"""Opening a page as its readers do."""

import shutil
from pathlib import Path

import html5lib
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OFFLINE = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
OFFLINE += ["--disable-sync", "--no-first-run", "--disable-quic"]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


def check_html(file: Path) -> str:
    """Raise an error where the file is not valid; its text."""
    text = file.read_text(encoding="utf-8")
    html5lib.HTMLParser(strict=True).parse(text)
    return text


def browse(file: Path) -> None:
    """Open a page in Chromium, on a phone and on a desk: nothing in the console, no request, no broken picture, and
    nothing wider than the screen."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        for size, scheme in ((DESK, "light"), (PHONE, "dark")):
            page = browser.new_page(viewport=size, color_scheme=scheme)
            found: list[str] = []
            page.on("console", lambda message, found=found: found.append(message.text))
            page.on("pageerror", lambda error, found=found: found.append(str(error)))
            page.on("request", lambda request, found=found: found.append(request.url))
            page.goto(file.resolve().as_uri())
            of_network = [text for text in found if not text.startswith(("file:", "data:"))]
            assert of_network == []
            assert sum(text.startswith("file:") for text in found) == 1  # the page itself
            assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            page.close()
        browser.close()
