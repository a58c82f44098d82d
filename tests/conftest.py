"""Fixtures: a ComfyUI in this process, the pack imported as ComfyUI imports it, and a real server."""
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run  # noqa: E402
from demo.comfy_path import pack_module, put_comfyui_first  # noqa: E402

try:
    COMFYUI = run.find_comfyui()
except run.SetupError as error:
    raise pytest.UsageError(str(error)) from None
if COMFYUI is None:
    raise pytest.UsageError("The tests need a ComfyUI, and none is set up. Run: python run.py test")
put_comfyui_first(COMFYUI)
sys.path.append(str(ROOT / "tests"))        # for the modules named helpers_*; last, so that no folder of it hides anything


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if not hasattr(report, "wasxfail"):
        fail_if_skipped_on_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    fail_if_skipped_on_ci(report)
    return report


def fail_if_skipped_on_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    """run.py has set up all that the tests need: what is skipped on CI would hide a missing piece."""
    if report.skipped and os.environ.get("CI"):
        report.outcome, report.longrepr = "failed", f"Skipped on CI, where nothing may be missing: {report.longrepr}"


@pytest.fixture(scope="session")
def comfyui_folder() -> Path:
    """The folder of the ComfyUI under test."""
    return COMFYUI


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """ComfyUI in this process, on the CPU, with a base folder of its own.

    `comfyui.base` is that folder; `comfyui.folder_paths` and `comfyui.nodes` are ComfyUI's modules (`comfyui.nodes.UNETLoader`
    is stock). A test that takes this fixture may `import comfy.sd` and the like inside it.
    """
    early = "comfy.model_management" in sys.modules
    import comfy.cli_args
    if early and not comfy.cli_args.args.cpu:
        raise RuntimeError("comfy.model_management was imported before the `comfyui` fixture ran: the device is chosen already. "
                           "Import comfy inside tests that take the fixture.")
    base = tmp_path_factory.mktemp("comfyui")
    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = str(base)
    for name in ("models/diffusion_models", "models/vae", "models/text_encoders", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True)
    import folder_paths
    import nodes
    return SimpleNamespace(base=base, folder_paths=folder_paths, nodes=nodes)


@pytest.fixture(scope="session")
def pack(comfyui: SimpleNamespace) -> Callable[[str], ModuleType]:
    """`pack("nodes.student")` is that module of the pack, imported as ComfyUI does; "" is the pack itself.

    Its engine is not the top-level `wanlite_model` of the unit tests: expect pack("wanlite_model.errors").WanLiteError.
    """
    return pack_module
