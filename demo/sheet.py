"""The demo's picture: teacher, plain cut and student side by side from the same noise, and the table under them."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import domain

if TYPE_CHECKING:           # it loads torch, and whoever only cuts tiles out of the picture has no need of that
    from .compare import Result

SIDE, GAP, MARGIN = 2 * domain.SIZE, 6, 28   # pixels of a frame, and between things
SHOWN = (0, 4, 8)                           # frames of each clip
TITLES = {"teacher": "teacher", "plain_cut": "plain cut (untrained)", "student": "student"}
INK, PALE = (28, 30, 36), (122, 126, 138)


def draw(result: Result, path: Path) -> None:
    """Writes the PNG: a row for each prompt, three frames for each model, then the table."""
    width = tile_box(len(TITLES) - 1, 0, len(SHOWN) - 1)[2] + MARGIN
    table_top = tile_box(0, len(result.prompts), 0)[1] + 16
    canvas = Image.new("RGB", (width, table_top + 34 * (len(result.rows) + 1) + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN - 8), "A WAN and its distilled student, from the same noise (first, middle and last frame)", fill=INK, font=font(22))
    for column, (name, title) in enumerate(TITLES.items()):
        left, top, *_ = tile_box(column, 0, 0)
        row = next(row for row in result.rows if row.name == name)
        pen.text((left, top - 28), f"{title}: {row.blocks} blocks, {row.evaluations} forwards", fill=INK, font=font(17))
        for line, clip in enumerate(result.clips[name]):
            for i, frame in enumerate(SHOWN):
                tile = Image.fromarray((np.clip(clip[frame], 0, 1) * 255).round().astype("uint8")).resize((SIDE, SIDE), Image.NEAREST)
                canvas.paste(tile, tile_box(column, line, i)[:2])
    for line, prompt in enumerate(result.prompts):
        pen.text((MARGIN, tile_box(0, line, 0)[3] + 4), prompt, fill=PALE, font=font(15))
    table(pen, result, table_top, width)
    canvas.save(path)


def tile_box(column: int, line: int, i: int) -> tuple[int, int, int, int]:
    """Where the i-th frame shown of a model's clip lies, (left, top, right, bottom); column: which of TITLES, line: which prompt."""
    group = len(SHOWN) * SIDE + (len(SHOWN) - 1) * 2
    left, top = MARGIN + column * (group + 3 * GAP) + i * (SIDE + 2), MARGIN + 64 + line * (SIDE + 34)
    return left, top, left + SIDE, top + SIDE


def table(pen: ImageDraw.ImageDraw, result: Result, top: int, width: int) -> None:
    lines = result.lines()
    widths = [max(pen.textlength(line[i], font=font(17)) for line in lines) for i in range(len(lines[0]))]
    space = (width - 2 * MARGIN - sum(widths)) / (len(widths) - 1)
    for number, line in enumerate(lines):
        x, y = MARGIN, top + 34 * number
        for i, (cell, wide) in enumerate(zip(line, widths)):
            anchor, at = ("la", x) if i == 0 else ("ra", x + wide)
            pen.text((at, y), cell, fill=PALE if number == 0 else INK, font=font(17), anchor=anchor)
            x += wide + space
        pen.line((MARGIN, y + 28, width - MARGIN, y + 28), fill=(226, 228, 232))


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
