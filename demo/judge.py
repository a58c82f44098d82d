"""Reads the four attributes back from the pixels. Plain geometry: no model, nothing learned."""

import numpy as np

from .domain import BACKGROUNDS, COLOURS, MOTIONS, RADII, parse

_SATURATED = 0.30           # spread of a pixel's three channels from which it belongs to the ball
_LEAST_AREA = 60            # pixels of ball in the first and in the last frame: a third of the small ball
_LEAST_TRAVEL = 12.0        # pixels, three eighths of the way that a rendered ball goes
_PURITY = 0.7               # share of the ball's pixels that must have its colour


def adherence(frames: np.ndarray, prompt: str) -> dict[str, bool]:
    """Which attributes of `prompt` the clip shows: {"size": ..., "colour": ..., "motion": ..., "background": ...}.

    `frames` is one clip as ComfyUI's IMAGE batch, [T, H, W, 3] in 0..1. Raises KeyError for a prompt outside the domain.
    """
    seen, wanted = read(frames), parse(prompt)
    return {name: value == getattr(wanted, name) for name, value in seen.items()}


def read(frames: np.ndarray) -> dict[str, str | None]:
    """The attributes that the clip shows; None where the pixels do not say."""
    frames = np.asarray(frames, dtype=np.float32)
    ball = frames.max(-1) - frames.min(-1) > _SATURATED                                 # [T, H, W]
    area = ball.sum((1, 2))                                                             # [T]
    if min(area[0], area[-1]) < _LEAST_AREA:
        return {"size": None, "colour": None, "motion": None, "background": _background(frames, ball)}
    return {"size": _size(np.median(area)), "colour": _colour(frames[ball]), "motion": _motion(ball),
            "background": _background(frames, ball)}


def _size(area: float) -> str:
    return min(RADII, key=lambda name: abs(np.sqrt(area / np.pi) - RADII[name]))


def _colour(pixels: np.ndarray) -> str | None:
    # hue only: a pale or a dim red is still red
    hues = pixels - pixels.mean(-1, keepdims=True)                                      # [N, 3]
    palette = np.array(list(COLOURS.values()))
    palette = palette - palette.mean(-1, keepdims=True)                                 # [6, 3]
    votes = np.bincount((hues @ (palette / np.linalg.norm(palette, axis=-1, keepdims=True)).T).argmax(-1),
                        minlength=len(COLOURS))
    return list(COLOURS)[votes.argmax()] if votes.max() >= _PURITY * votes.sum() else None


def _motion(ball: np.ndarray) -> str | None:
    first, last = (np.argwhere(frame).mean(0)[::-1] for frame in (ball[0], ball[-1]))   # (x, y)
    travel = last - first
    along = {name: travel @ np.array(direction) for name, direction in MOTIONS.items()}
    best = max(along, key=along.get)
    across = np.sqrt(max(travel @ travel - along[best] ** 2, 0))
    return best if along[best] >= _LEAST_TRAVEL and across <= along[best] / 2 else None


def _background(frames: np.ndarray, ball: np.ndarray) -> str | None:
    if ball.all():
        return None
    level = np.median(frames.mean(-1)[~ball])
    return min(BACKGROUNDS, key=lambda name: abs(level - BACKGROUNDS[name]))
