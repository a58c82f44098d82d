"""The graph: one file a node family. The engine and its bridge are imported where a node runs, not when ComfyUI starts."""
from comfy_api.latest import ComfyExtension, io


class WanLiteExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return []
