"""A real ComfyUI server with the pack in its custom_nodes, and its page in a real Chromium."""
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from demo.comfy_server import ComfyServer, running_comfyui
from wanlite_model.files import write_json

PATIENCE = 120_000      # milliseconds
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def server(comfyui_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The running server. Its user has been here before: ComfyUI greets a new one with a list of templates over the canvas."""
    base = tmp_path_factory.mktemp("browser")
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    write_json(settings, {"Comfy.TutorialCompleted": True})
    with running_comfyui(comfyui_folder, base, ("--cpu",)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For these tests only: while Playwright runs, asyncio does not in this thread."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail("The tests of the page need Chromium or Chrome, and none is on the PATH. On Debian and Ubuntu: apt-get install chromium")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page of a browser that remembers nothing."""
    page = browser.new_page(viewport={"width": 1800, "height": 1100})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()
