"""The computer stays awake while a job runs, by what its system has for that; and when the job ends, in whatever way, nothing of it is left."""
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from wanlite_model import awake as module
from wanlite_model.awake import awake

ROOT = Path(__file__).resolve().parents[2]
needs_posix = pytest.mark.skipif(os.name == "nt", reason="what stands in for these tools is a shell script")
# Each notes its arguments and its processes, and waits as the real one does: for the command that it starts, or for that process.
INHIBIT = """#!/bin/sh
printf '%s\n' "$@" > "$0.args"
exec 3<&0
for command; do :; done
"$command" <&3 &
echo "$$ $!" > "$0.pids"
wait
"""
CAFFEINATE = """#!/bin/sh
printf '%s\n' "$@" > "$0.args"
echo $$ > "$0.pids"
while kill -0 "$3" 2> /dev/null; do sleep 0.05; done
"""
STUBBORN = """#!/bin/sh
trap '' TERM
echo $$ > "$0.pids"
while :; do sleep 0.05; done
"""
STAND_INS = {"linux": ("systemd-inhibit", INHIBIT), "darwin": ("caffeinate", CAFFEINATE)}
JOB = """
import sys, time
from wanlite_model import awake
awake.SYSTEM = sys.argv[1]
with awake.awake("A job"):
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=STAND_INS)
def tool(request, tmp_path, monkeypatch):
    """The stand-in of that system's tool, on PATH."""
    name, script = STAND_INS[request.param]
    path = tmp_path / name
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(module, "SYSTEM", request.param)
    return path


def soon(condition, seconds=5.0):
    """Whether it came true in that time."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


def processes(tool):
    """Those of the stand-in that live, once it has noted them."""
    noted = tool.with_name(tool.name + ".pids")
    assert soon(lambda: noted.is_file() and noted.read_text().endswith("\n"))
    return [process for process in map(int, noted.read_text().split()) if lives(process)]


def ended(tool):
    return soon(lambda: processes(tool) == [])


def lives(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def open_in(process):
    """Names of what that process holds open. What it closes while it is asked, as a shell that starts a command does, is left out."""
    names = []
    for path in Path(f"/proc/{process}/fd").glob("*"):
        with suppress(FileNotFoundError):
            names.append(os.readlink(path))
    return names


@needs_posix
def test_the_systems_tool_runs_as_long_as_the_job(tool):
    begun = time.monotonic()
    with awake("Run cats"):
        assert time.monotonic() - begun < 0.5
        inside = processes(tool)
        assert len(inside) == (2 if tool.name == "systemd-inhibit" else 1)
        assert all(os.getpgid(process) != os.getpgid(0) for process in inside)          # Ctrl-C in the terminal is for us alone
        with awake("again"):
            pass
        assert processes(tool) == inside
    assert ended(tool)
    given = tool.with_name(tool.name + ".args").read_text().splitlines()
    assert given == (["-i", "-w", str(os.getpid())] if tool.name == "caffeinate" else
                     ["--what=sleep:idle", "--who=WanLite", "--why=Run cats", "--mode=block", given[-1]])
    assert os.path.isabs(given[-1]) or tool.name == "caffeinate"


@needs_posix
def test_a_job_that_fails_ends_it_too_and_the_next_starts_it_again(tool):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), awake("A job"):
            assert processes(tool)
            raise KeyboardInterrupt
        assert ended(tool)
        tool.with_name(tool.name + ".pids").unlink()


@needs_posix
def test_a_killed_job_leaves_no_process(tool):
    with subprocess.Popen([sys.executable, "-c", JOB, module.SYSTEM], cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "begun\n" and processes(tool)
        job.kill()
    assert ended(tool)


@needs_posix
def test_what_does_not_end_when_it_is_asked_to_is_killed(tool, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    tool.write_text(STUBBORN)
    with awake("A job"):
        assert processes(tool)
    assert ended(tool)


@needs_posix
def test_no_open_file_of_ours_is_handed_on(tool, tmp_path):
    with (tmp_path / "model").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        with awake("A job"):
            named = [name for process in processes(tool) for name in open_in(process)]
    assert named and str(tmp_path / "model") not in named


@pytest.mark.parametrize("system", ["linux", "darwin", "win32", "freebsd14"])
def test_where_there_is_nothing_the_job_runs_all_the_same(system, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "SYSTEM", system)
    monkeypatch.delattr(module.ctypes, "windll", raising=False)
    done = []
    with caplog.at_level(logging.DEBUG), awake("A job"):
        done.append(True)
    assert done and [record.levelno for record in caplog.records] == [logging.DEBUG] and "awake" in caplog.text


@needs_posix
def test_a_tool_that_fails_at_once_is_one_line_in_the_log(tool, caplog):
    tool.write_text('#!/bin/sh\necho "no bus" >&2\nexit 1\n')
    with caplog.at_level(logging.DEBUG), awake("A job"):
        assert soon(lambda: all(child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process().children() if tool.name in str(child)), 1)
        time.sleep(0.1)
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] and "ended with 1" in caplog.text


@pytest.fixture
def asked(monkeypatch):
    """(thread, flags) of each call, as Windows is given them."""
    calls = []
    kernel32 = SimpleNamespace(SetThreadExecutionState=lambda flags: calls.append((threading.get_ident(), flags)) or 1)
    monkeypatch.setattr(module, "SYSTEM", "win32")
    monkeypatch.setattr(module.ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    return calls


def test_windows_is_asked_once_and_the_wish_is_taken_back_in_the_same_thread(asked):
    def job():
        with pytest.raises(ValueError), awake("A job"):
            with awake("within"):
                assert len(asked) == 1
            assert len(asked) == 1
            raise ValueError

    worker = threading.Thread(target=job)
    worker.start()
    worker.join()
    assert [flags for _, flags in asked] == [0x80000001, 0x80000000] and len({thread for thread, _ in asked}) == 1 and asked[0][0] != threading.get_ident()


def test_the_command_line_is_kept_awake(monkeypatch, tmp_path):
    """As long as its work, of which the saving at its end is a part."""
    from wanlite_model import cli
    order = []

    class Held:
        def __enter__(self):
            order.append("awake")

        def __exit__(self, *_):
            order.append("asleep")

    def work():
        try:
            yield
        finally:
            order.append("saved")

    monkeypatch.setattr(cli, "awake", lambda why: order.append(why) or Held())
    monkeypatch.setattr(cli, "inputs", SimpleNamespace(job_of=lambda _: SimpleNamespace(role=None, steps=1, minutes=1), read=lambda _: SimpleNamespace(
        student=None, prompts=None, latents=None, start_from=None), teacher_of=lambda *_: None, cache_of=lambda _: tmp_path))
    for name in ("run", "fill"):
        monkeypatch.setattr(cli, name, lambda *_, **__: work())
    for command in ("run", "cache"):
        order.clear()
        assert cli.main([command, str(tmp_path / "cats"), "--device", "cpu"]) == 0
        assert order == ["Run cats", "awake", "saved", "asleep"]
