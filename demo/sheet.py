"""The demo's picture: teacher, plain cut and student side by side from the same noise, and the table under them."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .compare import Result

SCALE, GAP, MARGIN = 2, 6, 28               # of a 64-pixel frame, and pixels between things
SHOWN = (0, 4, 8)                           # frames of each clip
TITLES = {"teacher": "teacher", "plain_cut": "plain cut (untrained)", "student": "student"}
INK, PALE = (28, 30, 36), (122, 126, 138)


def draw(result: Result, path: Path) -> None:
    """Writes the PNG: a row for each prompt, three frames for each model, then the table."""
    side = result.clips["teacher"][0].shape[1] * SCALE
    group = len(SHOWN) * side + (len(SHOWN) - 1) * 2
    width = 2 * MARGIN + len(TITLES) * group + (len(TITLES) - 1) * 3 * GAP
    top, row_height = MARGIN + 64, side + 34
    table_top = top + len(result.prompts) * row_height + 16
    canvas = Image.new("RGB", (width, table_top + 34 * (len(result.rows) + 1) + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN - 8), "A WAN and its distilled student, from the same noise (first, middle and last frame)", fill=INK, font=font(22))
    for column, (name, title) in enumerate(TITLES.items()):
        left = MARGIN + column * (group + 3 * GAP)
        row = next(row for row in result.rows if row.name == name)
        pen.text((left, top - 28), f"{title}: {row.blocks} blocks, {row.evaluations} forwards", fill=INK, font=font(17))
        for line, clip in enumerate(result.clips[name]):
            for i, frame in enumerate(SHOWN):
                tile = Image.fromarray((np.clip(clip[frame], 0, 1) * 255).round().astype("uint8")).resize((side, side), Image.NEAREST)
                canvas.paste(tile, (left + i * (side + 2), top + line * row_height))
    for line, prompt in enumerate(result.prompts):
        pen.text((MARGIN, top + line * row_height + side + 4), prompt, fill=PALE, font=font(15))
    table(pen, result, table_top, width)
    canvas.save(path)


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
