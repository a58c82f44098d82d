"""A graph as ComfyUI's browser saves it, laid out in titled groups that read from left to right."""
import math
import re
from dataclasses import dataclass, field
from typing import Any

from .graph import controls, widgets

Link = tuple[str, int]      # (key of a node, which of its outputs)
Node = dict[str, Any]

NOTE, TEACHER, PROMPTS, CREATE, DISTIL, SAVE, LOOK = range(7)      # the places of a graph's groups, from left to right
BELOW = 10                                                          # added to a place: the group under it
GROUPS = {      # title and colour
    NOTE: ("Start here", "#6a6a6a"), TEACHER: ("1 · The teacher", "#3f789e"), PROMPTS: ("2 · Prompts", "#4a8c86"),
    CREATE: ("3 · The student", "#5d8a4e"), DISTIL: ("4 · Distil", "#b06634"), SAVE: ("5 · Save", "#7a5ea8"), LOOK: ("6 · Look at it", "#a8842c"),
}
# Pixels of the canvas. TITLE is a node's bar above its position, BAR the group's own; TALL is where a group begins another column.
COLUMN, NOTE_COLUMN, GAP, TITLE, BAR, ROW, MARGIN, TALL = 400, 480, 30, 34, 44, 29, 36, 1600
TEXT, PICTURE, CHART = 130, 300, 360                    # what a field of many lines takes beside its row, a picture, and what Distill shows of a job
SHOWS = {"PreviewAny": 160, "WanLiteDistill": CHART}


@dataclass(kw_only=True, slots=True, eq=False)
class Canvas:
    """info: what the server answers to GET /object_info. groups: {place: (title, colour)}. downloads: {file name: (folder below models, address)}."""
    info: dict[str, Any]
    groups: dict[int, tuple[str, str]] = field(default_factory=lambda: GROUPS)
    downloads: dict[str, tuple[str, str]] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    links: list[list[Any]] = field(default_factory=list)
    places: dict[int, list[Node]] = field(default_factory=dict)

    def add(self, key: str, kind: str, place: int, values: dict[str, Any], title: str | None = None) -> None:
        """Adds a node to the group of that place, below the last one. What is not named among the values keeps the node's default.

        Raises KeyError where this ComfyUI's node has no input of such a name.
        """
        spec = self.info[kind] if kind in self.info else {"input": {"required": {"": ["STRING", {}]}}, "output": []}
        shown = widgets(spec["input"])
        declared = {name: value for group in ("required", "optional") for name, value in spec["input"].get(group, {}).items()}
        if unknown := set(values) - set(declared):
            raise KeyError(f"{kind} has no input named {sorted(unknown)[0]!r}")
        number = len(self.nodes) + 1
        sockets = [name for name in declared if name not in dict(shown)]
        node = {"id": number, "type": kind, "flags": {}, "order": number - 1, "mode": 0,
                "inputs": [{"name": name, "type": declared[name][0], "link": None} for name in sockets],
                "outputs": [{"name": name, "type": type_, "slot_index": i, "links": []}
                            for i, (name, type_) in enumerate(zip(spec.get("output_name", ()), spec["output"]))],
                **({"title": title} if title else {}), "properties": {"Node name for S&R": kind}, "widgets_values": []}
        for slot, name in enumerate(sockets):
            if name in values:
                self._connect(node, slot, values[name])
        for name, value in shown:
            node["widgets_values"] += [values.get(name, _default(value)), *("fixed" for _ in controls(name, value))]
        node["size"] = _size(node, shown)
        self._offer_downloads(node)
        self.places.setdefault(place, []).append(node)
        self.nodes[key] = node

    def _connect(self, node: Node, slot: int, link: Link) -> None:
        origin = self.nodes[link[0]]
        self.links.append([len(self.links) + 1, origin["id"], link[1], node["id"], slot, origin["outputs"][link[1]]["type"]])
        node["inputs"][slot]["link"] = len(self.links)
        origin["outputs"][link[1]]["links"].append(len(self.links))

    def _offer_downloads(self, node: Node) -> None:
        """What the browser's list of missing models reads: it offers a file for download that a loader names."""
        wanted = [value for value in node["widgets_values"] if isinstance(value, str) and value in self.downloads]
        if wanted and node["type"].endswith(("Loader", "LoaderModelOnly")):
            node["properties"]["models"] = [{"name": name, "url": self.downloads[name][1], "directory": self.downloads[name][0]} for name in wanted]

    def saved(self) -> dict[str, Any]:
        """The workflow, version 0.4."""
        groups = [{"id": number, "title": self.groups[place][0], "bounding": box, "color": self.groups[place][1], "font_size": 24, "flags": {}}
                  for number, (place, box) in enumerate(self._laid_out().items(), start=1)]
        return {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": list(self.nodes.values()),
                "links": self.links, "groups": groups, "config": {}, "extra": {}, "version": 0.4}

    def _laid_out(self) -> dict[int, list[int]]:
        """Gives every node its place; returns the groups' boxes {place: [x, y, width, height]}."""
        below = [place for place in self.places if place >= BELOW]
        boxes, x = {}, 0
        upper = max((_stacked(self.places[place - BELOW], (0, 0))[1] for place in below), default=0)
        for column in sorted({place % BELOW for place in self.places}):
            for place in sorted(place for place in self.places if place % BELOW == column):
                y = upper + GAP if place >= BELOW else 0
                boxes[place] = [x, y, *_stacked(self.places[place], (x, y))]
            x += max(boxes[place][2] for place in boxes if place % BELOW == column) + GAP
        return boxes


def _stacked(nodes: list[Node], corner: tuple[int, int]) -> tuple[int, int]:
    """Puts nodes one below the other into a group at that corner, in as many columns as they need; returns its size."""
    left, top = corner[0] + GAP, corner[1] + BAR + TITLE
    x, y, bottom = left, top, top
    for node in nodes:
        if y > top and y + node["size"][1] > corner[1] + TALL:
            x, y = x + COLUMN + GAP, top
        node["pos"] = [x, y]
        y += node["size"][1] + GAP + TITLE
        bottom = max(bottom, y - TITLE)
    right = max(node["pos"][0] + node["size"][0] for node in nodes) + GAP
    return right - corner[0], bottom - corner[1]


def _size(node: Node, shown: list) -> list[int]:
    if node["type"] == "MarkdownNote":
        return [NOTE_COLUMN, _written(node["widgets_values"][0])]
    many_lines = sum(TEXT for _, value in shown if len(value) > 1 and value[1].get("multiline"))
    picture = PICTURE if node["type"].startswith("Save") and node["inputs"] and node["inputs"][0]["type"] == "IMAGE" else SHOWS.get(node["type"], 0)
    rows = max(len(node["inputs"]), len(node["outputs"])) + len(node["widgets_values"])
    return [COLUMN, ROW * rows + MARGIN + many_lines + picture]


def _written(text: str) -> int:
    """The height that a note's text takes in its column."""
    lines = (re.sub(r"\]\([^)]*\)|[*\[`]", "", line) for line in text.splitlines() if line)
    return ROW + sum(44 if line.startswith("#") else 10 + 17 * math.ceil(len(line) / 78) for line in lines)


def _default(declared: list) -> Any:
    options = declared[1] if len(declared) > 1 else {}
    choices = declared[0] if isinstance(declared[0], list) else options.get("options")
    return options.get("default", choices[0] if choices else "")
