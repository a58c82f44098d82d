"""A real ComfyUI server with the pack in its custom_nodes, one for the whole session."""
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.comfy_server import ComfyServer, running_comfyui


@pytest.fixture(scope="session")
def server(comfyui_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The running server; see ComfyServer for what it can do. Put model files below server.base before a test queues."""
    with running_comfyui(comfyui_folder, tmp_path_factory.mktemp("server"), ("--cpu",)) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A failed test that used the server shows the end of the server's log."""
    report = yield
    running = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(running, ComfyServer):
        report.sections.append(("ComfyUI's log", running.log()))
    return report
