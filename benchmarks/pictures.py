"""Draws what the quality table says: `python -m benchmarks.pictures` writes docs/speed_quality.png, from the numbers that stand in quality.md."""
from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TABLE = Path(__file__).with_name("quality.md")
TARGET = TABLE.parent.parent / "docs" / "speed_quality.png"
TEACHER = "teacher"
# What each row of the table is called in the picture, those that a student is compared with first. Rows of single frames have another teacher.
SHOWN = {
    TEACHER: "teacher, 30 steps, cfg", "teacher, no cfg": "teacher without cfg", "teacher, 8 steps": "teacher, 8 steps", "teacher, 4 steps": "teacher, 4 steps",
    "teacher, 4 steps, no cfg": "teacher, 4 steps, no cfg", "plain cut": "cut, untrained",
    "no-cfg": "no-cfg", "slim": "slim", "keep-cfg": "keep-cfg", "few-step 8": "few-step 8", "few-step 4": "few-step 4", "slim + few-step 4": "slim, then few-step 4"}

FINE = 2                                                    # drawn so many times larger, since PIL's lines have steps
WIDTH, HEIGHT = 1200, 680
LEFT, RIGHT, TOP, BOTTOM = 96, 56, 92, 84                   # margins around the plot
LOWEST = 0.6                                                # adherence at the bottom; what lies below is said in words there
SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
INK, GREY, GRID, PAPER = (28, 30, 36), (104, 110, 122), (228, 230, 234), (255, 255, 255)
STUDENT, ASKED = (196, 62, 24), (44, 92, 168)
LABEL, SMALL, HEADING = 17, 15, 22

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """seconds: a video's, as a share of the teacher's; adherence, with its 95% interval."""
    name: str
    seconds: float
    adherence: float
    low: float
    high: float

    @property
    def trained(self) -> bool:
        return not self.name.startswith(TEACHER) and self.name != "plain cut"


def rows(text: str) -> list[Row]:
    """The rows of quality.md's first table that are SHOWN, in that order."""
    table = text.split("\n| row |", 1)[1].split("\n\n", 1)[0].splitlines()
    columns = [cell.strip() for cell in ("row |" + table[0]).strip("|").split("|")]
    found = {}
    for line in table[2:]:
        cells = dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|"))))
        found[cells["row"]] = (*map(float, re.findall(r"[\d.]+", cells["adherence [95%]"])), float(cells["s / video"]))
    whole = found[TEACHER][3]
    return [Row(name=name, seconds=found[name][3] / whole, adherence=found[name][0], low=found[name][1], high=found[name][2]) for name in SHOWN]


def draw(shown: Sequence[Row]) -> Image.Image:
    """The picture, on paper of its own: pages are light or dark."""
    canvas = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), PAPER)
    pen = ImageDraw.Draw(canvas)
    _axes(pen)
    above = [row for row in shown if row.adherence >= LOWEST]
    taken: list[Box] = []
    for row in above:
        x, y = _place(row)
        _line(pen, (x, _y(row.low), x, _y(row.high)), _colour(row), 2)
        for end in (row.low, row.high):
            _line(pen, (x - 5, _y(end), x + 5, _y(end)), _colour(row), 2)
        _dot(pen, x, y, _colour(row))
        taken.append((x - 7, _y(row.high) - 3, x + 7, _y(row.low) + 3))
    for row in sorted(above, key=lambda row: row.seconds):
        taken.append(_label(pen, row, taken))
    for row in shown:
        if row not in above:
            _below(pen, row)
    return canvas.resize((WIDTH, HEIGHT), Image.LANCZOS)


def _label(pen: ImageDraw.ImageDraw, row: Row, taken: Sequence[Box]) -> Box:
    """Writes a row's name at the nearest place where nothing is yet, with a line to its mark; returns that place."""
    x, text = _place(row)[0], SHOWN[row.name]
    width, height = pen.textlength(text, font=_font(LABEL)) / FINE, LABEL + 5
    place, end = next((box, end) for box, end in _places(x, row, width, height) if _free(box, taken) and 0 < box[0] and box[2] < WIDTH)
    left, top, right, bottom = place
    nearest = min(max(x, left), right)
    if abs(nearest - x) > 12 or min(abs(top - end), abs(bottom - end)) > 8:
        _line(pen, (x, end, nearest, bottom if bottom < end else top), _colour(row), 1)
    _text(pen, ((left + right) / 2, (top + bottom) / 2), text, _colour(row), LABEL, "mm")
    return place


