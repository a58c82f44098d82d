"""What WanLite's predecessor wrote: ten fields, and tensors that no WAN has."""
import json

import torch
from safetensors.torch import save_file

FIELDS = {"model_type": "WanLiteStudent", "hidden_size": 1024, "depth": 16, "num_heads": 16, "num_channels": 4, "image_size": 256, "patch_size": 16,
          "text_max_length": 77, "text_encoder_output_dim": 768, "projection_factor": 1.0}
WEIGHTS = {"conv_in.weight": torch.zeros(8, 4, 3, 3), "blocks.0.attn.in_proj_weight": torch.zeros(24, 8), "conv_out.bias": torch.zeros(4)}
LAYOUTS = {"student_config.json": ("diffusion_model.safetensors",), "config.json": ("diffusion_pytorch_model.safetensors",),
           "config.json and a projection": ("diffusion_pytorch_model.safetensors", "output_proj.safetensors"), "no weights": (), "only student_config.json": ()}


def write_predecessor(folder, layout, **changes):
    """The folder, in one of its layouts; changes: of its fields."""
    folder.mkdir(parents=True)
    name = "student_config.json" if "student" in layout else "config.json"
    (folder / name).write_text(json.dumps({**FIELDS, **changes}), encoding="utf-8")
    for file in LAYOUTS[layout]:
        save_file({"output_proj.weight": torch.zeros(4, 4)} if "proj.s" in file else WEIGHTS, folder / file)
    return folder
