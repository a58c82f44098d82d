"""A portable ComfyUI as Windows has it: an isolated Python, an old code page, no compiler, and folders with blanks, an umlaut and a per cent sign."""
import ast
import ntpath
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from helpers_install import STUDENT, tracked

from demo import tiny
from demo.comfy_path import ROOT
from demo.workflows import TINY
from wanlite_model.errors import WanLiteError
from wanlite_model.files import read_json
from wanlite_model.formats.place import check_name
from wanlite_model.formats.read import open_wan

LONGEST = 150       # Windows stops at 260: this leaves more than a hundred for the folder in which a ComfyUI lies


def test_the_command_for_the_tiny_template_puts_in_place_what_it_asks_for(portable):
    """From the archive, with the portable Python, and with no word about where ComfyUI is."""
    asked = {value for node in read_json(TINY)["nodes"] for value in node.get("widgets_values", ()) if str(value).endswith(".safetensors")}
    assert {path.name for path in portable.placed} == {value.removeprefix("input/") for value in asked} and len(asked) == 3
    assert all(path.is_file() and path.is_relative_to(portable.base) for path in portable.placed)


def test_without_a_comfyui_around_the_pack_the_command_asks_for_one(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tiny, "ROOT", tmp_path / "WanLite")
    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    with pytest.raises(SystemExit):
        tiny.main()
    assert "Give the folder that holds ComfyUI's models and input" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_job_saves_its_student_there(portable):
    with open_wan(portable.base / "models" / "diffusion_models" / STUDENT) as student:
        assert student.config.num_layers == 8
    assert f"Saved {STUDENT}" in portable.log and "verified: ComfyUI's Load Diffusion Model opened it" in portable.log


def test_neither_the_start_nor_the_job_reads_or_writes_text_in_the_code_page(portable):
    """Python warns of each such line by its file, so the log names the pack's folder but for the time of its import."""
    assert "EncodingWarning" in portable.log                # of other packages
    assert [line for line in portable.log.splitlines() if str(portable.boot.folder) in line] == portable.boot.said_of_the_pack


def in_the_code_page(source: str) -> Iterator[int]:
    """The lines that open text without a word about its encoding."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        given = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
        modes = [value.value for value in given if isinstance(value, ast.Constant) and value.value and set(str(value.value)) <= set("rwaxb+t")]
        text = name in ("read_text", "write_text") or name == "open" and (isinstance(call.func, ast.Name) or modes) and not any("b" in mode for mode in modes)
        if text and "encoding" not in {word.arg for word in call.keywords}:
            yield call.lineno


@pytest.mark.parametrize("line", ["open(path)", "open(path, 'w')", "path.open('w')", "path.read_text()", "path.write_text('x')", "open(path, mode='a')"])
def test_text_without_an_encoding_is_seen(line):
    assert list(in_the_code_page(f"'''a file'''\n{line}")) == [2]


@pytest.mark.parametrize("line", ["open(path, 'rb')", "path.open('xb')", "path.read_text('utf-8', encoding='utf-8')", "student.open()", "path.read_bytes()"])
def test_bytes_and_text_with_an_encoding_are_let_through(line):
    assert list(in_the_code_page(line)) == []


def test_no_line_leaves_the_encoding_of_a_text_to_the_system():
    code = [name for name in tracked() if name.endswith(".py") and not name.startswith("tests/")]
    found = {name: list(in_the_code_page((ROOT / name).read_text(encoding="utf-8"))) for name in code}
    assert {name: lines for name, lines in found.items() if lines} == {} and len(found) > 100


def test_every_file_can_have_its_name_on_windows():
    """The rule is the one that holds for the names of students; it is tested with them."""
    names = tracked()
    for part in {part for name in names for part in name.split("/")}:
        assert check_name(part.lstrip(".")) == part.lstrip(".")         # .ci and the like may start with a dot
    assert len({name.lower() for name in names}) == len(names)
    assert max(len(name) for name in names) < LONGEST


@pytest.mark.parametrize("name", ["aux.py", "what?.py", "a:b", "ends.", "com1.json"])
def test_a_name_that_windows_does_not_know_is_seen(name):
    with pytest.raises(WanLiteError):
        check_name(name)


def test_a_folder_below_a_folder_has_one_name_on_windows_and_elsewhere(pack, monkeypatch, tmp_path):
    """ComfyUI lists files there with backslashes; a workflow from elsewhere names the folder with slashes."""
    folders = pack("nodes.comfy_bridge.folders")
    (tmp_path / "video" / "mine").mkdir(parents=True)
    (tmp_path / "video" / "mine" / "config.json").write_text("{}", encoding="utf-8")
    listed = ["video\\mine\\diffusion_model.safetensors"]
    monkeypatch.setattr(folders, "os", SimpleNamespace(path=ntpath, sep="\\"))
    monkeypatch.setattr(folders, "folder_paths", SimpleNamespace(get_filename_list=lambda kind: listed, get_folder_paths=lambda kind: [str(tmp_path)]))
    assert folders.model_names() == ["video/mine/", *listed]
    assert folders.model_path("video/mine/") == folders.model_path("video\\mine/") == tmp_path / "video" / "mine"
