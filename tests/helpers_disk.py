"""A disk that becomes full."""
import errno
import os
from pathlib import Path


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def leave_room(monkeypatch, room):
    """From now on, each new file of weights finds room for `room` bytes."""
    plain_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k:
                        FullDisk(plain_open(self, mode, *a, **k), room) if mode == "xb" else plain_open(self, mode, *a, **k))
