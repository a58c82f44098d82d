"""What can be asked of a running job: to finish early, and to save itself before the process ends."""
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from demo.comfy_path import ROOT


def test_a_request_to_finish_reaches_the_job_that_trains_and_never_the_next(pack):
    jobs, live = pack("nodes.comfy_bridge.jobs"), SimpleNamespace(node="12:5")
    assert not jobs.finish("cats") and jobs.run_at(["12:5"]) is None
    with jobs.running("cats", live) as job:
        assert not jobs.finish("cats")          # it has trained nothing yet
        job.trains = True
        assert not jobs.finish("dogs") and not job.finish
        assert jobs.finish("cats") and job.finish
        assert (jobs.run_at(["5"]), jobs.run_at(["5", "12:5"]), jobs.live("cats")) == (None, "cats", live)
    assert not jobs.finish("cats") and jobs.live("cats") is None
    with jobs.running("cats", live) as job:
        job.trains = True
        assert not job.finish


def test_a_second_copy_of_the_pack_adds_no_second_route(pack, monkeypatch):
    from aiohttp import web
    server = SimpleNamespace(routes=web.RouteTableDef())
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    for _ in range(2):
        pack("nodes.comfy_bridge.routes").add_routes()
    added = [(route.method, route.path) for route in server.routes]
    assert ("POST", "/wanlite/finish") in added and len(added) == len(set(added))


@pytest.fixture
def clock(pack, monkeypatch):
    """Seconds that pass when a test says so: clock.now += 1."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(pack("nodes.comfy_bridge.runtime").time, "monotonic", lambda: clock.now)
    return clock


def test_a_stage_that_follows_a_longer_one_is_shown_from_where_it_is(pack, clock, monkeypatch):
    """Newer ComfyUIs hold back what a bar of theirs has shown before."""
    import comfy.utils
    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, picture, node_id: shown.append((done, total, picture, node_id)))
    bar = pack("nodes.comfy_bridge.runtime").Bar("12:5")
    for stage, done, total in (("asking", 300, 300), ("training", 1, 1000), ("training", 2, 1000)):
        bar.show(stage, done, total)
        clock.now += 0.6                # one of the three comes too soon
    assert shown == [(300, 300, None, "12:5"), (2, 1000, None, "12:5")]


def test_the_board_tells_every_browser_and_no_more_than_twice_a_second(pack, clock, monkeypatch):
    import comfy.model_management
    sent, taken = [], []
    server = SimpleNamespace(send_sync=lambda *message: sent.append(message))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    live = SimpleNamespace(take=taken.append, tell=taken.append, shown=lambda memory: {"taken": len(taken), **memory})
    board = pack("nodes.comfy_bridge.runtime").Board(live)
    for event in range(40):
        board.show(event)
        clock.now += 0.125
    assert taken == list(range(40)) and len(sent) == 10
    assert all(len(message) == 2 and message[0] == "wanlite.live" for message in sent)          # no third: to all that are connected
    total = comfy.model_management.get_total_memory(comfy.model_management.get_torch_device())
    assert 0 < sent[-1][1]["used"] < sent[-1][1]["total"] == total and 0 < sent[-1][1]["process"] < total
    board.tell("Saving.")                                       # at once
    assert taken[-1] == "Saving." and len(sent) == 11


def test_a_page_that_cannot_be_told_ends_no_job(pack, monkeypatch):
    """A device that has failed fails again when it is asked for its memory; the job's own error is what the user is to see."""
    def failing():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pack("nodes.comfy_bridge.runtime").memory, "usage", failing)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(send_sync=None))))
    pack("nodes.comfy_bridge.runtime").Board(SimpleNamespace(take=lambda event: None)).show(None)


@pytest.fixture
def clips(pack, tmp_path):
    """A job's clips with a VAE that makes 5 grey frames of what it is given: its mean and, of a list of errors, what it raises first."""
    vae = SimpleNamespace(patcher=object(), decoded=[], errors=[])

    def decode(latents):
        if vae.errors:
            raise vae.errors.pop()
        vae.decoded.append(float(latents.mean()))
        return torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1).expand(1, 5, 40, 800, 3) * latents.mean()

    vae.decode = decode
    return pack("nodes.comfy_bridge.training").Clips(vae, SimpleNamespace(process_out=lambda latents: latents), tmp_path), vae


def sample(pack, step, teacher=0.5):
    latents = torch.ones(1, 16, 2, 4, 4)
    return pack("wanlite_model.distill.events").Sample(step=step, latents=latents, teacher=None if teacher is None else teacher * latents)


