"""What a case may not do, watched while it reads: open what lies elsewhere, open a pickle, start or reach something, change a file, take much memory."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from demo.comfy_path import ROOT

MEMORY = 2**29                          # bytes that a case may take beyond what its process had
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REACHING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "socket.connect", "urllib.Request")
SYSTEM = ("/proc", "/sys", "/dev")


class Guard:
    """One a process: what is hooked in stays. Sees what Python's own functions open; the safetensors library opens the paths that it is given."""

    def __init__(self, home: Path, *own: Path) -> None:
        self.seen: list[str] = []
        self._armed = self._writes = False
        self._place = str(home / "place")
        self._own = tuple({str(path) for path in (ROOT, home / "originals", *own, sys.prefix, sys.base_prefix, os.path.dirname(os.__file__),
                                                  *filter(os.path.isabs, sys.path))})
        sys.dont_write_bytecode = True
        sys.addaudithook(self._hook)
        self._load, torch.load = torch.load, self._torch_load

    @contextmanager
    def armed(self, writes: bool) -> Iterator[None]:
        """writes: whether the place may be written to."""
        self.seen, self._writes, self._armed = [], writes, True
        try:
            yield
        finally:
            self._armed = False

    def _torch_load(self, *args: Any, **options: Any) -> Any:
        if self._armed:
            self.seen.append("torch.load was called")
        return self._load(*args, **options)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        if event == "pickle.find_class":
            self.seen.append(f"a pickle that names {args[0]}.{args[1]} was opened")
        elif event in REACHING:
            self.seen.append(f"{event} {args[0]!r}")
        elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            self._opened(os.path.abspath(os.fsdecode(args[0])), *args[1:])

    def _opened(self, path: str, mode: str | None, flags: int) -> None:
        inside = _below(path, self._place)
        if not inside and not any(_below(path, own) for own in (*self._own, *SYSTEM)):
            self.seen.append(f"{path} was opened")
        elif flags & WRITING and not (inside and self._writes) and not path.startswith("/dev/"):
            self.seen.append(f"{path} was opened to be written to")


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """{path: what kind it is, its size and when it was changed} of all that lies below, links themselves and not where they lead."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            stat = os.lstat(path)
            found[path] = (stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found


def limit_memory() -> None:
    """From here on this process gets no more than so much; where the system knows no such limit, nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    import resource
    status = Path("/proc/self/status").read_text(encoding="ascii")
    data = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
