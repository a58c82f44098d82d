"""The graph: one file a node family. The engine is imported where a node runs, not when ComfyUI starts."""
from comfy_api.latest import ComfyExtension, io

from .compare import WanLiteCompare
from .distill import WanLiteDistill
from .lora import WanLiteRemapLoRA
from .prompts import WanLiteEncodePrompts
from .recipe import WanLiteRecipe
from .student import WanLiteCreateStudent, WanLiteLoadStudent, WanLiteSaveStudent
from .teacher import WanLiteLoadTeacher


class WanLiteExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [WanLiteLoadTeacher, WanLiteEncodePrompts, WanLiteCreateStudent, WanLiteRecipe, WanLiteDistill, WanLiteSaveStudent,
                WanLiteLoadStudent, WanLiteCompare, WanLiteRemapLoRA]
