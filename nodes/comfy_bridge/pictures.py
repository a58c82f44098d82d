"""A folder of pictures or clips with captions: prompts, what image-to-video is shown with each, and clips to train on."""
from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import comfy.utils
import numpy
import torch
from comfy_extras.nodes_wan import WanFirstLastFrameToVideo, WanImageToVideo
from PIL import Image, ImageOps
from torch import Tensor

from ...wanlite_model.cond import Shown
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.workflow import FPS, FPS_5B
from . import folders
from .conditions import processed, rows_of
from .folders import BOTH, FIRST, NOTHING
from .latents import size_of

PICTURES, CLIPS = (".png", ".jpg", ".jpeg", ".webp", ".bmp"), (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
LAST = "_last"                              # of the name of a picture that another one's clip is to end with
ROUNDED = 2e-3                           # seconds: containers keep times in milliseconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A picture or a clip, its caption, and the picture that its clip is to end with, where there is one."""
    file: Path
    caption: str
    last: Path | None = None

    @property
    def moves(self) -> bool:
        return self.file.suffix.lower() in CLIPS


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoder:
    """What turns pictures into what a WAN is shown, for clips of the LATENT's size."""
    vae: Any
    clip_vision: Any
    latent: dict[str, Any]
    show: str

    def encode(self, items: list[Item]) -> Generator[int, None, tuple[tuple[Shown, ...], dict[str, Any]]]:
        """(what is shown with each item, the LATENT to train at: with the clips in it, else as it came). Yields the number of items done.

        Pictures are training data where a clip is one frame.
        """
        if self.show == BOTH and self.vae.latent_channels == 48:
            raise WanLiteError(f"'{BOTH}' is chosen with the VAE of 2.2 TI2V-5B.", "That WAN is given a first frame alone.", f"Choose '{FIRST}'.")
        shown, clips = [], []
        width, height, length = size_of(self.latent)
        for done, item in enumerate(items, start=1):
            with torch.inference_mode():                    # as VAEEncode runs
                seen = Seen.of(item, width, height, length, FPS_5B if self.vae.latent_channels == 48 else FPS)
                if self.show != NOTHING:
                    shown.append(self._shown(seen, width, height, length))
                if len(seen.fitted) == length:
                    clips.append(self.vae.encode(seen.fitted).float().cpu())
            yield done
        if len(clips) < len(items):
            return tuple(shown), self.latent
        return tuple(shown), {"samples": torch.cat([clip if clip.ndim == 5 else clip.unsqueeze(2) for clip in clips])}

    def _shown(self, seen: Seen, width: int, height: int, length: int) -> Shown:
        """What ComfyUI's own nodes would tell a WAN of these pictures: the VAE's fitted to the video, CLIP vision's whole, as WAN's templates have it."""
        first, last = seen.fitted[:1], seen.last_fitted
        if self.vae.latent_channels == 48:
            return Shown(given=processed(self.vae.encode(first))[0])
        empty = [[torch.zeros(1, 1, 1), {}]]
        if self.show == BOTH:
            told = WanFirstLastFrameToVideo.execute(empty, empty, self.vae, width, height, length, 1, first, last, self._by_clip(seen.first),
                                                      self._by_clip(seen.last))
        else:
            told = WanImageToVideo.execute(empty, empty, self.vae, width, height, length, 1, first, self._by_clip(seen.first))
        [(_, shown)] = rows_of(told.args[0])
        return shown

    def _by_clip(self, picture: Tensor) -> Any:
        return None if self.clip_vision is None else self.clip_vision.encode_image(picture, crop=False)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen:
    """An item's pixels in 0..1: fitted [F, H, W, 3] to the video; its first and its last picture [1, h, w, 3] as they are, and the last one fitted."""
    fitted: Tensor
    first: Tensor
    last: Tensor
    last_fitted: Tensor

    @classmethod
    def of(cls, item: Item, width: int, height: int, length: int, fps: int) -> Seen:
        """Of a clip its first `length` frames at `fps` a second, one at a time: many large frames would fill the memory. Raises WanLiteError."""
        fitted, first, last = [], None, None
        for last in _resampled(item.file, length, fps) if item.moves else [_picture(item.file)]:
            first = last if first is None else first
            fitted.append(_fitted(last, width, height))
        if item.moves and len(fitted) < length:
            raise WanLiteError(f"{item.file.name} is too short: {len(fitted)} frames at {fps} a second.", f"The LATENT has {length}.",
                               "Shorten the LATENT, or move the clip elsewhere.")
        if item.last is not None:
            last = _picture(item.last)
        return cls(fitted=torch.cat(fitted), first=first, last=last, last_fitted=_fitted(last, width, height))


def items_of(name: str, show: str) -> list[Item]:
    """The pictures, or the clips, of a folder of ComfyUI's input folder, by name. Raises WanLiteError when it has none, both, or lacks a caption."""
    folder = folders.picture_folder(name)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES + CLIPS and not path.name.startswith("."))
    pictures = {path.stem for path in files if path.suffix.lower() in PICTURES}
    lasts = {path.stem.removesuffix(LAST): path for path in files if show == BOTH and path.suffix.lower() in PICTURES
             and path.stem.endswith(LAST) and path.stem.removesuffix(LAST) in pictures}
    items = [Item(file=path, caption=_caption(path), last=lasts.get(path.stem)) for path in files if path not in lasts.values()]
    if not items:
        raise WanLiteError(f"The folder {name} has no picture and no clip.", f"It holds {', '.join(PICTURES + CLIPS)} and a .txt of the same name to each.",
                           "Put them there, or choose another folder.")
    if len({item.moves for item in items}) > 1:
        raise WanLiteError(f"The folder {name} has both pictures and clips.", "", "Put them in two folders.")
    lacking = [item for item in items if show == BOTH and not item.moves and item.last is None]
    if lacking:
        raise WanLiteError(f"{lacking[0].file.name} has no picture to end with.", f"'{BOTH}' reads it from {lacking[0].file.stem}{LAST}.png beside it.",
                           f"Add it, or choose '{FIRST}'.")
    return items


