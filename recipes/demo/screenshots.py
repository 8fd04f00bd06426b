"""Takes the pictures of the demo page for the docs: docs/images/demo.png and docs/images/demo-phone.png.

    python recipes/demo/screenshots.py

Needs: pip install -c constraints.txt -e ".[recipes,demo,test]", and Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT)]

from demo import app  # noqa: E402
from demo.page import Page  # noqa: E402
from playwright.sync_api import Browser, expect, sync_playwright  # noqa: E402
from playwright.sync_api import Page as Tab  # noqa: E402
from scoring.contenders import sampling_of  # noqa: E402

CARDS = ROOT / "model_cards"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Root has no sandbox. The others keep Chromium from looking for its maker's hosts
FLAGS = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
PATIENCE = 120_000  # ms; a busy machine is slow


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium of this machine; Playwright's own download is not needed.

    Raises:
        FileNotFoundError: There is none.
    """
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise FileNotFoundError(f"No browser: expected one of {', '.join(BROWSERS)} on PATH. Debian: apt-get install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def shipped() -> Page:
    """The tiny pair's base."""
    return Page(str(CARDS / "tiny-janus"), "cpu", **sampling_of(0.7, None))


@contextmanager
def served(page: Page) -> Iterator[str]:
    """The address of the page, served by this process on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = app.build(page, str(CARDS / "tiny-janus-uc4x"))
    app.serve(blocks, port, wait=False)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        blocks.close()


def opened(browser: Browser, address: str, width: int = 1000, height: int = 900, scale: int = 1) -> Tab:
    """The page, as a visitor of its own sees it."""
    tab = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale).new_page()
    tab.set_default_timeout(PATIENCE)
    tab.goto(address)
    expect(tab.get_by_role("button", name="Draw", exact=True)).to_be_visible(timeout=PATIENCE)
    return tab


def start(tab: Tab, prompt: str, seed: int = 0) -> None:
    """Asks for a drawing."""
    tab.get_by_label("Prompt", exact=True).fill(prompt)
    tab.get_by_label("Seed").fill(str(seed))
    tab.get_by_role("button", name="Draw", exact=True).click()


def finish(tab: Tab) -> None:
    """Waits for both pictures."""
    for steps in ("64 steps", "16 steps"):
        expect(tab.get_by_text(steps)).to_be_visible(timeout=PATIENCE)


def main(folder: Path) -> None:
    with served(shipped()) as address, chromium() as browser:
        for name, width in (("demo", 1000), ("demo-phone", 390)):
            tab = opened(browser, address, width, scale=2)
            start(tab, app.PROMPTS[0])
            finish(tab)
            tab.wait_for_timeout(1000)  # Gradio fades
            tab.screenshot(path=folder / f"{name}.png", full_page=True)


if __name__ == "__main__":
    main(ROOT / "docs" / "images")
