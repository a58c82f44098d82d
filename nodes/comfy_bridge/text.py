"""Prompts through ComfyUI's text encoder, as far as a bank does not know them, or as stock nodes have encoded them."""
from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from comfy_execution.graph import ExecutionBlocker
from torch import Tensor

from ...wanlite_model.cond import Shown
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.place import check_name
from ...wanlite_model.formats.workflow import NEGATIVE
from ...wanlite_model.prompts import HOLDOUT_PROMPTS, PromptBank, parse_prompts, trim
from . import folders
from .conditions import given_frames, rows_of
from .folders import NOTHING
from .latents import check_vae, size_of
from .pictures import Encoder, Item, items_of

ENOUGH = 24             # prompts of a job whose student is to know more than them


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The prompts a node asks for. known: {text: context [L, 4096]} of those the bank holds, the negative prompt among them. shown: what the bank
    shows with them, where all come from it. items: the pictures or clips that they are the captions of.
    """
    prompts: tuple[str, ...]
    negative: str
    known: Mapping[str, Tensor]
    shown: tuple[Shown, ...] = ()
    items: tuple[Item, ...] = ()

    @classmethod
    def of(cls, prompts: str, prompt_file: str, template: str, negative: str, bank: str, folder: str, show: str) -> Wanted:
        """From the node's widgets. Raises WanLiteError without any prompt, when a file cannot be read, or when two places say what the prompts are."""
        stored = PromptBank.load(folders.bank_path(bank)) if bank != folders.NONE else None
        texts = None if stored is None else (stored.prompts, stored.negative_text)
        wanted, negative, items = _asked(prompts, prompt_file, template, negative, texts, folder, show)
        held = {} if stored is None else {**dict(zip(stored.prompts, stored.contexts)), stored.negative_text: stored.negative}
        from_bank = stored is not None and wanted is stored.prompts
        return cls(prompts=wanted, negative=negative, known={t: held[t] for t in (*wanted, negative) if t in held},
                   shown=stored.shown if from_bank else (), items=items)

    @property
    def missing(self) -> tuple[str, ...]:
        """The texts that have to be encoded."""
        return tuple(dict.fromkeys(text for text in (*self.prompts, self.negative) if text not in self.known))

    def check(self, clip: Any, preview: int, save_as: str) -> None:
        """Raises WanLiteError when a text has to be encoded and nothing is there to do it, when there is no prompt `preview`, or when
        another bank has the name `save_as` (with pictures that shows when they are encoded).
        """
        if self.missing and clip is None:
            raise _no_encoder(self.missing)
        check_preview(preview, len(self.prompts))
        path = _bank_path(save_as) if save_as else None
        if path is not None and path.exists() and not self.items and (self.missing or not _same(PromptBank.load(path), self._bank(self.known))):
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
                          negative=contexts[self.negative], shown=self.shown)


def check_asked(prompts: str, prompt_file: str, template: str, negative: str, bank: str, folder: str, show: str, preview: int,
                save_as: str, linked: Collection[str]) -> None:
    """What the node refuses whatever its links bring, found without reading an embedding. linked: which of clip, vae and latent are. Raises WanLiteError."""
    stored = PromptBank.texts(folders.bank_path(bank)) if bank != folders.NONE else None
    wanted, negative, items = _asked(prompts, prompt_file, template, negative, stored, folder, show)
    check_preview(preview, len(wanted))
    held = () if stored is None else (*stored[0], stored[1])
    missing = [text for text in dict.fromkeys((*wanted, negative)) if text not in held]
    if missing and "clip" not in linked:
        raise _no_encoder(missing)
    path = _bank_path(save_as) if save_as else None
    if path is not None and path.exists() and PromptBank.texts(path) != (wanted, negative):
        raise _taken(path)
    if items and show != NOTHING:
        _check_parts({"vae", "latent"} - set(linked))


def _asked(prompts: str, prompt_file: str, template: str, negative: str, stored: tuple[tuple[str, ...], str] | None, folder: str, show: str
           ) -> tuple[tuple[str, ...], str, tuple[Item, ...]]:
    """(the prompts, the bank's own where nothing else is given; the negative prompt; the folder's items). stored: the texts of the chosen bank."""
    text = f"{prompts}\n{_read(prompt_file)}" if prompt_file != folders.NONE else prompts
    items = tuple(items_of(folder, show)) if folder != folders.NONE else ()
    if items and text.strip():
        raise WanLiteError("There are prompts, and a folder whose captions are prompts.", "Each picture belongs to its own caption.",
                           "Empty the prompts and set prompt_file to none, or choose no folder.")
    negative = negative or (stored[1] if stored else NEGATIVE)
    if stored is not None and not text.strip() and not items:
        return stored[0], negative, items
    listed = tuple(item.caption for item in items) if items else parse_prompts(text)
    return tuple(template.replace("{prompt}", prompt) for prompt in listed), negative, items


def _no_encoder(missing: Sequence[str]) -> WanLiteError:
    return WanLiteError(f"{len(missing)} texts are in no bank (first: {missing[0][:60]!r}) and no CLIP is connected.", "",
                        "Connect WAN's text encoder, or choose a bank that holds these prompts and this negative prompt.")


Gathered = tuple[PromptBank, Any, str]          # the prompts, the LATENT to distil at, a report


