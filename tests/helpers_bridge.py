"""What the tests of the bridge and the nodes ask a teacher, and how they compare its answers."""
import torch

from wanlite_model.cond import Cond


class TextEncoder:
    """Stands for umt5-xxl, whose 11 GB no test can hold: an embedding that depends on the text, padded to 512 as WAN's is."""

    def __init__(self, width=4096):
        self.width, self.asked = width, []

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        self.asked.append(text)
        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        context = torch.zeros(1, 512, self.width)
        context[:, :len(text.split())] = torch.randn(len(text.split()), self.width, generator=generator)
        return [[context, {"pooled_output": None}]]


def state(batch=2, seed=0):
    """(x [B, 16, 3, 8, 12], sigma [B], condition of 7 tokens)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 16, 3, 8, 12, generator=generator)
    return x, torch.linspace(0.95, 0.1, batch), Cond(context=torch.randn(batch, 7, 4096, generator=generator) * 0.3)


def relative(found, expected):
    """The largest difference as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


PATCHED = ("blocks.1.ffn.0", "blocks.3.self_attn.q")


def factors(model, rank=4, seed=1, names=PATCHED):
    """{layer: (down [rank, columns], up [rows, rank])}, random."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in names:
        rows, columns = model.model.diffusion_model.get_submodule(name).weight.shape
        found[name] = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    return found


def lora(model, strength, rank=4, seed=1, names=PATCHED):
    """The MODEL with a LoRA on some layers, as ComfyUI's own LoRA loader makes it."""
    import comfy.sd
    file = {}
    for name, (down, up) in factors(model, rank, seed, names).items():
        file |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    return comfy.sd.load_lora_for_models(model, None, file, strength, 0.0)[0]


def lora_change(model, strength):
    """{weight: what that LoRA adds to it}."""
    return {f"{name}.weight": strength * up @ down for name, (down, up) in factors(model).items()}


def call(node, **given):
    """A node's outputs, run as ComfyUI runs it: in inference mode, widgets that are not given at their defaults."""
    defaults = {widget.id: widget.default for widget in node.GET_SCHEMA().inputs if getattr(widget, "default", None) is not None}
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE({}).EXECUTE_NORMALIZED(**{**defaults, **given}).result


def empty_latent(width=64, height=64, frames=5, channels=16):
    """What EmptyHunyuanLatentVideo makes."""
    return {"samples": torch.zeros(1, channels, (frames - 1) // 4 + 1, height // 8, width // 8)}


def tree(folder):
    """Every file below a folder with its size: equal before and after means that nothing on disk changed."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
