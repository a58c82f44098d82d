"""WanLite: smaller and faster WAN video models, made in ComfyUI. ComfyUI reads this file when it starts: nothing runs here."""


async def comfy_entrypoint():
    """Called by ComfyUI once; returns the extension that lists the nodes."""
    from .nodes import WanLiteExtension
    return WanLiteExtension()
