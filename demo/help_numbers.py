"""Writes the defaults and ranges of numbers into the nodes' help pages, from the nodes themselves: `python -m demo.help_numbers`. Words are left alone."""
import asyncio
import re
import sys
from typing import Any

from .comfy_path import ROOT, open_comfyui, pack_module

HELP = ROOT / "web" / "docs"
TO = {"md": "to", "zh": "到"}          # of a range, by the page's language
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def filled(page: str, inputs: list[Any], to: str) -> str:
    """The page with these inputs' default and range in the last two cells of their rows; cells that say the same in other digits stay as they are."""
    found = {f"| `{one.id}` |": one for one in inputs if one.io_type in ("INT", "FLOAT")}

    def row(line: str) -> str:
        one = next((one for start, one in found.items() if line.startswith(start)), None)
        if one is None:
            return line
        *words, default, span, end = line.split("|")
        default = default if numbers(default) == [one.default] else f" {written(one.default)} "
        span = span if numbers(span) == [one.min, one.max] else f" {written(one.min)} {to} {written(one.max)} "
        return "|".join((*words, default, span, end))

    return "\n".join(map(row, page.split("\n")))


def numbers(cell: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, cell)]


def written(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:.10g}"


def pages(node_id: str) -> dict[Any, str]:
    """{a page of this node: how it writes a range}"""
    return {HELP / f"{node_id}.md": TO["md"], **{path: TO[path.stem] for path in (HELP / node_id).glob("*.md")}}


def main() -> int:
    open_comfyui()
    for node in asyncio.run(pack_module("nodes").WanLiteExtension().get_node_list()):
        schema = node.GET_SCHEMA()
        for path, to in pages(schema.node_id).items():
            before = path.read_text(encoding="utf-8")
            after = filled(before, schema.inputs, to)
            if after != before:
                path.write_text(after, encoding="utf-8", newline="\n")
                sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
