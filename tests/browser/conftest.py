"""A real Chromium, headless. Tests are skipped where there is none, and fail under AIRL_NEEDS_BROWSER=1."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip
SCREENSHOTS = Path(os.environ.get("AIRL_ARTIFACTS") or Path(__file__).parents[2] / "build" / "screenshots")


@dataclass
class Watched:
    """A page, and what it did that it must not: messages of the console, errors, requests beyond its own file."""

    page: object
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def screenshot(self, name: str) -> Path:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(300)
        return Path(self.page.screenshot(path=SCREENSHOTS / f"{name}.png") and SCREENSHOTS / f"{name}.png")


@pytest.fixture(scope="session")
def browser() -> Iterator:
    found = os.environ.get("AIRL_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = "no Chromium: install the package chromium, or name one in AIRL_CHROMIUM"
        if os.environ.get("AIRL_NEEDS_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (make setup)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser) -> Iterator:
    """visit(file, width=1280, height=1000, scheme="light") -> Watched, once every plot is drawn.

    Afterwards: nothing was written to the console, and nothing but the file was asked for.
    """
    opened = []

    def visit(file: Path, *, width: int = 1280, height: int = 1000, scheme: str = "light") -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
        )
        watched = Watched(context.new_page())
        opened.append((watched, file))
        watched.page.on("console", lambda message: watched.said.append(f"{message.type}: {message.text}"))
        watched.page.on("pageerror", lambda error: watched.said.append(f"error: {error}"))
        watched.page.on("request", lambda request: watched.asked.append(request.url))
        watched.page.goto(file.as_uri())
        watched.page.wait_for_selector("html[data-plotted]", timeout=60_000)
        return watched

    yield visit
    for watched, file in opened:
        assert watched.said == []
        assert {url for url in watched.asked if not url.startswith(("data:", "blob:"))} == {file.as_uri()}
        watched.page.context.close()
