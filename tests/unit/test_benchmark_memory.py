"""What a job is said to take is what it takes: three lines of the memory table, on a WAN that a test can afford."""
import pytest
import torch

from benchmarks import memory
from benchmarks.memory import Clips, Line, measure, random_wan, written
from wanlite_model.config import WanConfig
from wanlite_model.distill.levers import LeverSettings
from wanlite_model.teacher import FileTeacher

CLIPS = Clips(frames=1, rows=32, columns=32, batch=4, blocks=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("memory")


@pytest.mark.parametrize(("trained", "levers"), [("adapters", {"checkpointing": True, "frozen_float8": True}), ("all, AdamW", {}), ("all, Muon", {"checkpointing": True})])
def test_a_whole_job_takes_what_was_predicted(folder, monkeypatch, trained, levers):
    monkeypatch.setitem(memory.SIZES, "small", WanConfig(dim=256, ffn_dim=512, num_layers=3))
    off = dict.fromkeys(("checkpointing", "frozen_float8", "optimizer_8bit"), False)
    line = Line(size="small", clips=CLIPS, trained=trained, levers=LeverSettings(**off | levers))
    teacher = FileTeacher(random_wan(memory.SIZES["small"], folder), shift=5.0, device=torch.device("cpu"))
    peak = measure(line, teacher, folder)
    assert peak.passes and "PASS" in written(line, peak), peak
