"""WANs of real size are cut, loaded and saved in the memory that they need, and no copy more. The files are mostly holes."""
import math
import shutil

import pytest
from helpers_memory import ROOM, WAN_1_3B, WAN_14B, largest, linux_only, mark, python, sparse_wan

from wanlite_model.formats.keymap import wan_shapes
from wanlite_model.formats.read import open_wan

pytestmark = linux_only
GIB = 2**30

START = """
from pathlib import Path
import torch
from helpers_compress import result_of
from helpers_memory import allow
from wanlite_model.compress.build import create_student
from wanlite_model.teacher import FileTeacher
allow(int(sys.argv[1]))
teacher = FileTeacher(Path(sys.argv[2]), shift=5.0, device=torch.device("cpu"))
print(result_of(create_student(teacher, None, (16, 21, 60, 104), keep=(0, 9, 20, 29), folder=Path(sys.argv[3])))[0].file)
"""

LOAD = """
from pathlib import Path
from helpers_memory import allow
from wanlite_model.transformer import WanLiteStudent
allow(int(sys.argv[1]))
WanLiteStudent.from_pretrained(Path(sys.argv[2]))
"""

CUT = """
from pathlib import Path
from helpers_memory import allow
from wanlite_model.compress.apply import start_student
from wanlite_model.compress.plan import CompressionPlan
from wanlite_model.formats.read import open_wan
from wanlite_model.formats.write import write_student
allow(int(sys.argv[1]))
plan = CompressionPlan(keep=(0, 39), ffn_dim=256, method="given", teacher_layers=40, teacher_ffn_dim=13824)
with open_wan(Path(sys.argv[2])) as source:
    # Of what goes nothing is read: 26 GB of holes are zeros that take half a minute.
    stays = [name for name in source.names() if not name.startswith("blocks.") or int(name.split(".")[1]) in plan.keep]
    write_student(Path(sys.argv[3]), config=plan.student_config(source.config), tensors=start_student(source.tensors(stays), plan))
"""

LOAD_AND_SAVE = """
from pathlib import Path
import torch
from helpers_memory import ROOM, allow
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.transformer import WanLiteStudent
allow(int(sys.argv[1]))
student = WanLiteStudent.from_pretrained(Path(sys.argv[2])) if sys.argv[4] == "bf16" else StudentHandle.of(Path(sys.argv[2])).load(torch.float32)
allow(ROOM)
student.save_pretrained(Path(sys.argv[3]), dtype=torch.bfloat16)
"""

FLOAT8 = """
from pathlib import Path
from types import SimpleNamespace
import torch
from helpers_memory import allow
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.distill.begin import fresh_state
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.levers import Levers
job = DistillJob(student="", teacher="", prompts="", shape=(16, 1, 8, 8), shift=5.0, steps=1, recipe=Recipe(rank=1))
student, teacher = StudentHandle.of(Path(sys.argv[2])), SimpleNamespace(device=torch.device("cpu"))
allow(int(sys.argv[1]))
fresh_state(job, student, teacher, None, Levers(frozen_float8=True))
"""

NARROW = """
from pathlib import Path
import torch
from helpers_compress import result_of
from helpers_memory import allow
from wanlite_model.cond import Cond
from wanlite_model.compress.apply import start_student
from wanlite_model.compress.ffn import cut_ffn
from wanlite_model.compress.importance import Probe
from wanlite_model.compress.plan import CompressionPlan
from wanlite_model.compress.shelf import Shelf
from wanlite_model.config import WanConfig
from wanlite_model.formats.keymap import wan_shapes

class Teacher:
    config = WanConfig(dim=5120, ffn_dim=512, num_layers=80)

    def weights(self):
        for name, shape in wan_shapes(self.config).items():
            yield name, torch.ones(shape if ".ffn.2." in name else (1,) * len(shape), dtype=torch.bfloat16).expand(shape)

    def velocity(self, x, sigma, cond, skip, taps):
        for tap in taps.values():
            tap(torch.randn(len(x), 16, self.config.ffn_dim), None)
        return x

teacher, keep = Teacher(), tuple(range(80))
torch.linalg.cholesky(torch.eye(256, dtype=torch.float64))          # its libraries are loaded at the first call
allow(int(sys.argv[1]))
probe = Probe(x=torch.zeros(4, 16, 1, 8, 8), sigma=torch.zeros(4), cond=Cond(context=torch.zeros(4, 1, 4096)))
cuts = result_of(cut_ffn(teacher, probe, keep, 256, Shelf(Path(sys.argv[2])), memory=1))
plan = CompressionPlan(keep=keep, ffn_dim=256, method="given", teacher_layers=80, teacher_ffn_dim=512)
for name, tensor in start_student(teacher.weights(), plan, cuts):
    del tensor
"""


