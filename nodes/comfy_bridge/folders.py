"""Where things lie in this ComfyUI: the names a combo offers, and the paths behind them. Never a free path."""
from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.files import ENDINGS

MODELS = "diffusion_models"
NONE = "none"
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


def model_names() -> list[str]:
    """Safetensors files below the model folders as stock loaders name them, and WAN or diffusers folders with a slash at the end."""
    files = [name for name in folder_paths.get_filename_list(MODELS) if name.lower().endswith(ENDINGS)]
    parents = sorted({os.path.dirname(name) for name in files} - {""})
    return [f"{parent.replace(os.sep, '/')}/" for parent in parents if _config_of(parent)] + files


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
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return " ".join(f"{file.stat().st_mtime_ns} {file.stat().st_size}" for file in files)


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
