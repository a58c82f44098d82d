"""What the shipped graphs look like: groups, notes, addresses, thumbnails. That they run is tests/http's."""
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers_graph import box, nodes_in
from PIL import Image

from demo import thumbnails
from demo.downloads import DOWNLOADS
from demo.workflows import FOLDER, SETTINGS
from wanlite_model.files import read_json

ALL = pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
MODEL_FILE = re.compile(r"[\w.-]+\.(?:safetensors|gguf|pth|ckpt)\b")
HERE = re.compile(r"^(?:[/~\\]|[A-Za-z]:[\\/])|/(?:home|tmp|root|Users)/")            # of a path of somebody's computer


def test_every_shipped_workflow_has_a_source_and_a_thumbnail():
    assert {path.name for path in FOLDER.iterdir()} == {name for path in SETTINGS for name in (path.name, path.with_suffix(".jpg").name)}
    assert {path.stem for path in SETTINGS} == set(thumbnails.CARDS)


@ALL
def test_every_node_lies_in_one_group_and_nothing_on_anything_else(path):
    workflow = read_json(path)
    found = Counter(node["id"] for group in workflow["groups"] for node in nodes_in(group, workflow))
    assert found == {node["id"]: 1 for node in workflow["nodes"]}
    for boxes in ([box(node) for node in workflow["nodes"]], [group["bounding"] for group in workflow["groups"]]):
        assert not [(one, other) for i, one in enumerate(boxes) for other in boxes[:i] if overlap(one, other)]


def overlap(one, other):
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


@ALL
def test_the_graph_reads_from_left_to_right(path):
    """The note is at the top left, the numbers of the groups rise, and a link goes to its own group or to a later one."""
    workflow = read_json(path)
    groups = sorted(workflow["groups"], key=lambda group: group["bounding"][0])
    assert [node["type"] for node in nodes_in(groups[0], workflow)] == ["MarkdownNote"] and groups[0]["bounding"][:2] == [0, 0]
    assert [group["title"][0] for group in groups[1:]] == sorted(group["title"][0] for group in groups[1:])
    assert {group["title"][0] for group in groups[1:]} == set("123456")
    place = {node["id"]: group["title"][0] for group in groups for node in nodes_in(group, workflow)}
    assert all(place[origin] <= place[target] for _, origin, _, target, _, _ in workflow["links"])


@ALL
def test_every_link_fits_both_of_its_ends(path):
    workflow = read_json(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["links"]
    for number, origin, slot, target, target_slot, kind in workflow["links"]:
        given, taken = nodes[origin]["outputs"][slot], nodes[target]["inputs"][target_slot]
        assert number in given["links"] and taken["link"] == number
        assert given["type"] == kind and taken["type"] in (kind, "*"), (nodes[origin]["type"], nodes[target]["type"])


@ALL
def test_the_note_names_the_files_that_the_graph_loads_and_no_others(path):
    workflow = read_json(path)
    note = next(node for node in workflow["nodes"] if node["type"] == "MarkdownNote")["widgets_values"][0]
    written = [value for node in workflow["nodes"] if node["type"] != "MarkdownNote" for value in node["widgets_values"] if isinstance(value, str)]
    loaded = {Path(value).name for value in written if MODEL_FILE.fullmatch(Path(value).name)}
    names = {SETTINGS[path]["name"].format(side=side) for side in ("high", "low")}
    assert names <= set(written) and all(name in note for name in names)
    assert loaded <= set(MODEL_FILE.findall(note)) <= loaded | {f"{name}.safetensors" for name in names}
    assert set(re.findall(r"\]\((.*?)\)", note)) == {DOWNLOADS[file][1] for file in loaded if file in DOWNLOADS}
    assert not [value for value in (note, *written) for word in value.split() if HERE.search(word.strip("`(),:"))]


@ALL
def test_what_is_missing_is_offered_for_download_from_where_stock_templates_have_it(path):
    offered = {(model["name"], model["url"], model["directory"]) for node in read_json(path)["nodes"] for model in node["properties"].get("models", ())}
    assert offered == {(name, address, folder) for name, (folder, address) in DOWNLOADS.items() if name in path.read_text(encoding="utf-8")}
    assert offered <= stock_downloads()


def stock_downloads():
    """(name, address, folder) of every model that ComfyUI's own templates offer."""
    found = set()
    packages = Path(importlib.util.find_spec("comfyui_workflow_templates").origin).parent.parent
    for file in packages.glob("comfyui_workflow_templates*/templates/*wan*.json"):
        json.loads(file.read_text(encoding="utf-8"), object_hook=lambda each: found.add(
            (each["name"], each["url"].removesuffix("?download=true"), each["directory"])) if {"name", "url", "directory"} <= set(each) else each)
    return found


@ALL
def test_the_thumbnail_is_what_the_command_draws_square_and_small(path, tmp_path):
    thumbnails.write(tmp_path / f"{path.stem}.jpg")
    assert path.with_suffix(".jpg").stat().st_size < 40_000
    with Image.open(path.with_suffix(".jpg")) as kept, Image.open(tmp_path / f"{path.stem}.jpg") as drawn:
        assert kept.format == "JPEG" and kept.size == (512, 512)
        apart = np.asarray(kept, dtype=np.float32) - np.asarray(drawn, dtype=np.float32)
    assert np.abs(apart).mean() < 2, "run python -m demo.workflows"         # another version of Pillow may draw letters a little differently
