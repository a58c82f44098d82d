"""ComfyUI's start waits for next to nothing: the pack looks which files it can offer, and that is all it does."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_install import NODES

from demo.comfy_path import ROOT

# What a node's run imports, when there is one: torch's modules are built there, and a job is planned.
AT_WORK = ("transformer", "teacher", "swap", "experts", "prompts", "cond", "pinned", "mixins", "cli", "compress", "distill.trainer", "distill.learner",
           "distill.begin", "distill.objectives", "distill.optim", "distill.evaluate", "formats.read", "formats.write", "formats.lora")


@pytest.fixture(scope="module")
def start(comfyui_folder):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "helpers_watch.py"), str(comfyui_folder), str(ROOT)], capture_output=True, text=True,
                          encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_import_and_all_schemas_take_less_than_half_a_second(start, request):
    """The quickest of several starts: another program may have had the machine in some of them."""
    boots = [request.getfixturevalue("managed"), request.getfixturevalue("pulled"), request.getfixturevalue("portable").boot]
    assert set(start["nodes"]) == NODES
    assert min(start["seconds"], *(boot.seconds for boot in boots)) < 0.5


def test_no_engine_is_imported_and_no_other_package(start):
    engine = {name.removeprefix("wanlite_model.") for name in start["ours"] if name.startswith("wanlite_model.")}
    assert "config" in engine and not [name for name in engine if name.startswith(AT_WORK)]
    assert [name for name in start["others"] if name.split(".")[0] not in sys.stdlib_module_names] == []


def test_nothing_is_written_started_connected_or_asked_of_a_gpu(start):
    reading = ("os.listdir", "os.scandir", "os.walk")
    assert [event for event in start["did"] if event[0] not in reading] == [] and start["threads"] == []
    assert start["did"]                 # the names of files that the nodes offer: what shows that the watch is on


def test_only_the_folders_are_read_whose_files_the_nodes_offer(start, comfyui_folder):
    offered = [comfyui_folder / name for name in ("models/unet", "models/diffusion_models", "models/loras", "input", "output/wanlite")]
    offered.append(ROOT / "nodes" / "prompt_lists")
    elsewhere = [folder for _, folder in start["did"] if not any(Path(folder).is_relative_to(one) for one in offered)]
    assert elsewhere == []