def _places(x: float, row: Row, width: float, height: float) -> Iterator[tuple[Box, float]]:
    """Boxes for a label, the nearest first: over and under the interval, ever further, beside the line that leads to them; and which end that starts at."""
    for step in range(1, 16):
        for end, sign in ((_y(row.high), -1), (_y(row.low), 1)):
            for shift in (0, 0.35, -0.35):
                middle, centre = end + sign * (4 + (step - 0.5) * height), x + shift * width
                yield (centre - width / 2, middle - height / 2, centre + width / 2, middle + height / 2), end


def _free(box: Box, taken: Sequence[Box]) -> bool:
    left, top, right, bottom = box
    inside = TOP - 14 < top and bottom < HEIGHT - BOTTOM - 30
    return inside and all(right + 6 < l or r + 6 < left or bottom < t or b < top for l, t, r, b in taken)


def _below(pen: ImageDraw.ImageDraw, row: Row) -> None:
    """An arrow down to what lies below the plot, with its number."""
    x, y = _place(row)[0], HEIGHT - BOTTOM - 8
    _line(pen, (x, y - 26, x, y), GREY, 2)
    pen.polygon([(FINE * a, FINE * b) for a, b in ((x - 6, y - 8), (x + 6, y - 8), (x, y + 2))], fill=GREY)
    _text(pen, (x + 14, y - 14), f"{SHOWN[row.name]}: {row.adherence:.3f}", GREY, LABEL, "lm")


def _axes(pen: ImageDraw.ImageDraw) -> None:
    for tenths in range(round(10 * LOWEST), 11):
        y = _y(tenths / 10)
        _line(pen, (LEFT, y, WIDTH - RIGHT, y), GRID, 1)
        _text(pen, (LEFT - 12, y), f"{tenths / 10:.1f}", INK, SMALL, "rm")
    for share in SECONDS:
        x = _x(share)
        _line(pen, (x, TOP, x, HEIGHT - BOTTOM), GRID, 1)
        _text(pen, (x, HEIGHT - BOTTOM + 12), f"{share:.0%}", INK, SMALL, "ma")
    _line(pen, (LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM), INK, 2)
    _text(pen, (LEFT, 22), "A tiny WAN and its students: how long a video takes, and how often it shows what was asked", INK, HEADING - 4, "la")
    _text(pen, (LEFT, 50), "share of videos that show all of the prompt, with its 95% interval", GREY, SMALL, "la")
    _text(pen, (WIDTH - RIGHT, HEIGHT - 18), "seconds a video, as a share of the teacher's (two CPU cores)", GREY, SMALL, "rs")
    for x, colour, text in ((LEFT + 8, STUDENT, "students"), (LEFT + 118, ASKED, "their teacher as it is")):
        _dot(pen, x, HEIGHT - 23, colour)
        _text(pen, (x + 14, HEIGHT - 18), text, colour, SMALL, "ls")


def _x(share: float) -> float:
    low, high = math.log(SECONDS[0]), math.log(1.15)
    return LEFT + (math.log(share) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(adherence: float) -> float:
    return HEIGHT - BOTTOM - (adherence - LOWEST) / (1 - LOWEST) * (HEIGHT - TOP - BOTTOM)


def _place(row: Row) -> tuple[float, float]:
    return _x(row.seconds), _y(row.adherence)


def _colour(row: Row) -> tuple[int, int, int]:
    return STUDENT if row.trained else ASKED


def _line(pen: ImageDraw.ImageDraw, ends: Box, colour: tuple[int, int, int], width: int) -> None:
    pen.line([FINE * value for value in ends], fill=colour, width=FINE * width)


def _dot(pen: ImageDraw.ImageDraw, x: float, y: float, colour: tuple[int, int, int]) -> None:
    pen.ellipse([FINE * value for value in (x - 6, y - 6, x + 6, y + 6)], fill=colour)


def _text(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: tuple[int, int, int], size: int, anchor: str) -> None:
    pen.text((FINE * at[0], FINE * at[1]), text, fill=colour, font=_font(size), anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FINE * size)


def main() -> None:
    draw(rows(TABLE.read_text(encoding="utf-8"))).quantize(64).save(TARGET, optimize=True)
    print(f"{TARGET.relative_to(TARGET.parent.parent)}: {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
