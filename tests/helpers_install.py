"""The pack as it reaches a user: what git tracks, programs of ComfyUI's world that fetch and pack it, and what a server tells of it."""
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

import run
from demo.comfy_path import ROOT
from demo.comfy_server import ComfyServer

NODES = {"WanLiteLoadTeacher", "WanLiteEncodePrompts", "WanLiteCreateStudent", "WanLiteRecipe", "WanLiteDistill", "WanLiteSaveStudent",
         "WanLiteLoadStudent", "WanLiteCompare", "WanLiteRemapLoRA"}

# What the registry's archive holds of what git tracks. .comfyignore says the same the other way round: what it leaves out.
# The tiny template is for everybody: its weights, and the command that puts them in place, go along. run.py does not: the registry
# forbids to install packages from a subprocess, which is all that it does.
SHIPPED = ("__init__.py", "nodes/*", "wanlite_model/*", "web/*", "example_workflows/*", "locales/*", "docs/*", "benchmarks/*.md", "LICENSE", "README.md",
           "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "demo/__init__.py", "demo/domain.py", "demo/tiny.py", "demo/words.py", "demo/weights/*")
STUDENT = "Schüler 1"       # ASCII does not know it
WITHDRAWN = {"nodes/withdrawn.py": "", "web/withdrawn.js": "// only the older version has it\n"}         # of the older of two versions


def clean(home: Path, **more: str) -> dict[str, str]:
    """An environment in which neither git nor the programs see or change what their user has set up."""
    kept = {name: value for name, value in run.clean_environment().items() if not name.startswith("GIT_")}
    return {**kept, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "APPDATA": str(home), "DO_NOT_TRACK": "1", "COLUMNS": "200",
            "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", **more}


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-c", "safe.directory=*", "-c", "user.name=WanLite", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false",
                           "-c", "core.autocrlf=false", "-C", str(folder), *arguments], env=clean(folder), capture_output=True, text=True,
                          encoding="utf-8")
    assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def tracked() -> list[str]:
    """The repository's files, by their path in it, as they are in the working tree now."""
    return [name for name in git(ROOT, "ls-files", "-z").split("\0") if name and (ROOT / name).is_file()]


def shipped() -> list[str]:
    """Those that the registry's archive has to hold."""
    return [name for name in tracked() if any(fnmatch(name, rule) for rule in SHIPPED)]


def committed(folder: Path) -> Path:
    """Has all that lies in a repository's folder committed."""
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "a version")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """{path below folder: bytes} of what was installed, without what git and Python keep for themselves."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not {".git", "__pycache__"} & set(path.relative_to(folder).parts)}


def program(module: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """What a program of .venv-tools says, in one text; some of them end with 0 whatever they found."""
    python = run.python_of(run.TOOLS)
    assert python.is_file(), f"{run.TOOLS} is not set up, and the tests of installing need it. Run: python run.py test"
    done = subprocess.run([str(python), "-m", module, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          encoding="utf-8", errors="replace", env=clean(cwd, **environment))
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_comfyui(source: Path, target: Path) -> Path:
    """ComfyUI's code without anything that its owner put into it."""
    own = {"models", "input", "output", "temp", "user", "custom_nodes", ".git", ".venv", "venv"}
    shutil.copytree(source, target, ignore=lambda folder, names: own & set(names) if Path(folder) == source else ())
    (target / "custom_nodes").mkdir()
    return target


def left_as_it_is(custom_nodes: Path) -> None:
    """For ComfyServer: the pack is installed already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Boot:
    """What a server told of the pack in one of its folders after it started.

    files: contents() of the folder then. listed: the scripts of the pack that the page loads. web: {path of a file in web/: the bytes that were served}.
    """
    folder: Path
    files: dict[str, bytes]
    nodes: set[str]
    listed: set[str]
    web: dict[str, bytes]
    templates: set[str]
    log: str

    @property
    def seconds(self) -> float:
        """What ComfyUI says that importing the pack took, to a tenth."""
        return float(re.search(rf"([\d.]+) seconds: {re.escape(str(self.folder))}$", self.log, re.MULTILINE)[1])

    @property
    def said_of_the_pack(self) -> list[str]:
        """All lines of the log with the pack's name or folder in them: a traceback through its code, a warning about a line, a failed import."""
        return [line for line in self.log.splitlines() if "wanlite" in line.lower()]


def look(server: ComfyServer, folder: Path) -> Boot:
    prefix, files = f"/extensions/{folder.name}/", contents(folder)
    return Boot(folder=folder, files=files, log=server.log(lines=10_000),
                nodes={name for name, info in server.object_info().items() if info["python_module"] == f"custom_nodes.{folder.name}"},
                listed={path.removeprefix(prefix) for path in json.loads(server.fetch("/extensions")) if path.startswith(prefix)},
                web={name: server.fetch(quote(prefix + name.removeprefix("web/"))) for name in files if name.startswith("web/")},
                templates=set(json.loads(server.fetch("/workflow_templates")).get(folder.name, ())))
