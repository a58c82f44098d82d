"""Prompts through ComfyUI's text encoder, as far as a bank does not know them."""
from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...wanlite_model.config import TEXT_LEN
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.place import check_name
from ...wanlite_model.formats.workflow import NEGATIVE
from ...wanlite_model.prompts import HOLDOUT_PROMPTS, PromptBank, parse_prompts, trim
from . import folders

ENOUGH = 24             # prompts of a job whose student is to know more than them


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The prompts a node asks for. known: {text: context [L, 4096]} of those the bank holds, the negative prompt among them."""
    prompts: tuple[str, ...]
    negative: str
    known: Mapping[str, Tensor]

    @classmethod
    def of(cls, prompts: str, prompt_file: str, template: str, negative: str, bank: str) -> Wanted:
        """From the node's widgets. Raises WanLiteError without any prompt, or when a file cannot be read."""
        stored = PromptBank.load(folders.bank_path(bank)) if bank != folders.NONE else None
        text = f"{prompts}\n{_read(prompt_file)}" if prompt_file != folders.NONE else prompts
        from_bank = stored is not None and not text.strip()
        texts = stored.prompts if from_bank else tuple(template.replace("{prompt}", prompt) for prompt in parse_prompts(text))
        negative = negative or (stored.negative_text if stored else NEGATIVE)
        held = {} if stored is None else {**dict(zip(stored.prompts, stored.contexts)), stored.negative_text: stored.negative}
        return cls(prompts=texts, negative=negative, known={t: held[t] for t in (*texts, negative) if t in held})

    @property
    def missing(self) -> tuple[str, ...]:
        """The texts that have to be encoded."""
        return tuple(dict.fromkeys(text for text in (*self.prompts, self.negative) if text not in self.known))

    def check(self, clip: Any, preview: int, save_as: str) -> None:
        """Raises WanLiteError when a text has to be encoded and nothing is there to do it, when there is no prompt `preview`, or when
        another bank has the name `save_as`.
        """
        if self.missing and clip is None:
            raise WanLiteError(f"{len(self.missing)} texts are in no bank (first: {self.missing[0][:60]!r}) and no CLIP is connected.", "",
                               "Connect WAN's text encoder, or choose a bank that holds these prompts and this negative prompt.")
        if preview > len(self.prompts):
            raise WanLiteError(f"preview is {preview} and there are {len(self.prompts)} prompts.", "", f"Set it between 1 and {len(self.prompts)}.")
        path = _bank_path(save_as) if save_as else None
        if path is not None and path.exists() and (self.missing or not _same(PromptBank.load(path), self._bank(self.known))):
            raise _taken(path)

    def encode(self, clip: Any) -> Generator[int, None, PromptBank]:
        """Yields how many texts are encoded, after each. Raises WanLiteError when the encoder is not WAN's."""
        contexts = dict(self.known)
        for done, text in enumerate(self.missing, start=1):
            with torch.inference_mode():        # as CLIPTextEncode runs
                encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]          # [1, 512, 4096]
            contexts[text] = trim(encoded.float().cpu().clone())
            yield done
        return self._bank(contexts)

    def _bank(self, contexts: Mapping[str, Tensor]) -> PromptBank:
        return PromptBank(prompts=self.prompts, contexts=tuple(contexts[text] for text in self.prompts), negative_text=self.negative,
                          negative=contexts[self.negative])


def too_few(count: int) -> str:
    """A warning when there are fewer prompts than a student can be judged by, or should learn from; else nothing."""
    if count < HOLDOUT_PROMPTS:
        return (f" {count} prompts are too few: none can be held out to measure on, and the student learns these by heart. Give {ENOUGH} or more; "
                "prompt_file has a list of ours to add.")
    if count < ENOUGH:
        return f" {count} prompts are few: the student knows little else afterwards. Better {ENOUGH} or more; prompt_file has a list of ours to add."
    return ""


def conditioning(context: Tensor) -> list:
    """CONDITIONING as the stock text encoder node makes it: [1, 512, 4096], zero-padded."""
    padded = torch.nn.functional.pad(context.float(), (0, 0, 0, TEXT_LEN - len(context)))
    return [[padded.unsqueeze(0), {"pooled_output": None}]]


def save_bank(bank: PromptBank, name: str) -> str:
    """Saves it under output/wanlite/prompts and says so. Raises WanLiteError when the name is taken by another bank, or is no name."""
    path = _bank_path(name)
    if path.exists():
        if _same(PromptBank.load(path), bank):
            return f" Already saved as {path.name}."
        raise _taken(path)
    bank.save(path)
    return f" Saved as {path.name}."


def _bank_path(name: str) -> Path:
    return folders.output_folder("prompts") / f"{check_name(name, 'a bank')}.safetensors"


def _same(one: PromptBank, other: PromptBank) -> bool:
    return (one.prompts, one.negative_text, one.fingerprint) == (other.prompts, other.negative_text, other.fingerprint)


def _taken(path: Path) -> WanLiteError:
    return WanLiteError(f"A bank named {path.stem} is already there.", "Nothing was encoded or overwritten.",
                        f"Choose {path.name} as the bank to use what it holds, and leave save_as empty or type another name.")


def _read(name: str) -> str:
    try:
        return folders.prompt_file(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WanLiteError(f"{name} cannot be read ({error}).", "Prompts come as a UTF-8 text file in ComfyUI's input folder.") from error
