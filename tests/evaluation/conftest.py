"""A browser for the tests of pages."""

import shutil

import pytest


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, driven by playwright; skips where either is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, headless=True, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opens(browser):
    """opens(path, hash="", ready="body") -> the page of a file, loaded anew, when it has an element like `ready`.

    When the test ends, nothing but these files may have been asked for (`page.asked`) and nothing logged or thrown (`page.said`); a test that expects such
    a thing takes it off these lists.
    """
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.said, page.asked, files = [], [], set()
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))

    def load(path, hash="", ready="body"):
        files.add(path.as_uri())
        page.goto("about:blank")  # a new hash alone would load nothing
        page.goto(path.as_uri() + hash)
        page.wait_for_selector(ready, state="attached")
        return page

    yield load
    assert page.said == []
    assert {url.split("#")[0] for url in page.asked} <= {"about:blank", *files}
    page.close()