def test_a_clip_lies_beside_the_teachers_and_moves(pack, clips, tmp_path):
    from PIL import Image
    made, vae = clips
    made.keep(sample(pack, 3))
    made.keep(sample(pack, 6))
    assert vae.decoded == [1.0, 0.5, 1.0]                   # the teacher's once
    for step in (3, 6):
        with Image.open(tmp_path / f"samples/step-{step}.webp") as clip:
            assert clip.size == (644, 16) and clip.n_frames == 5            # each 320 wide, and 4 between
            at = []
            for frame in range(5):
                clip.seek(frame)
                at.append([clip.convert("RGB").getpixel((x, 8))[0] for x in (160, 480)])
        assert at == [[pytest.approx(shade / 2, abs=6), pytest.approx(shade, abs=6)] for shade in (0, 64, 127, 191, 255)]
    assert [step for step, _ in pack("nodes.comfy_bridge.live").clips_of(tmp_path, 5)] == [3]
    made.keep(sample(pack, 9))
    assert [step for step, _ in pack("nodes.comfy_bridge.live").clips_of(tmp_path, 99)] == [3, 6, 9]


def test_without_a_clip_of_the_teachers_the_students_is_alone(pack, clips, tmp_path):
    from PIL import Image
    clips[0].keep(sample(pack, 3, teacher=None))
    with Image.open(tmp_path / "samples/step-3.webp") as clip:
        assert clip.size == (320, 16)


@pytest.mark.parametrize("what", ["no memory", "no disk"])
def test_a_clip_that_cannot_be_made_costs_the_clip_and_not_the_job(what, pack, clips, tmp_path, monkeypatch, caplog):
    made, vae = clips
    if what == "no memory":
        vae.errors.append(torch.cuda.OutOfMemoryError("nothing left"))
    else:
        def full(path, write):
            raise pack("wanlite_model.errors").WanLiteError("The disk is full.")
        monkeypatch.setattr(pack("nodes.comfy_bridge.runtime"), "replace_file", full)
    made.keep(sample(pack, 3))
    assert not list(tmp_path.rglob("*.webp")) and ("nothing left" in caplog.text or "The disk is full" in caplog.text)
    monkeypatch.undo()
    made.keep(sample(pack, 6))
    assert (tmp_path / "samples/step-6.webp").exists()


@pytest.fixture
def held(pack, monkeypatch):
    """The process held back from its end, with a server whose loop runs in this thread."""
    loop = SimpleNamespace(call_soon_threadsafe=lambda function: function())
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(loop=loop))))
    return pack("nodes.comfy_bridge.runtime").EndHeldBack()


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without telling it")
def test_a_deadly_signal_has_its_effect_once_the_job_is_saved(held, monkeypatch):
    raised = []
    with held:
        assert not held.wanted
        os.kill(os.getpid(), signal.SIGTERM)
        assert held.wanted and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL       # a second one would end it here
        monkeypatch.setattr(signal, "raise_signal", raised.append)
    assert raised == [signal.SIGTERM]


def test_signals_are_as_before_afterwards_and_those_that_are_ignored_stay_so(held, monkeypatch):
    one, other = signal.SIGTERM, signal.SIGINT
    monkeypatch.setattr(sys.modules[type(held).__module__], "DEADLY", (one, other))
    before = signal.signal(other, signal.SIG_IGN)
    try:
        with held:
            assert signal.getsignal(one) not in (signal.SIG_DFL, signal.SIG_IGN) and signal.getsignal(other) == signal.SIG_IGN
        assert signal.getsignal(one) == signal.SIG_DFL and signal.getsignal(other) == signal.SIG_IGN
    finally:
        signal.signal(other, before)


def test_the_computer_stays_awake_until_the_job_has_saved_itself(pack, monkeypatch):
    runtime, order = pack("nodes.comfy_bridge.runtime"), []

    @contextmanager
    def awake(why):
        order.append("awake")
        yield
        order.append("asleep")

    def work():
        try:
            yield order.append("works")
        finally:
            order.append("saves")

    monkeypatch.setattr(runtime, "awake", awake)
    runtime.drive(work(), lambda event: None)
    assert order == ["awake", "works", "saves", "asleep"]


ENDLESS = """
import importlib, sys, threading, time
from pathlib import Path
from demo.comfy_path import import_pack, open_comfyui, put_comfyui_first
put_comfyui_first(Path(sys.argv[1]))
open_comfyui()
runtime = importlib.import_module(import_pack().__name__ + ".nodes.comfy_bridge.runtime")
runtime.log.info = lambda sentence: print(sentence, flush=True)

def work():
    with runtime.EndHeldBack():
        print("begun", flush=True)
        time.sleep(600)

try:
    threading.Thread(target=work, daemon=True).start()      # it may print before this returns
    time.sleep(600)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_the_second_ctrl_c_does_not_wait_for_the_job(comfyui_folder):
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(comfyui_folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line == "begun\n" or "Ctrl-C again" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
