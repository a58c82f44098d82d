"""The quality table as Markdown: a line a row, seeds put together."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from demo.measure import wilson

from .rows import Row

Scores = Mapping[str, float]

# heading: (score, how it is written). Ratios are to the teacher's clips from the same noise.
COLUMNS = {
    "held out": ("right, held out", "{:.3f}"), "error": ("error", "{:.4f}"), "by sigma, clean to noise": ("", ""), "closure": ("closure", "{:.3f}"), "PSNR": ("psnr", "{:.1f}"),
    "sharp": ("sharpness", "{:.2f}"), "motion": ("motion", "{:.2f}"), "satur.": ("saturation", "{:.2f}"), "divers.": ("diversity", "{:.2f}"),
    "4x frames": ("error, 4x frames", "{:.3f}"), "wide": ("error, wide", "{:.3f}"), "tall": ("error, tall", "{:.3f}"),
    "M param.": ("parameters", "{:.2f}"), "forwards": ("evaluations", "{:.0f}"), "s / video": ("seconds", "{:.2f}"),
    "iter.": ("iterations", "{:.0f}"), "start s": ("start seconds", "{:.0f}"), "train s": ("train seconds", "{:.0f}"),
}


def table(results: Sequence[tuple[Row, Scores]]) -> str:
    """Every cell is a mean over seeds. Adherence has the 95% interval of one seed's videos: all seeds draw the same prompts from the same noise,
    so more of them are no more videos.
    """
    grouped: dict[str, list[Scores]] = {}
    for row, scores in results:
        grouped.setdefault(row.name, []).append(scores)
    lines = ["| row | adherence [95%] | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, found in grouped.items():
        right, videos = fmean(s["right"] for s in found), fmean(s["videos"] for s in found)
        low, high = wilson(right, videos)
        lines.append(f"| {name} | {right / videos:.3f} [{low:.3f}, {high:.3f}] | " + " | ".join(cell(head, found) for head in COLUMNS) + " |")
    return "\n".join(lines)


def cell(heading: str, found: Sequence[Scores]) -> str:
    if heading.startswith("by sigma"):
        return " ".join(number([s[f"error {b}/4"] for s in found], "{:.3f}") for b in range(1, 5))
    score, form = COLUMNS[heading]
    values = [s[score] for s in found if score in s]        # seconds are of the first seed alone
    return number([value / 1e6 for value in values] if score == "parameters" else values, form)


def number(values: Sequence[float], form: str) -> str:
    return "-" if not values or any(math.isnan(value) for value in values) else form.format(fmean(values))
