"""ComfyUIs that got the pack as its users get it: through the Manager's command line, with git, and from the registry's archive, into a portable one."""
import os
import subprocess
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_install import STUDENT, WITHDRAWN, Boot, committed, copy_comfyui, git, left_as_it_is, look, program, tracked

import run
from demo.comfy_path import ROOT
from demo.comfy_server import running_comfyui
from demo.graph import to_api
from demo.workflows import SETTINGS, TINY, build

PORTABLE = "ComfyUI_windows_portable Übung 100% voll, in a folder with a long name"


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of what git tracks here, as it is now: two versions, of which the older one has two files more and one that is different."""
    folder = tmp_path_factory.mktemp("published") / "WanLite"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for name, text in WITHDRAWN.items():
        (folder / name).write_text(text, encoding="utf-8")
    with open(folder / "__init__.py", "a", encoding="utf-8") as entry:
        entry.write("# the older version\n")
    committed(folder)
    for name in WITHDRAWN:
        (folder / name).unlink()
    (folder / "__init__.py").write_bytes((ROOT / "__init__.py").read_bytes())
    return committed(folder)


@pytest.fixture(scope="session")
def origin(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where users clone from: it stands at the older version until `pulled` publishes the newer one."""
    folder = tmp_path_factory.mktemp("origin") / "WanLite"
    git(folder.parent, "clone", "--quiet", str(repository), str(folder))
    git(folder, "reset", "--quiet", "--hard", "HEAD~1")
    return folder


@pytest.fixture(scope="session")
def managed(origin: Path, comfyui_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    """A clean ComfyUI whose Manager's command line installed the older version, started."""
    comfyui = copy_comfyui(comfyui_folder, tmp_path_factory.mktemp("managed") / "ComfyUI")
    said = program("cm_cli", "install", f"file://localhost/{origin.as_posix().lstrip('/')}", cwd=comfyui, COMFYUI_PATH=str(comfyui))
    folder = comfyui / "custom_nodes" / "WanLite"
    assert "Installation was successful" in said and (folder / "__init__.py").is_file(), said
    with running_comfyui(comfyui, comfyui, ("--cpu",), pack=left_as_it_is) as server:
        return look(server, folder)


@pytest.fixture(scope="session")
def pulled(managed: Boot, origin: Path) -> Boot:
    """The same ComfyUI after the newer version was published, pulled, and ComfyUI started again."""
    git(origin, "pull", "--quiet", "--ff-only")
    git(managed.folder, "pull", "--quiet", "--ff-only")
    comfyui = managed.folder.parent.parent
    with running_comfyui(comfyui, comfyui, ("--cpu",), pack=left_as_it_is) as server:
        return look(server, managed.folder)


@pytest.fixture(scope="session")
def archive(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `comfy node pack`, and with it `comfy node publish`, makes for the registry."""
    folder = tmp_path_factory.mktemp("registry") / "WanLite"
    git(folder.parent, "clone", "--quiet", str(repository), str(folder))
    said = program("comfy_cli", "--skip-prompt", "node", "pack", cwd=folder)
    assert "Created zip file: node.zip" in said, said
    return folder / "node.zip"


@dataclass(frozen=True, kw_only=True, slots=True)
class Portable:
    """A portable ComfyUI with the archive in it: how it started, where demo/tiny.py put its files, and the log after a small job."""
    base: Path
    boot: Boot
    placed: list[Path]
    log: str


@pytest.fixture(scope="session")
def portable(archive: Path, comfyui_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Portable:
    """Unpacked as the Manager unpacks it, into a folder with the registry's id for a name, and started as its .bat file starts it."""
    home = tmp_path_factory.mktemp("portable") / PORTABLE
    comfyui = copy_comfyui(comfyui_folder, home / "ComfyUI")
    folder = comfyui / "custom_nodes" / "wanlite"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    python, environment = embedded_python(home, comfyui)
    tiny = subprocess.run([*python, str(folder / "demo" / "tiny.py")], env=environment, cwd=home, capture_output=True, text=True, encoding="utf-8")
    assert tiny.returncode == 0, tiny.stderr
    with running_comfyui(comfyui, comfyui, ("--cpu", "--windows-standalone-build"), python=python, environment=environment,
                         pack=left_as_it_is) as server:
        boot = look(server, folder)
        server.run(small_job(server.object_info()))
        return Portable(base=comfyui, boot=boot, placed=[Path(line) for line in tiny.stdout.splitlines()], log=server.log(lines=10_000))


def embedded_python(home: Path, comfyui: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """(command, environment) of an interpreter like Windows' embedded one, with the packages of this environment.

    It is isolated, finds ComfyUI by a line of its own path file, sees no compiler and no other program, and takes text for that of an old code
    page (here ASCII, so that nothing else passes) while names of files are Unicode.
    """
    folder, programs = home / "python_embeded", home / "no programs"
    programs.mkdir()
    venv.create(folder, symlinks=os.name != "nt")
    packages = run.packages_of(folder)
    lines = (f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})", os.path.relpath(comfyui, packages),
             'import locale; locale.setlocale(locale.LC_CTYPE, "C")')
    (packages / "python_embeded.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    system = {name: os.environ[name] for name in ("SYSTEMROOT", "TEMP", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if name in os.environ}
    return ((str(run.python_of(folder)), "-I", "-s", "-u", "-X", "utf8=0", "-X", "warn_default_encoding"),
            {**system, **run.PATIENT, "PATH": str(programs), "HOME": str(home), "LC_ALL": "C.UTF-8"})


def small_job(object_info: dict) -> dict:
    """The tiny template from the teacher to the saved student, cut down to two steps on single frames; ASCII does not know its name."""
    setting = {**SETTINGS[TINY], "name": STUDENT, "size": (64, 64, 1), "steps": 1, "job": {"steps": 2},
               "recipe": {"batch_size": 2, "teacher_steps": 1, "evaluations": 1}}
    prompt = to_api(build(setting, object_info), object_info)
    wanted = [key for key, node in prompt.items() if node["class_type"] == "WanLiteSaveStudent"]
    for key in wanted:          # grows by what each node is linked to
        wanted += {value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)} - set(wanted)
    return {key: prompt[key] for key in wanted}
