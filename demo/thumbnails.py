"""The pictures that ComfyUI's template browser shows of the shipped graphs: 512 x 512, since its cards are square, all in one style.

Frames of the demo are cut out of docs/demo.png; everything else is drawn. The same code draws the same picture.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .comfy_path import ROOT
from .sheet import SHOWN, TITLES, font, tile_box

SIDE, FINER = 512, 2                # pixels, and how much finer it is drawn than saved
EDGE, TOP, BOTTOM = 32, 174, 448    # of the picture below the title, over which some pages lay a badge at the very top
DARK, DARKER, INK, PALE, FAINT, GONE = (33, 38, 52), (17, 20, 29), (242, 244, 248), (150, 160, 180), (84, 94, 118), (49, 56, 74)
BLUE, GREEN, ORANGE, PURPLE, YELLOW = (96, 165, 222), (128, 194, 108), (233, 142, 76), (164, 136, 226), (226, 182, 74)
QUALITY, GRAIN = 75, 16             # of the JPEG; pixels of a picture's noise

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


@dataclass(kw_only=True, slots=True, eq=False)
class Sheet:
    """A finer canvas that is drawn on in the saved picture's pixels."""
    image: Image.Image
    pen: ImageDraw.ImageDraw

    def text(self, x: float, y: float, text: str, size: int, fill: Colour, anchor: str = "la", bold: bool = False) -> None:
        self.pen.text((x * FINER, y * FINER), text, fill=fill, font=font(size * FINER), anchor=anchor, stroke_width=FINER // 2 if bold else 0)

    def box(self, box: Box, fill: Colour | None = None, outline: Colour | None = None, round_: float = 3) -> None:
        self.pen.rounded_rectangle([FINER * value for value in box], FINER * round_, fill, outline, FINER)

    def line(self, points: list[tuple[float, float]], fill: Colour, width: float) -> None:
        self.pen.line([(x * FINER, y * FINER) for x, y in points], fill, round(width * FINER), joint="curve")

    def dot(self, x: float, y: float, radius: float, fill: Colour) -> None:
        self.pen.ellipse([(x - radius) * FINER, (y - radius) * FINER, (x + radius) * FINER, (y + radius) * FINER], fill)

    def paste(self, picture: Image.Image, x: float, y: float, side: float, shade: float = 1.0) -> None:
        """A square picture with round corners; shade: how much of it is seen."""
        fitted = picture.resize((round(side * FINER),) * 2, Image.LANCZOS)
        mask = Image.new("L", fitted.size, 0)
        ImageDraw.Draw(mask).rounded_rectangle([0, 0, *(edge - 1 for edge in fitted.size)], 8 * FINER, round(255 * shade))
        self.image.paste(fitted, (round(x * FINER), round(y * FINER)), mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """title and told above the picture; card: what it takes, at the bottom."""
    title: str
    told: str
    card: str
    colour: Colour
    picture: Callable[[Sheet], None]

    def drawn(self) -> Image.Image:
        shade = np.linspace(DARK, DARKER, SIDE * FINER)[:, None].repeat(SIDE * FINER, axis=1)
        image = Image.fromarray(shade.round().astype(np.uint8))
        sheet = Sheet(image=image, pen=ImageDraw.Draw(image))
        sheet.text(EDGE, 64, self.title, 44, INK, bold=True)
        sheet.text(EDGE, 122, self.told, 27, PALE)
        self.picture(sheet)
        sheet.text(EDGE, 466, "WanLite", 24, self.colour, bold=True)
        sheet.text(SIDE - EDGE, 466, self.card, 24, PALE, "ra")
        return image.resize((SIDE, SIDE), Image.LANCZOS)


def scene(noise: float = 0.0, side: int = 512) -> Image.Image:
    """A sun over hills, and so much noise in it as a flow has at that sigma."""
    y, x = np.mgrid[:side, :side] / side                                                       # 0..1
    sky = np.array((46, 66, 130)) + (np.array((250, 176, 122)) - np.array((46, 66, 130))) * (y[..., None] ** 0.8)
    picture = np.where((np.hypot(x - 0.62, y - 0.42) < 0.13)[..., None], (255, 236, 190), sky)
    for height, wave, shift, colour in ((0.58, 7, 0.3, (104, 92, 146)), (0.70, 5, 2.1, (66, 70, 122)), (0.83, 4, 4.0, (32, 42, 78))):
        picture = np.where((y > height + 0.06 * np.sin(wave * x + shift) + 0.02 * np.sin(19 * x + shift))[..., None], colour, picture)
    grain = np.random.default_rng(7).normal(0, 70, (side // GRAIN, side // GRAIN, 3)).repeat(GRAIN, axis=0).repeat(GRAIN, axis=1)
    return Image.fromarray(np.clip(picture * (1 - noise) + noise * 118 + noise * grain, 0, 255).astype(np.uint8))


def demo_frames(sheet: Sheet) -> None:
    """Teacher and student of the demo, from the same noise."""
    with Image.open(ROOT / "docs" / "demo.png") as whole:
        picture = whole.convert("RGB")
    for row, (name, blocks, passes, colour) in enumerate((("teacher", 12, 60, PALE), ("student", 8, 6, GREEN))):
        top = TOP + 6 + row * 136
        sheet.text(EDGE, top + 18, name, 27, INK if name == "student" else PALE)
        sheet.text(EDGE, top + 54, f"{blocks} blocks", 22, colour)
        sheet.text(EDGE, top + 82, f"{passes} passes", 22, colour)
        for i in range(len(SHOWN)):
            sheet.paste(picture.crop(tile_box(list(TITLES).index(name), 3, i)), 150 + i * 113, top, 106)


def bars(sheet: Sheet, box: Box, blocks: int, gone: Callable[[int], bool], colour: Colour) -> list[float]:
    """Blocks as bars, those that are gone as shadows; returns where the others stand."""
    left, top, right, bottom = box
    pitch = (right - left) / blocks
    for i in range(blocks):
        x = left + i * pitch
        sheet.box((x, top, x + pitch * 0.66, bottom), GONE if gone(i) else colour, round_=pitch / 6)
    return [left + (i + 0.33) * pitch for i in range(blocks) if not gone(i)]


def fewer_blocks(sheet: Sheet) -> None:
    upper, lower, tall = TOP + 34, TOP + 166, 66
    sheet.text(EDGE, TOP - 4, "30 blocks", 25, BLUE)
    kept = bars(sheet, (EDGE, upper, SIDE - EDGE, upper + tall), 30, lambda i: i % 3 == 1, BLUE)
    at = bars(sheet, (EDGE + 72, lower, SIDE - EDGE - 72, lower + tall), 20, lambda i: False, GREEN)
    for above, below in zip(kept, at):
        sheet.line([(above, upper + tall + 4), (below, lower - 4)], FAINT, 1.2)
    sheet.text(SIDE / 2, lower + tall + 8, "20 blocks, no CFG", 25, GREEN, "ma")


def both_experts(sheet: Sheet) -> None:
    """From noise to a video, and which expert makes which half of the way."""
    count, middle = 6, SIDE / 2
    side = (SIDE - 2 * EDGE - 5 * (count - 1)) / count
    for i in range(count):
        sheet.paste(scene(1 - i / (count - 1)), EDGE + i * (side + 5), TOP + 6, side)
    for name, left, right, colour in (("high noise", EDGE, middle - 8, PURPLE), ("low noise", middle + 8, SIDE - EDGE, YELLOW)):
        top = TOP + side + 20
        sheet.line([(left, top), (left, top + 10), (right, top + 10), (right, top)], colour, 3)
        sheet.text((left + right) / 2, top + 26, name, 27, INK, "ma")
        bars(sheet, (left, top + 70, right, top + 126), 40, lambda i: i % 4 == 2, colour)
        sheet.text((left + right) / 2, top + 140, "30 of 40 blocks", 25, colour, "ma")


def few_steps(sheet: Sheet) -> None:
    """From noise to a picture: the teacher's many steps, and four."""
    side, left, right = 104, EDGE + 52, SIDE - EDGE - 52
    middle = (TOP + BOTTOM) / 2
    for name, count, up, colour, wide in (("30 steps, with CFG", 30, -1, PALE, 2.0), ("4 steps, no CFG", 4, 1, ORANGE, 5.0)):
        points = [(left + (right - left) * i / count, middle + up * (52 + 68 * math.sin(math.pi * i / count))) for i in range(count + 1)]
        sheet.line(points, colour, wide)
        for x, y in points[1:-1]:
            sheet.dot(x, y, 3 + wide, colour)
        sheet.text(SIDE / 2, middle + up * 70, name, 25, INK if up > 0 else PALE, "mm")
    sheet.paste(scene(1.0), EDGE, middle - side / 2, side)
    sheet.paste(scene(0.0), SIDE - EDGE - side, middle - side / 2, side)


def one_frame(sheet: Sheet) -> None:
    """A single picture in front of the video that nobody asked for."""
    side, top = 264, TOP + 6
    for i in (3, 2, 1):
        smaller = side - i * 22
        sheet.paste(scene(), SIDE - EDGE - smaller - (3 - i) * 62, top + (side - smaller) / 2, smaller, 0.58 - 0.15 * i)
    sheet.paste(scene(), EDGE, top, side)
    sheet.box((EDGE, top, EDGE + side, top + side), outline=YELLOW, round_=8)


CARDS = {
    "wanlite_tiny_demo": Card(title="Try it on a tiny WAN", told="teacher and student, same noise", card="no card needed", colour=GREEN, picture=demo_frames),
    "wanlite_wan2.1_1.3b_slim": Card(title="Slim Wan 2.1 1.3B", told="a third of its blocks gone", card="from 8 GB", colour=BLUE, picture=fewer_blocks),
    "wanlite_wan2.2_a14b_i2v_slim": Card(title="Slim Wan 2.2 A14B", told="image to video, both experts", card="from 12 GB", colour=PURPLE,
                                         picture=both_experts),
    "wanlite_wan2.1_14b_4_steps": Card(title="4 steps, your WAN", told="a speed LoRA, healed to it", card="from 16 GB", colour=ORANGE, picture=few_steps),
    "wanlite_wan2.1_1.3b_image": Card(title="WAN for pictures", told="one frame, 8 steps, no CFG", card="from 8 GB", colour=YELLOW, picture=one_frame),
}


def write(path: Path) -> None:
    """Draws the thumbnail of the template beside it, whose name it has."""
    CARDS[path.stem].drawn().save(path, quality=QUALITY, optimize=True)
