"""Another name for demo.comfy_path.open_comfyui."""
from .comfy_path import open_comfyui

__all__ = ["open_comfyui"]
