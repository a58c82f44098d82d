"""A real server starts with the pack in its custom_nodes, runs graphs, reports events, cancels, and says why it refuses."""
import pytest

from demo.comfy_server import ComfyServer, ServerError


def text_graph(text: str) -> dict:
    return {"1": {"class_type": "StringConcatenate", "inputs": {"string_a": text, "string_b": "!", "delimiter": ""}},
            "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}


def test_the_pack_is_imported_without_a_warning(server):
    log = server.log(lines=10_000)
    assert "IMPORT FAILED" not in log and "Cannot import" not in log, log
    assert "Error while calling comfy_entrypoint" not in log, log
    assert "custom_nodes" in log and "WanLite" in log


def test_the_server_knows_the_packs_nodes(server):
    ours = [name for name, info in server.object_info().items() if info["python_module"] == "custom_nodes.WanLite"]
    assert "WanLiteDistill" in ours and all(name.startswith("WanLite") for name in ours)


def test_the_server_hands_out_the_packs_texts_in_english_and_chinese(server):
    english, chinese = (server.translations()[language] for language in ("en", "zh"))
    ours = {name for name in server.object_info() if name.startswith("WanLite")}
    assert english["nodeDefs"].keys() == chinese["nodeDefs"].keys() == ours
    one, other = (told["nodeDefs"]["WanLiteDistill"]["inputs"]["steps"] for told in (english, chinese))
    assert one["tooltip"] == server.object_info()["WanLiteDistill"]["input"]["required"]["steps"][1]["tooltip"]
    assert other["name"] == "训练步数" and chinese["nodeCategories"] == {"WanLite": "WanLite 蒸馏"}


def test_what_widgets_alone_decide_is_refused_by_the_server_in_one_sentence(server):
    graph = {"1": {"class_type": "WanLiteLoadTeacher", "inputs": {"name": "gone.safetensors"}},
             "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}}}
    with pytest.raises(ServerError, match=r"WanLiteLoadTeacher \(node 1\).*gone.safetensors is not in ComfyUI's model folders any more") as refused:
        server.queue(graph)
    assert str(refused.value).count("gone.safetensors") == 1


def test_a_graph_runs_and_its_events_arrive(server):
    prompt_id = server.queue(text_graph("events"))
    seen = [event["type"] for event in server.events(prompt_id)]
    assert seen[-1] == "execution_success" and "executed" in seen
    assert server.wait(prompt_id)["outputs"]["2"]["text"] == ["events!"]


def test_a_refused_graph_says_which_node_and_why(server):
    with pytest.raises(ServerError, match=r"StringConcatenate \(node 1\).*string_b"):
        server.queue({**text_graph("x"), "1": {"class_type": "StringConcatenate", "inputs": {"string_a": "x", "delimiter": ""}}})


def test_a_failing_node_says_what_failed(server):
    graph = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
             "2": {"class_type": "ImageToMask", "inputs": {"image": ["1", 0], "channel": "alpha"}},
             "3": {"class_type": "MaskToImage", "inputs": {"mask": ["2", 0]}},
             "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}}
    with pytest.raises(ServerError, match=r"ImageToMask \(node 2\)"):
        server.run(graph)


def test_a_server_that_cannot_start_shows_its_log(comfyui_folder, tmp_path):
    broken = ComfyServer(comfyui_folder, tmp_path, ("--no-such-option",))
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-option"):
        broken.wait_until_up(timeout=60)
    broken.close()
