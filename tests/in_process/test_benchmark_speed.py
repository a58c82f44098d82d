"""The table of speeds is printed whole, by the engine's trainer and ComfyUI's own, on a WAN that a test can afford."""
import os
import subprocess
import sys

from demo.comfy_path import ROOT

SMALL = """
from benchmarks import speed
from wanlite_model.config import WanConfig
speed.SMALL, speed.SMALL_SHAPE, speed.WARM = WanConfig(dim=128, ffn_dim=256, num_layers=2), (16, 3, 32, 32), 1
speed.main()
"""


def test_every_line_is_timed_beside_those_that_it_is_compared_with(comfyui_folder):
    ended = subprocess.run([sys.executable, "-c", SMALL, "--steps", "2"], cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(comfyui_folder)},
                           capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.stdout.splitlines() if line.startswith("| ")][1:]
    found = {name: cells for name, *cells in rows}
    assert len(rows) == len(found) == 11 and all(float(cells[0]) > 0 for cells in found.values())
    trained = {name: cells for name, cells in found.items() if name.startswith(("velocity", "trajectory", "distribution"))}
    assert len(trained) == 7 and all(float(cells[1].split()[0]) > 0 for cells in trained.values())
    for name in ("velocity, LoRA", "velocity, LoRA, checkpointing"):
        assert [cell.split()[1] in ("PASS", "FAIL") for cell in (found[name][2], found[name][5])] == [True, True]
    assert float(found["velocity, LoRA, checkpointing"][4]) < float(found["velocity, LoRA"][4])
    assert float(found["distribution, LoRA"][0]) > float(found["velocity, LoRA"][0])
