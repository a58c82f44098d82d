"""Where Python finds ComfyUI and the pack: ComfyUI owns the module name `nodes`, and this repository has a folder of that name."""
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent

# What makes up the pack for a ComfyUI; the rest of the repository is for those who work on it.
PACK_FILES = ("__init__.py", "pyproject.toml", "LICENSE", "README.md")
PACK_FOLDERS = ("nodes", "wanlite_model", "web", "locales", "example_workflows")


def put_comfyui_first(comfyui: Path) -> None:
    """Makes `import nodes` and `import comfy` find ComfyUI's, with this repository right behind it on sys.path.

    Raises:
        RuntimeError: a module named `nodes` that is not this ComfyUI's has been imported already.
    """
    comfyui = Path(comfyui).resolve()
    imported = sys.modules.get("nodes")
    if imported is not None and Path(imported.__file__ or ".").resolve() != comfyui / "nodes.py":
        raise RuntimeError(f"`nodes` is already imported, from {imported.__file__}, and ComfyUI's own is {comfyui / 'nodes.py'}. "
                           "Call put_comfyui_first() before the first import that needs ComfyUI.")
    # "" stands for the working folder: when that is this repository, it would come before ComfyUI.
    rest = [entry for entry in sys.path if Path(entry or ".").resolve() not in (comfyui, ROOT)]
    sys.path[:] = [str(comfyui), str(ROOT), *rest]


def open_comfyui() -> None:
    """Makes `import comfy` work, on the CPU: the ComfyUI that put_comfyui_first() was told, else the one that run.py finds.

    Raises:
        run.SetupError: run.py finds none, or COMFYUI_PATH names none.
    """
    if importlib.util.find_spec("comfy") is None:
        import run
        folder = run.find_comfyui()
        if folder is None:
            raise run.SetupError("No ComfyUI is set up. Run `python run.py env`, which installs one, "
                                 "or set COMFYUI_PATH to the folder that holds ComfyUI's main.py.")
        put_comfyui_first(folder)
    import comfy.cli_args       # before comfy.model_management, which chooses the device when it is imported
    comfy.cli_args.args.cpu = True


def import_pack(folder: Path = ROOT) -> ModuleType:
    """The pack as ComfyUI imports it: by its path, under a name made from that path, so that only relative imports work inside."""
    name = str(folder).replace(".", "_x_")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def pack_module(name: str) -> ModuleType:
    """A module of that pack, such as "nodes.comfy_bridge.teacher"; "" is the pack itself."""
    pack = import_pack().__name__
    return importlib.import_module(f"{pack}.{name}" if name else pack)


def install_pack(custom_nodes: Path) -> Path:
    """Copies the pack into a custom_nodes folder, as a clone would lie there, and returns its folder.

    A copy and not a link: Windows lets only administrators make links.
    """
    target = custom_nodes / "WanLite"
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in PACK_FILES:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, target / name)
    for name in PACK_FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target
