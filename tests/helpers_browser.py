"""The chat page in a real browser: what test_ui.py and test_mc_ui.py share. The fixtures are in conftest.py."""

import contextlib
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ARGS += ["--disable-sync", "--no-first-run"]
WATCH = """
window.ran = []; window.violations = [];
window.alert = window.prompt = window.confirm = (text) => window.ran.push(text);
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(
    `${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@contextlib.contextmanager
def browsing(profile):
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS, downloads_path=profile)
        yield browser
        browser.close()


@contextlib.contextmanager
def watched_pages(browser):
    """Yields open_page(url, …). Afterwards nothing may have gone wrong in the pages that the test did not name."""
    contexts, faults = [], []

    def open_page(url, expected=r"^$", script="", ready=True, **options):
        """
        The chat page at this address in a fresh profile. expected: a pattern of complaints that are no fault. ready:
        whether it will know its server by itself.
        """
        usual = {"viewport": {"width": 1100, "height": 760}, "reduced_motion": "reduce", "base_url": url}
        context = browser.new_context(**(usual | options))
        context.set_default_timeout(8000)
        context.add_init_script(WATCH + script)
        contexts.append((context, expected))
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        page.on(
            "console",
            lambda line: (
                line.type in ("error", "warning") and not re.search(expected, line.text) and faults.append(line.text)
            ),
        )
        page.goto("")
        if ready:
            expect(page.locator("#model")).to_contain_text(re.compile(r"d\d"))
        return page

    yield open_page
    for context, expected in contexts:
        for page in context.pages:
            faults += page.evaluate("window.ran")
            faults += [line for line in page.evaluate("window.violations") if not re.search(expected, line)]
        context.close()
    assert faults == [], faults


def ask(page, text):
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")


def finished(page):
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
