"""Installing the pack changes no installed package, beside the newest transformers and beside version 4."""
import ast
import json
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import run as set_up
from demo.comfy_path import ROOT

try:
    import tomllib
except ModuleNotFoundError:     # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
NEVER_LISTED = {"torch", "torchvision", "torchaudio", "torchsde", "transformers", "tokenizers", "huggingface-hub", "accelerate",
                "bitsandbytes", "triton", "xformers", "opencv-python", "pillow"}


def pip(python: Path, *arguments: str) -> str:
    run = subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *arguments],
                         capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return run.stdout


def changed(python: Path, *requirements: str) -> dict[str, str]:
    """What installing `requirements` into that environment would replace: {name: "old -> new"}."""
    installed = {canonicalize_name(package["name"]): package["version"] for package in json.loads(pip(python, "list", "--format", "json"))}
    report = json.loads(pip(python, "install", "--dry-run", "--quiet", "--report", "-", *requirements))
    wanted = {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
    return {name: f"{installed[name]} -> {version}" for name, version in wanted.items() if name in installed}


@pytest.fixture(scope="session")
def beside_transformers_4(tmp_path_factory) -> Path:
    """The Python of an environment with transformers 4.57, and what that pins, as many ComfyUI users have it."""
    folder = tmp_path_factory.mktemp("transformers4") / "venv"
    venv.create(folder, symlinks=sys.platform != "win32")
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip(python, "install", "--no-compile", "transformers==4.57.*")     # compiling it takes longer than the rest
    return python


def test_beside_the_newest_transformers_nothing_changes():
    assert changed(Path(sys.executable), *DEPENDENCIES) == {}


def test_beside_transformers_4_nothing_changes(beside_transformers_4):
    assert changed(beside_transformers_4, *DEPENDENCIES) == {}


def test_diffusers_would_change_transformers_4s_pins_and_is_therefore_only_an_extra(beside_transformers_4):
    """Also what shows that the two tests above can fail."""
    assert "huggingface-hub" in changed(beside_transformers_4, *(pin for pin in set_up.TEST if pin.startswith("diffusers")))
    assert [Requirement(line).name for line in EXTRAS["diffusers"]] == ["diffusers"]


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_every_small_package_that_run_py_installs_exists_for_python(version, tmp_path):
    pins = [Requirement(pin) for pin in (*set_up.CLIENT, *set_up.TEST, *set_up.TEST_WITHOUT_DEPENDENCIES, *set_up.PROGRAMS, set_up.COMFYUI_PACKAGE)]
    # pip would evaluate the markers for the Python that runs it.
    wanted = [f"{pin.name}{pin.specifier}" for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": version})]
    assert len({Requirement(line).name for line in wanted}) == len(wanted) == len({pin.name for pin in pins})
    pip(Path(sys.executable), "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--only-binary=:all:",
        "--python-version", version, "--target", str(tmp_path / "nowhere"), *wanted)


def test_every_dependency_is_one_that_comfyui_already_has(comfyui_folder):
    lines = (comfyui_folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    theirs = {canonicalize_name(r.name): r.specifier for r in (Requirement(x) for x in lines if x.strip() and not x.startswith(("#", "-")))}
    for line in DEPENDENCIES:
        ours = Requirement(line)
        name = canonicalize_name(ours.name)
        assert name not in NEVER_LISTED
        if name == "filelock":          # torch requires it, without a bound
            assert "torch" in theirs and not ours.specifier
            continue
        bounds = [bound for bound in ours.specifier if bound.operator != ">="]
        assert not bounds, f"{line} could force another version on a working ComfyUI"
        if name in theirs and not theirs[name]:         # any version will do
            assert not ours.specifier
            continue
        lowest = min(bound.version for bound in theirs[name])
        assert all(lowest in ours.specifier for _ in ours.specifier), f"{line} asks for more than ComfyUI's {theirs[name]}"


def test_no_extra_and_no_other_file_installs_anything():
    for line in (line for extra in EXTRAS.values() for line in extra):
        assert canonicalize_name(Requirement(line).name) not in NEVER_LISTED
    # ComfyUI-Manager runs the first and installs the second.
    assert not (ROOT / "install.py").exists() and not (ROOT / "requirements.txt").exists()


def test_comfyui_reads_the_packs_metadata(comfyui_folder):
    from comfy_config import config_parser
    config = config_parser.extract_node_configuration(str(ROOT))
    assert (config.project.name, config.tool_comfy.display_name) == ("wanlite", "WanLite")
    assert config.tool_comfy.publisher_id and config.project.license.file == "LICENSE"
    minimum = PROJECT["tool"]["comfy"]["requires-comfyui"]
    assert minimum.startswith(">=") and minimum.count(".") == 2      # the registry takes three components only


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_all_that_comfyui_imports_comes_with_the_demo_and_not_only_with_the_tests(comfyui_folder):
    """The packages for the tests are in this environment too, and would hide one that the demo alone lacks."""
    requirements = (comfyui_folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    brought = closure([*set_up.TORCH, *set_up.UNSAID, *set_up.CLIENT, *(line for line in requirements if line.strip() and line[0] not in "#-")])
    owners = metadata.packages_distributions()
    files = [comfyui_folder / name for name in ("main.py", "server.py", "execution.py", "nodes.py", "folder_paths.py")]
    files += [path for folder in ("app", "comfy", "comfy_execution", "middleware", "utils") for path in (comfyui_folder / folder).rglob("*.py")]
    imported = {name for path in files for name in modules_of(path)} - {path.stem for path in comfyui_folder.iterdir()}
    lacking = {name for name in imported & owners.keys() if not brought & {canonicalize_name(owner) for owner in owners[name]}}
    assert {"requests", "aiohttp", "transformers"} <= imported and lacking == set()


def closure(requirements: list[str]) -> set[str]:
    """The distributions that these bring along, as installed here."""
    found, left = set(), [Requirement(line) for line in requirements]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found.add(name)
        try:
            left += [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:       # not for this system
            continue
    return found


def modules_of(path: Path) -> set[str]:
    """The top-level modules that a file imports as soon as it is itself imported."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return ({alias.name.split(".")[0] for node in body if isinstance(node, ast.Import) for alias in node.names}
            | {node.module.split(".")[0] for node in body if isinstance(node, ast.ImportFrom) and node.module and not node.level})
