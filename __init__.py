"""WanLite: smaller and faster WAN video models, made in ComfyUI. ComfyUI reads this file when it starts: no more runs here than has to."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI once; returns the extension that lists the nodes."""
    from .nodes import WanLiteExtension
    from .nodes.comfy_bridge.routes import add_routes
    add_routes()
    return WanLiteExtension()