@pytest.fixture
def disk(tmp_path):
    """A folder that is gone at once: pytest would keep the gigabytes of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def done(code, *arguments):
    ended = python(code, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def check_marks(path, keep):
    """Each tensor begins as that of the teacher that it was made of."""
    with open_wan(path) as source:
        assert source.config.num_layers == len(keep)
        for name in source.names():
            blocks, _, rest = name.partition(".")
            mine, _, leaf = rest.partition(".")
            theirs = f"blocks.{keep[int(mine)]}.{leaf}" if blocks == "blocks" else name
            assert source.tensor(name).flatten()[0] == mark(theirs), name


def test_1_3b_is_cut_from_file_to_file_in_the_memory_of_one_tensor(disk):
    """Through the same steps that a node takes. The limit is one that the model itself does not fit into."""
    teacher, room = sparse_wan(disk / "teacher.safetensors", WAN_1_3B), largest(WAN_1_3B) + GIB
    start = done(START, room, teacher, disk / "starts")
    check_marks(start, (0, 9, 20, 29))
    refused = python(LOAD, room, teacher)
    assert refused.returncode and "allocate memory" in refused.stderr


def test_14b_is_cut_from_file_to_file_in_the_memory_of_one_tensor(disk):
    teacher = sparse_wan(disk / "teacher.safetensors", WAN_14B)
    assert teacher.stat().st_size > 28e9 and 512 * teacher.stat().st_blocks < 50e6
    done(CUT, largest(WAN_14B) + GIB, teacher, disk / "student")
    check_marks(disk / "student", (0, 39))


@pytest.mark.parametrize("dtype, itemsize", [("bf16", 2), ("fp32", 4)])
def test_a_loaded_student_is_in_memory_once_and_saving_it_adds_nothing(disk, dtype, itemsize):
    config = WAN_1_3B.resized(num_layers=8, ffn_dim=WAN_1_3B.ffn_dim)
    file = sparse_wan(disk / "student.safetensors", config)
    copy = file.stat().st_size // 2 * itemsize
    done(LOAD_AND_SAVE, copy + largest(config) + ROOM, file, disk / "saved", dtype)
    assert copy > 3 * (largest(config) + ROOM)
    check_marks(disk / "saved", range(8))


def test_a_base_in_float8_is_never_in_memory_in_another_dtype(disk):
    config = WAN_14B.resized(num_layers=6, ffn_dim=WAN_14B.ffn_dim)
    shapes = wan_shapes(config)
    matrices = {name for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2}
    held = sum(math.prod(shape) * (1 if name in matrices else 4) for name, shape in shapes.items())
    made = (2 + 3 * 4) * max(math.prod(shapes[name]) for name in matrices)          # as it is read, in fp32, its magnitudes, scaled
    room = held + made + ROOM
    assert room < 4 * sum(map(math.prod, shapes.values())) / 2          # of all of it in fp32, which a CPU computes in
    done(FLOAT8, room, sparse_wan(disk / "student.safetensors", config))


def test_narrowing_the_ffn_holds_one_block_of_it(disk):
    """The moments of its activations are small here; what is refitted to them, of 80 blocks, is twice the limit."""
    assert ROOM <= 80 * 2 * 5120 * 512 / 2
    done(NARROW, ROOM, disk / "shelf")
