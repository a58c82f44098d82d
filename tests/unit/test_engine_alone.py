"""The engine without ComfyUI, without diffusers, without peft: a whole job in a process that cannot import them."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

ALONE = r'''
import json, sys
blocked = set(json.loads(sys.argv[2]))
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/tests"]
from pathlib import Path
folder = Path(sys.argv[1])
from helpers_tiny import random_bank, random_teacher, random_wan
from wanlite_model.compress.build import create_student
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.trainer import run
from wanlite_model.transformer import WanLiteStudent
student = random_wan(depth=2)
student.save_pretrained(folder / "saved")
teacher, bank = random_teacher(depth=3), random_bank(2)
making = create_student(teacher, bank, (16, 1, 4, 4), depth=2, method="interleaved", folder=folder / "starts")
while True:
    try:
        next(making)
    except StopIteration as end:
        handle, _ = end.value
        break
job = DistillJob(student=handle.fingerprint, teacher=teacher.fingerprint, prompts=bank.fingerprint, shape=(16, 1, 4, 4), shift=teacher.shift,
                 steps=2, recipe=Recipe(teacher_steps=2, batch_size=2))
end = list(run(job, folder / "run", folder / "cache", teacher, handle, bank))[-1]
again = WanLiteStudent.from_pretrained(end.handle.folder)
print(json.dumps({"bases": [base.__module__ for base in WanLiteStudent.__mro__], "config": dict(student.config), "steps": len(end.losses),
                  "parameters": again.num_parameters(), "imported": sorted(set(sys.modules) & {"diffusers", "peft", "comfy", "folder_paths"}),
                  "from_config": WanLiteStudent.from_config(student.config).wan == student.wan}, default=str))
'''


def alone(folder, blocked):
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder), json.dumps(blocked), str(ROOT)], capture_output=True, text=True,
                          encoding="utf-8", timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_with_and_without_diffusers_it_is_the_same_student_in_the_same_files(tmp_path):
    without = alone(tmp_path / "without", ["diffusers", "peft", "transformers", "comfy", "folder_paths", "comfy_api"])
    beside = alone(tmp_path / "with", ["comfy", "folder_paths", "comfy_api"])
    assert without["imported"] == [] and "wanlite_model.mixins" in without["bases"]
    assert "diffusers.models.modeling_utils" in beside["bases"] and "wanlite_model.mixins" not in beside["bases"]
    assert without["steps"] == beside["steps"] == 2 and without["parameters"] == beside["parameters"]
    assert without["from_config"] and beside["from_config"]
    assert without["config"].items() <= beside["config"].items()        # diffusers adds its own underscored notes
    files = [{path.name: path.read_bytes() for path in (tmp_path / name / "saved").iterdir()} for name in ("without", "with")]
    assert files[0] == files[1] and len(files[0]) == 4 - ("saved.workflow.json" not in files[0])
