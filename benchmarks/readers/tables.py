"""What came of it: two tables, and where formats/readers.py says otherwise."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wanlite_model.config import WanConfig
from wanlite_model.formats.readers import Reader, readers

from .exports import DIFFS, EXPORTS

LIMIT, GGUF_LIMIT = 1e-3, 1e-2
COLUMNS = ("ComfyUI", "Wan 2.1's code", "Wan 2.2's code", "diffusers", "WanLite", "WanVideoWrapper")
GGUF_NODE = "ComfyUI-GGUF"              # stands where ComfyUI does, of a GGUF


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Relative differences of a student's start from its MODEL, and of what is read of the file without ComfyUI: None, where there is no MODEL.

    Then the start is that of the file, and compared with it.
    """
    variant: str
    storage: str
    velocity: float
    alone_weights: float | None
    alone_velocity: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of a reader on a file: how far its velocity is from what it should be, or what it raised, or why it was not tried."""
    difference: float | None = None
    raised: str = ""
    untried: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An export of one start. outcomes: {reader: what came of it}, of all that formats/readers.py has something to say of."""
    variant: str
    storage: str
    export: str
    config: WanConfig
    outcomes: Mapping[str, Outcome]


def claims(config: WanConfig, export: str) -> tuple[Reader, ...]:
    """What formats/readers.py says of it."""
    found = EXPORTS[export]
    return readers(config, found.layout, found.dtype, diffs=found.lora == DIFFS)


def start_table(starts: Iterable[Start]) -> str:
    lines = ["| WAN | storage of the teacher | start, velocity | file alone, weights | file alone, velocity |", "|---|---|---|---|---|"]
    for start in starts:
        numbers = (start.velocity, start.alone_weights, start.alone_velocity)
        told = ["n/a: no MODEL without --gguf" if number is None else f"{number:.1e}" for number in numbers]
        lines.append(f"| {' | '.join([start.variant, start.storage, *told])} |")
    return "\n".join(lines)


def export_table(rows: Iterable[Row], each_storage: bool) -> str:
    """A line for each WAN and export, the largest difference of all storages in each cell; or a line for each storage too."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.storage, row.export) if each_storage else (row.variant, row.export), []).append(row)
    heads = ["WAN", *(["storage of the teacher"] if each_storage else []), "export", f"{COLUMNS[0]}, of a GGUF {GGUF_NODE}", *COLUMNS[1:]]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for names, group in groups.items():
        cells = {}
        for reader in claims(group[0].config, group[0].export):
            column = COLUMNS[0] if reader.name == GGUF_NODE else reader.name
            cells[column] = cell([row.outcomes[reader.name] for row in group], reader.why_not)
        lines.append(f"| {' | '.join([*names, *(cells[column] for column in COLUMNS)])} |")
    return "\n".join(lines)


def cell(outcomes: Sequence[Outcome], why_not: str) -> str:
    """The largest difference, or why there is none; both of a reader that opens a file and computes something else. why_not: as formats/readers.py says."""
    untried = next((one.untried for one in outcomes if one.untried), "")
    raised = next((one.raised for one in outcomes if one.raised), "")
    found = [one.difference for one in outcomes if one.difference is not None]
    if untried or not found or raised and not why_not:
        return "n/a: " + ": ".join(filter(None, (untried, why_not or raised)))
    return f"{max(found):.1e}" + (f": {why_not}" if why_not else "")


def contradictions(starts: Iterable[Start], rows: Iterable[Row]) -> list[str]:
    """A sentence for each start that is not its MODEL, and for each WAN, export and reader of which formats/readers.py does not tell the truth."""
    found = [f"{start.variant}, {start.storage}: the start's velocity differs from its MODEL's by {start.velocity:.1e}."
             for start in starts if not start.velocity < LIMIT]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        limit = GGUF_LIMIT if EXPORTS[row.export].layout == "GGUF" else LIMIT
        for reader in claims(row.config, row.export):
            outcome = row.outcomes[reader.name]
            opens = outcome.difference is not None and outcome.difference < limit
            if not outcome.untried and opens == bool(reader.why_not):
                says = f"does not open it, since {reader.why_not}" if reader.why_not else "opens it"
                came = f"raised {outcome.raised}" if outcome.raised else f"answered with a difference of {outcome.difference:.1e}"
                groups.setdefault((row.variant, row.export, reader.name), []).append(f"{says}; of a {row.storage} teacher it {came}")
    return found + [f"{variant}, {export}: formats/readers.py says that {reader} {told[0]} ({len(told)} such storages)."
                    for (variant, export, reader), told in groups.items()]
