"""A workflow as the browser saves it becomes the prompt that the browser would send, and the server runs it."""
import json
from importlib import metadata

import pytest

from demo.graph import to_api, widgets
from wanlite_model.errors import WanLiteError


@pytest.fixture(scope="module")
def info(server) -> dict:
    return server.object_info()


def node(node_id: int, kind: str, values=(), inputs=(), outputs=(), **more) -> dict:
    """`inputs` are (name, type, link id or None); `outputs` are types."""
    return {"id": node_id, "type": kind, "widgets_values": list(values), **more,
            "inputs": [{"name": name, "type": kind_, "link": link} for name, kind_, link in inputs],
            "outputs": [{"name": kind_, "type": kind_} for kind_ in outputs]}


def workflow(nodes: list[dict], *links: list) -> dict:
    return {"nodes": nodes, "links": [list(link) for link in links], "version": 0.4}


def concatenate_and_show(source: list[dict], *links: list) -> dict:
    """`source` feeds link 1 into string_a."""
    return workflow([*source,
                     node(8, "StringConcatenate", ["left", "right", "-"],
                          [("string_a", "STRING", 1), ("string_b", "STRING", None), ("delimiter", "STRING", None)], ["STRING"]),
                     node(9, "PreviewAny", [], [("source", "*", 2)])],
                    [2, 8, 0, 9, 0, "STRING"], *links)


def shown(server, saved: dict) -> str:
    prompt = to_api(saved, server.object_info())
    return server.run(prompt)["9"]["text"][0]


