"""The order of the house, read from the source: imports run downward, and each room knows only what it may know."""
import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from demo.comfy_path import ROOT

# From the ground up. A module belongs to its longest prefix here and imports only what stands below it;
# inside one package modules may import each other, as long as there is no circle.
LAYERS = (
    ("wanlite_model.errors",),
    ("wanlite_model.awake", "wanlite_model.kinds"),
    ("wanlite_model.config", "wanlite_model.files", "wanlite_model.flow"),
    ("wanlite_model.cond", "wanlite_model.roles"),
    ("wanlite_model.legacy", "wanlite_model.mixins", "wanlite_model.formats", "wanlite_model.pinned"),
    ("wanlite_model.transformer",),
    ("wanlite_model.swap",),
    ("wanlite_model.teacher",),
    ("wanlite_model.experts",),
    ("wanlite_model.prompts",),
    ("wanlite_model.compress",),
    ("wanlite_model.distill",),
    ("wanlite_model.cli",),
    ("wanlite_model.__main__",),
    ("nodes.comfy_bridge",),
    ("nodes",),
)
ENGINE_MAY_IMPORT = {"torch", "numpy", "safetensors", "filelock", "psutil", "tqdm", "diffusers", "peft", "gguf"}
COMFYUI = {"comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview",
           "node_helpers", "nodes", "server"}


class Import:
    """One imported module: its full name, whether it is written relative, and whether it runs at import."""

    def __init__(self, name: str, relative: bool, at_import: bool):
        self.name, self.relative, self.at_import = name, relative, at_import
        self.top = name.split(".")[0]


def modules(folder: str) -> dict[str, Path]:
    files = [path for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


ENGINE, NODES = modules("wanlite_model"), modules("nodes")
OURS = {**ENGINE, **NODES}


def imports(module: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {id(inner) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
             for inner in ast.walk(function)}
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, False, id(node) not in later)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:        # `from . import flow` names a module, `from .flow import velocity` does not
                inner = f"{name}.{alias.name}"
                yield Import(inner if inner in OURS else name, bool(node.level), id(node) not in later)


def layer(module: str) -> tuple[int, str]:
    """(height, the prefix that decided it)"""
    found = [(len(prefix), height, prefix) for height, prefixes in enumerate(LAYERS) for prefix in prefixes
             if module == prefix or module.startswith(prefix + ".")]
    assert found, f"{module} has no place in LAYERS: decide what it stands on"
    return max(found)[1:]


@pytest.mark.parametrize("module", [name for name in OURS if name != "wanlite_model"])
def test_imports_run_downward(module):
    height, room = layer(module)
    for imported in imports(module, OURS[module]):
        if not imported.relative or imported.name == "wanlite_model":
            continue
        below, other_room = layer(imported.name)
        assert below < height or other_room == room, f"{module} imports {imported.name}, which does not stand below it"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {imported.name for imported in imports(name, path) if imported.relative and imported.name in OURS} - {name}
             for name, path in OURS.items()}          # written without a dot, `nodes` is ComfyUI's
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", ENGINE)
def test_the_engine_knows_no_comfyui(module):
    for imported in imports(module, ENGINE[module]):
        assert imported.relative or imported.top in ENGINE_MAY_IMPORT | sys.stdlib_module_names, f"{module} imports {imported.name}"


@pytest.mark.parametrize("module", sorted(set(ENGINE) - {"wanlite_model.mixins"}))      # a base class is chosen at import
def test_what_may_be_missing_is_imported_only_where_it_is_used(module):
    for imported in imports(module, ENGINE[module]):
        assert imported.top not in ("diffusers", "peft", "gguf") or not imported.at_import, f"{module} imports {imported.name} at its top"


@pytest.mark.parametrize("module", NODES)
def test_only_the_bridge_knows_comfyuis_insides(module):
    for imported in imports(module, NODES[module]):
        if not module.startswith("nodes.comfy_bridge") and not imported.relative and imported.top in COMFYUI:
            assert imported.name in ("comfy_api", "comfy_api.latest"), f"{module} imports {imported.name}"


@pytest.mark.parametrize("module", NODES)
def test_the_pack_reaches_its_own_modules_by_relative_imports(module):
    """ComfyUI imports the pack under a name made from its path: `import wanlite_model` would not be found there."""
    for imported in imports(module, NODES[module]):
        ours = imported.top in ("wanlite_model", "demo", "tests", "benchmarks") or imported.name.startswith("nodes.comfy_bridge")
        assert imported.relative or not ours, f"{module} imports {imported.name}"


def test_the_packs_own_file_imports_nothing_when_comfyui_starts():
    assert not [imported.name for imported in imports("", ROOT / "__init__.py") if imported.at_import]
