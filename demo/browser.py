"""ComfyUI's own page in a Chromium that is installed already, which nobody sees."""
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from run import SetupError
from wanlite_model.files import write_json

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def been_here_before(base: Path, more: Mapping[str, object] = {}) -> None:
    """Gives this base folder a user whom ComfyUI does not greet with a list of templates over the canvas. more: of the user's settings."""
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    write_json(settings, {"Comfy.TutorialCompleted": True, **more})


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for the length of a with block. While it runs, asyncio does not in this thread. Raises SetupError when none is on the PATH."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise SetupError("ComfyUI's page needs Chromium or Chrome, and none is on the PATH. On Debian and Ubuntu: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
