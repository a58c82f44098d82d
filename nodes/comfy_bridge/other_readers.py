"""The readers that may be installed beside ComfyUI: diffusers, and the custom node ComfyUI-GGUF."""
from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import nodes
import torch
from torch import Tensor

from ...wanlite_model.config import TEXT_LEN, WanConfig
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.gguf_write import read_back
from ...wanlite_model.formats.keymap import wan_size
from ...wanlite_model.formats.saving import Verified
from . import memory
from .verify import CLIP_TOKENS, OPENED, Recorded, compared, verifier

log = logging.getLogger(__name__)

DIFFUSERS, GGUF_NODE = "diffusers' WanTransformer3DModel.from_pretrained", "UnetLoaderGGUF"
GGUF_LIMIT = 1e-2           # this loader takes no dtype: on a card it rounds what is not quantised to that card's, which is a tenth of this
NEEDED = ("diffusers", "accelerate")        # diffusers opens this class with accelerate only, since it keeps parts of it in fp32


def by_diffusers(recorded: Recorded, config: WanConfig) -> Callable[[Path], Verified]:
    """What write_diffusers calls with the new folder: opened by diffusers itself, in fp32 on the CPU."""
    absent = next((name for name in NEEDED if importlib.util.find_spec(name) is None), None)
    why = f"{absent} is not installed here." if absent else recorded.why
    if not why and (lack := memory.lacking(int(OPENED * torch.float32.itemsize * wan_size(config)))):
        why = f"diffusers would open it in fp32, and {lack}."

    def verify(folder: Path) -> Verified:
        if why:
            return Verified(reader=DIFFUSERS, difference=None, why=why)
        try:
            from diffusers import WanTransformer3DModel
        except Exception as error:          # broken installations raise anything; the folder is not worse for it
            log.warning("WanLite: diffusers cannot be imported (%s).", error)
            return Verified(reader=DIFFUSERS, difference=None, why="diffusers is installed and cannot be imported.")
        with torch.inference_mode(False), torch.no_grad():
            model = WanTransformer3DModel.from_pretrained(str(folder), torch_dtype=torch.float32).eval()
            x, sigma, cond = recorded.x, recorded.sigma, recorded.cond
            context = torch.nn.functional.pad(cond.context, (0, 0, 0, TEXT_LEN - cond.context.shape[1]))
            pictures = cond.clip_fea if cond.clip_fea is None else cond.clip_fea.unflatten(1, (-1, CLIP_TOKENS)).flatten(0, 1)
            velocity = model(cond.input(x), cond.timestep(x, sigma), context, encoder_hidden_states_image=pictures, return_dict=False)[0]
        del model
        gc.collect()                        # the folder is renamed next, which Windows refuses while a file in it is mapped
        return compared(velocity, recorded, DIFFUSERS)
    return verify


def by_gguf_node(recorded: Recorded, expected: Callable[[], Iterable[tuple[str, Tensor]]]) -> Callable[[Path], Verified]:
    """What write_gguf calls with the new file: opened by ComfyUI-GGUF where that is installed, else read back tensor by tensor.

    expected: (name, what a reader should get).
    """
    loader = nodes.NODE_CLASS_MAPPINGS.get(GGUF_NODE)
    if loader is not None:
        return verifier(recorded, lambda file: _opened(loader, file), "ComfyUI-GGUF's Unet Loader", GGUF_LIMIT)

    def verify(file: Path) -> Verified:
        read_back(file, expected())
        return Verified(reader=GGUF_NODE, difference=None, why="read back; not opened, since ComfyUI-GGUF is not installed here.")
    return verify


def _opened(loader: type, file: Path) -> Any:
    """The MODEL that the node itself makes of a file that is not yet where it looks: its own code, which is told this path when it asks for one."""
    own = loader.load_unet
    told = SimpleNamespace(get_full_path=lambda *_: str(file), get_full_path_or_raise=lambda *_: str(file))
    told_path = FunctionType(own.__code__, {**own.__globals__, "folder_paths": told}, own.__name__, own.__defaults__, own.__closure__)
    try:
        return told_path(loader(), file.name)[0]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        log.warning("ComfyUI-GGUF's loader on %s: %s", file.name, error)
        raise WanLiteError(f"ComfyUI-GGUF cannot open {file.name}.", "", "Nothing was saved; update ComfyUI-GGUF, or choose another format.") from error
