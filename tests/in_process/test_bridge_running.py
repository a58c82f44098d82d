"""What can be asked of a running job: to finish early, and to save itself before the process ends."""
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from demo.comfy_path import ROOT


def test_a_request_to_finish_reaches_the_job_that_trains_and_never_the_next(pack):
    jobs = pack("nodes.comfy_bridge.jobs")
    assert not jobs.finish("12:5")
    with jobs.running("12:5") as job:
        assert not jobs.finish("12:5")          # it has trained nothing yet
        job.trains = True
        assert not jobs.finish("5") and not job.finish
        assert jobs.finish("12:5") and job.finish
    assert not jobs.finish("12:5")
    with jobs.running("12:5") as job:
        job.trains = True
        assert not job.finish


def test_a_second_copy_of_the_pack_adds_no_second_route(pack, monkeypatch):
    from aiohttp import web
    server = SimpleNamespace(routes=web.RouteTableDef())
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    for _ in range(2):
        pack("nodes.comfy_bridge.routes").add_routes()
    assert [route.path for route in server.routes] == ["/wanlite/finish"]


def test_a_stage_that_follows_a_longer_one_is_shown_from_its_first_step_on(pack, monkeypatch):
    """Newer ComfyUIs hold back what a bar of theirs has shown before."""
    import comfy.utils
    shown = []
    runtime = pack("nodes.comfy_bridge.runtime")
    monkeypatch.setattr(runtime, "UPDATES", 1e9)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, picture, node_id: shown.append((done, total, picture, node_id)))
    bar = runtime.Bar("12:5")
    for stage, done, total in (("asking", 300, 300), ("training", 1, 1000), ("training", 2, 1000)):
        bar.show(stage, done, total)
    assert shown == [(300, 300, None, "12:5"), (1, 1000, None, "12:5"), (2, 1000, None, "12:5")]
    bar.preview(torch.zeros(2, 3, 3))
    assert shown[-1][:2] == (2, 1000) and shown[-1][2][1].size == (3, 2)


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
