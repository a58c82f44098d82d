"""What a run looked like, as a picture and as the stock loss plot takes it."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 1024, 640
LEFT, RIGHT, TOP, BOTTOM = 110, 40, 96, 64          # margins around the plot, in pixels
INK, FAINT, GRID = (34, 34, 40), (176, 190, 214), (232, 232, 236)
ERROR, CUT = (200, 62, 30), (60, 130, 60)
POINTS = 800                                        # of the loss curve that are drawn


def loss_map(losses: Sequence[float]) -> dict[str, list[float]]:
    """ComfyUI's LOSS_MAP. Its plot divides by the range of the losses: where there is none, the last one is moved by one rounding."""
    values = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    return {"loss": values if len(set(values)) > 1 else [*values, math.nextafter(values[-1], math.inf)]}


def picture(losses: Sequence[float], evaluations: Sequence[tuple[int, float]], plain_cut: float, yardstick: str) -> Any:
    """IMAGE [1, H, W, 3]: training loss, held-out error at each evaluation, and the yardstick's error as a line, on a logarithmic scale."""
    import numpy
    import torch
    from PIL import Image, ImageDraw
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    curve = [(step, loss) for step, loss in enumerate(losses, start=1) if math.isfinite(loss) and loss > 0]
    curve = _averaged(curve)
    marks = [(step, error) for step, error in evaluations if math.isfinite(error) and error > 0]
    cut = [plain_cut] if math.isfinite(plain_cut) and plain_cut > 0 else []
    values = [value for _, value in (*curve, *marks)] + cut or [1.0]
    place = _axes(draw, max(1, len(losses)), min(values), max(values))
    _line(draw, [place(*point) for point in curve], FAINT, 2)
    for value in cut:
        draw.line([place(0, value), place(max(1, len(losses)), value)], fill=CUT, width=3)
    _line(draw, [place(*point) for point in marks], ERROR, 3)
    for x, y in (place(*point) for point in marks):
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=ERROR)
    _legend(draw, curve, marks, cut, yardstick)
    return torch.from_numpy(numpy.asarray(canvas, dtype="float32") / 255).unsqueeze(0)


def _averaged(curve: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of its neighbours."""
    size = -(-len(curve) // POINTS) or 1
    groups = [curve[i:i + size] for i in range(0, len(curve), size)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _axes(draw: Any, steps: int, low: float, high: float) -> Any:
    """Grid and numbers; returns the function from (step, value) to pixels."""
    bottom, top = math.log10(low) - 0.05, math.log10(high) + 0.05

    def place(step: float, value: float) -> tuple[float, float]:
        share = (math.log10(value) - bottom) / (top - bottom)
        return LEFT + step / steps * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    for value in _ticks(10**bottom, 10**top):
        y = place(0, value)[1]
        draw.line((LEFT, y, WIDTH - RIGHT, y), fill=GRID)
        draw.text((LEFT - 12, y), f"{value:.2g}", fill=INK, font=_font(18), anchor="rm")
    for quarter in range(5):
        x = place(steps * quarter / 4, low)[0]
        draw.text((x, HEIGHT - BOTTOM + 10), f"{steps * quarter / 4:g}", fill=INK, font=_font(18), anchor="ma")
    draw.text((LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 8), "training step", fill=INK, font=_font(18), anchor="ms")
    draw.line((LEFT, TOP, LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM), fill=INK, width=2)
    return place


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in a logarithmic range: 1, 2, 5 of each power, or evenly spread where it is too narrow for them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [first * 10.0**power for power in powers for first in (1, 2, 5) if low <= first * 10.0**power <= high]
    return ticks if len(ticks) >= 3 else [low + (high - low) * i / 4 for i in range(5)]


def _line(draw: Any, points: list[tuple[float, float]], colour: tuple[int, int, int], width: int) -> None:
    if len(points) > 1:
        draw.line(points, fill=colour, width=width, joint="curve")


def _legend(draw: Any, curve: list, marks: list, cut: list, yardstick: str) -> None:
    entries = [(FAINT, f"training loss {curve[-1][1]:.3g}" if curve else "no training loss"),
               (ERROR, f"held-out error, best {min(e for _, e in marks):.3g}" if marks else "not evaluated"),
               (CUT, f"{yardstick} {cut[0]:.3g}" if cut else f"no {yardstick}")]
    draw.text((LEFT, 16), "Relative squared error against the teacher; lower is better", fill=INK, font=_font(22))
    x = LEFT
    for colour, text in entries:
        draw.rectangle((x, 62, x + 26, 70), fill=colour)
        draw.text((x + 34, 66), text, fill=INK, font=_font(18), anchor="lm")
        x += 34 + draw.textlength(text, font=_font(18)) + 34


def _font(size: int) -> Any:
    from PIL import ImageFont
    return ImageFont.load_default(size)
