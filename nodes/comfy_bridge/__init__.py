"""The door between ComfyUI and the engine: no other place imports comfy, folder_paths or server."""
