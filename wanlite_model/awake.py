"""While a job runs, the computer does not go to sleep because nobody touches it. Its screen may."""
from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess       # nosec B404  # the system's own tools, by absolute path and with fixed arguments
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

log = logging.getLogger(__name__)

SYSTEM = sys.platform
PATIENCE = 1.0                                          # seconds for a tool to end by itself
CONTINUOUS, SYSTEM_REQUIRED = 0x80000000, 0x00000001    # ES_*, winbase.h

_inside = threading.local()     # Windows remembers a wish for each thread


@contextmanager
def awake(why: str) -> Iterator[None]:
    """While inside, the computer stays awake, where it has a way to be asked to. why: in words, for who asks what holds it up.

    Inside of another `awake` of the same thread it does nothing. It ends with the process, however that ends. Never raises.
    """
    if getattr(_inside, "held", False):
        yield
        return
    _inside.held = True
    try:
        with ExitStack() as stack:
            try:
                stack.callback(WAYS.get(SYSTEM, _inhibited)(why))
            except (OSError, AttributeError, ValueError) as error:
                log.debug("WanLite: nothing keeps this computer awake (%s).", error)
            yield
    finally:
        _inside.held = False


def _required(_: str) -> Callable[[], None]:
    """Windows (SetThreadExecutionState): to be taken back in the same thread."""
    state = ctypes.windll.kernel32.SetThreadExecutionState
    state.argtypes, state.restype = [ctypes.c_uint], ctypes.c_uint
    if not state(CONTINUOUS | SYSTEM_REQUIRED):
        raise OSError("SetThreadExecutionState refused")
    return lambda: state(CONTINUOUS)


def _caffeinated(_: str) -> Callable[[], None]:
    """macOS: -i holds up idle sleep alone, and -w ends it with us."""
    return _beside([_found("caffeinate"), "-i", "-w", str(os.getpid())])


def _inhibited(why: str) -> Callable[[], None]:
    """Linux: the lock lasts as long as a `cat` that reads from a pipe of ours, which the system closes when we end."""
    return _beside([_found("systemd-inhibit"), "--what=sleep:idle", "--who=WanLite", f"--why={why}", "--mode=block", _found("cat")])


WAYS = {"win32": _required, "darwin": _caffeinated}


def _found(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        raise FileNotFoundError(f"there is no {tool}")
    return os.path.abspath(path)


def _beside(command: list[str]) -> Callable[[], None]:
    """Starts it; returns what ends it. In a session of its own: Ctrl-C is not meant for it, and no terminal asks for a password."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,      # nosec B603  # no shell
                               close_fds=True, start_new_session=True)

    def end() -> None:
        with suppress(OSError, subprocess.TimeoutExpired):
            process.stdin.close()
            if process.poll() is not None:
                log.debug("WanLite: nothing kept this computer awake (%s ended with %d).", os.path.basename(command[0]), process.returncode)
                return
            os.killpg(process.pid, signal.SIGTERM)          # with what it has started
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(PATIENCE)

    return end
