"""The files that the shipped graphs ask for, from where ComfyUI's own WAN templates have them, and the notes that tell of them."""
from pathlib import Path

from wanlite_model.formats.workflow import EXPERT, TEXT_ENCODER, VAE

_WAN_21 = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
_WAN_22 = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"

T2V_1_3B, T2V_14B = "wan2.1_t2v_1.3B_fp16.safetensors", "wan2.1_t2v_14B_fp8_scaled.safetensors"
I2V_HIGH, I2V_LOW = (EXPERT.format(task="i2v", side=side) for side in ("high", "low"))
SPEED_LORA = "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors"

DOWNLOADS = {         # name: folder below models, address
    T2V_1_3B: ("diffusion_models", f"{_WAN_21}/diffusion_models/{T2V_1_3B}"),
    T2V_14B: ("diffusion_models", f"{_WAN_21}/diffusion_models/{T2V_14B}"),
    I2V_HIGH: ("diffusion_models", f"{_WAN_22}/diffusion_models/{I2V_HIGH}"),
    I2V_LOW: ("diffusion_models", f"{_WAN_22}/diffusion_models/{I2V_LOW}"),
    TEXT_ENCODER: ("text_encoders", f"{_WAN_21}/text_encoders/{TEXT_ENCODER}"),
    VAE: ("vae", f"{_WAN_21}/vae/{VAE}"),
    SPEED_LORA: ("loras", f"https://huggingface.co/Kijai/WanVideo_comfy/resolve/main/Lightx2v/{SPEED_LORA}"),
}

_NOTES = Path(__file__).parent / "notes"


def note(name: str, *files: str) -> str:
    """The note of the template of that name, from demo/notes: a paragraph is one line, and {files} is what these files are and where they go."""
    listed = "\n".join(f"- [{file}]({DOWNLOADS[file][1]}) → `models/{DOWNLOADS[file][0]}`" for file in files)
    blocks = (_NOTES / f"{name}.md").read_text(encoding="utf-8").strip().split("\n\n")
    return "\n\n".join(block if block.startswith(("- ", "{files}")) else " ".join(block.split("\n")) for block in blocks).replace("{files}", listed)
