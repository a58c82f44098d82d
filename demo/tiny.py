"""Puts the tiny WAN of the shipped template where ComfyUI looks for it: teacher, VAE, and the prompt bank that stands for a text encoder.

    python demo/tiny.py [FOLDER]

FOLDER holds models/ and input/; left out, it is the ComfyUI in whose custom_nodes this pack lies. Any Python with ComfyUI's packages will do,
that of a portable ComfyUI too.
"""
import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent      # links not followed: a pack linked into custom_nodes still lies in it
if not __package__:     # started as a file, which a portable Python does not look beside
    sys.path.insert(0, str(ROOT))

from demo import domain, words  # noqa: E402
from wanlite_model.prompts import PromptBank  # noqa: E402

MODELS = {"wan_tiny_teacher.safetensors": "diffusion_models", "wan_tiny_vae.safetensors": "vae"}      # in demo/weights: below models/
BANK = "wan_tiny_prompts.safetensors"
BANK_PROMPTS = 120                          # all that the teacher was trained on


def bank() -> PromptBank:
    """Prompts that are spread over those the teacher was trained on, encoded."""
    trained_on = domain.training_prompts()
    prompts = trained_on[::len(trained_on) // BANK_PROMPTS][:BANK_PROMPTS]
    return PromptBank(prompts=tuple(prompts), contexts=tuple(words.embed(prompt) for prompt in prompts), negative_text=domain.NEGATIVE,
                      negative=words.context([domain.NEGATIVE])[0, :1])


def place(base: Path) -> list[Path]:
    """Writes the three files below a ComfyUI's base folder and returns where they lie."""
    placed = [base / "models" / folder / name for name, folder in MODELS.items()] + [base / "input" / BANK]
    for path in placed:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name in MODELS:
            shutil.copyfile(ROOT / "demo" / "weights" / path.name, path)
        else:
            bank().save(path)
    return placed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT.parent.parent if ROOT.parent.name == "custom_nodes" else None)
    folder = parser.parse_args().folder
    if folder is None or not folder.is_dir():
        parser.error(f"{folder or 'No folder was given, and this pack lies in no custom_nodes: it'} is not a ComfyUI's folder. "
                     "Give the folder that holds ComfyUI's models and input.")
    print(*place(folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
