"""The shipped graphs fit the nodes as they are, and a real server takes them but for model files that nobody ships."""
import json

import pytest

from demo.comfy_server import ServerError
from demo.graph import to_api
from demo.workflows import BANK, FOLDER, REAL, SETTINGS, TINY, build
from wanlite_model.files import read_json


def test_every_shipped_workflow_has_a_source():
    assert {path.name for path in FOLDER.glob("*.json")} == {path.name for path in SETTINGS}


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_the_file_is_what_the_command_writes_for_these_nodes(path, server):
    written = json.loads(json.dumps(build(SETTINGS[path], server.object_info())))
    assert _without_new_outputs(read_json(path)) == _without_new_outputs(written), "run python -m demo.workflows"


def _without_new_outputs(workflow):
    """Newer ComfyUIs hand on what PreviewAny and the savers show: outputs that no node here takes."""
    return {**workflow, "nodes": [{**node, "outputs": node["outputs"] if node["type"].startswith("WanLite") else
                                   [output for output in node["outputs"] if output["links"]]} for node in workflow["nodes"]]}


@pytest.mark.parametrize("path", [TINY, REAL], ids=lambda path: path.stem)
def test_the_server_misses_nothing_but_model_files(path, server):
    workflow = read_json(path)
    prompt = to_api(workflow, server.object_info())
    assert {node["class_type"] for node in prompt.values()} == {node["type"] for node in workflow["nodes"]} - {"MarkdownNote"}
    absent = 0
    for node in prompt.values():                # whatever other tests have put into this server's folders
        for name in {"unet_name", "vae_name", "clip_name"} & set(node["inputs"]):
            node["inputs"][name], absent = "absent.safetensors", absent + 1
    with pytest.raises(ServerError) as refused:
        server.queue(prompt)
    complaints = [line for line in str(refused.value).splitlines()[1:] if f"input/{BANK} is not there" not in line]
    assert len(complaints) == absent and all("absent.safetensors" in line for line in complaints), complaints
