"""ComfyUI's registry takes the pack: its own checks pass, the archive holds what a user needs and no more, and the published rules are kept."""
import ast
import posixpath
import re
import zipfile
from collections.abc import Iterator

import pytest
from helpers_install import git, program, shipped

from demo.comfy_path import ROOT

try:
    import tomllib
except ModuleNotFoundError:     # Python 3.10
    import tomli as tomllib

MEGABYTES = 12      # the tiny template's weights are nine of them
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CODE = [name for name in shipped() if name.endswith((".py", ".js"))]


def validated(folder) -> list[str]:
    return program("comfy_cli", "--skip-prompt", "node", "validate", cwd=folder).splitlines()


def test_the_registrys_own_check_has_nothing_to_say(archive):
    assert sorted(validated(archive.parent)) == ["Running security checks...", "Validating node configuration...",
                                                 "✓ All validation checks passed successfully"]


def test_the_registrys_own_check_can_speak(archive, tmp_path):
    folder = tmp_path / "spoiled"
    git(tmp_path, "clone", "--quiet", str(archive.parent), str(folder))
    (folder / "nodes" / "bad.py").write_text("eval(input())\n", encoding="utf-8")
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(text.replace('">=0.3.75"', '">=0.3"'), encoding="utf-8")
    said = "\n".join(validated(folder))
    assert "Security warnings found" in said and "nodes/bad.py" in said and "Invalid requires-comfyui format" in said


def test_the_archive_holds_what_a_user_needs_and_no_more(archive):
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
    assert sorted(names) == sorted(shipped())
    assert {"__init__.py", "pyproject.toml", "LICENSE", "README.md", "nodes/distill.py", "wanlite_model/transformer.py", "web/wanlite.js",
            "nodes/prompt_lists/video.txt", "example_workflows/wanlite_tiny_demo.json", "demo/weights/wan_tiny_vae.safetensors"} <= set(names)
    assert archive.stat().st_size < MEGABYTES * 2**20


def test_what_the_archive_leaves_out_is_not_missed_by_what_it_holds():
    """No module that goes along imports one that does not, and no page links a file that does not."""
    for name in (name for name in shipped() if name.endswith(".md")):
        folder = "web/docs" if name.startswith("web/docs/") else posixpath.dirname(name)        # ComfyUI looks there for a translated page's pictures too
        links = re.findall(r"\]\(([^)\s#]+)", (ROOT / name).read_text(encoding="utf-8"))
        linked = {posixpath.normpath(posixpath.join(folder, link)) for link in links if not link.startswith("https://")}
        assert linked <= set(shipped()), name
    held = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in shipped() if name.endswith(".py")}
    for name in (name for name in shipped() if name.endswith(".py")):
        tops = {alias.name for node in ast.walk(tree_of(name)) if isinstance(node, ast.Import) for alias in node.names}
        tops |= {f"{node.module}.{alias.name}" for node in ast.walk(tree_of(name)) if isinstance(node, ast.ImportFrom) and not node.level
                 for alias in node.names if node.module.split(".")[0] in ("demo", "wanlite_model")}
        wanted = {top for top in tops if top.split(".")[0] in ("demo", "wanlite_model", "benchmarks", "tests", "run")}
        assert {top for top in wanted if top not in held and top.rpartition(".")[0] not in held} == set(), name


def test_the_projects_fields_are_what_the_registry_asks_for():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z](?:[._-]?[a-z0-9])*", project["name"]) and len(project["name"]) < 100 and "comfy" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"file": "LICENSE"} and project["description"].endswith(".") and project["requires-python"] == ">=3.10"
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert comfy["PublisherId"] and comfy["DisplayName"] == "WanLite"
    for address in (*project.get("urls", {}).values(), comfy.get("Icon", "https://"), comfy.get("Banner", "https://")):
        assert address.startswith("https://")


def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def against_the_rules(tree: ast.Module) -> Iterator[str]:
    """What the registry's published standards forbid: code made from text, shells, and packages installed while ComfyUI runs."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            yield from modules & {"pip", "ensurepip", "marshal", "pickle", "ctypes.util", "pty"}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load") or name.startswith(("os.exec", "os.spawn")):
                yield name
            if name.startswith("subprocess.") or name.split(".")[-1] in ("Popen", "check_call", "check_output", "create_subprocess_exec"):
                said = {word for inner in ast.walk(node) if isinstance(inner, ast.Constant) for word in re.split(r"\W+", str(inner.value))}
                yield from said & {"pip", "pip3", "uv", "conda"}
                yield from ("shell=True" for word in node.keywords if word.arg == "shell")


@pytest.mark.parametrize("line, found", [
    ("eval(text)", "eval"), ("exec(open(path).read())", "exec"), ("os.system('ls')", "os.system"), ("import pickle", "pickle"),
    ("__import__(name)", "__import__"),
    ("subprocess.run([sys.executable, '-m', 'pip', 'install', 'x'])", "pip"), ("subprocess.check_call('uv pip install x', shell=True)", "uv"),
    ("from pip import main", "pip"), ("torch.load(path)", "torch.load")])
def test_what_the_registry_forbids_is_seen(line, found):
    assert found in list(against_the_rules(ast.parse(line)))


def test_the_registrys_rules_are_kept():
    assert {name: list(against_the_rules(tree_of(name))) for name in CODE if name.endswith(".py") and list(against_the_rules(tree_of(name)))} == {}


def test_all_code_can_be_read():
    """The registry takes no obfuscated code: lines are short, and letters are letters."""
    for name in CODE:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert max(map(len, text.splitlines()), default=0) < 300, name
        assert not re.search(r"(?:\\x[0-9a-f]{2}){8}|[A-Za-z0-9+/]{120}", text), name
