"""What a virus scanner holds for a moment still reaches its place."""
import os
from pathlib import Path

import pytest
from helpers_compress import SHAPE, counting_teacher, result_of

from wanlite_model import files
from wanlite_model.compress.build import create_student


@pytest.fixture
def held(monkeypatch, tmp_path) -> list[int]:
    """held[0]: how often a move into tmp_path is refused yet. Waiting takes no time."""
    left = [0]

    def refusing(move):
        def moved(source, goal):
            if left[0] and Path(goal).parent == tmp_path:
                left[0] -= 1
                raise PermissionError(13, "The process cannot access the file because it is being used by another process")
            move(source, goal)
        return moved

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    return left


def test_a_new_start_waits_for_the_scanner(tmp_path, held):
    held[0] = 3
    handle, _ = result_of(create_student(counting_teacher(depth=2, ffn_dim=64), None, SHAPE, depth=1, method="interleaved", folder=tmp_path))
    assert held[0] == 0 and handle.file.is_file()


def test_a_file_that_is_replaced_waits_too(tmp_path, held):
    files.write_json(tmp_path / "note.json", 1)
    held[0] = 3
    files.write_json(tmp_path / "note.json", 2)
    assert held[0] == 0 and files.read_json(tmp_path / "note.json") == 2


def test_a_refusal_that_lasts_is_told_and_changes_nothing(tmp_path, held):
    (tmp_path / "new").touch()
    held[0] = 4
    with pytest.raises(PermissionError):
        files.patiently(os.rename, tmp_path / "new", tmp_path / "placed")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