def test_a_seed_widget_is_followed_by_the_browsers_own_control(info):
    sampler = node(3, "KSampler", [42, "randomize", 4, 1.0, "euler", "simple", 1.0])
    inputs = to_api(workflow([sampler]), info)["3"]["inputs"]
    assert inputs == {"seed": 42, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def test_a_noise_seed_has_the_control_too_and_other_numbers_have_none(info):
    sampler = node(3, "SamplerCustom", [True, 7, "fixed", 5.5])
    assert to_api(workflow([sampler]), info)["3"]["inputs"] == {"add_noise": True, "noise_seed": 7, "cfg": 5.5}
    size = node(4, "EmptyImage", [64, 32, 1, 0])
    assert to_api(workflow([size]), info)["4"]["inputs"] == {"width": 64, "height": 32, "batch_size": 1, "color": 0}


def test_control_after_generate_is_obeyed_in_the_schema():
    declared = {"Picker": {"input": {"required": {
        "noise_seed": ["INT", {"control_after_generate": False}], "count": ["INT", {"control_after_generate": True}],
        "file": [["a", "b"], {"control_after_generate": True}], "last": ["BOOLEAN", {}], "wire": ["INT", {"forceInput": True}]}}}}
    picker = node(1, "Picker", [5, 6, "increment", "b", "fixed", "", True])
    assert to_api(workflow([picker]), declared)["1"]["inputs"] == {"noise_seed": 5, "count": 6, "file": "b", "last": True}


def test_a_connected_widget_takes_the_link_and_not_its_saved_value(server):
    source = [node(1, "PrimitiveString", ["linked"], [("value", "STRING", None)], ["STRING"])]
    assert shown(server, concatenate_and_show(source, [1, 1, 0, 8, 0, "STRING"])) == "linked-right"


def test_an_unconnected_widget_keeps_its_saved_value(server):
    assert shown(server, concatenate_and_show([])) == "left-right"


def test_a_reroute_hands_its_input_on(server):
    source = [node(1, "PrimitiveString", ["rerouted"], [], ["STRING"]), node(2, "Reroute", [], [("", "*", 3)], ["STRING"]),
              node(3, "Reroute", [], [("", "*", 4)], ["STRING"])]
    saved = concatenate_and_show(source, [4, 1, 0, 3, 0, "STRING"], [3, 3, 0, 2, 0, "STRING"], [1, 2, 0, 8, 0, "STRING"])
    assert shown(server, saved) == "rerouted-right"


def test_a_bypassed_node_hands_on_the_input_of_the_same_type(server):
    bypassed = node(2, "StringConcatenate", ["x", "y", "z"],
                    [("string_a", "STRING", None), ("string_b", "STRING", 3), ("delimiter", "STRING", None)], ["STRING"], mode=4)
    upstream = node(1, "PrimitiveString", ["never"], [], ["STRING"])
    prompt = to_api(concatenate_and_show([upstream, bypassed], [3, 1, 0, 2, 1, "STRING"], [1, 2, 0, 8, 0, "STRING"]), server.object_info())
    assert "2" not in prompt
    assert prompt["8"]["inputs"]["string_a"] == "left"          # its first input is not connected, so nothing comes through
    bypassed["inputs"][0]["link"], bypassed["inputs"][1]["link"] = 3, None
    saved = concatenate_and_show([upstream, bypassed], [3, 1, 0, 2, 0, "STRING"], [1, 2, 0, 8, 0, "STRING"])
    assert shown(server, saved) == "never-right"


def test_a_bypassed_sampler_hands_its_latent_on_and_not_its_model(info):
    slots = [("model", "MODEL", 1), ("positive", "CONDITIONING", None), ("negative", "CONDITIONING", None), ("latent_image", "LATENT", 2)]
    saved = workflow([node(1, "UNETLoader", ["a.safetensors", "default"], [], ["MODEL"]),
                      node(2, "EmptyLatentImage", [64, 64, 1], [], ["LATENT"]),
                      node(3, "KSampler", [1, "fixed", 4, 1.0, "euler", "simple", 1.0], slots, ["LATENT"], mode=4),
                      node(4, "SaveLatent", ["x"], [("samples", "LATENT", 3)])],
                     [1, 1, 0, 3, 0, "MODEL"], [2, 2, 0, 3, 3, "LATENT"], [3, 3, 0, 4, 0, "LATENT"])
    assert to_api(saved, info)["4"]["inputs"] == {"filename_prefix": "x", "samples": ["2", 0]}


def test_a_muted_node_is_left_out_with_its_links(info):
    source = [node(1, "PrimitiveString", ["muted"], [], ["STRING"], mode=2)]
    saved = concatenate_and_show(source, [1, 1, 0, 8, 0, "STRING"])
    prompt = to_api(saved, info)
    assert set(prompt) == {"8", "9"} and "string_a" not in prompt["8"]["inputs"]


def test_a_primitive_gives_its_value_and_notes_are_left_out(info):
    saved = workflow([node(1, "PrimitiveNode", [20, "fixed"], [], ["INT"]), node(2, "Note", ["read me"]), node(3, "MarkdownNote", ["*me*"]),
                      node(4, "KSampler", [42, "randomize", 4, 1.0, "euler", "simple", 1.0], [("steps", "INT", 1)], ["LATENT"])],
                     [1, 1, 0, 4, 0, "INT"])
    prompt = to_api(saved, info)
    assert set(prompt) == {"4"} and prompt["4"]["inputs"]["steps"] == 20


def test_values_of_widgets_that_only_the_browser_has_are_left_out(info):
    image = node(1, "LoadImage", ["cat.png", "image"], [], ["IMAGE", "MASK"])
    assert to_api(workflow([image]), info)["1"]["inputs"] == {"image": "cat.png"}


def test_a_title_given_by_hand_is_kept(info):
    prompt = to_api(workflow([node(1, "EmptyImage", [64, 64, 1, 0], title="Canvas"), node(2, "EmptyImage", [64, 64, 1, 0])]), info)
    assert [prompt[key]["_meta"]["title"] for key in "12"] == ["Canvas", info["EmptyImage"]["display_name"]]


def test_the_templates_that_come_with_comfyui_convert_whole(info):
    """Every one that this server has all nodes for, about ninety; the others are other people's services, or hold subgraphs."""
    files = [package.locate_file(file) for package in metadata.distributions()
             if package.metadata["Name"].replace("_", "-").startswith("comfyui-workflow-templates")
             for file in package.files if file.suffix == ".json"]
    saved = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    saved = {name: content for name, content in saved.items() if isinstance(content, dict) and "nodes" in content
             and all(_as_it_was_saved(node, info) for node in content["nodes"])}
    assert len(saved) > 20
    for name, content in saved.items():
        for node_id, entry in to_api(content, info).items():
            missing = set(info[entry["class_type"]]["input"].get("required", {})) - set(entry["inputs"])
            assert not missing, f"{name}, node {node_id} ({entry['class_type']})"


def _as_it_was_saved(node: dict, info: dict) -> bool:
    """Whether this server has the node, with no widget that came later and none of the kinds (COMFY_...) that grow in the browser."""
    if node["type"] in ("Reroute", "PrimitiveNode", "Note", "MarkdownNote"):
        return True
    spec = info[node["type"]]["input"] if node["type"] in info else None
    values = node.get("widgets_values", [])
    return spec is not None and (isinstance(values, dict) or len(values) >= len(widgets(spec))) and not any(
        str(declared[0]).startswith("COMFY_") or declared[0] == "IMAGECOMPARE" for group in ("required", "optional")
        for declared in spec.get(group, {}).values())


@pytest.mark.parametrize("saved, sentence", [
    ({"1": {"class_type": "KSampler", "inputs": {}}}, "not a saved workflow"),
    (workflow([node(5, "NoSuchNode")]), "Node 5 is a NoSuchNode, and this ComfyUI has no such node"),
    (workflow([node(5, "KSampler", [42, 4, 1.0, "euler", "simple", 1.0])]), "has 6 saved widget values and this ComfyUI's KSampler has 7"),
    (workflow([node(5, "KSampler", [42, 4, 1.0, "euler", "simple", 1.0, "more"])]), "has 1.0 saved for steps which takes INT"),
    ({**workflow([node(5, "0f-1e")]), "definitions": {"subgraphs": [{"id": "0f-1e"}]}}, "is a subgraph"),
    (workflow([node(1, "Reroute", [], [("", "*", 1)], ["*"]), node(2, "PreviewAny", [], [("source", "*", 1)])], [1, 1, 0, 1, 0, "*"]), "feeds itself"),
])
def test_what_cannot_be_converted_is_refused_in_a_sentence(info, saved, sentence):
    with pytest.raises(WanLiteError, match=sentence):
        to_api(saved, info)
