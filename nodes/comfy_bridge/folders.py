"""Where things lie in this ComfyUI: the names a combo offers, and the paths behind them. Never a free path."""
from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

import folder_paths

from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.files import ENDINGS
from ...wanlite_model.legacy import read_recipe

MODELS = "diffusion_models"
NONE = "none"
NOTHING, FIRST, BOTH = "nothing", "first frame", "first and last frame"         # of a folder's pictures, for image-to-video
SHOW = (FIRST, BOTH, NOTHING)
PROMPT_LISTS, BUNDLED = Path(__file__).resolve().parent.parent / "prompt_lists", "WanLite/"


def output_folder(name: str) -> Path:
    """A folder of WanLite's own below ComfyUI's output folder, or where extra_model_paths.yaml puts `wanlite_<name>`; not made here."""
    placed, _ = folder_paths.folder_names_and_paths.get(f"wanlite_{name}", ((), ()))
    return Path(placed[0]) if placed else Path(folder_paths.get_output_directory(), "wanlite", name)


def models_folder() -> Path:
    """Where new models are saved: the scanned folder that is called diffusion_models (the first one listed is models/unet)."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(MODELS)]
    return next((folder for folder in folders if folder.name == MODELS), folders[0])


def loras_folder() -> Path:
    """Where new LoRAs are saved."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def lora_names() -> list[str]:
    """LoRA files as stock loaders name them."""
    return [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(ENDINGS)]


def lora_path(name: str) -> Path:
    """The file behind one of lora_names(). Raises WanLiteError when it is gone."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise WanLiteError(f"{name} is not in ComfyUI's LoRA folders any more.", "", "Press R to refresh the list, and choose again.")
    return Path(path)


def chosen_loras(first: str, more: str, suffix: str) -> dict[str, bool]:
    """{name: whether only a wildcard found it} of lora_names(): `first`, and what each line of `more` names or matches.

    What ends with `suffix` is a result and is found by its whole name only. Raises WanLiteError where a line finds nothing.
    """
    def plain(name: str) -> str:
        return name.replace("\\", "/").lower()

    found, listed = {first: False}, lora_names()
    for line in filter(None, map(str.strip, more.splitlines())):
        exact = [name for name in listed if plain(name) == plain(line)]
        matching = [name for name in listed if fnmatchcase(plain(name), plain(line)) and not (suffix and Path(name).stem.endswith(suffix))]
        if not (exact or matching):
            raise WanLiteError(f"No LoRA that ComfyUI lists is called or matches {line!r}.", "",
                               "Write names as the list above shows them, one a line; * stands for any letters.")
        found |= dict.fromkeys(exact, False) if exact else {name: found.get(name, True) for name in matching}
    return found


def model_names() -> list[str]:
    """Safetensors files below the model folders as stock loaders name them, and WAN or diffusers folders with a slash at the end."""
    files = [name for name in folder_paths.get_filename_list(MODELS) if name.lower().endswith(ENDINGS)]
    parents = sorted({os.path.dirname(name) for name in files} - {""})
    return [f"{parent.replace(os.sep, '/')}/" for parent in parents if _config_of(parent)] + files


def recipe_names(listed: list[str]) -> list[str]:
    """Folders below the model folders, up to two deep, that hold a predecessor's config and no weights: those with weights are `listed`, of model_names()."""
    found = (config.parent.relative_to(folder).as_posix() + "/" for folder in map(Path, folder_paths.get_folder_paths(MODELS)) for deep in ("*", "*/*")
             for config in folder.glob(f"{deep}/*config.json") if not any(config.parent.glob("*.safetensors")) and read_recipe(config.parent))
    return sorted(set(found) - set(listed))


def model_path(name: str) -> Path | None:
    """The file or folder behind one of model_names(), or None when it is gone."""
    if name.endswith("/"):
        config = _config_of(name.rstrip("/"))
        return config.parent if config else None
    found = folder_paths.get_full_path(MODELS, name)
    return Path(found) if found else None


def found(name: str) -> Path:
    """The same, or WanLiteError."""
    path = model_path(name)
    if path is None:
        raise WanLiteError(f"{name} is not in ComfyUI's model folders any more.", "", "Press R to refresh the list, and choose again.")
    return path


def stock_name(path: Path) -> str:
    """What the stock Load Diffusion Model or LoRA loader calls this file; its bare name outside their folders."""
    for folder in (*folder_paths.get_folder_paths(MODELS), *folder_paths.get_folder_paths("loras")):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return path.name


def prompt_files() -> list[str]:
    """Our own lists, and the .txt files at the top of ComfyUI's input folder."""
    return [BUNDLED + name for name in _names(PROMPT_LISTS, ".txt")] + _names(Path(folder_paths.get_input_directory()), ".txt")


def prompt_file(name: str) -> Path:
    """The file behind one of prompt_files()."""
    if name.startswith(BUNDLED):
        return PROMPT_LISTS / os.path.basename(name)
    return Path(folder_paths.get_input_directory(), os.path.basename(name))


def picture_folders() -> list[str]:
    """The folders of ComfyUI's input folder."""
    top = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in top.iterdir() if path.is_dir() and not path.name.startswith(".")) if top.is_dir() else []


def picture_folder(name: str) -> Path:
    """The folder behind one of picture_folders()."""
    return Path(folder_paths.get_input_directory(), os.path.basename(name))


def bank_names() -> list[str]:
    """Prompt banks: saved by the node, and safetensors files at the top of ComfyUI's input folder."""
    saved = _names(output_folder("prompts"), ".safetensors")
    return saved + [f"input/{name}" for name in _names(Path(folder_paths.get_input_directory()), ".safetensors")]


def bank_path(name: str) -> Path:
    base = Path(folder_paths.get_input_directory()) if name.startswith("input/") else output_folder("prompts")
    return base / os.path.basename(name)


def changed(path: Path | None) -> str:
    """What a node's fingerprint holds of a file, so that editing the file runs the node again."""
    if path is None or not path.exists():
        return ""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return " ".join(f"{file.name} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files)


def _names(folder: Path, ending: str) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ending and not path.name.startswith("."))


def _config_of(relative: str) -> Path | None:
    for folder in folder_paths.get_folder_paths(MODELS):
        place = Path(folder, *relative.replace("\\", "/").split("/"))
        for name in ("config.json", "student_config.json"):         # the second: WanLite's predecessor
            if (place / name).is_file() and ".." not in place.parts:
                return place / name
    return None
