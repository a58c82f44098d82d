"""Tiny random WANs and prompts that every test can afford."""
import torch

from wanlite_model.prompts import PromptBank
from wanlite_model.teacher import ModuleTeacher
from wanlite_model.transformer import WanLiteStudent


def random_wan(seed=0, spread=0.05, **fields):
    """A WAN whose every weight matters: the head of a fresh one is zero, and would hide any fault before it."""
    torch.manual_seed(seed)
    student = WanLiteStudent(**{"hidden_size": 128, "depth": 6, "ffn_dim": 256, **fields}).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return student


def random_bank(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    contexts = tuple(torch.randn(3 + i % 3, 4096, generator=generator) * 0.3 for i in range(count))
    return PromptBank(prompts=tuple(f"prompt {i}" for i in range(count)), contexts=contexts, negative_text="",
                      negative=torch.randn(2, 4096, generator=generator) * 0.3)


def random_teacher(seed=0, shift=3.0, **fields):
    return ModuleTeacher(random_wan(seed, **fields), shift=shift)
