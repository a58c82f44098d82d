"""Whose `nodes` is imported: ComfyUI's, whatever the working folder is and however the tests or the demo are started."""
import subprocess
import sys
from pathlib import Path

import pytest

from demo.comfy_path import ROOT, install_pack, put_comfyui_first

FIND_NODES = "import importlib.util; print(importlib.util.find_spec('nodes').origin)"
SETTING_UP = "import sys; from pathlib import Path; from demo.comfy_path import put_comfyui_first; put_comfyui_first(Path(sys.argv[1])); "


def origin_of_nodes(code: str, *arguments: str) -> Path:
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return Path(run.stdout.strip())


def test_a_command_run_from_the_repository_finds_comfyuis_nodes(comfyui_folder):
    assert origin_of_nodes(SETTING_UP + FIND_NODES, str(comfyui_folder)).resolve() == comfyui_folder.resolve() / "nodes.py"


def test_without_the_helper_the_repository_would_hide_comfyuis_nodes(comfyui_folder):
    """Keeps the test above able to fail: the working folder comes before PYTHONPATH."""
    hiding = "import sys; sys.path.append(sys.argv[1]); "
    assert origin_of_nodes(hiding + FIND_NODES, str(comfyui_folder)).is_relative_to(ROOT / "nodes")


def test_importing_the_wrong_nodes_first_is_refused(comfyui_folder, tmp_path):
    (tmp_path / "nodes.py").write_text("", encoding="utf-8")
    code = "import sys; sys.path.insert(0, sys.argv[2]); import nodes; " + SETTING_UP
    run = subprocess.run([sys.executable, "-c", code, str(comfyui_folder), str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "`nodes` is already imported" in run.stderr


def test_importing_the_pack_imports_nothing_heavy():
    code = ("import sys; from demo.comfy_path import import_pack; pack = import_pack(); "
            "heavy = {'torch', 'diffusers', 'peft', 'transformers', 'numpy', 'safetensors', 'nodes', 'wanlite_model'}; "
            "print(sorted(name for name in sys.modules if name.split('.')[0] in heavy or name.startswith(pack.__name__ + '.')))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_installed_pack_is_what_a_comfyui_needs_and_no_more(tmp_path):
    folder = install_pack(tmp_path)
    (folder / "left_over.py").write_text("", encoding="utf-8")
    assert install_pack(tmp_path) == folder                     # a second start replaces the copy
    names = {path.name for path in folder.iterdir()}
    assert {"__init__.py", "pyproject.toml", "LICENSE", "nodes", "wanlite_model"} <= names
    assert not names & {"left_over.py", "demo", "tests", "benchmarks", "run.py", ".venv", ".comfyui", "output"}


@pytest.mark.parametrize("entry", ["", str(ROOT)])
def test_the_repository_stays_importable_behind_comfyui(entry, comfyui_folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry, "elsewhere"] if entry else [str(ROOT), "elsewhere"])
    put_comfyui_first(comfyui_folder)
    assert sys.path == [str(comfyui_folder.resolve()), str(ROOT), "elsewhere"]