def _caption(path: Path) -> str:
    try:
        text = " ".join(path.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        text = ""
    if not text:
        raise WanLiteError(f"{path.name} has no caption.", f"It stands in {path.stem}.txt, in UTF-8.", "Write one, or move the file elsewhere.")
    return text


def _resampled(file: Path, length: int, fps: int) -> Iterator[Tensor]:
    """Frames [1, h, w, 3] in 0..1, upright: at each moment the one that is shown then, whatever the clip's own pace. No more is decoded than is needed."""
    due = 0
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            rate, held, begun, now = float(stream.average_rate or fps), None, None, 0.0
            for index, frame in enumerate(container.decode(stream)):
                now = index / rate if frame.time is None else frame.time
                begun = now if begun is None else begun
                while held is not None and due < length and due / fps < now - begun - ROUNDED:
                    yield _upright(held)
                    due += 1
                if due == length:
                    return
                held = frame
            while held is not None and due < length and due / fps < now - begun + 1 / rate - ROUNDED:
                yield _upright(held)
                due += 1
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        raise WanLiteError(f"{file.name} cannot be read as a clip ({error}).", "", "Convert it to .mp4, or move it elsewhere.") from error


def _upright(frame: av.VideoFrame) -> Tensor:
    """[1, h, w, 3]: a phone stores what it was held for beside the frame."""
    pixels = numpy.rot90(frame.to_ndarray(format="rgb24"), k=round(getattr(frame, "rotation", 0) / 90) % 4)
    return torch.from_numpy(pixels.astype("float32") / 255).unsqueeze(0)


def _picture(file: Path) -> Tensor:
    try:
        with Image.open(file) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):                # 16 bits of grey, which convert() would clip
                upright = Image.fromarray((numpy.asarray(upright, dtype="float32") / 257).clip(0, 255).astype("uint8"))
            pixels = numpy.asarray(upright.convert("RGB"), dtype="float32")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise WanLiteError(f"{file.name} cannot be read as a picture ({error}).", "", "Save it again as .png, or move it elsewhere.") from error
    return torch.from_numpy(pixels / 255).unsqueeze(0)


def _fitted(frames: Tensor, width: int, height: int) -> Tensor:
    """[F, H, W, 3], scaled and cropped around the middle as ComfyUI's image-to-video nodes do."""
    return comfy.utils.common_upscale(frames.movedim(-1, 1), width, height, "bilinear", "center").movedim(1, -1)
