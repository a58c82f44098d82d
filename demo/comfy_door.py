"""ComfyUI for the training and measuring commands: found, put on sys.path and kept on the CPU."""
import os
from pathlib import Path

from .comfy_path import ROOT, put_comfyui_first


def open_comfyui() -> None:
    """Makes `import comfy` work: from COMFYUI_PATH, else from the .comfyui that run.py installs, else from the ComfyUI around the project.

    Raises:
        FileNotFoundError: none of the three is a ComfyUI.
    """
    places = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    places += [ROOT / ".comfyui", ROOT.parent.parent]
    folder = next((place for place in places if (place / "comfy" / "sd.py").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"No ComfyUI in {', '.join(map(str, places))}. Run `python run.py env`, which installs one, "
                                "or set COMFYUI_PATH to the folder that holds its main.py.")
    put_comfyui_first(folder)
    import comfy.cli_args       # before comfy.model_management, which chooses the device when it is imported
    comfy.cli_args.args.cpu = True