def encoded(wanted: Wanted, *, clip: Any, vae: Any, clip_vision: Any, latent: Any, show: str) -> Generator[tuple[str, int, int], None, Gathered]:
    """Texts and pictures encoded. Yields (stage, done, of all) after each. Raises WanLiteError when something to encode pictures with is missing."""
    encoder = _encoder(wanted, vae, clip_vision, latent, show)
    bank = yield from _staged("encoding prompts", wanted.encode(clip), len(wanted.missing))
    report = f"{len(bank)} prompts, {len(wanted.missing)} texts encoded now, {len(wanted.known)} known from the bank."
    if encoder is None:
        return _with_given(bank, latent), _or_blocked(latent), report
    shown, at = yield from _staged("encoding pictures", encoder.encode(list(wanted.items)), len(wanted.items))
    told = f" {len(wanted.items)} {'clips' if wanted.items[0].moves else 'pictures'} encoded; shown to the WAN: {show}."
    return replace(bank, shown=shown), at, report + told + ("" if at is latent else " The LATENT holds them as training data.")


def _staged(name: str, work: Generator[int, None, Any], total: int) -> Generator[tuple[str, int, int], None, Any]:
    while True:
        try:
            done = next(work)
        except StopIteration as end:
            return end.value
        yield name, done, total


def _encoder(wanted: Wanted, vae: Any, clip_vision: Any, latent: Any, show: str) -> Encoder | None:
    """None where there are no pictures, or their captions alone are wanted."""
    lacking = {name for name, given in (("vae", vae), ("latent", latent)) if given is None}
    if wanted.items and not lacking:
        size_of(latent)                 # refused here, before a text is encoded
        check_vae(vae, latent["samples"].shape[1])
        return Encoder(vae=vae, clip_vision=clip_vision, latent=latent, show=show)
    if wanted.items and show != NOTHING:
        _check_parts(lacking)
    return None


def _check_parts(lacking: Collection[str]) -> None:
    """Raises WanLiteError when something to encode pictures with is missing."""
    told = [words for name, words in (("vae", "WAN's VAE"), ("latent", "a LATENT, which tells size and length,")) if name in lacking]
    if told:
        raise WanLiteError(f"The folder's pictures are to be shown, and {' and '.join(told)} is not connected.", "",
                           f"Connect it, or choose '{NOTHING}' to use the captions alone.")


def check_alone(prompts: str, prompt_file: str, bank: str, folder: str) -> None:
    """Raises WanLiteError when there are other prompts beside those of a CONDITIONING."""
    if prompts.strip() or any(name != folders.NONE for name in (prompt_file, bank, folder)):
        raise WanLiteError("A CONDITIONING is connected, and there are prompts beside it.", "Either holds all prompts.",
                           "Disconnect it, or empty the prompts and set prompt_file, bank and folder to none.")


def from_conditioning(positive: list, negative: Any, latent: Any, preview: int) -> Gathered:
    """The prompts that stock nodes have encoded, with their pictures. Raises WanLiteError when something else hangs on them."""
    if negative is None:
        raise WanLiteError("The positive CONDITIONING is connected, and the negative one is not.", "", "Connect both, from the same node.")
    rows, (against, *others) = list(rows_of(positive)), list(rows_of(negative))
    if others:
        raise WanLiteError(f"The negative CONDITIONING holds {len(others) + 1} prompts.", "One negative prompt serves all.", "Connect one.")
    check_preview(preview, len(rows))
    shown = tuple(one for _, one in rows if one.tensors())
    bank = PromptBank(prompts=tuple(f"CONDITIONING {number}" for number in range(1, len(rows) + 1)), contexts=tuple(context for context, _ in rows),
                      negative_text="CONDITIONING", negative=against[0], shown=shown)
    told = " with pictures" if shown else ""
    return _with_given(bank, latent), _or_blocked(latent), f"{len(bank)} prompts{told} from CONDITIONING."


def _with_given(bank: PromptBank, latent: Any) -> PromptBank:
    """What the LATENT keeps still, one clip's to all prompts or each its own."""
    given = [] if latent is None else given_frames(latent)
    if given and len(given) not in (1, len(bank)):
        raise WanLiteError(f"The LATENT keeps the first frames of {len(given)} clips, and there are {len(bank)} prompts.", "", "Give one to all, or one to each.")
    return replace(bank, shown=tuple(Shown(given=given[i % len(given)]) for i in range(len(bank)))) if given else bank


def _or_blocked(latent: Any) -> Any:
    """The LATENT; without one, what a node that is connected to that output says."""
    return ExecutionBlocker("WanLite Encode Prompts has no LATENT to hand on: connect one to it, which tells the size.") if latent is None else latent


def check_preview(preview: int, count: int) -> None:
    """Raises WanLiteError when there is no prompt of this number."""
    if preview > count:
        raise WanLiteError(f"preview is {preview} and there are {count} prompts.", "", f"Set it between 1 and {count}.")


def too_few(count: int) -> str:
    """A warning when there are fewer prompts than a student can be judged by, or should learn from; else nothing."""
    if count < HOLDOUT_PROMPTS:
        return (f" {count} prompts are too few: none can be held out to measure on, and the student learns these by heart. Give {ENOUGH} or more; "
                "prompt_file has a list of ours to add.")
    if count < ENOUGH:
        return f" {count} prompts are few: the student knows little else afterwards. Better {ENOUGH} or more; prompt_file has a list of ours to add."
    return ""


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
