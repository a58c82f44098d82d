"""A real ComfyUI server with the pack in its custom_nodes, and its page in a real Chromium: the page that comes with it, and the newest one."""
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers_page import Graph, put_files
from playwright.sync_api import Browser, BrowserContext, Page, expect

from demo.browser import been_here_before, chromium
from demo.comfy_server import ComfyServer, running_comfyui
from run import NEWEST_PAGE

PATIENCE = 120_000      # milliseconds
PAGES = {"own page": (), "newest page": ("--front-end-root", str(NEWEST_PAGE))}


@pytest.fixture(scope="session")
def servers(comfyui_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ComfyServer]]:
    """servers("newest page") is the running server of that page, with the files of put_files; each is started once."""
    with ExitStack() as stack:
        @functools.cache
        def running(name: str) -> ComfyServer:
            base = tmp_path_factory.mktemp("browser")
            been_here_before(base)
            server = stack.enter_context(running_comfyui(comfyui_folder, base, ("--cpu", *PAGES[name])))
            put_files(base)
            return server

        yield running


@pytest.fixture(params=list(PAGES))
def server(request: pytest.FixtureRequest, servers: Callable[[str], ComfyServer]) -> ComfyServer:
    return servers(request.param)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For one module: while Playwright runs, asyncio does not in this thread, and the tests that come next need it."""
    expect.set_options(timeout=PATIENCE)
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that remembers nothing."""
    context = browser.new_context(viewport={"width": 1800, "height": 1100})
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """An empty page."""
    return context.new_page()


@pytest.fixture(params=[False, True], ids=["canvas", "vue"])
def graph(request: pytest.FixtureRequest, page: Page, server: ComfyServer) -> Iterator[Graph]:
    """What a user has before them, with the nodes that a canvas draws and with Vue's. Nothing that it queued goes on afterwards."""
    graph = Graph(page, server, request.param)
    yield graph
    graph.end()
